//! Submitting: a ticket, once there is room, and the way to the links.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_plan::Extents;
use anyfabric_transports::{Failure, Leg, Link, Loss, Op, Payload, Region, Spread, Terms, Ticket};
use anyfabric_wire::{Address, Imm};

use crate::early::{MAX_EARLY, MAX_EARLY_OF_ALL};
use crate::inner::{nanos, Inner};
use crate::peer::{Chosen, Peer};
use crate::remote::{RemoteShared, Route};
use crate::submission::{Content, Submission};
use crate::transfer::About;
use crate::under_way::Entry;
use crate::{Code, Error, QueueFull, Result, ScatterTarget};

/// What a ticket is asked for.
#[derive(Default)]
pub(crate) struct Order {
    /// Parts, at least one.
    pub(crate) num_parts: u32,
    /// Bytes of the operation.
    pub(crate) nbytes: u64,
    /// Kept alive until the operation has quiesced.
    pub(crate) source: Option<Arc<Region>>,
    pub(crate) imm: Option<Imm>,
    pub(crate) timeout: Option<Duration>,
    /// It moves nothing, and goes on its way whether there is room or not.
    pub(crate) is_probe: bool,
}

/// One peer's part of an operation.
pub(crate) struct Part<'p> {
    pub(crate) peer: &'p Arc<Peer>,
    pub(crate) what: What<'p>,
}

/// What a part moves.
pub(crate) enum What<'p> {
    Write { source: &'p Arc<Region>, remote: &'p RemoteShared, extents: Extents },
    Signal,
}

/// Where a leg of an operation with several peers goes.
#[derive(Clone, Copy)]
pub(crate) struct Towards<'p> {
    pub(crate) peer: &'p Arc<Peer>,
    /// What is written where, and how that is reached, if it was looked up before;
    /// nothing for the immediate alone.
    pub(crate) target: Option<(&'p ScatterTarget, Option<&'p Route>)>,
}

/// What the legs of an operation have in common.
pub(crate) struct LegsOf<'p> {
    pub(crate) ticket: &'p Arc<Ticket>,
    pub(crate) source: Option<&'p Arc<Region>>,
    /// Counted once by each.
    pub(crate) imm: Option<Imm>,
    pub(crate) verify: bool,
    /// How many, at most.
    pub(crate) num: usize,
}

/// What becomes of a submission.
pub(crate) enum Prepared<'p> {
    /// It is to be posted.
    Op(&'p dyn Link, Op),
    /// There is no path yet, or none just now.
    Waits(Submission),
    /// It has ended.
    Ended,
}

/// What the receiver counts, and whether it checks a checksum before.
pub(crate) type How = (Option<(Imm, u32)>, bool);

impl Inner {
    /// Begins an operation, once there is room for it: from now on its deadline is
    /// looked after. `entry` names whom it is for.
    pub(crate) fn begin(&self, mut entry: Entry, order: Order) -> Result<Arc<Ticket>> {
        let timeout = order.timeout.unwrap_or(self.config.timeout);
        let mut submitted_ns = self.clock.now_ns();
        let deadline_ns = submitted_ns.saturating_add(nanos(timeout));
        let limit = if order.is_probe { usize::MAX } else { self.config.queue_depth };
        if !self.office.enter(limit) {
            self.enter_once_there_is_room(timeout)?;
            submitted_ns = self.clock.now_ns();
        }
        let Order { num_parts, nbytes, source, imm, is_probe, .. } = order;
        entry.imm = imm;
        let terms = Terms { num_parts, nbytes, submitted_ns, deadline_ns, source, is_probe };
        let ticket = entry.issue(&self.office, terms);
        self.look_after(entry);
        if self.has_begun_to_close() {
            (0..num_parts).for_each(|_| ticket.part_ended(Err(Failure::Closed)));
            return Err(Error::new(Code::Closed, "the engine is closed"));
        }
        Ok(ticket)
    }

    #[cold]
    fn enter_once_there_is_room(&self, timeout: Duration) -> Result<()> {
        let depth = self.config.queue_depth;
        let has_entered = Cell::new(false);
        // Who waits may ask again after a yes.
        let enters = || {
            if !has_entered.get() {
                has_entered.set(self.office.enter(depth));
            }
            has_entered.get()
        };
        if self.config.queue_full == QueueFull::Block {
            self.wait(Some(timeout), || enters() || self.is_closed());
        }
        if has_entered.get() {
            return Ok(());
        }
        self.check_open()?;
        let message = format!("{depth} operations are under way, as many as `queue_depth` allows");
        Err(Error::new(Code::QueueFull, message))
    }

    /// As [`Inner::begin`], for an operation with one peer.
    pub(crate) fn begin_one(&self, peer: &Peer, order: Order) -> Result<Arc<Ticket>> {
        let mut entry = self.rings.draft();
        entry.recipients.add(peer.idx, &peer.operations, order.nbytes);
        self.begin(entry, Order { num_parts: 1, ..order })
    }

    /// Looks after a ticket's deadline from now on.
    pub(crate) fn track(&self, ticket: &Arc<Ticket>, imm: Option<Imm>) {
        let mut entry = self.rings.draft();
        entry.imm = imm;
        entry.set_ticket(ticket);
        self.look_after(entry);
        if self.has_begun_to_close() {
            ticket.fail(Failure::Closed);
        }
    }

    /// Asked once an operation is looked after: if not, the end of the engine finds
    /// it there and waits for it; if so, nothing of it may be posted, for links that
    /// close refuse it in words of their own.
    fn has_begun_to_close(&self) -> bool {
        // ORDERING: sequentially consistent with the ring of what was submitted: `set_closed` comes before `finish`
        // looks there, this after the operation was put there.
        self.closed.load(Ordering::SeqCst)
    }

    fn look_after(&self, mut entry: Entry) {
        let deadline_ns = entry.deadline_ns();
        while let Err(back) = self.rings.submit(entry) {
            entry = back;
            // Whoever drives is far behind.
            self.wake();
            self.look();
            std::thread::yield_now();
        }
        if !self.presence.looks_before(deadline_ns) {
            // Whoever sleeps until the next tick of a calm engine would be late for it.
            self.wake();
        }
    }

    /// Whether fewer operations are under way than `queue_depth` allows.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.office.num_under_way() < self.config.queue_depth
    }

    /// Sends an operation on its way.
    pub(crate) fn submit(
        &self,
        peer: &Arc<Peer>,
        content: Content,
        imm: Option<(Imm, u32)>,
        verify: bool,
        ticket: &Arc<Ticket>,
    ) {
        if let Some((link, op)) = self.prepare_slowly(peer, content, self.next_op_id(), (imm, verify), ticket) {
            link.post(op);
        }
        self.wake();
    }

    /// Sends the only part of an operation on its way.
    pub(crate) fn submit_part(&self, part: Part<'_>, how: How, ticket: &Arc<Ticket>) {
        if let Some((link, op)) = self.prepare_part(part, how, ticket) {
            link.post(op);
        }
        self.wake();
    }

    /// Sends the legs of an operation on their way, each to its peer; the first
    /// before the second is looked at.
    pub(crate) fn submit_legs<'p>(&self, mut towards: impl Iterator<Item = Towards<'p>>, of: &LegsOf<'p>) {
        let ids = self.next_op_ids(of.num as u64).into();
        let spread = Spread { ticket: of.ticket, source: of.source, imm: of.imm, ids };
        let is_quick = !of.verify && self.presence.has_listened(of.ticket.submitted_ns());
        let aim = |to: Towards<'p>, leg: &mut Leg<'p>| self.aim(to, of, is_quick, leg);
        let mut leg = Leg { peer: 0, link: 0, write: None };
        let mut next = towards.next();
        while let Some(to) = next.take() {
            if let Some(chosen) = aim(to, &mut leg) {
                // NICs are in our hands meanwhile: what takes time or other locks comes after.
                chosen.link.post_legs(&spread, &mut leg, &mut |leg| {
                    next = towards.next();
                    let is_near = |to: &mut Towards<'p>| aim(*to, leg).is_some_and(|other| other.is_beside(chosen));
                    next.take_if(is_near).is_some()
                });
            } else {
                self.submit_slowly(to, of);
            }
            next = next.or_else(|| towards.next());
        }
        self.wake();
    }

    #[cold]
    fn submit_slowly(&self, Towards { peer, target }: Towards<'_>, of: &LegsOf<'_>) {
        let what = match (of.source, target) {
            (Some(source), Some((target, _))) => {
                What::Write { source, remote: &target.remote.shared, extents: Extents::One(target.extent()) }
            }
            _ => What::Signal,
        };
        let how = (of.imm.map(|imm| (imm, 1)), of.verify);
        if let Some((link, op)) = self.prepare_part_slowly(Part { peer, what }, how, of.ticket) {
            link.post(op);
        }
    }

    /// Fills a leg in, but for its number: over which link it goes. `None` unless all that it needs is there already.
    #[inline]
    fn aim<'p>(
        &self,
        Towards { peer, target }: Towards<'p>,
        of: &LegsOf<'p>,
        is_quick: bool,
        leg: &mut Leg<'p>,
    ) -> Option<&'p Chosen> {
        let chosen = peer.open_link()?;
        if !is_quick && self.goes_slowly(peer, of) {
            return None;
        }
        leg.write = match (of.source, target) {
            (Some(source), Some((target, route))) => Some((route?.binding(source)?, target.extent())),
            _ => None,
        };
        (leg.peer, leg.link) = (peer.idx, chosen.place.map_or(0, |place| place.link));
        Some(chosen)
    }

    #[cold]
    fn goes_slowly(&self, peer: &Peer, of: &LegsOf<'_>) -> bool {
        of.verify || self.is_behind(peer, of.ticket)
    }

    /// Whether a peer may have told us that it stopped our rails, and nobody has
    /// heard it: after a pause, be it that nothing was to do or that this process
    /// was stopped, an operation waits for what was said before it.
    #[inline]
    pub(crate) fn is_behind(&self, peer: &Peer, ticket: &Ticket) -> bool {
        let now_ns = ticket.submitted_ns();
        if self.presence.has_listened(now_ns) || peer.was_silent(now_ns) {
            return false;
        }
        if !peer.link().is_some_and(|link| link.follows_control()) {
            return false;
        }
        // In this order: what is not in the socket any more is being acted upon, or has been.
        let is_behind = peer.base.has_news() || self.presence.is_hearing();
        if !is_behind {
            // As good as having listened: who submits without a pause asks the socket now and then only.
            peer.set_silent(now_ns);
        }
        is_behind
    }

    /// What is to be posted where; `None` when it waits for a path, or has ended.
    fn prepare_part<'p>(&self, part: Part<'p>, how: How, ticket: &Arc<Ticket>) -> Option<(&'p dyn Link, Op)> {
        match self.prepare_quickly(part, self.next_op_id(), how, ticket) {
            Ok(ready) => Some(ready),
            Err(part) => self.prepare_part_slowly(part, how, ticket),
        }
    }

    /// What is to be posted where, if all that it needs is there already; given
    /// back otherwise.
    #[inline]
    fn prepare_quickly<'p>(
        &self,
        part: Part<'p>,
        id: u64,
        (imm, verify): How,
        ticket: &Arc<Ticket>,
    ) -> std::result::Result<(&'p dyn Link, Op), Part<'p>> {
        let peer = part.peer;
        let Some(Chosen { link, .. }) = peer.open_link().filter(|_| !verify && !self.is_behind(peer, ticket)) else {
            return Err(part);
        };
        let payload = match part.what {
            What::Signal => Payload::Signal,
            What::Write { source, remote, extents } => match remote
                .binding(peer, source)
                .filter(|binding| binding.enter().is_ok())
            {
                Some(binding) => Payload::Write { source: Arc::clone(source), binding: Arc::clone(binding), extents },
                None => return Err(Part { peer, what: What::Write { source, remote, extents } }),
            },
        };
        let (ticket, loss) = (Arc::clone(ticket), Loss::default());
        Ok((&**link, Op { id, peer: peer.idx, payload, imm, verify, ticket, loss }))
    }

    #[cold]
    fn prepare_part_slowly<'p>(
        &self,
        Part { peer, what }: Part<'p>,
        how: How,
        ticket: &Arc<Ticket>,
    ) -> Option<(&'p dyn Link, Op)> {
        let content = match what {
            What::Signal => Content::Signal,
            What::Write { source, remote, extents } => remote.content(source, extents),
        };
        self.prepare_slowly(peer, content, self.next_op_id(), how, ticket)
    }

    fn prepare_slowly<'p>(
        &self,
        peer: &'p Arc<Peer>,
        content: Content,
        id: u64,
        (imm, verify): How,
        ticket: &Arc<Ticket>,
    ) -> Option<(&'p dyn Link, Op)> {
        let submission = Submission { id, content, imm, verify, ticket: Arc::clone(ticket) };
        let is_behind = self.is_behind(peer, ticket);
        match if is_behind { Prepared::Waits(submission) } else { peer.prepare_op(submission) } {
            Prepared::Op(link, op) => Some((link, op)),
            Prepared::Ended => None,
            Prepared::Waits(submission) => {
                peer.push_waiting(submission);
                if let Some(why) = peer.lost() {
                    // It was lost in between: nobody looks at what waits for it any more.
                    peer.fail_waiting(why);
                }
                self.prepare(peer);
                None
            }
        }
    }

    /// The peer of an operation, unless it can be refused at once; `about` names all
    /// but the peer, and is asked for only then: a scatter adds up its targets for it.
    pub(crate) fn peer_for(
        &self,
        address: &Address,
        imm: Option<Imm>,
        about: impl FnOnce() -> About,
    ) -> Result<Arc<Peer>> {
        if address.engine == self.address.engine {
            let message = "the destination is this engine itself; copy the bytes instead";
            return Err(Error::invalid(message).during(about().operation));
        }
        let peer = self.peer_at(address);
        if peer.takes(imm.is_some()) {
            return Ok(peer);
        }
        Err(match peer.lost() {
            Some(why) => About { peer: Some(peer.clone()), ..about() }.error(self, why),
            None => self.uncounted(&peer, about()),
        })
    }

    #[cold]
    fn uncounted(&self, peer: &Peer, about: About) -> Error {
        let message = format!(
            "the peer {} keeps no more immediates that it has opened no counter for: at most {MAX_EARLY} of one peer \
             and {MAX_EARLY_OF_ALL} of all; open the counters there, or use fewer immediates",
            peer.address
        );
        let About { operation, region, nbytes, .. } = about;
        let mut error = Error::new(Code::ResourceExhausted, message);
        *error.context = self.context(operation, Some(peer), region, nbytes);
        error
    }
}

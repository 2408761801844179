//! The NICs that serve one engine through one library.
//!
//! One thread at a time has the NICs; who finds them taken leaves its operation
//! in a bounded ring for whoever polls next. So nobody waits on the way of an
//! operation: there is one attempt at a lock for each operation, or for all of a
//! scatter, and each poll, and none for a work request or a completion. Only
//! when the ring is full a submitter waits for the NICs, and takes what was left
//! along.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use anyfabric_plan::{Extent, Extents, MAX_NICS};
use anyfabric_wire::NicLibrary;
use crossbeam_queue::ArrayQueue;

use super::book::{Book, Stage};
use super::legs::Spreading;
use super::link::{PathOptions, RailLink, RailPath};
use super::nic::{Domain, Nic, NicAbout, NicError, PortLook, RemoteMemory};
use super::registrations::Registrations;
use super::turn::{Arrival, Turn};
use super::visible::Visible;
use crate::sys::populate;
use crate::{lock, try_lock, Clock, Failure, Leg, Op, Payload, Region, Sink, Spread};

/// The NICs that serve one engine through one library, for the engine.
pub trait NicGroup: Send + Sync {
    /// Which library.
    fn library(&self) -> NicLibrary;

    /// The NICs.
    fn nics(&self) -> &[NicAbout];

    /// Moves everything on; true when something moved.
    fn poll(&self, sink: &dyn Sink) -> bool;

    /// What to wait on; a NIC without such a descriptor must be polled.
    fn event_fds(&self) -> Vec<Option<RawFd>>;

    /// Readable when a device has announced something: then [`NicGroup::hear`].
    fn announcements(&self) -> Vec<RawFd>;

    /// Asks every NIC for an event, and polls once more. True when an event will
    /// come for whatever is next. False when something moved, when a NIC promises
    /// nothing now, or when another thread has the NICs: then nobody may wait for
    /// longer than a NIC without a descriptor is left alone.
    fn arm(&self, sink: &dyn Sink) -> bool;

    /// Whether all of them may be given GPU memory.
    fn reaches_gpus(&self) -> bool {
        self.nics().iter().all(|nic| nic.reaches_gpus)
    }

    /// Makes the way to a peer.
    fn path(self: Arc<Self>, options: PathOptions) -> Arc<dyn RailPath>;

    /// Looks at the ports: stops the rails of those that went down. At most every
    /// tenth of a second.
    fn look_at_ports(&self, now_ns: u64);

    /// A device has announced something: looks at the ports now.
    fn hear(&self, now_ns: u64);
}

/// NICs and what is under way on them.
pub struct RailGroup<N: Nic> {
    library: NicLibrary,
    /// By NIC; ports of one device have theirs in common.
    registrations: Vec<Arc<Registrations<N::Domain>>>,
    abouts: Vec<NicAbout>,
    ports: Vec<PortLook>,
    state: Mutex<State<N>>,
    visible: Visible,
    /// Left by threads that found the NICs taken.
    pub(super) left: ArrayQueue<(u32, Op)>,
    /// Large regions that are being registered, by number, and what waits for each.
    pinning: Mutex<HashMap<u64, Vec<Then<N>>>>,
    looked_ns: AtomicU64,
    pub(super) clock: Clock,
}

/// Base address and key of a region, for each of its owner's NICs.
pub(super) type Keys = Vec<(u64, u64)>;

/// What waits for a registration.
type Then<N> = Box<dyn FnOnce(&RailGroup<N>, Result<Keys, NicError>) + Send>;

pub(super) struct State<N> {
    pub(super) nics: Vec<N>,
    /// By NIC: whether its port was up when it was last looked at.
    pub(super) are_up: Vec<bool>,
    pub(super) book: Book,
    /// For the writes of one batch.
    writes: Vec<Extent>,
    /// For the arrivals of one poll, where they wait for a flush.
    held: Vec<Arrival>,
}

impl<N: Nic> RailGroup<N> {
    /// Of NICs that were opened for one engine: at least one, and of more than
    /// [`MAX_NICS`] the first.
    pub fn new(library: NicLibrary, mut nics: Vec<N>, clock: Clock) -> Arc<Self> {
        nics.truncate(MAX_NICS);
        let place = |idx| idx + library as usize * MAX_NICS;
        let mut registrations: Vec<Arc<Registrations<N::Domain>>> = Vec::new();
        for (idx, nic) in nics.iter().enumerate() {
            let known = registrations.iter().find(|of| of.is_of(nic.domain())).cloned();
            let of_domain = || Registrations::new(Arc::clone(nic.domain()), place(idx), NUM_LIBRARIES * MAX_NICS);
            registrations.push(known.unwrap_or_else(|| Arc::new(of_domain())));
        }
        let book = Book { owners: nics.iter().map(|_| Vec::new()).collect(), ..Book::default() };
        Arc::new(Self {
            library,
            registrations,
            abouts: nics.iter().map(|nic| nic.about().clone()).collect(),
            ports: nics.iter().map(Nic::port).collect(),
            state: Mutex::new(State {
                are_up: vec![true; nics.len()],
                nics,
                book,
                writes: Vec::new(),
                held: Vec::new(),
            }),
            visible: Visible::default(),
            left: ArrayQueue::new(MAX_LEFT),
            pinning: Mutex::default(),
            looked_ns: AtomicU64::new(0),
            clock,
        })
    }

    pub(super) fn abouts(&self) -> &[NicAbout] {
        &self.abouts
    }

    /// The NICs, for what is rare; waits for whoever has them.
    pub(super) fn state(&self) -> MutexGuard<'_, State<N>> {
        lock(&self.state)
    }

    fn try_state(&self) -> Option<MutexGuard<'_, State<N>>> {
        try_lock(&self.state)
    }

    /// Takes an operation: posts it, or leaves it for the next poll.
    pub(super) fn submit(&self, path: u32, op: Op) {
        match self.try_state() {
            Some(mut state) => self.post(&mut state, path, op),
            None => self.leave(path, op),
        }
    }

    /// Takes the legs of an operation, together where that is possible: `next` is
    /// asked with the NICs in our hands.
    pub(super) fn submit_legs<'t>(
        self: &Arc<Self>,
        spread: &Spread<'t>,
        leg: &mut Leg<'t>,
        next: &mut dyn FnMut(&mut Leg<'t>) -> bool,
    ) {
        let mut legs = Spreading::of(spread);
        loop {
            let of_its_own = || leg.into_op(spread).into_iter();
            if !legs.is_registered(&self.registrations) {
                // Registering takes its time, and nobody should wait for the NICs meanwhile.
                of_its_own().for_each(|op| self.enter(leg.link, op));
            } else if let Some(mut state) = self.try_state() {
                return self.post_legs(&mut state, &mut legs, leg, next);
            } else {
                of_its_own().for_each(|op| self.leave(leg.link, op));
            }
            if !next(leg) {
                return;
            }
        }
    }

    /// Posts a leg at once, and those that follow, each of which is looked up before the one ahead of it is posted.
    fn post_legs<'t>(
        &self,
        state: &mut State<N>,
        legs: &mut Spreading<'_, 't, N::Domain>,
        leg: &mut Leg<'t>,
        next: &mut dyn FnMut(&mut Leg<'t>) -> bool,
    ) {
        self.post_leg(state, legs, leg);
        let mut has_more = next(leg);
        while has_more {
            let mut ahead = *leg;
            has_more = next(&mut ahead);
            if has_more {
                state.book.expect_leg(&state.nics, &ahead);
            }
            self.post_leg(state, legs, leg);
            *leg = ahead;
        }
        state.book.keep_legs(legs);
    }

    #[inline]
    fn post_leg(&self, state: &mut State<N>, legs: &mut Spreading<'_, '_, N::Domain>, leg: &Leg<'_>) {
        let State { nics, book, .. } = state;
        if !book.post_leg(nics, legs, leg) {
            leg.into_op(legs.spread).into_iter().for_each(|op| self.start(state, leg.link, op));
        }
    }

    /// Takes an operation whose source may yet have to be registered.
    pub(super) fn enter(self: &Arc<Self>, path: u32, op: Op) {
        match &op.payload {
            Payload::Write { source, .. } if !self.is_registered(source) => {
                let source = Arc::clone(source);
                self.when_registered(&source, move |group, registered| match registered {
                    Ok(_) => group.submit(path, op),
                    Err(NicError::Unsupported(why)) => op.end(Err(Failure::Unsupported(why))),
                    Err(NicError::DeviceLost(why)) => op.end(Err(Failure::DeviceLost(why))),
                    Err(error) => op.end(Err(Failure::Exhausted(error.to_string()))),
                });
            }
            _ => self.submit(path, op),
        }
    }

    #[inline]
    fn post(&self, state: &mut State<N>, path: u32, op: Op) {
        let State { nics, book, .. } = state;
        // Never one work request: not moved once more to be given back.
        if matches!(&op.payload, Payload::Write { extents: Extents::Pages { .. }, .. } | Payload::Message(_)) {
            return self.start(state, path, op);
        }
        if let Some(op) = book.post_alone(nics, &self.registrations, path, op) {
            self.start(state, path, op);
        }
    }

    /// The general way of an operation.
    fn start(&self, state: &mut State<N>, path: u32, op: Op) {
        // The clock was read when it was submitted.
        let now_ns = op.ticket.submitted_ns();
        state.book.start(path, op, now_ns);
        state.pump(&self.registrations, now_ns);
    }

    #[cold]
    fn leave(&self, path: u32, op: Op) {
        let Err((path, op)) = self.left.push((path, op)) else { return };
        let mut state = self.state();
        self.take_left(&mut state, op.ticket.submitted_ns());
        self.post(&mut state, path, op);
    }

    pub(super) fn take_left(&self, state: &mut State<N>, now_ns: u64) {
        // Who comes later is seen by the next poll, for submitters wake the driver.
        while !self.left.is_empty() {
            let Some((path, op)) = self.left.pop() else { break };
            state.book.start(path, op, now_ns);
        }
    }

    /// Goes on with a region once it is registered: at once when it is, or when
    /// that is quick; otherwise in a thread of its own, one a region, for pinning
    /// gigabytes takes seconds, and whoever drives the engine must not be silent for
    /// so long.
    pub(super) fn when_registered(
        self: &Arc<Self>,
        region: &Arc<Region>,
        then: impl FnOnce(&Self, Result<Keys, NicError>) + Send + 'static,
    ) {
        let then: Then<N> = Box::new(then);
        if region.nbytes() <= QUICK_BYTES || self.is_registered(region) {
            return then(self, self.register(region));
        }
        let is_first = {
            let mut pinning = lock(&self.pinning);
            let waiting = pinning.entry(region.id).or_default();
            waiting.push(then);
            waiting.len() == 1
        };
        if is_first {
            let (group, memory) = (Arc::clone(self), Arc::clone(region));
            let thread = std::thread::Builder::new().name("anyfabric-pin".into());
            if thread.spawn(move || group.pin(&memory)).is_err() {
                self.pin(region);
            }
        }
    }

    /// Registers a region, and goes on with all that waits for it.
    fn pin(&self, region: &Region) {
        let registered = self.register(region);
        // Who comes after this finds it registered, or tries again.
        let waiting = lock(&self.pinning).remove(&region.id);
        waiting.into_iter().flatten().for_each(|then| then(self, registered.clone()));
    }

    /// Whether a region can be posted from at once.
    #[inline]
    pub(super) fn is_registered(&self, region: &Region) -> bool {
        self.registrations.iter().all(|of| of.knows(region))
    }

    /// Registers a region with every NIC, unless it is; tells what a peer needs
    /// to write into it over each.
    fn register(&self, region: &Region) -> Result<Keys, NicError> {
        if let (Some(memory), true) = (region.gpu_memory(), region.writable) {
            self.visible.expect(memory)?;
        }
        if region.nbytes() > QUICK_BYTES {
            self.pin_side_by_side(region);
        }
        let remote = |registrations: &Arc<Registrations<N::Domain>>| {
            let RemoteMemory { base, key } = N::Domain::remote(registrations.of(region)?);
            Ok((base, key))
        };
        self.registrations.iter().map(remote).collect()
    }

    /// Registers a large region with all devices at the same time; what fails is
    /// tried again by who asks for the registration, and told then.
    fn pin_side_by_side(&self, region: &Region) {
        if self.registrations.iter().filter(|of| !of.knows(region)).count() < 2 {
            return;
        }
        // Each device takes references of its own, but the pages have to be found and zeroed once only.
        if region.gpu_memory().is_none() {
            populate(region.as_ptr(), region.nbytes(), region.writable);
        }
        std::thread::scope(|scope| {
            for registrations in &self.registrations {
                let pin = || drop(registrations.of(region));
                if std::thread::Builder::new().name("anyfabric-pin".into()).spawn_scoped(scope, pin).is_err() {
                    return;
                }
            }
        });
    }
}

impl<N: Nic> RailGroup<N> {
    /// Moves everything on, with the NICs in hand.
    fn turn(&self, state: &mut State<N>, sink: &dyn Sink) -> bool {
        let now_ns = self.clock.now_ns();
        self.take_left(state, now_ns);
        let State { nics, book, held, .. } = state;
        let mut moved = false;
        for (nic_no, nic) in nics.iter_mut().enumerate() {
            moved |= nic.poll(&mut Turn { book, nic: nic_no, sink, now_ns, heard: None, visible: &self.visible, held });
        }
        if !held.is_empty() {
            self.count_held(held, sink);
        }
        if !state.book.faulty.is_empty() {
            state.settle_faulty(now_ns);
        }
        if !state.book.answers.is_empty() {
            state.answer();
        }
        if !state.book.dirty.is_empty() {
            state.pump(&self.registrations, now_ns);
        }
        moved
    }

    #[cold]
    fn count_held(&self, held: &mut Vec<Arrival>, sink: &dyn Sink) {
        let flushed = self.visible.flush();
        for Arrival { peer, imm, quarters } in held.drain(..) {
            match &flushed {
                // A full table is told to the sender by the engine itself.
                Ok(()) => drop(sink.arrived(peer, imm, quarters)),
                Err(why) => sink.invisible(peer, imm, why),
            }
        }
    }
}

impl<N: Nic> State<N> {
    /// Posts what there is room for.
    #[inline]
    pub(super) fn pump(&mut self, registrations: &[Arc<Registrations<N::Domain>>], now_ns: u64) {
        // What cannot go on now is dirty again, for the next turn.
        for _ in 0..self.book.dirty.len() {
            let Some(rail) = self.book.dirty.pop_front() else { break };
            self.book.pump(&mut self.nics, registrations, rail, &mut self.writes, now_ns);
        }
    }

    /// A rail has come up: what waited for one goes on, with the next pump.
    pub(super) fn take_waiting(&mut self, path: u32, now_ns: u64) {
        let waiting = self.book.paths.get_mut(path).map(|path| std::mem::take(&mut path.waiting));
        for op in waiting.into_iter().flatten() {
            self.book.start(path, op, now_ns);
        }
    }
}

impl<N: Nic> NicGroup for RailGroup<N> {
    fn library(&self) -> NicLibrary {
        self.library
    }

    fn nics(&self) -> &[NicAbout] {
        &self.abouts
    }

    fn poll(&self, sink: &dyn Sink) -> bool {
        self.try_state().is_some_and(|mut state| self.turn(&mut state, sink))
    }

    fn event_fds(&self) -> Vec<Option<RawFd>> {
        self.state().nics.iter().map(Nic::event_fd).collect()
    }

    fn announcements(&self) -> Vec<RawFd> {
        let mut fds: Vec<RawFd> = self.state().nics.iter().filter_map(Nic::announcements).collect();
        fds.sort_unstable();
        fds.dedup();
        fds
    }

    fn arm(&self, sink: &dyn Sink) -> bool {
        let Some(mut state) = self.try_state() else { return false };
        // Each is asked, although another refuses; those without a descriptor are looked at anyway.
        let ask = |armed, nic: &mut N| (nic.event_fd().is_none() || nic.arm()) && armed;
        let is_armed = state.nics.iter_mut().fold(true, ask);
        !self.turn(&mut state, sink) && is_armed
    }

    fn path(self: Arc<Self>, options: PathOptions) -> Arc<dyn RailPath> {
        RailLink::make(self, options)
    }

    fn look_at_ports(&self, now_ns: u64) {
        // ORDERING: only the driver looks.
        if now_ns >= self.looked_ns.load(Ordering::Relaxed) + LOOK_NS {
            self.hear(now_ns);
        }
    }

    fn hear(&self, now_ns: u64) {
        // ORDERING: as above.
        self.looked_ns.store(now_ns, Ordering::Relaxed);
        // Before anybody has to wait for the NICs.
        let are_up: Vec<bool> = self.ports.iter().map(|port| port()).collect();
        let mut state = self.state();
        state.are_up.clone_from(&are_up);
        state.nics.iter_mut().for_each(Nic::heed);
        for nic in (0..are_up.len()).filter(|nic| !are_up[*nic]) {
            let rails: Vec<(u32, usize)> = state.book.owners[nic].iter().flatten().copied().collect();
            for (path, rail) in rails {
                let is_up = state.book.rail(path, rail).is_some_and(|rail| rail.stage == Stage::Up);
                if is_up {
                    let why = format!("the port of {} went down", self.abouts[nic].name);
                    state.stop_rail(path, rail, &why, now_ns);
                }
            }
        }
    }
}

impl<N: Nic> std::fmt::Debug for RailGroup<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RailGroup").field("library", &self.library).field("nics", &self.abouts).finish_non_exhaustive()
    }
}

/// Libraries that drive NICs.
const NUM_LIBRARIES: usize = 2;
/// Regions up to this length are registered by whoever needs them: that takes less than anybody waits for a heartbeat.
const QUICK_BYTES: u64 = 64 << 20;
const LOOK_NS: u64 = 100_000_000;
/// Operations that wait for the NICs, while another thread has them: a thread is
/// rarely away for as long as it takes to submit so many.
const MAX_LEFT: usize = 256;

//! The trait that every transport implements, and what passes through it.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyfabric_plan::Extents;
use anyfabric_wire::{Imm, Refusal};

use crate::sys::Ready;
use crate::{lock, Binding, Failure, Leg, PeerIdx, PeerStats, Region, Spread, Stub, Ticket};

/// One operation to one peer, checked and ready to be carried out.
#[derive(Debug)]
pub struct Op {
    /// Unique in this engine.
    pub id: u64,
    /// Whom it goes to.
    pub peer: PeerIdx,
    /// What to move.
    pub payload: Payload,
    /// What the receiver counts, and how often; counted only after the bytes
    /// are visible to it.
    pub imm: Option<(Imm, u32)>,
    /// Whether the receiver checks a checksum before it counts.
    pub verify: bool,
    /// Ended by whoever carries the operation out.
    pub ticket: Arc<Ticket>,
    /// Whether it was noted that its count will never come.
    pub loss: Loss,
}

/// What an operation moves.
#[derive(Debug)]
pub enum Payload {
    /// Ranges of a region into a peer's region.
    Write {
        /// The source.
        source: Arc<Region>,
        /// The destination, entered ([`Binding::enter`]) until the end.
        binding: Arc<Binding>,
        /// Which ranges; all inside both regions.
        extents: Extents,
    },
    /// Nothing: the immediate alone.
    Signal,
    /// A message for the peer's receive queue.
    Message(Vec<u8>),
}

impl Op {
    /// Bytes that it moves.
    pub fn nbytes(&self) -> u64 {
        match &self.payload {
            Payload::Write { extents, .. } => extents.nbytes(),
            Payload::Signal => 0,
            Payload::Message(bytes) => bytes.len() as u64,
        }
    }

    /// Why no more of it should be carried, if so: it has ended, was cancelled, or
    /// the owner of its destination refuses it.
    pub fn given_up(&self) -> Option<Failure> {
        self.ticket.given_up().or_else(|| self.refusal().map(Failure::Refused))
    }

    /// Why the owner of its destination refuses it, if that is so.
    pub fn refusal(&self) -> Option<Refusal> {
        match &self.payload {
            Payload::Write { binding, .. } => binding.refusal(),
            _ => None,
        }
    }

    /// Has the receiver told that its count will never come, if it has one. Once:
    /// by the time of the second notice another operation may use the imm.
    pub fn note_loss(&self) {
        if let Some((imm, _)) = self.imm {
            self.loss.note(&self.ticket, self.peer, imm);
        }
    }

    /// Fails the operation that it is a part of; this part may be under way.
    pub fn fail(&self, failure: Failure) {
        self.ticket.fail_by(self.peer, failure);
    }

    /// Ends it. When it failed and was counted the receiver is told.
    pub fn end(self, result: Result<(), Failure>) {
        Stub::from(self).end(result);
    }
}

/// A small write that needs neither a ticket nor a queue.
#[derive(Debug)]
pub struct Inline<'a> {
    /// The source.
    pub source: &'a Region,
    /// The destination.
    pub binding: &'a Binding,
    /// Which ranges; all inside both regions.
    pub extents: &'a Extents,
    /// What the receiver counts, and how often.
    pub imm: Option<(Imm, u32)>,
}

/// Whether one operation is among the [`Losses`]; by default it is not.
#[derive(Debug, Default)]
pub struct Loss(AtomicBool);

impl Loss {
    /// Has the receiver told, the first time.
    pub(crate) fn note(&self, ticket: &Ticket, peer: PeerIdx, imm: Imm) {
        // ORDERING: it guards nothing but itself.
        if !self.0.swap(true, Ordering::Relaxed) {
            ticket.note_loss(peer, imm);
        }
    }
}

/// Counts of an engine's that will never come: it tells the receivers.
#[derive(Debug, Default)]
pub struct Losses {
    imms: Mutex<HashMap<PeerIdx, Vec<Imm>>>,
    has_some: AtomicBool,
}

impl Losses {
    /// Notes one of a peer's.
    pub fn note(&self, peer: PeerIdx, imm: Imm) {
        lock(&self.imms).entry(peer).or_default().push(imm);
        // ORDERING: a hint; the lock orders the rest, and who looks too early looks again.
        self.has_some.store(true, Ordering::Release);
    }

    /// Takes all of a peer's that were noted.
    pub fn take(&self, peer: PeerIdx) -> Vec<Imm> {
        // ORDERING: see `note`.
        if !self.has_some.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut imms = lock(&self.imms);
        let of_peer = imms.remove(&peer).unwrap_or_default();
        // ORDERING: under the lock.
        self.has_some.store(!imms.is_empty(), Ordering::Release);
        of_peer
    }
}

/// Where a link posts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Names the group.
    pub group: NonZeroUsize,
    /// The link's number there.
    pub link: u32,
}

/// One engine's way to one peer.
///
/// Any thread may bind, try and post; one thread at a time, the one that drives
/// the engine, polls. After [`Link::close`] every operation has ended and
/// nothing of ours touches the peer's memory any more, but for what no NIC would
/// stop: that has failed and never quiesces.
pub trait Link: Send + Sync {
    /// Name of the transport in the API.
    fn transport(&self) -> &'static str;

    /// How the bytes move, for people: "mapped memory", "2 streams".
    fn manner(&self) -> String;

    /// Whether it makes do with fewer NICs than it has.
    fn is_degraded(&self) -> bool {
        false
    }

    /// Longest message that it carries now; the control connection carries the
    /// others.
    fn max_message_bytes(&self) -> usize {
        usize::MAX
    }

    /// Whether the peer may have ended it with no more than a control message:
    /// what is posted before that was read is lost.
    fn follows_control(&self) -> bool {
        false
    }

    /// Whether it notices by itself when the peer's process exits: then operations
    /// go on while the control connection is made again.
    fn sees_exit(&self) -> bool {
        false
    }

    /// Whether it goes over streams, of which those that are missing are called.
    fn has_streams(&self) -> bool {
        false
    }

    /// Whether source and destination may lie on GPUs.
    fn reaches_gpu_memory(&self) -> bool {
        false
    }

    /// Prepares a peer's region. The binding may be pending at first;
    /// operations may be posted to it only when it is ready.
    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding>;

    /// Carries a small write out at once, in the caller's thread; `None` when
    /// that is not possible now and the write must be posted. So it is wherever
    /// done means acknowledged, for that takes a round trip.
    fn try_inline(&self, _write: &Inline<'_>) -> Option<Result<(), Failure>> {
        None
    }

    /// Takes an operation; it ends through its ticket, maybe before this
    /// returns. True when progress must be driven for that.
    fn post(&self, op: Op) -> bool;

    /// Which group of NICs it posts through, and its number there: operations of
    /// links of one group can be posted together.
    fn place(&self) -> Option<Place> {
        None
    }

    /// As [`Link::post`], for legs of one operation over links of this one's group.
    /// `leg` is the first; `next` puts the one after it in its place, and says whether
    /// there is one. In place, for a copy of what was just written waits for all that
    /// was written before, the request for a NIC too.
    fn post_legs<'t>(&self, spread: &Spread<'t>, leg: &mut Leg<'t>, next: &mut dyn FnMut(&mut Leg<'t>) -> bool) {
        loop {
            leg.into_op(spread).map(|op| self.post(op));
            if !next(leg) {
                return;
            }
        }
    }

    /// Moves on what needs no descriptor: rings, queued copies. Costs little
    /// when there is nothing. True when something moved.
    fn poll(&self, sink: &dyn Sink) -> bool;

    /// A descriptor of this link is ready; `channel` was given when it was
    /// added to the poller.
    fn ready(&self, channel: u8, ready: Ready, sink: &dyn Sink);

    /// Ends or notes operations whose tickets were given up.
    fn reap(&self);

    /// A peer takes a key of its region back: nothing new is posted with it;
    /// true once nothing is under way and nothing of it is mapped here.
    fn release(&self, region: u64, key: u64, refusal: Refusal) -> bool;

    /// The region is closed to this peer, as its [`Region`] says: true when
    /// from now on no byte of the peer lands in it, false when that depends on
    /// the peer's word or exit.
    fn withhold(&self, region: &Region) -> bool;

    /// Whether answers to messages of the peer's may be lost by [`Link::close`].
    /// Not where they go before the goodbye in one stream.
    fn owes_answers(&self) -> bool {
        false
    }

    /// Gives the peer up: stops, ends every operation with `why`.
    fn close(&self, why: &Failure);

    /// Whether the peer can no longer touch our memory through this link,
    /// after [`Link::close`].
    fn is_quiet(&self) -> bool;

    /// What went over it.
    fn stats(&self) -> &PeerStats;

    /// Adds the latency of an inline write to the statistics of what carried it.
    fn note_latency(&self, _ns: u64) {}
}

/// A link that also carries what the two engines tell each other: reliable and
/// in order for the session's life, over one control connection after another.
pub trait ControlPath: Link {
    /// Whether the control connection stands.
    fn has_control(&self) -> bool;

    /// Whether something of the peer's waits on the control connection that
    /// nobody has read; asks the system.
    fn has_news(&self) -> bool;

    /// Sends a control message, now or over the next control connection.
    fn send_control(&self, bytes: Vec<u8>);

    /// The peer has every control message up to `sequence`.
    fn confirm(&self, sequence: u64);

    /// Last control message that arrived without a gap.
    fn received(&self) -> u64;

    /// Takes a broken connection out, the control connection when `channel` is
    /// 0; what it carried has failed. False when it is out already, or another one
    /// stands in its place.
    fn disconnect(&self, channel: u8, why: &str) -> bool;
}

/// Where a link reports what arrives. A sink that does not care for something leaves it out.
pub trait Sink {
    /// An immediate, after its bytes; weight in quarters of a count.
    ///
    /// # Errors
    /// [`Refusal::Full`] when nobody opened a counter and no more are kept.
    fn arrived(&self, _peer: PeerIdx, _imm: Imm, _quarters: u64) -> Result<(), Refusal> {
        Ok(())
    }

    /// An immediate came, and its bytes cannot be made visible.
    fn invisible(&self, _peer: PeerIdx, _imm: Imm, _why: &str) {}

    /// Immediates of the peer's may have come that nobody knows of: how many, and
    /// which.
    fn missed(&self, _peer: PeerIdx, _why: &str) {}

    /// A message.
    ///
    /// # Errors
    /// [`Refusal::Full`] when the receive queue is full, [`Refusal::TooLarge`].
    fn message(&self, _peer: PeerIdx, _bytes: Vec<u8>) -> Result<(), Refusal> {
        Ok(())
    }

    /// A control message.
    fn control(&self, _peer: PeerIdx, _bytes: &[u8]) {}

    /// Something came from the peer: it lives.
    fn heard(&self, _peer: PeerIdx) {}

    /// A stream of this link broke; channel 0 is the control connection.
    fn broken(&self, _peer: PeerIdx, _channel: u8, _why: &str) {}

    /// The peer keeps to no bound and must be given up: more waits for it than it may leave unread.
    fn overrun(&self, _peer: PeerIdx, _why: &str) {}

    /// The peer's process has exited.
    fn exited(&self, _peer: PeerIdx) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Clock, Doorbell, Terms, TicketOffice};

    /// A transfer is given up, and looked after again and again until it ends.
    #[test]
    fn a_lost_count_is_noted_once() {
        let doorbell = Arc::new(Doorbell::private().expect("memory"));
        let office = Arc::new(TicketOffice::new(doorbell, Clock::Real));
        let terms = || Terms { num_parts: 1, ..Terms::default() };
        let take = || office.losses.take(0);
        let op = |imm| Op {
            id: 1,
            peer: 0,
            payload: Payload::Signal,
            imm,
            verify: false,
            ticket: Arc::new(Ticket::new(Arc::clone(&office), terms())),
            loss: Loss::default(),
        };
        let imm = Imm::new(7).expect("below 2^30");
        let counted = op(Some((imm, 4)));
        counted.note_loss();
        counted.note_loss();
        assert_eq!(take(), [imm]);
        // The imm may be another operation's by now.
        counted.end(Err(Failure::Cancelled));
        assert!(take().is_empty());
        op(Some((imm, 1))).end(Err(Failure::Cancelled));
        op(Some((imm, 1))).end(Ok(()));
        op(None).end(Err(Failure::Cancelled));
        assert_eq!(take(), [imm]);
    }
}

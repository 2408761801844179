//! What is under way on the rails of a group: everything but the NICs.
//!
//! ```text
//! operation ─ Flight ─┬─ Part (one a rail) ─┬─ batch (one token at the NIC)
//!                     └─ Part               └─ batch
//! ```
//!
//! What fits one work request is a batch and nothing else, see `super::lone`. Any
//! other operation ends when its last part has ended, and a part when all of it
//! was posted, or given up, and its last batch has ended. That is also what lets
//! `release` promise that nothing touches a region any more.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::Rota;
use anyfabric_wire::{NicLibrary, Rails, Refusal};

use super::cut::Cursor;
use super::legs::{leg_of, Fan, Posted};
use super::lone::Lone;
use super::messages::Answer;
use super::nic::{Fault, RailIdx};
use super::roll::Roll;
use super::slab::Slab;
use crate::{Binding, ControlPath, Failure, Op, PeerIdx, PeerStats, Splits};

/// What is under way, and the paths that it is under way on.
#[derive(Default)]
pub(super) struct Book {
    pub(super) paths: Roll<Path>,
    pub(super) flights: Slab<Flight>,
    pub(super) parts: Slab<Part>,
    pub(super) batches: Slab<Batched>,
    /// Of operations with several peers, and what those have in common.
    pub(super) legs: Slab<Posted>,
    pub(super) fans: Slab<Fan>,
    /// Path and number of each rail, by NIC and the NIC's own number.
    pub(super) owners: Vec<Vec<Option<(u32, usize)>>>,
    /// Rails that may have something to post.
    pub(super) dirty: VecDeque<(u32, usize)>,
    /// Rails to be looked after: broken, and drained or not.
    pub(super) faulty: Vec<(u32, usize)>,
    /// To messages of peers, until they are posted.
    pub(super) answers: VecDeque<Answer>,
    /// For a message in its form.
    pub(super) frame: Vec<u8>,
}

/// The rails between us and one peer.
pub(super) struct Path {
    pub(super) peer: PeerIdx,
    pub(super) rails: Vec<Rail>,
    /// Operations for which no rail stands yet.
    pub(super) waiting: VecDeque<Op>,
    /// Parts whose rail broke before they were on it, or between two of their batches, when no other stood.
    pub(super) stranded: VecDeque<u32>,
    /// Parts that are messages and wait for their answers, by number.
    pub(super) unanswered: HashMap<u64, u32>,
    /// What messages over these rails carry.
    pub(super) key: u64,
    /// Which rails serve the next operation.
    pub(super) rota: Rota,
    /// Regions of the peer's that legs go into.
    pub(super) held: Slab<Arc<Binding>>,
    pub(super) stats: Arc<PeerStats>,
    pub(super) splits: Splits,
    pub(super) control: Arc<dyn ControlPath>,
    pub(super) library: NicLibrary,
    pub(super) is_caller: bool,
    /// Why the last rail that failed did, for people.
    pub(super) why: String,
    /// A rail was closed that its NIC did not stop.
    pub(super) is_stuck: bool,
}

/// One rail: which NICs it joins, and what waits for it.
pub(super) struct Rail {
    /// Which of our NICs, and which of the peer's.
    pub(super) nic: usize,
    pub(super) theirs: usize,
    /// Our end.
    pub(super) idx: Option<RailIdx>,
    pub(super) stage: Stage,
    pub(super) attempt: u32,
    /// The first attempt has come to something.
    pub(super) is_decided: bool,
    /// When it is called again; once broken, until when its batches may end by themselves.
    pub(super) due_ns: u64,
    pub(super) backoff_ns: u64,
    /// Parts that have something left to post.
    pub(super) small: VecDeque<u32>,
    pub(super) bulk: VecDeque<u32>,
    /// Apart, for they need buffers that others do not.
    pub(super) messages: VecDeque<u32>,
    /// Batches and bulk bytes that have not ended.
    pub(super) under_way: u32,
    pub(super) bulk_bytes: u64,
    /// Answers that were posted and have not ended.
    pub(super) answers: u32,
    pub(super) is_dirty: bool,
}

/// How far a rail is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Not there; the caller tries again.
    Down,
    /// Our end is there, the other has been asked or has not said that it is
    /// ready.
    Called,
    /// Operations go over it.
    Up,
    /// Broken; what was posted has not all ended.
    Broken,
}

impl Stage {
    /// Whether messages may go over it. One may come before the word that its rail stands.
    pub(super) const fn stands(self) -> bool {
        matches!(self, Self::Up | Self::Called)
    }
}

/// An operation.
pub(super) struct Flight {
    pub(super) op: Op,
    pub(super) parts_left: u32,
    pub(super) failure: Option<Failure>,
    pub(super) is_split: bool,
    pub(super) began_ns: u64,
}

/// One rail's part of an operation.
pub(super) struct Part {
    pub(super) flight: u32,
    pub(super) path: u32,
    pub(super) rail: usize,
    pub(super) cursor: Cursor,
    /// As it travels.
    pub(super) imm: Option<u32>,
    pub(super) is_bulk: bool,
    pub(super) is_message: bool,
    /// Batches that have not ended.
    pub(super) under_way: u32,
    /// Left its queue to wait for its own batches.
    pub(super) is_parked: bool,
    /// A message, which is over when the peer's engine has said so.
    pub(super) awaits_answer: bool,
}

/// A batch that a NIC carries.
pub(super) struct Batched {
    pub(super) of: Of,
    pub(super) nbytes: u64,
}

/// What a batch is of.
pub(super) enum Of {
    /// A part.
    Part(u32),
    /// Nothing more: it is a whole operation.
    Lone(Lone),
}

impl Path {
    pub(super) fn send(&self, message: Rails) {
        let control = anyfabric_wire::Control::Rails { library: self.library, message };
        self.control.send_control(control.encode());
    }

    /// The rail whose turn it is, of those that are up; the next one's turn comes.
    #[inline]
    pub(super) fn take_turn(&mut self) -> Option<usize> {
        let rail = self.rota.next(|rail| self.rails[rail].stage == Stage::Up)?;
        self.rota.took(rail);
        Some(rail)
    }

    pub(super) fn num_up(&self) -> usize {
        self.rails.iter().filter(|rail| rail.stage == Stage::Up).count()
    }
}

impl Rail {
    /// Whether what is posted at once passes nobody.
    #[inline]
    pub(super) fn is_free(&self) -> bool {
        !self.is_dirty && self.small.is_empty()
    }

    /// Whether a part waits.
    pub(super) fn has_more(&self) -> bool {
        !(self.small.is_empty() && self.bulk.is_empty() && self.messages.is_empty())
    }

    /// Where a part waits.
    pub(super) fn queue(&mut self, is_bulk: bool, is_message: bool) -> &mut VecDeque<u32> {
        match (is_bulk, is_message) {
            (_, true) => &mut self.messages,
            (true, _) => &mut self.bulk,
            _ => &mut self.small,
        }
    }
}

impl Book {
    pub(super) fn rail(&mut self, path: u32, rail: usize) -> Option<&mut Rail> {
        self.paths.get_mut(path)?.rails.get_mut(rail)
    }

    pub(super) fn set_owner(&mut self, nic: usize, idx: RailIdx, owner: (u32, usize)) {
        let owners = &mut self.owners[nic];
        if owners.len() <= idx as usize {
            owners.resize(idx as usize + 1, None);
        }
        owners[idx as usize] = Some(owner);
    }

    pub(super) fn set_dirty(&mut self, path: u32, rail: usize) {
        if let Some(found) = self.rail(path, rail) {
            if !std::mem::replace(&mut found.is_dirty, true) {
                self.dirty.push_back((path, rail));
            }
        }
    }

    /// A batch has ended.
    #[inline]
    pub(super) fn batch_ended(&mut self, token: u32, result: Result<(), Fault>, now_ns: u64) {
        if let Some(leg) = leg_of(token) {
            return self.leg_ended(leg, result, now_ns);
        }
        let Some(Batched { of, nbytes }) = self.batches.remove(token) else { return };
        let part_idx = match of {
            Of::Lone(lone) => return self.lone_ended(lone, nbytes, result, now_ns),
            Of::Part(part) => part,
        };
        let Some(part) = self.parts.get_mut(part_idx) else { return };
        let (path, rail_no) = (part.path, part.rail);
        part.under_way -= 1;
        let (is_bulk, flight) = (part.is_bulk, part.flight);
        let wakes = part.is_parked && part.under_way == 0 && !part.cursor.is_over();
        if wakes {
            part.is_parked = false;
        }
        let has_more = self.rail(path, rail_no).is_some_and(|rail| {
            rail.under_way -= 1;
            if is_bulk {
                rail.bulk_bytes -= nbytes;
            }
            if wakes {
                rail.small.push_front(part_idx);
            }
            rail.has_more()
        });
        if has_more {
            self.set_dirty(path, rail_no);
        }
        if let Err(fault) = result {
            let cause = self.cause(path, rail_no, fault);
            self.fail_flight(flight, |op| failure_of(fault, cause, || op.refusal()));
        }
        self.settle_part(part_idx, now_ns);
    }

    /// Ends a part of which nothing is left.
    #[inline]
    pub(super) fn settle_part(&mut self, part_idx: u32, now_ns: u64) {
        let Some(part) = self.parts.get_mut(part_idx) else { return };
        if part.under_way > 0 {
            return;
        }
        let flight_idx = part.flight;
        let Some(flight) = self.flights.get_mut(flight_idx) else { return };
        if flight.failure.is_some() && !part.cursor.is_over() {
            // It failed elsewhere, and has more to post: its number is another's soon, and must wait nowhere.
            part.cursor.stop();
            unqueue(&mut self.paths, part, part_idx);
        }
        if !part.cursor.is_over() || part.awaits_answer && flight.failure.is_none() {
            return;
        }
        let number = part.awaits_answer.then_some(flight.op.id);
        flight.parts_left -= 1;
        let is_last = flight.parts_left == 0;
        let (path, rail) = (part.path, part.rail);
        let (failed, began_ns) = (flight.failure.is_some(), flight.began_ns);
        self.parts.remove(part_idx);
        if let Some(path) = self.paths.get_mut(path) {
            number.map(|number| path.unanswered.remove(&number));
            let nic = path.stats.nic(rail);
            nic.latency.record_alone(now_ns.saturating_sub(began_ns));
            if failed {
                // ORDERING: statistics.
                nic.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        if is_last {
            self.end_flight(flight_idx, path);
        }
    }

    /// Ends an operation of which nothing is left.
    pub(super) fn end_flight(&mut self, flight: u32, path: u32) {
        let Some(Flight { op, failure, is_split, .. }) = self.flights.remove(flight) else { return };
        if let (true, Some(path), Some((imm, _))) = (is_split, self.paths.get_mut(path), op.imm) {
            path.splits.end(imm, op.id, failure.is_none());
        }
        op.end(failure.map_or(Ok(()), Err));
    }

    /// An operation has failed; its owner learns of it at once, what is under way
    /// of it only quiesces.
    pub(super) fn fail_flight(&mut self, flight: u32, why: impl FnOnce(&Op) -> Failure) {
        let Some(flight) = self.flights.get_mut(flight) else { return };
        if flight.failure.is_none() {
            let failure = why(&flight.op);
            flight.op.fail(failure.clone());
            flight.failure = Some(failure);
        }
    }

    /// A rail stopped carrying anything: the parts that wait for it go to another, or wait until one stands. What they
    /// have posted before is placed. Where something is under way nobody knows: that fails, and with it the rest.
    pub(super) fn rail_stopped(&mut self, path_idx: u32, rail_no: usize, why: &str, now_ns: u64) {
        let Some(path) = self.paths.get_mut(path_idx) else { return };
        path.why = why.to_owned();
        let queued: Vec<u32> = {
            let rail = &mut path.rails[rail_no];
            rail.small.drain(..).chain(rail.bulk.drain(..)).chain(rail.messages.drain(..)).collect()
        };
        for part_idx in queued {
            let Some(part) = self.parts.get_mut(part_idx) else { continue };
            let has_failed = self.flights.get(part.flight).is_none_or(|flight| flight.failure.is_some());
            if part.under_way > 0 || has_failed {
                self.drop_part(part_idx, why, now_ns);
                continue;
            }
            let Some(path) = self.paths.get_mut(path_idx) else { break };
            match path.take_turn() {
                Some(other) => self.queue_part(part_idx, other),
                None => path.stranded.push_back(part_idx),
            }
        }
        // Parked parts wait for batches, which end with a fault.
        self.lose_answers(path_idx, rail_no, why, now_ns);
    }

    /// A rail stands: what was stranded goes over it.
    pub(super) fn unstrand(&mut self, path_idx: u32, rail_no: usize) {
        let stranded = self.paths.get_mut(path_idx).map(|path| std::mem::take(&mut path.stranded));
        for part_idx in stranded.into_iter().flatten() {
            self.queue_part(part_idx, rail_no);
        }
    }

    /// Nothing will stand any more: fails what is stranded.
    pub(super) fn drop_stranded(&mut self, path_idx: u32, why: &str, now_ns: u64) {
        let stranded = self.paths.get_mut(path_idx).map(|path| std::mem::take(&mut path.stranded));
        for part_idx in stranded.into_iter().flatten() {
            self.drop_part(part_idx, why, now_ns);
        }
    }

    fn queue_part(&mut self, part_idx: u32, rail_no: usize) {
        let Some(part) = self.parts.get_mut(part_idx) else { return };
        part.rail = rail_no;
        let (path, is_bulk, is_message) = (part.path, part.is_bulk, part.is_message);
        if let Some(rail) = self.rail(path, rail_no) {
            rail.queue(is_bulk, is_message).push_back(part_idx);
        }
        self.set_dirty(path, rail_no);
    }

    /// Ends or notes the operations of a path whose tickets were given up.
    pub(super) fn reap(&mut self, path_idx: u32, now_ns: u64) {
        let Some(path) = self.paths.get_mut(path_idx) else { return };
        let (gone, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut path.waiting).into_iter().partition(|op| op.ticket.given_up().is_some());
        path.waiting = kept;
        for op in gone {
            let why = op.ticket.given_up().unwrap_or(Failure::Cancelled);
            op.end(Err(why));
        }
        for lone in self.lone_on(path_idx) {
            if let Some(why) = lone.stub.given_up() {
                lone.stub.note_loss();
                lone.stub.fail(why);
            }
        }
        self.reap_legs(path_idx);
        let mut gone = Vec::new();
        for (idx, part) in self.parts.iter().filter(|(_, part)| part.path == path_idx) {
            let Some(flight) = self.flights.get(part.flight) else { continue };
            if let Some(why) = flight.op.ticket.given_up() {
                // What a NIC has been told cannot be taken back; it may yet arrive.
                flight.op.note_loss();
                gone.push((idx, why));
            }
        }
        for (part_idx, why) in gone {
            let Some(part) = self.parts.get_mut(part_idx) else { continue };
            part.cursor.stop();
            unqueue(&mut self.paths, part, part_idx);
            let flight = part.flight;
            self.fail_flight(flight, |_| why);
            self.settle_part(part_idx, now_ns);
        }
    }

    /// Fails all that a path carries; it only quiesces.
    pub(super) fn fail_all(&mut self, path_idx: u32, why: &Failure) {
        self.lone_on(path_idx).for_each(|lone| lone.stub.fail(why.clone()));
        self.fail_legs(path_idx, why);
        let flights = self.parts.iter().filter(|(_, part)| part.path == path_idx).map(|(_, part)| part.flight);
        for flight in flights.collect::<Vec<_>>() {
            self.fail_flight(flight, |_| why.clone());
        }
    }

    /// Batches that a rail carries.
    pub(super) fn batches_on(&self, path_idx: u32, rail_no: usize) -> Vec<u32> {
        let place = |of: &Of| match of {
            Of::Part(part) => self.parts.get(*part).map(|part| (part.path, part.rail)),
            Of::Lone(lone) => Some((lone.path, lone.rail)),
        };
        let is_on = |of| place(of) == Some((path_idx, rail_no));
        let batches = self.batches.iter().filter(|(_, batch)| is_on(&batch.of)).map(|(token, _)| token);
        batches.chain(self.legs_on(path_idx, rail_no)).collect()
    }

    /// Why what was on a rail was flushed: that was another's fault, or the rail was stopped.
    #[cold]
    pub(super) fn cause(&mut self, path_idx: u32, rail_no: usize, fault: Fault) -> Option<String> {
        let path = self.paths.get_mut(path_idx).filter(|_| fault == Fault::Flushed)?;
        // Of one that stands nobody knows yet.
        let has_stopped = path.rails.get(rail_no).is_some_and(|rail| !rail.stage.stands());
        has_stopped.then(|| path.why.clone())
    }

    fn lone_on(&mut self, path_idx: u32) -> impl Iterator<Item = &mut Lone> {
        self.batches.iter_mut().filter_map(move |batch| match &mut batch.of {
            Of::Lone(lone) if lone.path == path_idx => Some(lone),
            _ => None,
        })
    }

    pub(super) fn drop_part(&mut self, part_idx: u32, why: &str, now_ns: u64) {
        if let Some(part) = self.parts.get_mut(part_idx) {
            part.cursor.stop();
            let flight = part.flight;
            self.fail_flight(flight, |_| Failure::ConnectionBroken(why.to_owned()));
            self.settle_part(part_idx, now_ns);
        }
    }
}

/// Takes a part out of whatever it waits in.
#[cold]
fn unqueue(paths: &mut Roll<Path>, part: &Part, part_idx: u32) {
    let Some(path) = paths.get_mut(part.path) else { return };
    path.stranded.retain(|stranded| *stranded != part_idx);
    if let Some(rail) = path.rails.get_mut(part.rail) {
        for queue in [&mut rail.small, &mut rail.bulk, &mut rail.messages] {
            queue.retain(|queued| *queued != part_idx);
        }
    }
}

/// What an operation fails with when its NIC reports a fault, of which the cause may be known, and its owner may have
/// said more.
pub(super) fn failure_of(fault: Fault, cause: Option<String>, refusal: impl FnOnce() -> Option<Refusal>) -> Failure {
    // Without a word from the owner it may be that its process ends: then keys go before the queue pairs.
    let refusal = if fault == Fault::Refused { refusal() } else { None };
    refusal.map_or_else(|| Failure::ConnectionBroken(cause.unwrap_or_else(|| fault.to_string())), Failure::Refused)
}

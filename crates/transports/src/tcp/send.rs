//! The sending half of a lane: operations become frames, frames become as few
//! system calls as possible.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyfabric_plan::Extents;
use anyfabric_wire::{Frame, Imm};

use super::batch::Batch;
use super::lane::Lane;
use crate::controls::{kept_bytes, MAX_CONTROL_BYTES};
use crate::{lock, try_lock, Failure, NicStats, Op, PeerStats, Region};

/// An operation, shared by the lanes that carry parts of it.
#[derive(Debug)]
pub(super) struct Shared {
    stats: Arc<PeerStats>,
    op: Mutex<Option<Op>>,
    parts: AtomicU32,
    failure: Mutex<Option<Failure>>,
}

impl Shared {
    pub(super) fn new(op: Op, num_parts: u32, stats: &Arc<PeerStats>) -> Self {
        let (op, parts, stats) = (Mutex::new(Some(op)), AtomicU32::new(num_parts), Arc::clone(stats));
        Self { stats, op, parts, failure: Mutex::default() }
    }

    /// Why the operation should not go on, if so.
    pub(super) fn given_up(&self) -> Option<Failure> {
        if let Some(failure) = lock(&self.failure).clone() {
            return Some(failure);
        }
        lock(&self.op).as_ref().and_then(Op::given_up)
    }

    /// Notes the lost count of an operation that was given up but may yet arrive.
    pub(super) fn note_loss(&self) {
        if let Some(op) = lock(&self.op).as_ref() {
            if op.ticket.given_up().is_some() {
                op.note_loss();
            }
        }
    }

    /// The owner learns of the first failure at once; the rest only quiesces.
    pub(super) fn fail(&self, failure: Failure) {
        if let Some(op) = lock(&self.op).as_ref() {
            op.fail(failure.clone());
        }
        lock(&self.failure).get_or_insert(failure);
    }

    fn part_ended(&self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            self.fail(failure);
        }
        // ORDERING: the last part takes what the others noted.
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            let failure = lock(&self.failure).take();
            let op = lock(&self.op).take();
            if let Some(op) = op {
                op.end(failure.map_or(Ok(()), Err));
            }
        }
    }
}

/// What one lane carries of an operation.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) shared: Arc<Shared>,
    /// Which lane carries it.
    pub(super) lane: usize,
    pub(super) op: u64,
    pub(super) content: Content,
    /// What the receiver counts when this part (and its siblings, if
    /// `num_parts` says that there are some) has arrived.
    pub(super) imm: Option<(Imm, u32)>,
    pub(super) num_parts: u16,
    pub(super) verify: bool,
    pub(super) submitted_ns: u64,
}

/// What a part moves.
#[derive(Debug)]
pub(super) enum Content {
    Write { source: Arc<Region>, region: u64, key: u64, extents: Extents },
    Signal,
    Message(Vec<u8>),
}

impl Part {
    /// Bytes that it moves.
    pub(super) fn nbytes(&self) -> u64 {
        match &self.content {
            Content::Write { extents, .. } => extents.nbytes(),
            Content::Signal => 0,
            Content::Message(bytes) => bytes.len() as u64,
        }
    }

    pub(super) fn end(&self, result: Result<(), Failure>) {
        if result.is_err() {
            // ORDERING: statistics.
            self.shared.stats.nic(self.lane).errors.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.part_ended(result);
    }
}

/// Handed over by submitting threads.
#[derive(Debug, Default)]
pub(super) struct Submitted {
    controls: VecDeque<(u64, Vec<u8>)>,
    control_bytes: usize,
    acks: Vec<u8>,
    pub(super) small: VecDeque<Arc<Part>>,
    pub(super) bulk: VecDeque<Arc<Part>>,
}

impl Submitted {
    fn is_empty(&self) -> bool {
        self.controls.is_empty() && self.acks.is_empty() && self.small.is_empty() && self.bulk.is_empty()
    }

    /// False when the peer has left so many unread that there is no room: a peer may confirm what it never read.
    pub(super) fn push_control(&mut self, sequence: u64, bytes: Vec<u8>) -> bool {
        let has_room = self.control_bytes < MAX_CONTROL_BYTES;
        if has_room {
            self.control_bytes += kept_bytes(&bytes);
            self.controls.push_back((sequence, bytes));
        }
        has_room
    }

    /// False when the peer has left so many unread that there is no room.
    pub(super) fn push_ack(&mut self, record: [u8; Frame::ACK_BYTES]) -> bool {
        let has_room = self.acks.len() < MAX_ACK_BYTES;
        if has_room {
            self.acks.extend_from_slice(&record);
        }
        has_room
    }

    pub(super) fn drain(&mut self, parts: &mut Vec<Arc<Part>>) {
        parts.extend(self.small.drain(..));
        parts.extend(self.bulk.drain(..));
    }

    /// Ends what was given up.
    pub(super) fn reap(&mut self, ended: &mut Vec<(Arc<Part>, Failure)>) {
        reap_unsent(&mut self.small, ended);
        reap_unsent(&mut self.bulk, ended);
    }
}

/// Being sent.
#[derive(Debug, Default)]
pub(super) struct Send {
    /// The large operation whose frames go out, and how far it has come.
    current: Option<Cursor>,
    /// Large operations that wait.
    bulk: VecDeque<Arc<Part>>,
    /// Sent whole, or as far as they were when they were given up; the peer will acknowledge.
    pub(super) awaiting: HashMap<u64, Cursor>,
    /// Bytes on their way into the socket.
    batch: Batch,
}

/// An operation and how far it has come.
#[derive(Debug)]
pub(super) struct Cursor {
    pub(super) part: Arc<Part>,
    pub(super) extent_idx: usize,
    pub(super) done: u64,
}

impl Send {
    /// Takes everything out: what was sent, some of it or all, and the rest.
    pub(super) fn drain(&mut self, sent: &mut Vec<Arc<Part>>, unsent: &mut Vec<Arc<Part>>) {
        if let Some(cursor) = self.current.take() {
            let list = if cursor.has_not_begun() { &mut *unsent } else { &mut *sent };
            list.push(cursor.part);
        }
        unsent.extend(self.bulk.drain(..));
        sent.extend(self.awaiting.drain().map(|(_, cursor)| cursor.part));
        self.batch = Batch::default();
    }

    /// Ends what was given up before any of it was sent; notes the counts of
    /// what was sent already.
    pub(super) fn reap(&mut self, ended: &mut Vec<(Arc<Part>, Failure)>) {
        reap_unsent(&mut self.bulk, ended);
        for cursor in self.awaiting.values() {
            cursor.part.shared.note_loss();
        }
    }
}

impl Lane {
    /// Sends a batch of about `batch_bytes`, or what is left of the last one, as
    /// far as the socket takes it. True when something moved; `pending` says
    /// whether there may be more, and `stats` that it had to wait.
    ///
    /// # Errors
    /// The system's: the stream is broken.
    pub(super) fn flush(&self, batch_bytes: usize, stats: &NicStats) -> io::Result<bool> {
        let mut moved = false;
        // Whoever holds the lock looks again after giving it back, so that
        // nothing submitted meanwhile stays behind.
        while let Some(mut send) = try_lock(&self.send) {
            let mut blocked = false;
            if send.batch.is_sent() {
                self.assemble(&mut send, batch_bytes);
            }
            let more = !send.batch.is_sent();
            if more {
                match send.batch.send(self.raw()) {
                    Ok(()) => moved = true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => blocked = true,
                    Err(error) => return Err(error),
                }
            }
            // ORDERING: under the lock; a submitter that comes later sets it again.
            self.pending.store(more, Ordering::Release);
            let waits = self.set_blocked(blocked) && blocked;
            if waits && send.batch.has_parts() {
                // ORDERING: statistics.
                stats.retries.fetch_add(1, Ordering::Relaxed);
            }
            drop(send);
            if more || lock(&self.submitted).is_empty() {
                break;
            }
        }
        Ok(moved)
    }

    /// Makes the next batch: acknowledgements, control messages, small
    /// operations, then frames of large ones.
    fn assemble(&self, send: &mut Send, batch_bytes: usize) {
        let Send { current, bulk, awaiting, batch } = send;
        batch.clear();
        {
            let mut submitted = lock(&self.submitted);
            batch.acks(&mut submitted.acks);
            while let Some((sequence, bytes)) = submitted.controls.pop_front() {
                batch.control(sequence, &bytes);
            }
            submitted.control_bytes = 0;
            while batch.pieces.len() < MAX_PIECES && batch.nbytes < batch_bytes {
                let Some(part) = submitted.small.pop_front() else { break };
                match part.shared.given_up() {
                    Some(why) => part.end(Err(why)),
                    None => {
                        let mut cursor = Cursor { part, extent_idx: 0, done: 0 };
                        batch.hold(&cursor.part);
                        while !batch.frame(&mut cursor, batch_bytes) {}
                        awaiting.insert(cursor.part.op, cursor);
                    }
                }
            }
            bulk.append(&mut submitted.bulk);
        }
        while batch.nbytes < batch_bytes && batch.pieces.len() < MAX_PIECES {
            let Some(mut cursor) = current.take().or_else(|| bulk.pop_front().map(Cursor::new)) else { break };
            // Between frames an operation may be given up. What was sent of it will land: the peer is told that no more
            // comes, and its answer ends the part.
            if let Some(why) = cursor.part.shared.given_up() {
                if cursor.has_not_begun() {
                    cursor.part.end(Err(why));
                } else {
                    cursor.part.shared.fail(why);
                    cursor.part.shared.note_loss();
                    batch.withdrawal(&cursor.part);
                    awaiting.insert(cursor.part.op, cursor);
                }
                continue;
            }
            batch.hold(&cursor.part);
            if batch.frame(&mut cursor, batch_bytes) {
                awaiting.insert(cursor.part.op, cursor);
            } else {
                *current = Some(cursor);
            }
        }
    }
}

impl Cursor {
    fn new(part: Arc<Part>) -> Self {
        Self { part, extent_idx: 0, done: 0 }
    }

    /// Bytes that were sent.
    pub(super) fn nbytes(&self) -> u64 {
        match &self.part.content {
            Content::Write { extents, .. } if self.extent_idx < extents.num_extents() => {
                extents.nth(0).nbytes * self.extent_idx as u64 + self.done
            }
            _ => self.part.nbytes(),
        }
    }

    const fn has_not_begun(&self) -> bool {
        self.extent_idx == 0 && self.done == 0
    }
}

/// Takes out what was given up.
fn reap_unsent(queue: &mut VecDeque<Arc<Part>>, ended: &mut Vec<(Arc<Part>, Failure)>) {
    queue.retain(|part| match part.shared.given_up() {
        Some(why) => {
            ended.push((Arc::clone(part), why));
            false
        }
        None => true,
    });
}

/// What the peer has acknowledged.
pub(super) fn acknowledged(lane: &Lane, op: u64) -> Option<Cursor> {
    lock(&lane.send).awaiting.remove(&op)
}

const MAX_PIECES: usize = 1024;
/// Most that waits in one lane of acknowledgements that a peer does not read: a million. Those of a peer that reads wait
/// only for what its sockets hold, and to reach this they would have to hold 64 MiB of empty writes.
const MAX_ACK_BYTES: usize = 16 << 20;

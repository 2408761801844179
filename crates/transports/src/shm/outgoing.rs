//! The writing half of a link: copies, and the entries that announce them.
//!
//! Short writes are carried out by whoever submits them. Long ones wait in a
//! queue, from which the driver copies one chunk a turn.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_plan::Extents;
use anyfabric_wire::{Imm, WireImm};

use super::link::{ShmLink, INLINE_BYTES};
use super::ring::{Entry, Producer, AREA};
use super::walk::{Ahead, Chunk, Range};
use crate::copy::{prefetch, prefetch_for_write};
use crate::sys::{self, Foreign, ForeignWrite};
use crate::{copy, lock, Doorbell, Failure, Inline, Op, Payload, Region, Target};

pub(super) struct Outgoing {
    pub(super) producer: Producer,
    /// The peer's, until it is gone.
    pub(super) doorbell: Option<Doorbell>,
    /// Bytes are placed, the entry waits for room in the ring.
    pub(super) backlog: VecDeque<Op>,
    /// Answers that wait for room.
    pub(super) answers: VecDeque<Entry>,
    /// Sent through the bounce area; the peer will answer.
    pub(super) awaiting: HashMap<u64, Op>,
    /// Inline writes since the statistics were last read.
    pub(super) inline_bytes: u64,
    pub(super) inline_operations: u64,
}

/// A large operation and how far it has come.
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) extent_idx: usize,
    /// Bytes of that extent that are done.
    pub(super) done: u64,
}

impl Job {
    pub(super) const fn has_not_begun(&self) -> bool {
        self.extent_idx == 0 && self.done == 0
    }
}

impl ShmLink {
    /// Copies ranges to where the peer's region is mapped or lives.
    ///
    /// # Errors
    /// The system's, of process_vm_writev.
    pub(super) fn place(
        &self,
        source: &Region,
        target: &Target,
        ranges: impl Iterator<Item = Range>,
    ) -> std::io::Result<()> {
        match target {
            Target::Mapped(mapping) => {
                let (src, dst) = (source.as_ptr().cast_const(), mapping.as_ptr());
                let mut ranges = Ahead::new(ranges);
                while let Some((range, soon)) = ranges.next() {
                    if let Some(soon) = soon {
                        prefetch(src.wrapping_add(soon.src as usize), soon.nbytes as usize);
                    }
                    // SAFETY: the engine checked the ranges against both regions; the binding is entered, so the
                    // mapping stays; the ticket holds the source.
                    unsafe { copy(src.add(range.src as usize), dst.add(range.dst as usize), range.nbytes as usize) };
                }
                Ok(())
            }
            Target::Foreign(address) => {
                let src = source.as_ptr().cast_const();
                let ranges = ranges.map(|range| ForeignWrite {
                    // SAFETY: inside the source region, as above.
                    src: unsafe { src.add(range.src as usize) },
                    dst: address + range.dst,
                    nbytes: range.nbytes as usize,
                });
                let has_exited = || self.has_exited(Duration::ZERO);
                self.witness.check(has_exited)?;
                FOREIGN.with_borrow_mut(|room| {
                    // SAFETY: as above.
                    unsafe { sys::foreign_write(self.pid, room, ranges) }
                })?;
                self.witness.check(has_exited)
            }
            Target::Owner | Target::Nics { .. } => Err(std::io::Error::from(std::io::ErrorKind::Unsupported)),
        }
    }

    /// Publishes the count of a finished operation, or keeps it for later.
    pub(super) fn finish(&self, op: Op, outgoing: &mut Outgoing) {
        let Some((imm, count)) = op.imm else {
            self.end(op, Ok(()));
            return;
        };
        if outgoing.producer.is_fenced() {
            return self.end(op, Err(fenced()));
        }
        if outgoing.backlog.is_empty() && outgoing.producer.push_arrival(whole(imm), count) {
            self.notify_arrival(outgoing, count);
            self.end(op, Ok(()));
        } else {
            // ORDERING: statistics.
            self.stats.nic(0).retries.fetch_add(1, Ordering::Relaxed);
            if self.is_closed() {
                return self.end(op, Err(given_up()));
            }
            outgoing.backlog.push_back(op);
            // ORDERING: see `poll`.
            self.busy.store(true, Ordering::Release);
        }
    }

    pub(super) fn end(&self, op: Op, result: Result<(), Failure>) {
        let nic = self.stats.nic(0);
        match &result {
            Ok(()) => nic.sent(op.nbytes()),
            // ORDERING: statistics.
            Err(_) => drop(nic.errors.fetch_add(1, Ordering::Relaxed)),
        }
        let ticket = Arc::clone(&op.ticket);
        op.end(result);
        if let Some((submitted_ns, ended_ns)) = ticket.interval_ns() {
            nic.latency.record(ended_ns.saturating_sub(submitted_ns));
        }
    }

    pub(super) fn flush_answers(&self, outgoing: &mut Outgoing) -> bool {
        let mut moved = false;
        while let Some(answer) = outgoing.answers.front() {
            if !outgoing.producer.push(answer) {
                break;
            }
            outgoing.answers.pop_front();
            moved = true;
        }
        if moved {
            self.notify(outgoing);
        }
        if !outgoing.answers.is_empty() {
            // ORDERING: see `poll`.
            self.busy.store(true, Ordering::Release);
        }
        moved
    }

    pub(super) fn flush_backlog(&self) -> bool {
        let mut outgoing = lock(&self.outgoing);
        let mut moved = self.flush_answers(&mut outgoing);
        while let Some(op) = outgoing.backlog.front() {
            let is_fenced = outgoing.producer.is_fenced();
            if let Some(why) = op.ticket.given_up().or_else(|| is_fenced.then(fenced)) {
                if let Some(op) = outgoing.backlog.pop_front() {
                    self.end(op, Err(why));
                }
                continue;
            }
            let Some((imm, count)) = op.imm else { break };
            if !outgoing.producer.push_arrival(whole(imm), count) {
                break;
            }
            self.notify(&outgoing);
            moved = true;
            if let Some(op) = outgoing.backlog.pop_front() {
                self.end(op, Ok(()));
            }
        }
        moved
    }

    /// Queues a large operation; false when the link closed, and it has ended.
    pub(super) fn keep(&self, job: Job, has_begun: bool) -> bool {
        let mut queue = lock(&self.queue);
        // Under the lock: `close` says so before it empties the queue.
        if self.is_closed() {
            drop(queue);
            self.end(job.op, Err(given_up()));
            return false;
        }
        enqueue(&mut queue, job, has_begun);
        // ORDERING: a hint for `poll`; the queue's lock orders the rest.
        self.busy.store(true, Ordering::Release);
        true
    }

    /// One chunk of the oldest large operation.
    pub(super) fn advance_queue(&self) -> bool {
        let Some(mut job) = lock(&self.queue).pop_front() else { return false };
        if let Some(why) = job.op.given_up() {
            self.withdraw(job, why);
            return true;
        }
        match self.advance(&mut job) {
            Ok(Step::Done) => self.finish(job.op, &mut lock(&self.outgoing)),
            Ok(Step::Bounced) => {
                let id = job.op.id;
                let mut outgoing = lock(&self.outgoing);
                if self.is_closed() {
                    self.end(job.op, Err(given_up()));
                    return true;
                }
                outgoing.awaiting.insert(id, job.op);
                drop(outgoing);
                let end = self.push_bounce_end(id);
                if !end {
                    // No room for the end: it follows the answers.
                    let imm = lock(&self.outgoing).awaiting.get(&id).and_then(|op| bounce_imm(op.imm));
                    lock(&self.outgoing).answers.push_back(Entry::BounceEnd { op: id, imm });
                }
            }
            Ok(Step::More) => drop(self.keep(job, true)),
            Ok(Step::Blocked) => {
                self.keep(job, true);
                return false;
            }
            Err(error) => self.end(job.op, Err(self.system_failure(&error))),
        }
        true
    }

    /// Gives a large operation up. What of it lies in the bounce area will land: then it has quiesced when the peer has
    /// seen the end, which counts nothing.
    fn withdraw(&self, job: Job, why: Failure) {
        let Payload::Write { binding, .. } = &job.op.payload else { return self.end(job.op, Err(why)) };
        let is_bounced = matches!(binding.target(), Some(Target::Owner));
        if !is_bounced || job.has_not_begun() {
            return self.end(job.op, Err(why));
        }
        job.op.fail(why);
        job.op.note_loss();
        let mut outgoing = lock(&self.outgoing);
        // Under the lock, as in `close`, which ends what is awaited.
        if self.is_closed() {
            drop(outgoing);
            return self.end(job.op, Err(given_up()));
        }
        let op = job.op.id;
        outgoing.awaiting.insert(op, job.op);
        outgoing.answers.push_back(Entry::BounceEnd { op, imm: None });
        self.flush_answers(&mut outgoing);
    }

    fn push_bounce_end(&self, id: u64) -> bool {
        let mut outgoing = lock(&self.outgoing);
        let Some(op) = outgoing.awaiting.get(&id) else { return true };
        if matches!(op.payload, Payload::Message(_)) {
            return true;
        }
        let imm = bounce_imm(op.imm);
        let pushed = outgoing.producer.push(&Entry::BounceEnd { op: id, imm });
        self.notify(&outgoing);
        pushed
    }

    fn advance(&self, job: &mut Job) -> std::io::Result<Step> {
        match &job.op.payload {
            Payload::Signal => Ok(Step::Done),
            Payload::Message(bytes) => Ok(self.advance_message(job.op.id, bytes)),
            Payload::Write { source, binding, extents } => {
                let Some(target) = binding.target() else { return Ok(Step::Blocked) };
                if matches!(target, Target::Owner) {
                    return Ok(self.advance_bounce(job));
                }
                let (mut extent_idx, mut done) = (job.extent_idx, job.done);
                let chunk = Chunk { extents, extent_idx: &mut extent_idx, done: &mut done, left: CHUNK };
                self.place(source, target, chunk)?;
                let finished = extent_idx >= extents.num_extents();
                (job.extent_idx, job.done) = (extent_idx, done);
                Ok(if finished { Step::Done } else { Step::More })
            }
        }
    }

    fn advance_message(&self, op: u64, bytes: &[u8]) -> Step {
        let mut outgoing = lock(&self.outgoing);
        let Some((start, to)) = outgoing.producer.reserve(bytes.len()) else { return Step::Blocked };
        // SAFETY: `reserve` returned room for that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        // `reserve` made sure of room for the entry.
        outgoing.producer.push(&Entry::Message { op, start, nbytes: bytes.len() as u32 });
        self.notify(&outgoing);
        Step::Bounced
    }

    fn advance_bounce(&self, job: &mut Job) -> Step {
        let Payload::Write { source, binding, extents } = &job.op.payload else { return Step::Done };
        let mut outgoing = lock(&self.outgoing);
        let mut chunk = Chunk { extents, extent_idx: &mut job.extent_idx, done: &mut job.done, left: CHUNK };
        let mut moved = false;
        loop {
            let room = outgoing.producer.room().min(BOUNCE_BYTES);
            if room == 0 || !outgoing.producer.has_room() {
                break;
            }
            let Some(range) = chunk.next_at_most(room as u64) else { break };
            let Some((start, to)) = outgoing.producer.reserve(range.nbytes as usize) else { break };
            // SAFETY: inside the source, as the engine checked, and inside the reserved room.
            unsafe { copy(source.as_ptr().add(range.src as usize), to, range.nbytes as usize) };
            let (region, key) = (binding.region, binding.key);
            let nbytes = range.nbytes as u32;
            outgoing.producer.push(&Entry::Bounce { op: job.op.id, region, key, offset: range.dst, start, nbytes });
            moved = true;
        }
        if moved {
            self.notify(&outgoing);
        }
        match (job.extent_idx >= extents.num_extents(), moved) {
            (true, _) => Step::Bounced,
            (false, true) => Step::More,
            (false, false) => Step::Blocked,
        }
    }

    pub(super) fn system_failure(&self, error: &std::io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::ESRCH) => Failure::PeerLost("its process has exited".into()),
            _ => Failure::System(format!("process_vm_writev to process {}: {error}", self.pid)),
        }
    }

    /// The owner has read what lies where this goes; that line comes back while the rest is looked at. The count waits
    /// for it.
    #[inline]
    pub(super) fn ask_for_line(&self, write: &Inline<'_>, target: &Target) {
        if let (Target::Mapped(mapping), Extents::One(extent)) = (target, write.extents) {
            let dst = mapping.as_ptr().wrapping_add(extent.dst as usize);
            prefetch_for_write(dst);
            // ORDERING: a hint.
            self.last_dst.store(dst, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn place_all(&self, write: &Inline<'_>, target: &Target) -> std::io::Result<()> {
        if let (Target::Mapped(mapping), Extents::One(extent)) = (target, write.extents) {
            let (src, dst) = (write.source.as_ptr().cast_const(), mapping.as_ptr());
            // SAFETY: as in `place`, which would first look for more ranges.
            unsafe { copy(src.add(extent.src as usize), dst.add(extent.dst as usize), extent.nbytes as usize) };
            return Ok(());
        }
        let (mut extent_idx, mut done) = (0, 0);
        let chunk = Chunk { extents: write.extents, extent_idx: &mut extent_idx, done: &mut done, left: u64::MAX };
        self.place(write.source, target, chunk)
    }

    /// Carries a short write out in the caller's thread; `None` when it is none.
    pub(super) fn place_now(&self, op: &Op) -> Option<std::io::Result<()>> {
        let Payload::Write { source, binding, extents } = &op.payload else { return None };
        let target = binding.target().filter(|target| !matches!(target, Target::Owner))?;
        if op.nbytes() > INLINE_BYTES || op.ticket.given_up().is_some() {
            return None;
        }
        let (mut extent_idx, mut done) = (0, 0);
        let chunk = Chunk { extents, extent_idx: &mut extent_idx, done: &mut done, left: u64::MAX };
        Some(self.place(source, target, chunk))
    }

    /// Counts may wait for others, unless the ring is getting full.
    #[inline]
    fn notify_arrival(&self, outgoing: &mut Outgoing, count: u32) {
        let arrivals = if outgoing.producer.is_half_full() { 0 } else { count };
        self.notify_of(outgoing, arrivals);
    }

    #[inline]
    pub(super) fn push_arrival(&self, outgoing: &mut Outgoing, imm: Option<(Imm, u32)>) -> bool {
        let Some((imm, count)) = imm else { return true };
        let pushed = outgoing.producer.push_arrival(whole(imm), count);
        if pushed {
            self.notify_arrival(outgoing, count);
        }
        pushed
    }
}

/// Small operations are not stuck behind large ones, not even behind one whose
/// turn has just ended.
fn enqueue(queue: &mut VecDeque<Job>, job: Job, has_begun: bool) {
    let is_small = |job: &Job| job.op.nbytes() <= INLINE_BYTES;
    let num_small = queue.iter().take_while(|job| is_small(job)).count();
    let at = match (is_small(&job), has_begun) {
        (true, true) => 0,
        (true, false) | (false, true) => num_small,
        (false, false) => queue.len(),
    };
    queue.insert(at, job);
}

/// What is submitted while the link closes; why it does was said to what it found.
pub(super) fn given_up() -> Failure {
    Failure::PeerLost("it was given up".into())
}

/// Of what the peer, which reads this process's ring no more, would have to count.
pub(super) fn fenced() -> Failure {
    Failure::PeerLost("it has given this process up".into())
}

/// What one turn of a large operation came to.
enum Step {
    /// All bytes are placed.
    Done,
    /// All bytes are in the bounce area; the peer will answer.
    Bounced,
    /// There is more to do.
    More,
    /// There is more to do, and no room for it.
    Blocked,
}

fn whole(imm: Imm) -> WireImm {
    WireImm { imm, quarters: 4 }
}

fn bounce_imm(imm: Option<(Imm, u32)>) -> Option<(WireImm, u32)> {
    imm.map(|(imm, count)| (whole(imm), count))
}

thread_local! {
    static FOREIGN: std::cell::RefCell<Foreign> = std::cell::RefCell::default();
}

/// Bytes of a large operation copied in one turn: bounds how long arrivals and
/// other operations wait for the copying thread.
const CHUNK: u64 = 1 << 20;
/// Bytes of one bounced piece.
const BOUNCE_BYTES: usize = AREA / 4;

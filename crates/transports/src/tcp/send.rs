//! The sending half of a lane: operations become frames, frames become as few
//! system calls as possible.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyfabric_plan::Extents;
use anyfabric_wire::{Frame, FrameKind, Imm, Refusal, WireImm, FLAG_LAST, FLAG_VERIFY};

use super::lane::Lane;
use super::link::lock;
use crate::sys::check_len;
use crate::{BindingState, Failure, Op, Payload, Region};

/// An operation, shared by the lanes that carry parts of it.
#[derive(Debug)]
pub(super) struct Shared {
    op: Mutex<Option<Op>>,
    parts: AtomicU32,
    failure: Mutex<Option<Failure>>,
}

impl Shared {
    pub(super) fn new(op: Op, num_parts: u32) -> Self {
        Self { op: Mutex::new(Some(op)), parts: AtomicU32::new(num_parts), failure: Mutex::default() }
    }

    /// Why the operation should not go on, if so.
    pub(super) fn given_up(&self) -> Option<Failure> {
        if let Some(failure) = lock(&self.failure).clone() {
            return Some(failure);
        }
        let op = lock(&self.op);
        let op = op.as_ref()?;
        op.ticket.given_up().or_else(|| match &op.payload {
            Payload::Write { binding, .. } => match binding.state() {
                BindingState::Refused(refusal) => Some(Failure::Refused(refusal)),
                _ => None,
            },
            _ => None,
        })
    }

    /// Notes the lost count of an operation that was given up but may yet arrive.
    pub(super) fn note_loss(&self) {
        if let Some(op) = lock(&self.op).as_ref() {
            if let (Some(_), Some((imm, _))) = (op.ticket.given_up(), op.imm) {
                op.losses.note(imm);
            }
        }
    }

    fn part_ended(&self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            // The owner learns of the first failure at once; the rest only quiesces.
            if let Some(op) = lock(&self.op).as_ref() {
                op.ticket.fail(failure.clone());
            }
            lock(&self.failure).get_or_insert(failure);
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
        self.shared.part_ended(result);
    }
}

/// Handed over by submitting threads.
#[derive(Debug, Default)]
pub(super) struct Submitted {
    pub(super) controls: VecDeque<(u64, Vec<u8>)>,
    pub(super) acks: Vec<u8>,
    pub(super) small: VecDeque<Arc<Part>>,
    pub(super) bulk: VecDeque<Arc<Part>>,
}

impl Submitted {
    fn is_empty(&self) -> bool {
        self.controls.is_empty() && self.acks.is_empty() && self.small.is_empty() && self.bulk.is_empty()
    }

    pub(super) fn drain(&mut self, parts: &mut Vec<Arc<Part>>) {
        parts.extend(self.small.drain(..));
        parts.extend(self.bulk.drain(..));
    }
}

/// Being sent.
#[derive(Debug, Default)]
pub(super) struct Send {
    /// The large operation whose frames go out, and how far it has come.
    current: Option<Cursor>,
    /// Large operations that wait.
    bulk: VecDeque<Arc<Part>>,
    /// Sent whole; the peer will acknowledge.
    pub(super) awaiting: HashMap<u64, Arc<Part>>,
    /// Bytes on their way into the socket.
    batch: Batch,
}

#[derive(Debug)]
struct Cursor {
    part: Arc<Part>,
    extent_idx: usize,
    done: u64,
}

/// Frames that go out together.
#[derive(Debug, Default)]
struct Batch {
    /// Headers, page tables and small payloads, in order.
    head: Vec<u8>,
    pieces: Vec<Piece>,
    /// First piece that is not yet sent whole, and how much of it is.
    piece_idx: usize,
    piece_done: usize,
    nbytes: usize,
    /// Sources that pieces point into.
    holds: Vec<Arc<Part>>,
    /// Room for the ranges of the frame being made: source, destination, bytes.
    ranges: Vec<(u64, u64, u64)>,
    /// Room for one system call's list.
    iovs: Vec<libc::iovec>,
}

#[derive(Debug, Clone, Copy)]
enum Piece {
    /// Bytes of `Batch::head`.
    Head { start: usize, nbytes: usize },
    /// Bytes of a held source.
    Memory { address: *const u8, nbytes: usize },
}

// SAFETY: the pointers lead into regions and messages that `Batch::holds` keeps alive.
unsafe impl std::marker::Send for Batch {}

impl Send {
    pub(super) fn drain(&mut self, parts: &mut Vec<Arc<Part>>) {
        parts.extend(self.current.take().map(|cursor| cursor.part));
        parts.extend(self.bulk.drain(..));
        parts.extend(self.awaiting.drain().map(|(_, part)| part));
        self.batch = Batch::default();
    }

    /// Ends what was given up before any of it was sent; notes the counts of
    /// what was sent already.
    pub(super) fn reap(&mut self, ended: &mut Vec<(Arc<Part>, Failure)>) {
        self.bulk.retain(|part| match part.shared.given_up() {
            Some(why) => {
                ended.push((Arc::clone(part), why));
                false
            }
            None => true,
        });
        for part in self.awaiting.values() {
            part.shared.note_loss();
        }
    }
}

impl Lane {
    /// Sends as much as the socket takes, at most `max_batches` batches. True
    /// when something moved; `pending` says whether there is more.
    ///
    /// # Errors
    /// The system's: the stream is broken.
    pub(super) fn flush(&self, max_batches: usize) -> io::Result<bool> {
        let mut moved = false;
        // Whoever holds the lock looks again after giving it back, so that
        // nothing submitted meanwhile stays behind.
        while let Ok(mut send) = self.send.try_lock() {
            let (mut more, mut blocked) = (true, false);
            for _ in 0..max_batches {
                if send.batch.is_sent() {
                    self.assemble(&mut send);
                    if send.batch.is_sent() {
                        more = false;
                        break;
                    }
                }
                match send.batch.send(self.raw()) {
                    Ok(()) => moved = true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        blocked = true;
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            // ORDERING: under the lock; a submitter that comes later sets it again.
            self.pending.store(more, Ordering::Release);
            self.set_blocked(blocked);
            drop(send);
            if more || lock(&self.submitted).is_empty() {
                break;
            }
        }
        Ok(moved)
    }

    /// Makes the next batch: acknowledgements, control messages, small
    /// operations, then one frame of a large one.
    fn assemble(&self, send: &mut Send) {
        let Send { current, bulk, awaiting, batch } = send;
        batch.clear();
        {
            let mut submitted = lock(&self.submitted);
            batch.acks(&mut submitted.acks);
            while let Some((sequence, bytes)) = submitted.controls.pop_front() {
                batch.control(sequence, &bytes);
            }
            while batch.pieces.len() < MAX_PIECES && batch.nbytes < BATCH_BYTES {
                let Some(part) = submitted.small.pop_front() else { break };
                match part.shared.given_up() {
                    Some(why) => part.end(Err(why)),
                    None => {
                        let mut cursor = Cursor { part, extent_idx: 0, done: 0 };
                        batch.hold(&cursor.part);
                        while !batch.frame(&mut cursor) {}
                        awaiting.insert(cursor.part.op, cursor.part);
                    }
                }
            }
            bulk.append(&mut submitted.bulk);
        }
        if batch.nbytes >= BATCH_BYTES {
            return;
        }
        while let Some(mut cursor) = current.take().or_else(|| bulk.pop_front().map(Cursor::new)) {
            // Between frames an operation may be given up: the peer never sees its last frame and so neither
            // acknowledges nor counts it.
            if let Some(why) = cursor.part.shared.given_up() {
                cursor.part.end(Err(why));
                continue;
            }
            batch.hold(&cursor.part);
            if batch.frame(&mut cursor) {
                awaiting.insert(cursor.part.op, cursor.part);
            } else {
                *current = Some(cursor);
            }
            break;
        }
    }
}

impl Cursor {
    fn new(part: Arc<Part>) -> Self {
        Self { part, extent_idx: 0, done: 0 }
    }
}

impl Batch {
    fn is_sent(&self) -> bool {
        self.piece_idx == self.pieces.len()
    }

    fn clear(&mut self) {
        self.head.clear();
        self.pieces.clear();
        self.holds.clear();
        (self.piece_idx, self.piece_done, self.nbytes) = (0, 0, 0);
    }

    fn hold(&mut self, part: &Arc<Part>) {
        self.holds.push(Arc::clone(part));
    }

    fn push_head(&mut self, bytes: &[u8]) {
        let start = self.head.len();
        self.head.extend_from_slice(bytes);
        self.nbytes += bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Head { nbytes, .. }) => *nbytes += bytes.len(),
            _ => self.pieces.push(Piece::Head { start, nbytes: bytes.len() }),
        }
    }

    fn push_memory(&mut self, address: *const u8, nbytes: usize) {
        self.nbytes += nbytes;
        match self.pieces.last_mut() {
            Some(Piece::Memory { address: last, nbytes: len }) if last.wrapping_add(*len) == address => {
                *len += nbytes;
            }
            _ => self.pieces.push(Piece::Memory { address, nbytes }),
        }
    }

    fn acks(&mut self, acks: &mut Vec<u8>) {
        for records in acks.chunks(Frame::ACK_BYTES * MAX_ACKS) {
            self.push_head(&Frame::new(FrameKind::Ack, 0, records.len() as u32).encode());
            self.push_head(records);
        }
        acks.clear();
    }

    fn control(&mut self, sequence: u64, bytes: &[u8]) {
        self.push_head(&Frame::new(FrameKind::Control, sequence, bytes.len() as u32).encode());
        self.push_head(bytes);
    }

    /// Adds the part's next frame; true when it was the last.
    fn frame(&mut self, cursor: &mut Cursor) -> bool {
        let part = Arc::clone(&cursor.part);
        let imm = part.imm.map(|(imm, count)| (WireImm { imm, quarters: 4 }, count));
        match &part.content {
            Content::Signal => {
                let frame = Frame { flags: FLAG_LAST, imm, ..Frame::new(FrameKind::Write, part.op, 0) };
                self.push_head(&frame.encode());
                true
            }
            Content::Message(bytes) => {
                let frame = Frame { flags: FLAG_LAST, ..Frame::new(FrameKind::Message, part.op, bytes.len() as u32) };
                self.push_head(&frame.encode());
                self.push_memory(bytes.as_ptr(), bytes.len());
                true
            }
            Content::Write { source, region, key, extents } => {
                let base = Frame {
                    region: *region,
                    key: *key,
                    num_parts: part.num_parts,
                    ..Frame::new(FrameKind::Write, part.op, 0)
                };
                let mut frame = match extents {
                    Extents::One(_) => self.plan_range(base, cursor, extents),
                    Extents::Pages { src, .. } if src.page_bytes() > FRAME_BYTES => {
                        self.plan_range(base, cursor, extents)
                    }
                    Extents::Pages { .. } => self.plan_pages(base, cursor, extents),
                };
                let is_last = cursor.extent_idx >= extents.num_extents();
                if is_last {
                    frame.flags |= FLAG_LAST;
                    frame.imm = imm;
                }
                self.push_write(frame, source, part.verify);
                is_last
            }
        }
    }

    /// The next bytes of one extent.
    fn plan_range(&mut self, base: Frame, cursor: &mut Cursor, extents: &Extents) -> Frame {
        self.ranges.clear();
        let extent = extents.nth(cursor.extent_idx);
        let nbytes = (extent.nbytes - cursor.done).min(FRAME_BYTES);
        let offset = extent.dst + cursor.done;
        let range = (extent.src + cursor.done, offset, nbytes);
        self.ranges.push(range);
        cursor.done += nbytes;
        if cursor.done == extent.nbytes {
            (cursor.extent_idx, cursor.done) = (cursor.extent_idx + 1, 0);
        }
        Frame { offset, nbytes: nbytes as u32, ..base }
    }

    /// The next pages.
    fn plan_pages(&mut self, base: Frame, cursor: &mut Cursor, extents: &Extents) -> Frame {
        let page_bytes = extents.nth(cursor.extent_idx).nbytes;
        let fit = (FRAME_BYTES / page_bytes.max(1)).clamp(1, MAX_FRAME_PAGES) as usize;
        let end = (cursor.extent_idx + fit).min(extents.num_extents());
        let num_pages = end - cursor.extent_idx;
        self.ranges.clear();
        for idx in cursor.extent_idx..end {
            let extent = extents.nth(idx);
            self.ranges.push((extent.src, extent.dst, extent.nbytes));
        }
        cursor.extent_idx = end;
        Frame {
            kind: FrameKind::Pages,
            num_pages: num_pages as u16,
            nbytes: (num_pages as u64 * page_bytes) as u32,
            page_bytes: page_bytes as u32,
            ..base
        }
    }

    /// Header, page table and payload of the ranges just planned.
    fn push_write(&mut self, mut frame: Frame, source: &Region, verify: bool) {
        let ranges = std::mem::take(&mut self.ranges);
        if verify {
            let mut crc = crc32fast::Hasher::new();
            for &(src, _, nbytes) in &ranges {
                // SAFETY: inside the source region, as the engine checked.
                crc.update(unsafe { std::slice::from_raw_parts(source.as_ptr().add(src as usize), nbytes as usize) });
            }
            frame.crc = crc.finalize();
            frame.flags |= FLAG_VERIFY;
        }
        self.push_head(&frame.encode());
        if frame.kind == FrameKind::Pages {
            for &(_, dst, _) in &ranges {
                self.push_head(&dst.to_le_bytes());
            }
        }
        for &(src, _, nbytes) in ranges.iter().filter(|range| range.2 > 0) {
            // SAFETY: inside the source region, as the engine checked.
            self.push_memory(unsafe { source.as_ptr().add(src as usize) }, nbytes as usize);
        }
        self.ranges = ranges;
    }

    /// Hands the rest of the batch to the socket.
    ///
    /// # Errors
    /// The system's; `WouldBlock` when it takes nothing.
    fn send(&mut self, fd: std::os::fd::RawFd) -> io::Result<()> {
        while !self.is_sent() {
            self.iovs.clear();
            let mut skip = self.piece_done;
            for piece in self.pieces[self.piece_idx..].iter().take(IOV_MAX) {
                let (address, nbytes) = match *piece {
                    Piece::Head { start, nbytes } => (self.head[start..].as_ptr(), nbytes),
                    Piece::Memory { address, nbytes } => (address, nbytes),
                };
                let base = address.wrapping_add(skip).cast_mut().cast();
                self.iovs.push(libc::iovec { iov_base: base, iov_len: nbytes - skip });
                skip = 0;
            }
            // SAFETY: an all-zero msghdr is valid.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = self.iovs.as_mut_ptr();
            message.msg_iovlen = self.iovs.len() as _;
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: every piece lies in `head` or in a source that `holds` keeps alive.
            let sent = check_len(unsafe { libc::sendmsg(fd, &raw const message, flags) })?;
            self.advance(sent);
        }
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        while self.piece_idx < self.pieces.len() {
            let (Piece::Head { nbytes, .. } | Piece::Memory { nbytes, .. }) = self.pieces[self.piece_idx];
            let left = nbytes - self.piece_done;
            if sent < left {
                self.piece_done += sent;
                return;
            }
            sent -= left;
            (self.piece_idx, self.piece_done) = (self.piece_idx + 1, 0);
        }
    }
}

/// The end of an operation, as the peer acknowledged it.
pub(super) fn acknowledged(lane: &Lane, op: u64, result: Result<(), Refusal>) -> Option<Arc<Part>> {
    let part = lock(&lane.send).awaiting.remove(&op)?;
    part.end(result.map_err(Failure::Refused));
    Some(part)
}

/// Payload of one frame: long enough to make system calls cheap, short enough
/// that other lanes get their turn.
///
/// MEASURED: benchmarks/records, perf tcp rows.
const FRAME_BYTES: u64 = 128 << 10;
/// Small operations join a batch up to this many bytes.
const BATCH_BYTES: usize = 128 << 10;
const MAX_FRAME_PAGES: u64 = 512;
const MAX_PIECES: usize = 256;
const MAX_ACKS: usize = 4096;
const IOV_MAX: usize = 1024;

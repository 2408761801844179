//! Frames that go out together: as few system calls as possible.

use std::io;
use std::sync::Arc;

use anyfabric_plan::Extents;
use anyfabric_wire::{Frame, FrameKind, WireImm, FLAG_LAST, FLAG_VERIFY};

use super::send::{Content, Cursor, Part};
use crate::sys::{check_len, IOV_MAX};
use crate::Region;

/// Frames that go out together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Headers, page tables and small payloads, in order.
    head: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
    /// First piece that is not yet sent whole, and how much of it is.
    piece_idx: usize,
    piece_done: usize,
    pub(super) nbytes: usize,
    /// Sources that pieces point into.
    holds: Vec<Arc<Part>>,
    /// Room for the ranges of the frame being made: source, destination, bytes.
    ranges: Vec<(u64, u64, u64)>,
    /// Room for one system call's list.
    iovs: Vec<libc::iovec>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Piece {
    /// Bytes of `Batch::head`.
    Head { start: usize, nbytes: usize },
    /// Bytes of a held source.
    Memory { address: *const u8, nbytes: usize },
}

// SAFETY: the pointers lead into regions and messages that `Batch::holds` keeps alive.
unsafe impl std::marker::Send for Batch {}

impl Batch {
    pub(super) fn is_sent(&self) -> bool {
        self.piece_idx == self.pieces.len()
    }

    /// Whether it is not acknowledgements and control messages alone.
    pub(super) fn has_parts(&self) -> bool {
        !self.holds.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.head.clear();
        self.pieces.clear();
        self.holds.clear();
        (self.piece_idx, self.piece_done, self.nbytes) = (0, 0, 0);
    }

    pub(super) fn hold(&mut self, part: &Arc<Part>) {
        if self.holds.last().is_none_or(|last| !Arc::ptr_eq(last, part)) {
            self.holds.push(Arc::clone(part));
        }
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

    pub(super) fn acks(&mut self, acks: &mut Vec<u8>) {
        for records in acks.chunks(Frame::ACK_BYTES * MAX_ACKS) {
            self.push_head(&Frame::new(FrameKind::Ack, 0, records.len() as u32).encode());
            self.push_head(records);
        }
        acks.clear();
    }

    pub(super) fn control(&mut self, sequence: u64, bytes: &[u8]) {
        self.push_head(&Frame::new(FrameKind::Control, sequence, bytes.len() as u32).encode());
        self.push_head(bytes);
    }

    /// Adds the end of a part of which no more comes. It names no region, so the peer refuses it: what was placed of the
    /// operation is not counted, whatever its other parts bring.
    pub(super) fn withdrawal(&mut self, part: &Part) {
        let nothing = Frame::new(FrameKind::Write, part.op, 0);
        let frame = Frame { flags: FLAG_LAST, region: NO_REGION, num_parts: part.num_parts, ..nothing };
        self.push_head(&frame.encode());
    }

    /// Adds the part's next frame, which keeps within `max_bytes` where it can;
    /// true when it was the last.
    pub(super) fn frame(&mut self, cursor: &mut Cursor, max_bytes: usize) -> bool {
        let max_bytes = FRAME_BYTES.min(max_bytes as u64);
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
                    Extents::One(_) => self.plan_range(base, cursor, extents, max_bytes),
                    Extents::Pages { lists, .. } if cursor.done > 0 || lists.src.page_bytes() > max_bytes => {
                        self.plan_range(base, cursor, extents, max_bytes)
                    }
                    Extents::Pages { .. } => self.plan_pages(base, cursor, extents, max_bytes),
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
    fn plan_range(&mut self, base: Frame, cursor: &mut Cursor, extents: &Extents, max_bytes: u64) -> Frame {
        self.ranges.clear();
        let extent = extents.nth(cursor.extent_idx);
        let nbytes = (extent.nbytes - cursor.done).min(max_bytes);
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
    fn plan_pages(&mut self, base: Frame, cursor: &mut Cursor, extents: &Extents, max_bytes: u64) -> Frame {
        let page_bytes = extents.nth(cursor.extent_idx).nbytes;
        let fit = (max_bytes / page_bytes.max(1)).clamp(1, MAX_FRAME_PAGES) as usize;
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
                unsafe { source.add_to(&mut crc, src, nbytes as usize) };
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
    pub(super) fn send(&mut self, fd: std::os::fd::RawFd) -> io::Result<()> {
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

/// Payload of one frame: long enough to make system calls cheap, short enough
/// that other lanes get their turn.
///
/// MEASURED: benchmarks/records, perf tcp rows.
const FRAME_BYTES: u64 = 128 << 10;
const MAX_FRAME_PAGES: u64 = 512;
const MAX_ACKS: usize = 4096;
/// Regions are counted from 1; 0 is said where only an immediate goes.
const NO_REGION: u64 = u64::MAX;

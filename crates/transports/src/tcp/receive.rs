//! The receiving half of a lane: payload goes straight to where it belongs.
//!
//! A small staging buffer takes headers and page tables. While a payload is
//! under way every read scatters into the region first and into the staging
//! buffer last, so that one system call ends a frame and begins the next.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use anyfabric_wire::{Frame, FrameKind, Refusal};

use super::lane::Lane;
use super::link::TcpLink;
use crate::sys::{check_len, IOV_MAX};
use crate::{lock, PeerIdx, Region, Sink};

/// What a lane is receiving.
#[derive(Debug)]
pub(super) struct Receive {
    staging: Box<[u8]>,
    /// Bytes of `staging` that are filled and not yet taken.
    start: usize,
    end: usize,
    body: Option<Body>,
    /// Operations of which a frame was refused and the last has not come.
    refused: HashMap<u64, Refusal>,
    /// Room for one system call's list.
    iovs: Vec<libc::iovec>,
}

// SAFETY: the list is filled anew for every system call.
unsafe impl Send for Receive {}

/// A frame whose header has been read.
#[derive(Debug)]
struct Body {
    frame: Frame,
    place: Place,
    done: usize,
}

/// Where a payload goes.
#[derive(Debug)]
enum Place {
    /// Into a region: destination offsets of ranges of equal length.
    Region { region: Arc<Region>, offsets: Vec<u64>, range_bytes: usize },
    /// Into memory of our own.
    Buffer(Vec<u8>),
    /// Nowhere: the operation was refused.
    Discard(Refusal),
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            staging: vec![0; STAGING].into_boxed_slice(),
            start: 0,
            end: 0,
            body: None,
            refused: HashMap::new(),
            iovs: Vec::new(),
        }
    }
}

impl Receive {
    /// Nothing more is placed.
    pub(super) fn abandon(&mut self) {
        (self.start, self.end, self.body) = (0, 0, None);
    }

    /// From now on nothing of this lane lands in `region`.
    pub(super) fn withhold(&mut self, peer: PeerIdx, region: &Region) {
        if let Some(Body { place, frame, .. }) = &mut self.body {
            if matches!(place, Place::Region { region: into, .. } if into.id == region.id) {
                if let Err(refusal) = region.check_peer(peer, frame.key) {
                    *place = Place::Discard(refusal);
                }
            }
        }
    }
}

impl Lane {
    /// Reads and places what has come, at most a turn's worth; returns how many
    /// bytes that were.
    ///
    /// # Errors
    /// The system's, the end of the stream, or a peer that sends garbage.
    pub(super) fn pump(&self, link: &TcpLink, sink: &dyn Sink) -> io::Result<usize> {
        let mut receive = lock(&self.receive);
        let receive = &mut *receive;
        let mut taken = 0;
        let turn_bytes = READ_BYTES.min(link.turn_bytes());
        while taken < turn_bytes {
            receive.parse(self, link, sink)?;
            let (read, asked) = receive.read(self, link, turn_bytes)?;
            taken += read;
            if read < asked {
                // The socket is empty, most likely; epoll says when it is not.
                break;
            }
        }
        receive.parse(self, link, sink)?;
        Ok(taken)
    }
}

impl Receive {
    /// One system call for about `max_bytes`; returns the bytes it brought and
    /// asked for.
    fn read(&mut self, lane: &Lane, link: &TcpLink, max_bytes: usize) -> io::Result<(usize, usize)> {
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let iovs = &mut self.iovs;
        iovs.clear();
        let mut body_bytes = 0;
        if let Some(body) = &mut self.body {
            body.recheck(link);
            body.fill(iovs, IOV_MAX - 1, max_bytes);
            body_bytes = iovs.iter().map(|iov| iov.iov_len).sum();
        }
        // With a long payload under way the staging buffer only takes what follows it.
        let complete = self.body.as_ref().is_none_or(|body| body.left() == body_bytes);
        if complete {
            let room = &mut self.staging[self.end..];
            iovs.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
        }
        let asked: usize = iovs.iter().map(|iov| iov.iov_len).sum();
        // SAFETY: an all-zero msghdr is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovs.as_mut_ptr();
        message.msg_iovlen = iovs.len() as _;
        // SAFETY: the ranges were checked against their region, which `body` holds; the rest is ours.
        let read = match check_len(unsafe { libc::recvmsg(lane.raw(), &raw mut message, libc::MSG_DONTWAIT) }) {
            Ok(0) if asked > 0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        let into_body = read.min(body_bytes);
        if let Some(body) = &mut self.body {
            body.done += into_body;
        }
        self.end += read - into_body;
        // Staging is a scrap: a full payload counts as a full read even when nothing followed it.
        Ok((read, if body_bytes > 0 { body_bytes.min(asked) } else { asked }))
    }

    /// Takes frames out of the staging buffer as far as they are whole.
    fn parse(&mut self, lane: &Lane, link: &TcpLink, sink: &dyn Sink) -> io::Result<()> {
        loop {
            if let Some(body) = &mut self.body {
                let staged = &self.staging[self.start..self.end];
                let taken = body.take(staged, &mut self.iovs);
                self.start += taken;
                if body.left() > 0 {
                    return Ok(());
                }
                if let Some(body) = self.body.take() {
                    self.finish(body, lane, link, sink)?;
                }
            }
            let staged = &self.staging[self.start..self.end];
            let Some((header, rest)) = staged.split_first_chunk::<{ Frame::HEADER }>() else { return Ok(()) };
            let frame = Frame::decode(header).map_err(invalid)?;
            let table_bytes = usize::from(frame.num_pages) * 8;
            let Some(table) = rest.get(..table_bytes) else { return Ok(()) };
            let place = link.place(&frame, table)?;
            self.start += Frame::HEADER + table_bytes;
            self.body = Some(Body { frame, place, done: 0 });
        }
    }

    fn finish(&mut self, body: Body, lane: &Lane, link: &TcpLink, sink: &dyn Sink) -> io::Result<()> {
        let Body { frame, place, .. } = body;
        if lane.idx == 0 && !matches!(frame.kind, FrameKind::Control | FrameKind::Ack) {
            link.note_small();
        }
        match (frame.kind, place) {
            (FrameKind::Control, Place::Buffer(bytes)) => link.on_control(frame.op, &bytes, sink),
            (FrameKind::Ack, Place::Buffer(bytes)) => link.on_acks(lane, &bytes),
            (FrameKind::Message, Place::Buffer(bytes)) => {
                link.acknowledge(lane, frame.op, sink.message(link.peer, bytes), sink)
            }
            (FrameKind::Message, _) => link.acknowledge(lane, frame.op, Err(Refusal::TooLarge), sink),
            (_, place) => {
                if let Err(refusal) = place.verify(&frame) {
                    if self.refused.len() >= MAX_REFUSED {
                        return Err(invalid("too many refused operations without an end"));
                    }
                    self.refused.entry(frame.op).or_insert(refusal);
                }
                if frame.is_last() {
                    let result = self.refused.remove(&frame.op).map_or(Ok(()), Err);
                    let result = link.on_write_end(&frame, result, sink);
                    link.acknowledge(lane, frame.op, result, sink)?;
                }
                Ok(())
            }
        }
    }
}

impl Body {
    fn left(&self) -> usize {
        self.frame.nbytes as usize - self.done
    }

    /// Turns to discarding when the region was closed or revoked meanwhile.
    fn recheck(&mut self, link: &TcpLink) {
        if let Place::Region { region, .. } = &self.place {
            if let Err(refusal) = region.check_peer(link.peer, self.frame.key) {
                self.place = Place::Discard(refusal);
            }
        }
    }

    /// Appends where the next bytes go, in at most `max` pieces of about
    /// `max_bytes` together.
    fn fill(&mut self, iovs: &mut Vec<libc::iovec>, max: usize, max_bytes: usize) {
        let (left, done) = (self.left().min(max_bytes), self.done);
        if left == 0 {
            return;
        }
        let whole = |address: *mut u8, nbytes: usize| libc::iovec { iov_base: address.cast(), iov_len: nbytes };
        match &mut self.place {
            Place::Buffer(bytes) => iovs.push(whole(bytes[done..].as_mut_ptr(), left)),
            Place::Discard(_) => DISCARD.with_borrow_mut(|scrap| {
                iovs.push(whole(scrap.as_mut_ptr(), left.min(scrap.len())));
            }),
            Place::Region { region, offsets, range_bytes } => {
                let (mut skip, mut room) = (done % *range_bytes, left);
                for &offset in &offsets[done / *range_bytes..] {
                    // SAFETY: `TcpLink::place` checked every range against the region.
                    let address = unsafe { region.as_ptr().add(offset as usize + skip) };
                    let nbytes = room.min(*range_bytes - skip);
                    let full = iovs.len() == max;
                    match iovs.last_mut() {
                        Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == address => {
                            last.iov_len += nbytes;
                        }
                        _ if full => break,
                        _ => iovs.push(whole(address, nbytes)),
                    }
                    (skip, room) = (0, room - nbytes);
                    if room == 0 {
                        break;
                    }
                }
            }
        }
    }

    /// Takes what is already in the staging buffer.
    fn take(&mut self, staged: &[u8], iovs: &mut Vec<libc::iovec>) -> usize {
        let mut taken = 0;
        while taken < staged.len() && self.left() > 0 {
            iovs.clear();
            self.fill(iovs, IOV_MAX, usize::MAX);
            for iov in iovs.iter() {
                let nbytes = iov.iov_len.min(staged.len() - taken);
                // SAFETY: `fill` returns memory that is ours to write; `staged` is checked.
                unsafe { std::ptr::copy_nonoverlapping(staged[taken..].as_ptr(), iov.iov_base.cast(), nbytes) };
                taken += nbytes;
                self.done += nbytes;
                if taken == staged.len() {
                    break;
                }
            }
        }
        taken
    }
}

impl Place {
    /// Whether the bytes were placed, and are those that were sent.
    fn verify(&self, frame: &Frame) -> Result<(), Refusal> {
        match self {
            Self::Discard(refusal) => Err(*refusal),
            Self::Region { region, offsets, range_bytes } if frame.is_verified() => {
                let mut crc = crc32fast::Hasher::new();
                for &offset in offsets {
                    // SAFETY: `TcpLink::place` checked every range against the region.
                    unsafe { region.add_to(&mut crc, offset, *range_bytes) };
                }
                if crc.finalize() == frame.crc {
                    Ok(())
                } else {
                    Err(Refusal::Checksum)
                }
            }
            _ => Ok(()),
        }
    }
}

impl TcpLink {
    /// Where a frame's payload goes; a refusal is a place too, for the bytes
    /// have to leave the stream.
    fn place(&self, frame: &Frame, table: &[u8]) -> io::Result<Place> {
        Ok(match frame.kind {
            FrameKind::Control | FrameKind::Ack => Place::Buffer(vec![0; frame.nbytes as usize]),
            FrameKind::Message if frame.nbytes > self.max_message_bytes => Place::Discard(Refusal::TooLarge),
            FrameKind::Message => Place::Buffer(vec![0; frame.nbytes as usize]),
            // Region 0 is none: an immediate alone.
            FrameKind::Write if frame.region == 0 && frame.nbytes == 0 => Place::Buffer(Vec::new()),
            FrameKind::Write | FrameKind::Pages => match self.admit(frame, table) {
                Ok((region, offsets)) => {
                    let range_bytes = match frame.kind {
                        FrameKind::Pages => frame.page_bytes as usize,
                        _ => frame.nbytes as usize,
                    };
                    Place::Region { region, offsets, range_bytes }
                }
                Err(refusal) => Place::Discard(refusal),
            },
        })
    }

    fn admit(&self, frame: &Frame, table: &[u8]) -> Result<(Arc<Region>, Vec<u64>), Refusal> {
        let region = self.regions.admit_host(self.peer, frame.region, frame.key)?;
        let (offsets, nbytes) = match frame.kind {
            FrameKind::Pages => {
                let offsets = table.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
                (offsets, u64::from(frame.page_bytes))
            }
            _ => (vec![frame.offset], u64::from(frame.nbytes)),
        };
        let fits = |&offset: &u64| offset.checked_add(nbytes).is_some_and(|end| end <= region.nbytes());
        if offsets.iter().all(fits) {
            Ok((region, offsets))
        } else {
            Err(Refusal::OutOfBounds)
        }
    }
}

pub(super) fn invalid(why: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

thread_local! {
    static DISCARD: std::cell::RefCell<Box<[u8]>> = std::cell::RefCell::new(vec![0; 64 << 10].into_boxed_slice());
}

/// Room for the largest header and page table, and some small frames.
const STAGING: usize = 16 << 10;
/// Bytes read from one lane before the others get their turn.
const READ_BYTES: usize = 128 << 10;
const MAX_REFUSED: usize = 1024;

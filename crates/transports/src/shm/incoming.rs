//! The reading half of a link: entries of the peer's ring, and its messages on
//! the Unix socket. Everything here was written by another process.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_wire::{Access, Local, Refusal};

use super::link::{ShmLink, DRAIN};
use super::ring::{Consumer, Entry, AREA, ENTRIES};
use crate::copy::prefetch_for_write;
use crate::mutant::Mutant;
use crate::sys::{self, Fd, Mapping};
use crate::{copy, lock, Backing, Failure, Sink, Target};

pub(super) struct Incoming {
    pub(super) consumer: Consumer,
    /// Turns that brought something; every so many the peer counts as heard.
    pub(super) turns: u32,
    /// The peer's beats when last looked at.
    pub(super) beats: u32,
    /// Bounced operations of which a part was refused.
    pub(super) refused: HashMap<u64, Refusal>,
}

impl ShmLink {
    /// Takes what the peer has published, at most a turn's worth; how many entries that were.
    pub(super) fn drain_incoming(&self, sink: &dyn Sink) -> usize {
        let mut incoming = lock(&self.incoming);
        if !incoming.consumer.has_news() {
            incoming.consumer.publish_head(true);
            return 0;
        }
        // Who answers writes where it wrote before, and the peer has read that line meanwhile.
        // ORDERING: a hint.
        prefetch_for_write(self.last_dst.load(Ordering::Relaxed));
        let (mut num_taken, mut nbytes) = (0, 0);
        // A peer may refill its ring as fast as it is read, and others wait meanwhile.
        while num_taken < DRAIN && nbytes < AREA {
            match incoming.consumer.pop() {
                None => break,
                Some(Ok(entry)) => nbytes += self.take(entry, &mut incoming, sink),
                Some(Err(why)) => {
                    sink.broken(self.peer, Self::LOCAL, why);
                    break;
                }
            }
            num_taken += 1;
            incoming.consumer.publish_head(false);
        }
        incoming.turns = incoming.turns.wrapping_add(1);
        if incoming.turns % HEARD_TURNS == 1 {
            sink.heard(self.peer);
        }
        num_taken
    }

    /// What the peer published before its end still counts. That is no more than its ring holds: for somebody who goes on
    /// filling it nobody stays here.
    pub(super) fn drain_last(&self, sink: &dyn Sink) {
        let mut num_taken = 0;
        while num_taken < ENTRIES as usize {
            match self.drain_incoming(sink) {
                0 => break,
                num => num_taken += num,
            }
        }
    }

    /// Returns the bytes that were copied.
    #[inline]
    fn take(&self, entry: Entry, incoming: &mut Incoming, sink: &dyn Sink) -> usize {
        let Entry::Arrival { imm, count } = entry else {
            return self.take_other(entry, incoming, sink);
        };
        let times = if Mutant::DoublePart.is_on() { 2 } else { 1 };
        let quarters = u64::from(imm.quarters) * u64::from(count) * times;
        // A full table is told to the sender by the engine itself.
        let _ = sink.arrived(self.peer, imm.imm, quarters);
        0
    }

    /// A function of its own, for arrivals do not pay for what the others need.
    #[inline(never)]
    fn take_other(&self, entry: Entry, incoming: &mut Incoming, sink: &dyn Sink) -> usize {
        match entry {
            Entry::Arrival { .. } => {}
            Entry::Message { op, start, nbytes } => {
                let result = match incoming.consumer.payload(start, nbytes) {
                    None => Err(Refusal::OutOfBounds),
                    Some(payload) => {
                        let mut bytes = vec![0; nbytes as usize];
                        // SAFETY: `payload` is valid for `nbytes`; a peer that changes it now changes its own message.
                        unsafe { std::ptr::copy_nonoverlapping(payload, bytes.as_mut_ptr(), bytes.len()) };
                        sink.message(self.peer, bytes)
                    }
                };
                incoming.consumer.publish_head(true);
                self.answer(op, result, sink);
                return nbytes as usize;
            }
            Entry::Bounce { op, region, key, offset, start, nbytes } => {
                if let Err(refusal) = self.place_bounced(incoming, (region, key, offset), (start, nbytes)) {
                    if incoming.refused.len() >= MAX_REFUSED {
                        sink.broken(self.peer, Self::LOCAL, "too many refused operations without an end");
                        return 0;
                    }
                    incoming.refused.entry(op).or_insert(refusal);
                }
                incoming.consumer.publish_head(true);
                return nbytes as usize;
            }
            Entry::BounceEnd { op, imm } => {
                let result = incoming.refused.remove(&op).map_or(Ok(()), Err);
                let result = result.and_then(|()| match imm {
                    Some((imm, count)) => sink.arrived(self.peer, imm.imm, u64::from(imm.quarters) * u64::from(count)),
                    None => Ok(()),
                });
                self.answer(op, result, sink);
            }
            Entry::Answer { op, result } => {
                let awaited = lock(&self.outgoing).awaiting.remove(&op);
                if let Some(op) = awaited {
                    let result = result.map_err(Failure::Refused);
                    let result = result.and_then(|()| op.ticket.given_up().map_or(Ok(()), Err));
                    self.end(op, result);
                }
            }
        }
        0
    }

    pub(super) fn place_bounced(
        &self,
        incoming: &Incoming,
        (region, key, offset): (u64, u64, u64),
        (start, nbytes): (u32, u32),
    ) -> Result<(), Refusal> {
        let region = self.regions.admit_host(self.peer, region, key)?;
        let end = offset.checked_add(nbytes.into()).ok_or(Refusal::OutOfBounds)?;
        if end > region.nbytes() {
            return Err(Refusal::OutOfBounds);
        }
        let payload = incoming.consumer.payload(start, nbytes).ok_or(Refusal::OutOfBounds)?;
        // SAFETY: both ranges were checked; the table keeps the region alive through `region`.
        unsafe { copy(payload, region.as_ptr().add(offset as usize), nbytes as usize) };
        Ok(())
    }

    pub(super) fn answer(&self, op: u64, result: Result<(), Refusal>, sink: &dyn Sink) {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.answers.len() >= MAX_ANSWERS {
            drop(outgoing);
            return sink.overrun(self.peer, "it does not read its ring: more answers wait for it than are kept");
        }
        outgoing.answers.push_back(Entry::Answer { op, result });
        self.flush_answers(&mut outgoing);
    }

    pub(super) fn on_local(&self, message: Local, mut fds: Vec<Fd>) -> std::io::Result<()> {
        match message {
            Local::Import { request, region, key } => {
                let (result, fd) = match self.export(region, key) {
                    Ok((access, fd)) => (Ok(access), fd),
                    Err(refusal) => (Err(refusal), None),
                };
                self.send(&Local::Imported { request, result }, fd)
            }
            Local::Imported { request, result } => {
                let Some(binding) = lock(&self.bindings).answered(request) else { return Ok(()) };
                match result {
                    Err(refusal) => binding.refuse(refusal),
                    Ok(Access::Bounce) => binding.accept(Target::Owner),
                    Ok(Access::Foreign { .. }) if self.isolate => binding.accept(Target::Owner),
                    // Nobody but us checks where process_vm_writev ends.
                    Ok(Access::Foreign { address, nbytes })
                        if nbytes != binding.nbytes || address.checked_add(nbytes).is_none() =>
                    {
                        binding.refuse(Refusal::OutOfBounds);
                    }
                    Ok(Access::Foreign { address, .. }) => binding.accept(Target::Foreign(address)),
                    Ok(Access::Mapped { nbytes }) if nbytes != binding.nbytes => binding.refuse(Refusal::OutOfBounds),
                    Ok(Access::Mapped { nbytes }) => binding.accept(match fds.pop() {
                        Some(fd) => map_target(&fd, nbytes as usize)?,
                        // No descriptor was left to receive it with.
                        None => Target::Owner,
                    }),
                }
                Ok(())
            }
            Local::Probed { foreign } => {
                let _ = self.peer_writes_foreign.set(foreign);
                Ok(())
            }
            Local::Kick => Ok(()),
            Local::Join { .. } | Local::Joined { .. } => {
                Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "joined twice"))
            }
        }
    }

    pub(super) fn export(&self, region: u64, key: u64) -> Result<(Access, Option<Arc<Fd>>), Refusal> {
        if self.is_closed() {
            return Err(Refusal::Closing);
        }
        let region = self.regions.admit(self.peer, region, key)?;
        match region.backing() {
            Backing::Memfd { fd, .. } => {
                region.grant(self.peer, key)?;
                Ok((Access::Mapped { nbytes: region.nbytes() }, Some(Arc::clone(fd))))
            }
            Backing::Gpu { .. } => Err(Refusal::OnGpu),
            Backing::Foreign { address, .. } => {
                if self.isolate || self.peer_writes_foreign.get() != Some(&true) {
                    return Ok((Access::Bounce, None));
                }
                region.grant(self.peer, key)?;
                Ok((Access::Foreign { address: *address as u64, nbytes: region.nbytes() }, None))
            }
        }
    }
}

/// The mapping of a peer's region; its owner places the bytes where this process
/// has no addresses left.
fn map_target(fd: &Fd, len: usize) -> std::io::Result<Target> {
    sys::check_memfd(fd, len)?;
    match Mapping::shared(fd, len, len <= POPULATE) {
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => Ok(Target::Owner),
        mapping => mapping.map(Target::Mapped),
    }
}

/// Mappings up to this length are entered into the page table at once.
const POPULATE: usize = 256 << 20;
/// Bounced operations with a refused part that have not ended.
const MAX_REFUSED: usize = 1024;
/// Answers that a peer has not made room for in its ring. One that reads its ring before it writes more into ours leaves no
/// more than the rings hold, and the ends of our own operations.
const MAX_ANSWERS: usize = 1 << 16;
/// Turns with news between two notes that the peer lives.
const HEARD_TURNS: u32 = 256;

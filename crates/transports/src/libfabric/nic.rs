//! One NIC through libfabric.
//!
//! Each rail has an endpoint of its own, as long as the provider has some: to stop
//! one peer for good is to close the endpoint that it reaches. Rails that share
//! one break together. All endpoints of a NIC complete into one queue; what
//! arrives names its rail by a tag, or by its sender where an immediate has no
//! room for one.
//!
//! An operation that fails breaks its rail: the endpoint is closed, which also is
//! the only proof that nothing of the rail moves any more.

use std::collections::{HashMap, VecDeque};
use std::mem::ManuallyDrop;
use std::os::fd::RawFd;
use std::sync::Arc;

use anyfabric_plan::Extent;

use super::buffers::{Brought, Buffers, HEADER_BYTES};
use super::completions::Report;
use super::domain::{FabricDomain, FabricMemory};
use super::endpoint::{Endpoint, Queue};
use super::library::FabricError;
use super::posting::Writes;
use super::provider::{Arrivals, Provider};
use super::rail::{new_tag, Peer, Rail, RailAddress, MAX_RAILS};
use super::settings::FabricSettings;
use super::slots::Slots;
use super::sys::*;
use crate::rdma::{Batch, Completions, Domain, Fault, Marks, Nic, NicAbout, NicError, PortLook, RailIdx};

/// One NIC.
pub struct FabricNic {
    // Declared in the order in which the library's objects must be closed.
    pub(super) endpoints: Vec<Option<Open>>,
    pub(super) sends: Buffers,
    landing: Buffers,
    pub(super) queue: Queue,
    pub(super) domain: Arc<FabricDomain>,
    pub(super) about: NicAbout,
    pub(super) rails: Vec<Option<Rail>>,
    pub(super) by_source: HashMap<fi_addr_t, RailIdx>,
    pub(super) slots: Slots,
    pub(super) free_sends: Vec<u32>,
    /// Batches with a write that has completed and an immediate that has not been
    /// sent; one entry an immediate.
    pub(super) announcements: VecDeque<u32>,
    /// Receives that could not be posted again.
    pub(super) reposts: VecDeque<u32>,
    /// What was in the queue when an endpoint was closed, and what closing it ended,
    /// to be told at the next poll.
    pub(super) reports: VecDeque<Report>,
    /// Slots and endpoint numbers that completions in the queue may still name.
    pub(super) orphans: Vec<u32>,
    pub(super) resting: Vec<u16>,
    /// Numbers of endpoints that the library refused to close.
    pub(super) stuck: Vec<u16>,
    pub(super) entries: [fi_cq_data_entry; READ_BATCH],
    pub(super) sources: [fi_addr_t; READ_BATCH],
    pub(super) answer_timeout_ns: u64,
    pub(super) checked_ns: u64,
    /// Operations of all endpoints that have not completed.
    pub(super) under_way: u32,
    /// Polls until every endpoint that took no more has been looked at twice: once to
    /// let it try again, once to see whether it was tried.
    pub(super) unsettled: u8,
    /// Flags of every operation.
    pub(super) op_flags: u64,
    /// Immediates go with the writes.
    pub(super) has_write_data: bool,
    /// Operations that one endpoint takes at once.
    depth: u32,
    max_endpoints: usize,
    pub(super) num_receives: u32,
}

/// An endpoint that is open.
pub(super) struct Open {
    pub(super) endpoint: Endpoint,
    /// What was posted to it.
    pub(super) receives: ManuallyDrop<Buffers>,
    /// Operations that have not completed.
    pub(super) outstanding: u32,
    /// It took no more; cleared by the next poll.
    pub(super) is_blocked: bool,
    /// Since when nothing has completed although something should; 0 when nothing
    /// is waited for.
    pub(super) waiting_since_ns: u64,
    num_rails: u32,
}

impl Open {
    /// It took so many operations.
    #[inline]
    pub(super) fn posted(&mut self, count: u32) {
        if self.outstanding == 0 {
            self.waiting_since_ns = now_ns();
        }
        self.outstanding += count;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.endpoint.close() {
            // SAFETY: dropped once, here. An endpoint that is not closed may still write into them: they stay.
            unsafe { ManuallyDrop::drop(&mut self.receives) };
        }
    }
}

// SAFETY: the raw pointers are in the entries, which are read only right after the library wrote them.
unsafe impl Send for FabricNic {}

impl FabricNic {
    /// Opens a NIC.
    ///
    /// # Errors
    /// The library's.
    pub fn open(provider: Arc<Provider>, settings: &FabricSettings) -> Result<Self, NicError> {
        let device = |error: FabricError| NicError::Device(format!("{}: {error}", provider.nic));
        let domain = FabricDomain::open(Arc::clone(&provider)).map_err(device)?;
        // SAFETY: an entry has all attributes but the NIC's, for as long as it lives.
        let (mode, depth, max_endpoints, op_flags) = unsafe {
            let info = &*provider.info().as_ptr();
            let flags = if provider.quirks().acknowledges_writes { 0 } else { FI_DELIVERY_COMPLETE };
            (info.mode, (*info.tx_attr).size, (*info.domain_attr).ep_cnt, flags | FI_COMPLETION)
        };
        let max_endpoints =
            if domain.binds_memory() { 1 } else { max_endpoints.clamp(1, settings.max_endpoints.max(1)) };
        // Where immediates use up receives there must be many.
        let num_receives = if mode & FI_RX_CQ_DATA != 0 { 4 * RECEIVES } else { RECEIVES };
        // Room for all that can complete; and for what cannot be known, where it would be lost.
        let depth_for = |endpoints: usize| OPERATIONS as usize + (endpoints + SPARE) * num_receives as usize;
        let enough = depth_for(max_endpoints);
        let most = if provider.quirks().drops_completions { enough.max(DEEPEST_QUEUE) } else { enough };
        let depths =
            std::iter::successors(Some(most), |depth| Some(depth / 2)).take_while(|depth| *depth >= depth_for(1));
        let queue = Queue::open(&domain, depths, provider.arrivals == Arrivals::Sourced).map_err(device)?;
        let max_endpoints = (1..=max_endpoints).rev().find(|num| depth_for(*num) <= queue.depth()).unwrap_or(1);
        let endpoint = Endpoint::open(&domain, &queue).map_err(device)?;
        if domain.binds_memory() {
            domain.bind_to(endpoint.as_ptr())?;
        }
        let longest = endpoint.max_message_bytes(domain.library().version()).unwrap_or(usize::MAX);
        let about = NicAbout {
            name: provider.nic.clone(),
            manner: provider.manner(),
            gbps: provider.gbps.max(1),
            max_write_bytes: endpoint.max_write_bytes().min(MAX_WRITE_BYTES),
            max_message_bytes: MAX_MESSAGE_BYTES.min(longest.saturating_sub(HEADER_BYTES)),
            is_ordered: false,
            reaches_gpus: provider.reaches_gpus,
        };
        // Nothing fails once the queue is the NIC's: an endpoint beside that would be closed after it.
        let receives = new_receives(&domain, num_receives)?;
        let mut this = Self {
            endpoints: Vec::new(),
            sends: Buffers::new(&domain, SENDS as usize, HEADER_BYTES + MAX_MESSAGE_BYTES)?,
            landing: Buffers::landing(&domain, 64)?,
            queue,
            about,
            rails: Vec::new(),
            by_source: HashMap::new(),
            slots: Slots::new(OPERATIONS, (max_endpoints + SPARE) as u32 * num_receives),
            free_sends: (0..SENDS).collect(),
            announcements: VecDeque::with_capacity(OPERATIONS as usize),
            reposts: VecDeque::with_capacity(max_endpoints * num_receives as usize),
            reports: VecDeque::new(),
            orphans: Vec::new(),
            resting: Vec::new(),
            stuck: Vec::new(),
            // SAFETY: zeroes are an entry without meaning; none is read before the library wrote it.
            entries: unsafe { std::mem::zeroed() },
            sources: [FI_ADDR_UNSPEC; READ_BATCH],
            answer_timeout_ns: u64::try_from(settings.answer_timeout.as_nanos()).unwrap_or(u64::MAX),
            checked_ns: 0,
            under_way: 0,
            unsettled: 0,
            op_flags,
            has_write_data: provider.arrivals != Arrivals::Messages,
            depth: depth.clamp(1, OPERATIONS as usize) as u32,
            max_endpoints,
            num_receives,
            domain,
        };
        this.add_endpoint(0, endpoint, receives);
        Ok(this)
    }

    /// An endpoint for another rail: one without rails, a new one, or the one with
    /// the fewest.
    fn endpoint_for_rail(&mut self) -> Result<u16, NicError> {
        let open = || self.endpoints.iter().enumerate().filter_map(|(idx, open)| Some((idx, open.as_ref()?.num_rails)));
        let least = open().min_by_key(|(_, num_rails)| *num_rails).map(|(idx, num_rails)| (idx as u16, num_rails));
        match least {
            Some((idx, 0)) => Ok(idx),
            Some((idx, _)) if open().count() >= self.max_endpoints => Ok(idx),
            _ => match self.open_endpoint() {
                Ok(idx) => Ok(idx),
                // The provider promised more than it has.
                Err(error) => least.map(|(idx, _)| idx).ok_or(error),
            },
        }
    }

    fn open_endpoint(&mut self) -> Result<u16, NicError> {
        let name = self.about.name.clone();
        let failed = |error: FabricError| NicError::Device(format!("{name}: {error}"));
        self.mend_queue().map_err(failed)?;
        let endpoint = Endpoint::open(&self.domain, &self.queue).map_err(failed)?;
        let is_bound = if self.domain.binds_memory() { self.domain.bind_to(endpoint.as_ptr()) } else { Ok(()) };
        match is_bound.and_then(|()| self.prepare_endpoint()) {
            Ok((idx, receives)) => {
                self.add_endpoint(idx, endpoint, receives);
                Ok(idx)
            }
            Err(error) => {
                // Before it is closed: nothing may be bound to what is no more.
                self.domain.unbind();
                Err(error)
            }
        }
    }

    /// A number for another endpoint, and what it receives into.
    fn prepare_endpoint(&self) -> Result<(u16, Buffers), NicError> {
        let is_open = |idx: usize| self.endpoints.get(idx).is_some_and(Option::is_some);
        let is_taken =
            |idx: usize| is_open(idx) || self.resting.contains(&(idx as u16)) || self.stuck.contains(&(idx as u16));
        let idx = (0..self.max_endpoints + SPARE)
            .find(|idx| !is_taken(*idx))
            .ok_or_else(|| NicError::Device(format!("{}: endpoints are still being closed", self.about.name)))?;
        Ok((idx as u16, new_receives(&self.domain, self.num_receives)?))
    }

    fn add_endpoint(&mut self, idx: u16, endpoint: Endpoint, receives: Buffers) {
        let receives = ManuallyDrop::new(receives);
        let open = Open { endpoint, receives, outstanding: 0, is_blocked: false, waiting_since_ns: 0, num_rails: 0 };
        self.endpoints.resize_with(self.endpoints.len().max(usize::from(idx) + 1), || None);
        self.endpoints[usize::from(idx)] = Some(open);
        for receive in 0..self.num_receives {
            self.post_receive(OPERATIONS + u32::from(idx) * self.num_receives + receive, idx);
        }
    }

    /// Posts the receive of a slot, now or at a later poll; the library's error, positive, or 0.
    pub(super) fn post_receive(&mut self, slot: u32, endpoint: u16) -> isize {
        let open = self.endpoints.get(usize::from(endpoint)).and_then(Option::as_ref);
        let Some(open) = open.filter(|open| open.endpoint.is_open()) else { return 0 };
        self.slots.set_receive(slot, endpoint);
        let iov = open.receives.iovec((slot - OPERATIONS) % self.num_receives, usize::MAX);
        let mut desc = open.receives.memory().desc();
        let message = fi_msg {
            msg_iov: &raw const iov,
            desc: &raw mut desc,
            iov_count: 1,
            addr: FI_ADDR_UNSPEC,
            context: self.slots.context(slot),
            data: 0,
        };
        // SAFETY: the buffer and the context outlive the endpoint; the rest is read during the call.
        let code = -unsafe { open.endpoint.receive(&message) };
        if code != 0 {
            self.reposts.push_back(slot);
        }
        code
    }
}

impl Nic for FabricNic {
    type Domain = FabricDomain;

    fn domain(&self) -> &Arc<FabricDomain> {
        &self.domain
    }

    fn about(&self) -> &NicAbout {
        &self.about
    }

    fn port(&self) -> PortLook {
        let domain = Arc::clone(&self.domain);
        Box::new(move || domain.provider().is_up())
    }

    fn open(&mut self) -> Result<RailIdx, NicError> {
        // Not the number of one that was closed while what arrived on it is still to be told.
        let rests = |idx: usize| self.reports.iter().any(|report| report.rail() as usize == idx);
        let free = (0..self.rails.len()).find(|idx| self.rails[*idx].is_none() && !rests(*idx));
        let free = free.unwrap_or(self.rails.len());
        if free >= MAX_RAILS as usize {
            return Err(NicError::Device(format!("{}: {MAX_RAILS} rails are open", self.about.name)));
        }
        let (rail, endpoint) = (free as RailIdx, self.endpoint_for_rail()?);
        let tag = new_tag(rail)?;
        if let Some(open) = self.endpoints[usize::from(endpoint)].as_mut() {
            open.num_rails += 1;
        }
        self.rails.resize_with(self.rails.len().max(free + 1), || None);
        self.rails[free] = Some(Rail { endpoint, tag, peer: None, is_broken: false });
        Ok(rail)
    }

    fn address(&self, rail: RailIdx) -> Vec<u8> {
        let Some(rail) = self.rails.get(rail as usize).and_then(Option::as_ref) else { return Vec::new() };
        let Some(open) = self.endpoints[usize::from(rail.endpoint)].as_ref() else { return Vec::new() };
        let landing = FabricDomain::remote(self.landing.memory());
        RailAddress::new(self.domain.provider(), rail.tag, landing, open.endpoint.name()).encode()
    }

    fn connect(&mut self, rail: RailIdx, theirs: &[u8]) -> Result<(), NicError> {
        let no_rail = || NicError::Device(format!("{}: rail {rail} is not open", self.about.name));
        let state = self.rails.get_mut(rail as usize).and_then(Option::as_mut).ok_or_else(no_rail)?;
        let open = self.endpoints[usize::from(state.endpoint)].as_ref().ok_or_else(no_rail)?;
        let theirs = RailAddress::decode(theirs, self.domain.provider(), open.endpoint.name())?;
        let address = self.queue.insert(&theirs.name).ok_or_else(|| {
            NicError::Peer(format!("libfabric does not take its address ({} bytes)", theirs.name.len()))
        })?;
        if self.domain.provider().arrivals == Arrivals::Sourced {
            // Of two rails to one endpoint nobody could tell which an immediate is of.
            let first = *self.by_source.entry(address).or_insert(rail);
            if first != rail {
                self.queue.remove(address);
                return Err(NicError::Peer(format!("rail {first} goes to its endpoint already")));
            }
        }
        let RailAddress { tag, is_tagged, landing, .. } = theirs;
        state.peer = Some(Peer { address, tag, is_tagged, landing });
        Ok(())
    }

    fn fence(&mut self, rail: RailIdx) -> bool {
        let Some(state) = self.rails.get_mut(rail as usize).and_then(Option::as_mut) else { return true };
        let endpoint = state.endpoint;
        if !state.is_broken {
            self.close_endpoint(endpoint, Fault::Flushed, None, Some(rail));
        }
        !self.stuck.contains(&endpoint)
    }

    fn close(&mut self, rail: RailIdx) -> bool {
        let is_stopped = self.fence(rail);
        let Some(state) = self.rails.get_mut(rail as usize).and_then(Option::take) else { return is_stopped };
        if let Some(peer) = state.peer {
            self.by_source.remove(&peer.address);
            // An endpoint that is not closed may still look it up.
            if is_stopped {
                self.queue.remove(peer.address);
            }
        }
        let stays = |report: &Report| {
            matches!(report, Report::Arrived(..) | Report::Message(..) | Report::Broken(_, Fault::Missed(_)))
        };
        self.reports.retain(|report| report.rail() != rail || stays(report));
        is_stopped
    }

    #[inline]
    fn room(&self, rail: RailIdx) -> usize {
        let Some(rail) = self.rails.get(rail as usize).and_then(Option::as_ref) else { return 0 };
        match self.endpoints.get(usize::from(rail.endpoint)).and_then(Option::as_ref) {
            Some(open) if !rail.is_broken && !open.is_blocked && rail.peer.is_some() => {
                self.slots.num_free().min(self.depth.saturating_sub(open.outstanding) as usize)
            }
            _ => 0,
        }
    }

    fn post(&mut self, rail: RailIdx, batch: &Batch<'_, FabricMemory>) -> Result<usize, Fault> {
        let room = self.room(rail);
        let Some((endpoint, _, peer)) = self.parts(rail) else { return Err(Fault::Flushed) };
        let count = batch.writes.len().min(room);
        let imm = match batch.marks {
            Marks::None => 0,
            Marks::Each(imm) | Marks::Last(imm) => imm,
        };
        if count == 0 {
            return Ok(0);
        }
        let Some(idx) = self.slots.begin((rail, endpoint), batch.token, imm) else { return Ok(0) };
        let writes = Writes {
            peer: peer.address,
            source: batch.source.address(),
            desc: batch.source.desc(),
            target: batch.target,
            writes: &batch.writes[..count],
            num_in_batch: batch.writes.len(),
            marks: batch.marks,
            data: peer.data(imm),
        };
        let (posted, result) = self.submit_writes(endpoint, idx, &writes);
        self.posted(rail, idx, posted, result)
    }

    fn signal(&mut self, rail: RailIdx, imm: u32, token: u32) -> Result<bool, Fault> {
        let room = self.room(rail);
        let Some((endpoint, _, peer)) = self.parts(rail) else { return Err(Fault::Flushed) };
        if room == 0 {
            return Ok(false);
        }
        let Some(batch) = self.slots.begin((rail, endpoint), token, imm) else { return Ok(false) };
        let result = if self.has_write_data {
            let writes = Writes {
                peer: peer.address,
                source: 0,
                desc: std::ptr::null_mut(),
                target: peer.landing,
                writes: &[Extent { src: 0, dst: 0, nbytes: 0 }],
                num_in_batch: 1,
                marks: Marks::Each(imm),
                data: peer.data(imm),
            };
            self.submit_writes(endpoint, batch, &writes).1
        } else {
            self.submit_message(rail, Brought::Imm(imm), batch)
        };
        self.posted(rail, batch, usize::from(result == Ok(true)), result).map(|count| count > 0)
    }

    fn send(&mut self, rail: RailIdx, message: &[u8], token: u32) -> Result<bool, Fault> {
        let Some((endpoint, ..)) = self.parts(rail) else { return Err(Fault::Flushed) };
        if message.len() > self.about.max_message_bytes {
            return Err(Fault::Local(libc::EMSGSIZE as u32));
        }
        if self.room(rail) == 0 {
            return Ok(false);
        }
        let Some(batch) = self.slots.begin((rail, endpoint), token, 0) else { return Ok(false) };
        let result = self.submit_message(rail, Brought::Message(message), batch);
        self.posted(rail, batch, usize::from(result == Ok(true)), result).map(|count| count > 0)
    }

    fn flush(&mut self, rail: RailIdx) -> Result<(), Fault> {
        // Nothing is held back: the last write of a post never says that more follows.
        self.parts(rail).map(drop).ok_or(Fault::Flushed)
    }

    fn poll(&mut self, to: &mut impl Completions) -> bool {
        self.poll_queue(to)
    }

    fn event_fd(&self) -> Option<RawFd> {
        self.queue.event_fd()
    }

    fn arm(&mut self) -> bool {
        let is_idle = self.reports.is_empty() && self.announcements.is_empty() && self.reposts.is_empty();
        // That an endpoint takes more again is no event.
        is_idle && self.unsettled == 0 && self.queue.may_wait()
    }
}

impl Drop for FabricNic {
    fn drop(&mut self) {
        // An endpoint that memory is bound to cannot be closed.
        if self.domain.binds_memory() {
            self.domain.unbind();
        }
        let mut is_stuck = !self.stuck.is_empty();
        self.endpoints.iter_mut().flatten().for_each(|open| is_stuck |= !open.endpoint.close());
        if is_stuck {
            self.slots.keep_contexts();
            self.sends.keep_bytes();
            self.queue.keep();
        }
    }
}

/// What an endpoint receives into.
fn new_receives(domain: &Arc<FabricDomain>, num: u32) -> Result<Buffers, NicError> {
    Buffers::new(domain, num as usize, HEADER_BYTES + MAX_MESSAGE_BYTES)
}

/// A clock that costs a few nanoseconds and is right to some milliseconds.
pub(super) fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in a structure that lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    // Never 0, which means never.
    (now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64).max(1)
}

/// Operations under way on a NIC at most; slots beyond are receives.
pub(super) const OPERATIONS: u32 = 2048;
/// Completions taken at once: a turn of the driver costs as much as some dozen of them.
pub(super) const READ_BATCH: usize = 64;
/// Numbers of endpoints beyond those that are open: of some that were just closed.
const SPARE: usize = 8;
/// Receives of an endpoint.
const RECEIVES: u32 = 32;
/// Messages of a NIC on their way.
const SENDS: u32 = 64;
/// Completions that a queue holds at most.
const DEEPEST_QUEUE: usize = 1 << 16;
const MAX_MESSAGE_BYTES: usize = 4096;
/// A longer write would complete nothing for longer than a rail may be silent.
const MAX_WRITE_BYTES: u64 = 256 << 20;

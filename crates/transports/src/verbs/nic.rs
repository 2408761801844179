//! One port as a [`Nic`]: its queues and its rails.
//!
//! Every work request has a sequence number on its queue pair. Batches wait in
//! the order in which they were posted, each with the number of its last
//! request; a completion ends all up to its own number. After a fault the
//! device flushes what was posted, one completion a request.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::Extent;
use rustc_hash::FxHashMap;

use super::chain::{Chain, Request};
use super::device::VerbsDomain;
use super::events::Notice;
use super::memory::VerbsMemory;
use super::port::Port;
use super::qp::{End, QueuePair};
use super::rails::{id_of, manner, CompletionQueue, Kind, Rail, Waiting, MAX_RAILS};
use super::receives::{ImmReceives, MessageBuffers};
use super::sys::{self, SendWr, Sge, Wc};
use super::VerbsSettings;
use crate::copy::prefetch_for_write;
use crate::rdma::{Batch, Completions, Fault, Marks, Nic, NicAbout, NicError, One, PortLook, RailIdx, RemoteMemory};

/// One port of a device, driven through libibverbs.
pub struct VerbsNic {
    // Queue pairs go before the queues that they use.
    pub(super) rails: Vec<Rail>,
    pub(super) free: Vec<RailIdx>,
    pub(super) by_number: FxHashMap<u32, RailIdx>,
    pub(super) imms: ImmReceives,
    pub(super) messages: MessageBuffers,
    pub(super) queue: CompletionQueue,
    pub(super) domain: Arc<VerbsDomain>,
    port: Port,
    settings: VerbsSettings,
    pub(super) about: NicAbout,
    /// Requests of one rail that are held back.
    chain: Chain,
    held_for: RailIdx,
    /// Completions that the queue still has room for, beside those of receives.
    pub(super) budget: usize,
    /// Rails that broke while something was posted, to be reported.
    pub(super) faulty: Vec<RailIdx>,
    /// Completions that were taken out of the queue when a rail was closed, to be
    /// reported, each with the rail whose queue pair it is of.
    pub(super) aside: Vec<(Wc, Option<RailIdx>)>,
    /// Closed rails that those may be of; their numbers are free after that.
    pub(super) resting: Vec<RailIdx>,
    /// What broke the queues: every rail ends, and before the next one is made others take their place.
    pub(super) queue_fault: Option<Fault>,
    pub(super) completions: Box<[Wc; POLL]>,
}

// SAFETY: the raw pointers are to objects of libibverbs that this owns, which have no thread of their own, and to requests
// in boxes of its own, which stay where they are.
unsafe impl Send for VerbsNic {}

impl VerbsNic {
    pub(super) fn new(domain: Arc<VerbsDomain>, port: Port, settings: &VerbsSettings) -> Result<Self, NicError> {
        let queue = CompletionQueue::new(&domain)?;
        let imms = ImmReceives::new(&queue, id_of(Kind::Imm, 0, 0, 0))?;
        let messages = MessageBuffers::new(&queue, id_of(Kind::Message, 0, 0, 0))?;
        let about = NicAbout {
            name: if domain.attributes.phys_port_cnt > 1 {
                format!("{}:{}", domain.name, port.number)
            } else {
                domain.name.clone()
            },
            manner: manner(&port),
            gbps: port.gbps,
            max_write_bytes: port.max_message.into(),
            max_message_bytes: MessageBuffers::BYTES,
            is_ordered: true,
            reaches_gpus: true,
        };
        // SAFETY: the domain keeps its context open.
        let post_send = unsafe { (*domain.context).ops.post_send };
        let budget = queue.depth().saturating_sub(imms.depth + MessageBuffers::RECEIVES);
        Ok(Self {
            rails: Vec::new(),
            free: Vec::new(),
            by_number: FxHashMap::default(),
            imms,
            messages,
            queue,
            domain,
            port,
            settings: settings.clone(),
            about,
            chain: Chain::new(post_send),
            held_for: 0,
            budget,
            faulty: Vec::new(),
            aside: Vec::new(),
            resting: Vec::new(),
            queue_fault: None,
            completions: Box::new([Wc::default(); POLL]),
        })
    }

    pub(super) fn rail(&mut self, rail: RailIdx) -> Option<&mut Rail> {
        self.rails.get_mut(rail as usize).filter(|rail| rail.is_open)
    }

    /// Notes what broke a rail, once; the device flushes the rest.
    pub(super) fn break_rail(&mut self, rail: RailIdx, why: Fault) {
        let Some(broken) = self.rail(rail) else { return };
        if broken.fault.is_none() {
            broken.fault = Some(why);
            broken.stop();
            self.faulty.push(rail);
        }
    }

    /// Hands over what is held back, for whichever rail.
    fn hand_over(&mut self) -> Result<(), Fault> {
        let (rail, held) = (self.held_for, self.chain.len() as u32);
        if held == 0 {
            return Ok(());
        }
        let Some(Rail { pairs: Some((pair, _)), writes, .. }) = self.rails.get_mut(rail as usize) else {
            self.chain.clear();
            return Err(Fault::Flushed);
        };
        // SAFETY: the queue pair lives, the function is its device's, and registrations outlive what is posted.
        match unsafe { self.chain.post(pair.qp) } {
            Ok(()) => {
                writes.taken = writes.taken.wrapping_add(held);
                Ok(())
            }
            Err((taken, code)) => {
                writes.taken = writes.taken.wrapping_add(taken as u32);
                let fault = Fault::Local(code);
                self.break_rail(rail, fault);
                if taken > 0 {
                    // The one that was to be announced is not among them: what is placed already nothing would tell.
                    self.destroy(rail);
                }
                Err(fault)
            }
        }
    }

    /// Posts a request that is a batch, and hands it over: made with its number, and how many bytes may travel in it.
    #[inline]
    fn post_alone(
        &mut self,
        rail_idx: RailIdx,
        token: u32,
        request: impl FnOnce((u64, u32)) -> Request,
    ) -> Result<bool, Fault> {
        if self.held_for == rail_idx && self.chain.len() > 0 {
            self.hand_over()?;
        }
        let Some(rail) = self.rails.get_mut(rail_idx as usize) else { return Err(Fault::Flushed) };
        let Rail { fault: None, is_connected: true, pairs: Some((pair, _)), writes, .. } = rail else {
            return Err(rail.fault.unwrap_or(Fault::Flushed));
        };
        if writes.under_way() >= DEPTH || self.budget == 0 {
            return Ok(false);
        }
        let request = request((writes.id | u64::from(writes.next), pair.max_inline));
        writes.next = writes.next.wrapping_add(1);
        writes.batches.push_back(Waiting { token, end: writes.next, buffer: None });
        self.budget -= 1;
        // SAFETY: as in `hand_over`.
        match unsafe { self.chain.post_alone(pair.qp, &request) } {
            Ok(()) => writes.taken = writes.next,
            Err(code) => self.break_rail(rail_idx, Fault::Local(code)),
        }
        Ok(true)
    }

    /// Puts other queues in the place of those that broke, once all that used them has ended: its buffers are gone too.
    #[cold]
    fn renew_queues(&mut self) -> Result<(), NicError> {
        if !(self.faulty.is_empty() && self.aside.is_empty()) {
            return Err(NicError::Device(format!("{}: its queues broke", self.about.name)));
        }
        self.imms = ImmReceives::new(&self.queue, id_of(Kind::Imm, 0, 0, 0))?;
        self.messages = MessageBuffers::new(&self.queue, id_of(Kind::Message, 0, 0, 0))?;
        self.queue.renew()?;
        self.queue_fault = None;
        Ok(())
    }

    fn hold_for(&mut self, rail: RailIdx) {
        if self.held_for != rail {
            // A fault of the other rail is that rail's; it ends there.
            let _ = self.hand_over();
            self.held_for = rail;
        }
    }

    fn check(&self, rail: RailIdx) -> Result<&Rail, Fault> {
        match self.rails.get(rail as usize) {
            Some(Rail { fault: Some(fault), .. }) => Err(*fault),
            Some(found) if found.is_connected => Ok(found),
            _ => Err(Fault::Flushed),
        }
    }
}

impl Nic for VerbsNic {
    type Domain = VerbsDomain;

    fn domain(&self) -> &Arc<VerbsDomain> {
        &self.domain
    }

    fn about(&self) -> &NicAbout {
        &self.about
    }

    fn port(&self) -> PortLook {
        let (domain, number) = (Arc::clone(&self.domain), self.port.number);
        Box::new(move || {
            domain.hear();
            // ORDERING: see `hear`.
            let is_lost = domain.is_lost.load(Ordering::Relaxed);
            !is_lost && domain.query_port(number).is_ok_and(|port| port.state == sys::PORT_ACTIVE)
        })
    }

    fn announcements(&self) -> Option<RawFd> {
        Some(self.domain.announcements())
    }

    fn heed(&mut self) {
        for notice in self.queue.notices.take() {
            match notice {
                Notice::Queues(why) => drop(self.fail_queues(why)),
                Notice::Pair(number, why) => {
                    let rail = self.by_number.get(&number).copied();
                    rail.into_iter().for_each(|rail| self.break_rail(rail, why));
                }
            }
        }
        // That the device refused was said when it did so first.
        let _ = self.imms.make_up();
        let _ = self.messages.make_up();
    }

    fn open(&mut self) -> Result<RailIdx, NicError> {
        if self.rails.len() >= MAX_RAILS && self.free.is_empty() {
            return Err(NicError::Device(format!(
                "{}: {MAX_RAILS} rails are open, as many as can be",
                self.about.name
            )));
        }
        if self.queue_fault.is_some() {
            self.renew_queues()?;
        }
        self.port = self.domain.port(self.port.number, &self.settings)?;
        let pair = |receives, depth| QueuePair::new(&self.queue, receives, depth, &self.port, &self.settings);
        let writes = pair(self.imms.queue.srq, DEPTH)?;
        let messages = pair(self.messages.queue.srq, MESSAGES)?;
        let idx = self.free.pop().unwrap_or_else(|| {
            self.rails.push(Rail::default());
            self.rails.len() as RailIdx - 1
        });
        self.by_number.insert(writes.number(), idx);
        self.by_number.insert(messages.number(), idx);
        let rail = &mut self.rails[idx as usize];
        rail.life = rail.life.wrapping_add(1);
        (rail.pairs, rail.is_open) = (Some((writes, messages)), true);
        (rail.fault, rail.is_told) = (None, false);
        rail.writes.id = id_of(Kind::Write, rail.life, idx, 0);
        rail.messages.id = id_of(Kind::Send, rail.life, idx, 0);
        Ok(idx)
    }

    fn address(&self, rail: RailIdx) -> Vec<u8> {
        let Some(Rail { pairs: Some((writes, messages)), .. }) = self.rails.get(rail as usize) else {
            return Vec::new();
        };
        let end = End {
            is_ethernet: self.port.is_ethernet,
            mtu: self.port.mtu,
            lid: self.port.lid,
            gid: self.port.gid,
            is_roce_v2: self.port.is_roce_v2(),
            writes: (writes.number(), writes.psn),
            messages: (messages.number(), messages.psn),
        };
        end.encode()
    }

    fn connect(&mut self, rail: RailIdx, theirs: &[u8]) -> Result<(), NicError> {
        let end = End::decode(theirs)?;
        if end.is_ethernet != self.port.is_ethernet {
            let name = &self.about.name;
            return Err(NicError::Peer(format!("{name} and the peer's NIC are on Ethernet and InfiniBand")));
        }
        if end.is_roce_v2 != self.port.is_roce_v2() {
            // Both ends would connect, and nothing would ever come through.
            let version = |is_v2| if is_v2 { "v2" } else { "v1" };
            return Err(NicError::Peer(format!(
                "{} uses RoCE {} and the peer's NIC RoCE {}; choose GIDs of one version with `gid_index`",
                self.about.name,
                version(self.port.is_roce_v2()),
                version(end.is_roce_v2),
            )));
        }
        let (port, settings) = (self.port, self.settings.clone());
        let rail = self.rail(rail).ok_or_else(|| NicError::Device("the rail was closed".into()))?;
        if let Some((writes, messages)) = &rail.pairs {
            writes.connect(&port, &settings, &end, end.writes)?;
            messages.connect(&port, &settings, &end, end.messages)?;
        }
        rail.is_connected = true;
        Ok(())
    }

    fn fence(&mut self, rail: RailIdx) -> bool {
        if self.held_for == rail {
            let _ = self.hand_over();
        }
        self.break_rail(rail, Fault::Flushed);
        let Some(fenced) = self.rail(rail) else { return true };
        fenced.is_told |= !fenced.has_missed();
        fenced.stop() || self.destroy(rail)
    }

    fn close(&mut self, rail: RailIdx) -> bool {
        if self.held_for == rail {
            let _ = self.hand_over();
        }
        if self.rail(rail).is_none() {
            return true;
        }
        let is_stopped = self.destroy(rail);
        let closed = &mut self.rails[rail as usize];
        if is_stopped {
            for posted in [&mut closed.writes, &mut closed.messages] {
                self.budget += posted.under_way() as usize;
                posted.batches.drain(..).filter_map(|batch| batch.buffer).for_each(|buffer| {
                    self.messages.release(buffer);
                });
            }
        }
        // That something may be missing is told all the same.
        let fault = closed.fault.filter(|_| closed.has_missed() && !closed.is_told);
        *closed = Rail { life: closed.life, fault, is_stuck: !is_stopped, ..Rail::default() };
        if fault.is_none() {
            self.faulty.retain(|faulty| *faulty != rail);
        }
        // Completions of a stuck one may come at any time, and so its number is nobody's.
        if is_stopped {
            let is_free = self.aside.is_empty() && fault.is_none();
            if is_free { &mut self.free } else { &mut self.resting }.push(rail);
        }
        is_stopped
    }

    fn room(&self, rail: RailIdx) -> usize {
        let Some(rail) = self.rails.get(rail as usize) else { return 0 };
        (DEPTH.saturating_sub(rail.writes.under_way()) as usize).min(self.budget)
    }

    fn post(&mut self, rail: RailIdx, batch: &Batch<'_, VerbsMemory>) -> Result<usize, Fault> {
        self.check(rail)?;
        let count = batch.writes.len().min(self.room(rail));
        let Some(last) = count.checked_sub(1) else { return Ok(0) };
        self.hold_for(rail);
        let Rail { writes, pairs, .. } = &mut self.rails[rail as usize];
        let max_inline = pairs.as_ref().map_or(0, |(writes, _)| writes.max_inline);
        let (first, of_rail) = (writes.next, writes.id);
        writes.next = first.wrapping_add(count as u32);
        writes.batches.push_back(Waiting { token: batch.token, end: writes.next, buffer: None });
        self.budget -= count;
        let whole = count == batch.writes.len();
        for (idx, write) in batch.writes[..count].iter().enumerate() {
            if self.chain.is_full() && self.hand_over().is_err() {
                break;
            }
            let imm = match batch.marks {
                Marks::Each(imm) => Some(imm),
                Marks::Last(imm) if whole && idx == last => Some(imm),
                _ => None,
            };
            let id = of_rail | u64::from(first.wrapping_add(idx as u32));
            self.chain.push(&request((batch.source, batch.target), write, imm, (id, max_inline)));
        }
        Ok(count)
    }

    #[inline]
    fn post_one(&mut self, rail: RailIdx, one: &One<'_, VerbsMemory>) -> Result<bool, Fault> {
        self.post_alone(rail, one.token, |id| request((one.source, one.target), one.write, one.imm, id))
    }

    #[inline]
    fn signal(&mut self, rail: RailIdx, imm: u32, token: u32) -> Result<bool, Fault> {
        // No byte is written, so the key is not looked at (InfiniBand C9-88).
        let request = |(id, _)| Request { id, local: Sge::default(), remote: (0, 0), imm: Some(imm), is_inline: false };
        self.post_alone(rail, token, request)
    }

    #[inline]
    fn expect(&self, rail: RailIdx) {
        if let Some(Rail { pairs: Some((pair, _)), writes, .. }) = self.rails.get(rail as usize) {
            prefetch_for_write((&raw const *writes).cast());
            prefetch_for_write(pair.qp.cast());
        }
    }

    fn send(&mut self, rail: RailIdx, message: &[u8], token: u32) -> Result<bool, Fault> {
        let Rail { messages, .. } = self.check(rail)?;
        let (of_rail, sequence) = (messages.id, messages.next);
        if self.budget == 0 || messages.under_way() >= MESSAGES {
            return Ok(false);
        }
        let Some((buffer, mut sge)) = self.messages.fill(message) else { return Ok(false) };
        let mut request = SendWr {
            wr_id: of_rail | u64::from(sequence),
            sg_list: &raw mut sge,
            num_sge: 1,
            opcode: sys::WR_SEND,
            send_flags: sys::SEND_SIGNALED,
            ..SendWr::EMPTY
        };
        let Rail { messages, pairs, .. } = &mut self.rails[rail as usize];
        let Some((_, pair)) = pairs else { return Err(Fault::Flushed) };
        messages.next = sequence.wrapping_add(1);
        messages.batches.push_back(Waiting { token, end: messages.next, buffer: Some(buffer) });
        self.budget -= 1;
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair lives; request and piece live through the call, the buffer until its completion.
        let failed = unsafe { ((*self.domain.context).ops.post_send)(pair.qp, &raw mut request, &raw mut bad) };
        if failed == 0 {
            messages.taken = messages.next;
        } else {
            self.break_rail(rail, Fault::Local(failed.unsigned_abs()));
        }
        Ok(true)
    }

    fn flush(&mut self, rail: RailIdx) -> Result<(), Fault> {
        if self.held_for == rail {
            self.hand_over()?;
        }
        Ok(())
    }

    fn poll(&mut self, to: &mut impl Completions) -> bool {
        self.poll_queue(to)
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.queue.fd())
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
}

/// A write of its own number, of which so many bytes may travel in the request.
#[inline]
fn request(
    (source, target): (&VerbsMemory, RemoteMemory),
    write: &Extent,
    imm: Option<u32>,
    (id, max_inline): (u64, u32),
) -> Request {
    let length = write.nbytes as u32;
    Request {
        id,
        local: Sge { addr: source.base + write.src, length, lkey: source.lkey },
        remote: (target.base.wrapping_add(write.dst), target.key as u32),
        imm,
        // Inline bytes are copied by the CPU.
        is_inline: source.is_on_host && length <= max_inline,
    }
}

/// Work requests under way on one rail: at 11 million a second those of 11 µs.
///
/// Each goes into the next place of its queue's ring, so a scatter walks through the rings of all its peers. Those of 63,
/// of 64 bytes a place, are half a MiB, about what a core has for itself.
const DEPTH: u32 = 128;
/// Messages under way on one rail.
const MESSAGES: u32 = 16;
/// Completions taken at once.
pub(super) const POLL: usize = 32;

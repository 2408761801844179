//! Shared receive queues: what arrivals and messages use up.
//!
//! An immediate needs a receive without memory, a message one with a buffer.
//! Both are posted again in batches, long before they run out.

use std::alloc::Layout;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::device::VerbsDomain;
use super::memory::VerbsMemory;
use super::rails::CompletionQueue;
use super::sys::{RecvWr, Sge, Srq, SrqInitAttr};
use crate::rdma::NicError;

/// A shared receive queue; destroyed on drop.
pub(super) struct ReceiveQueue {
    domain: Arc<VerbsDomain>,
    pub(super) srq: *mut Srq,
}

/// Receives for immediates: without memory, each like the other.
pub(super) struct ImmReceives {
    pub(super) queue: ReceiveQueue,
    template: Box<[RecvWr; REFILL]>,
    used: usize,
    pub(super) depth: usize,
}

/// Buffers for messages: some to receive into, some to send from.
pub(super) struct MessageBuffers {
    pub(super) queue: ReceiveQueue,
    memory: VerbsMemory,
    bytes: ManuallyDrop<Buffers>,
    /// One a receive buffer.
    requests: Box<[RecvWr]>,
    // Pointed to by the requests.
    _sges: Box<[Sge]>,
    used: Vec<usize>,
    free: Vec<u32>,
}

/// Page-aligned memory that the NIC writes to.
struct Buffers {
    start: *mut u8,
    layout: Layout,
}

impl ReceiveQueue {
    fn new(queue: &CompletionQueue, depth: usize) -> Result<Self, NicError> {
        let domain = &queue.domain;
        let mut init =
            SrqInitAttr { srq_context: queue.notices.as_context(), max_wr: depth as u32, max_sge: 1, srq_limit: 0 };
        // SAFETY: the domain is open; the attributes live through the call.
        let srq = unsafe { (domain.library.create_srq)(domain.pd, &raw mut init) };
        if srq.is_null() {
            let error = std::io::Error::last_os_error();
            return Err(NicError::Device(format!("{}: no shared receive queue: {error}", domain.name)));
        }
        Ok(Self { domain: Arc::clone(domain), srq })
    }

    /// Posts a chain; an error has the first that was not taken.
    ///
    /// # Safety
    /// The chain from `first` is well formed, and its memory stays registered.
    unsafe fn post(&self, first: *mut RecvWr) -> Result<(), (*mut RecvWr, NicError)> {
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue lives; as promised by the caller.
        let failed = unsafe { ((*self.domain.context).ops.post_srq_recv)(self.srq, first, &raw mut bad) };
        if failed == 0 {
            return Ok(());
        }
        let error = std::io::Error::from_raw_os_error(failed);
        Err((bad, NicError::Device(format!("{}: receives cannot be posted: {error}", self.domain.name))))
    }
}

impl Drop for ReceiveQueue {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        // SAFETY: made in `new`, dropped once, after every queue pair that uses it.
        unsafe { (self.domain.library.destroy_srq)(self.srq) };
    }
}

impl ImmReceives {
    /// Creates and fills the queue; `id` comes back with every completion.
    pub(super) fn new(queue: &CompletionQueue, id: u64) -> Result<Self, NicError> {
        let most = usize::try_from(queue.domain.attributes.max_srq_wr).unwrap_or(0);
        // What is posted needs room in the queue too.
        let half = queue.depth().saturating_sub(MessageBuffers::RECEIVES) / 2;
        let depth = IMM_DEPTH.min(most).min(half).max(REFILL) / REFILL * REFILL;
        let queue = ReceiveQueue::new(queue, depth)?;
        let empty = RecvWr { wr_id: id, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 0 };
        let mut template = Box::new([empty; REFILL]);
        for idx in 1..REFILL {
            template[idx - 1].next = &raw mut template[idx];
        }
        let mut this = Self { queue, template, used: 0, depth };
        for _ in 0..depth / REFILL {
            this.refill()?;
        }
        Ok(this)
    }

    /// A receive was used up.
    #[inline]
    pub(super) fn take(&mut self) -> Result<(), NicError> {
        self.used += 1;
        if self.used < REFILL {
            return Ok(());
        }
        self.used -= REFILL;
        self.refill()
    }

    /// Posts what was refused before, for perhaps nothing arrives any more with which it would be posted.
    pub(super) fn make_up(&mut self) -> Result<(), NicError> {
        while self.used >= REFILL {
            self.used -= REFILL;
            self.refill()?;
        }
        Ok(())
    }

    #[cold]
    fn refill(&mut self) -> Result<(), NicError> {
        let first = self.template.as_mut_ptr();
        // SAFETY: the template is a well-formed chain that names no memory.
        unsafe { self.queue.post(first) }.map_err(|(bad, error)| {
            let taken = (bad as usize).wrapping_sub(first as usize) / std::mem::size_of::<RecvWr>();
            self.used += REFILL - taken.min(REFILL);
            error
        })
    }
}

impl MessageBuffers {
    /// Longest message.
    pub(super) const BYTES: usize = 8192;
    /// Receives.
    pub(super) const RECEIVES: usize = 128;
    const SENDS: usize = 64;

    /// Creates and fills the queue; `id` plus the buffer's number comes back
    /// with every completion.
    pub(super) fn new(completions: &CompletionQueue, id: u64) -> Result<Self, NicError> {
        let queue = ReceiveQueue::new(completions, Self::RECEIVES)?;
        let bytes = Buffers::new((Self::RECEIVES + Self::SENDS) * Self::BYTES)?;
        // SAFETY: the buffers live as long as the registration, which is dropped before them.
        let memory = unsafe { completions.domain.register_buffers(bytes.start, bytes.layout.size() as u64) }?;
        let sge = |idx: usize| Sge {
            addr: bytes.start as u64 + (idx * Self::BYTES) as u64,
            length: Self::BYTES as u32,
            lkey: memory.lkey,
        };
        let mut sges: Box<[Sge]> = (0..Self::RECEIVES).map(sge).collect();
        let request = |(idx, sge): (usize, &mut Sge)| RecvWr {
            wr_id: id + idx as u64,
            next: std::ptr::null_mut(),
            sg_list: &raw mut *sge,
            num_sge: 1,
        };
        let requests = sges.iter_mut().enumerate().map(request).collect();
        let free = (Self::RECEIVES..Self::RECEIVES + Self::SENDS).map(|idx| idx as u32).collect();
        let used = (0..Self::RECEIVES).collect();
        let bytes = ManuallyDrop::new(bytes);
        let mut this = Self { queue, memory, bytes, requests, _sges: sges, used, free };
        this.refill()?;
        Ok(this)
    }

    /// What came into a receive buffer, if it is one that was posted; [`MessageBuffers::give_back`] follows.
    pub(super) fn received(&self, idx: usize, nbytes: usize) -> Option<&[u8]> {
        if idx >= Self::RECEIVES || self.used.contains(&idx) {
            return None;
        }
        // SAFETY: inside the buffers; the NIC has completed the receive and will not write until it is posted again.
        Some(unsafe { std::slice::from_raw_parts(self.bytes.start.add(idx * Self::BYTES), nbytes.min(Self::BYTES)) })
    }

    /// A receive buffer may be used again.
    pub(super) fn give_back(&mut self, idx: usize) -> Result<(), NicError> {
        self.used.push(idx);
        self.make_up()
    }

    /// Posts what waits for that, if it is enough.
    pub(super) fn make_up(&mut self) -> Result<(), NicError> {
        if self.used.len() < Self::RECEIVES / 8 {
            return Ok(());
        }
        self.refill()
    }

    fn refill(&mut self) -> Result<(), NicError> {
        for pair in 0..self.used.len() {
            let next = self.used.get(pair + 1).map_or(std::ptr::null_mut(), |&next| &raw mut self.requests[next]);
            self.requests[self.used[pair]].next = next;
        }
        let Some(&first) = self.used.first() else { return Ok(()) };
        // SAFETY: a chain over distinct receives whose buffers live as long as the queue.
        let posted = unsafe { self.queue.post(&raw mut self.requests[first]) };
        let refused = |bad| self.used.iter().position(|idx| std::ptr::eq(&raw const self.requests[*idx], bad));
        let taken = posted.as_ref().err().and_then(|(bad, _)| refused(bad.cast_const()));
        self.used.drain(..taken.unwrap_or(self.used.len()));
        posted.map_err(|(_, error)| error)
    }

    /// Copies a message into a buffer; `None` when all are in use or it is too
    /// long.
    pub(super) fn fill(&mut self, message: &[u8]) -> Option<(u32, Sge)> {
        if message.len() > Self::BYTES {
            return None;
        }
        let idx = self.free.pop()?;
        // SAFETY: a send buffer that no work request uses, long enough.
        let at = unsafe { self.bytes.start.add(idx as usize * Self::BYTES) };
        // SAFETY: as above; the message is elsewhere.
        unsafe { at.copy_from_nonoverlapping(message.as_ptr(), message.len()) };
        Some((idx, Sge { addr: at as u64, length: message.len() as u32, lkey: self.memory.lkey }))
    }

    /// A send buffer may be used again.
    pub(super) fn release(&mut self, idx: u32) {
        self.free.push(idx);
    }
}

impl Drop for MessageBuffers {
    fn drop(&mut self) {
        if self.memory.end() {
            // SAFETY: dropped once, here. What the device does not forget it may still write to: that stays.
            unsafe { ManuallyDrop::drop(&mut self.bytes) };
        }
    }
}

impl Buffers {
    fn new(nbytes: usize) -> Result<Self, NicError> {
        let failed = || NicError::Device(format!("no memory for {nbytes} bytes of message buffers"));
        let layout = Layout::from_size_align(nbytes, PAGE).map_err(|_| failed())?;
        // SAFETY: the layout has a size.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            return Err(failed());
        }
        Ok(Self { start, layout })
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

/// Receives for immediates of one NIC.
const IMM_DEPTH: usize = 8192;
/// Receives posted at once.
const REFILL: usize = 64;
const PAGE: usize = 4096;

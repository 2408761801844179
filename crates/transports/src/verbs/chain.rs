//! Work requests that are handed to the device together.
//!
//! The requests are linked once and for all; posting a write patches the few
//! fields that differ. Only the last of a chain asks for a completion: on a
//! reliable connected queue pair it speaks for all before it. What goes alone
//! need not wait in the chain, and has a template of its own.

use std::ffi::c_int;

use super::sys::{self, Qp, SendWr, Sge};

/// A template of [`Chain::LEN`] work requests, of which the first `len` are
/// patched and wait.
pub(super) struct Chain {
    post: PostSend,
    requests: Box<[SendWr; Chain::LEN]>,
    // Pointed to by the requests.
    sges: Box<[Sge; Chain::LEN]>,
    len: usize,
    /// For a request that goes alone; the first points to the second.
    alone: Box<(SendWr, Sge)>,
}

/// One work request.
pub(super) struct Request {
    /// Given back by its completion.
    pub(super) id: u64,
    /// Address, length and key of the local bytes.
    pub(super) local: Sge,
    /// Address and key at the peer.
    pub(super) remote: (u64, u32),
    /// Given to the receiver, in host byte order.
    pub(super) imm: Option<u32>,
    /// Whether the bytes travel in the work request.
    pub(super) is_inline: bool,
}

impl Chain {
    /// Longest chain.
    pub(super) const LEN: usize = 32;

    /// For queue pairs of the device whose function `post` is.
    pub(super) fn new(post: PostSend) -> Self {
        let mut requests = Box::new([SendWr::EMPTY; Self::LEN]);
        let mut sges = Box::new([Sge::default(); Self::LEN]);
        for idx in 0..Self::LEN {
            requests[idx].sg_list = &raw mut sges[idx];
            if idx + 1 < Self::LEN {
                requests[idx].next = &raw mut requests[idx + 1];
            }
        }
        let mut alone = Box::new((SendWr::EMPTY, Sge::default()));
        alone.0.sg_list = &raw mut alone.1;
        Self { post, requests, sges, len: 0, alone }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_full(&self) -> bool {
        self.len == Self::LEN
    }

    /// Forgets what waits.
    pub(super) const fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds a write; the chain is not full.
    #[inline]
    pub(super) fn push(&mut self, request: &Request) {
        let idx = self.len;
        self.len += 1;
        request.patch(&mut self.requests[idx], &mut self.sges[idx]);
    }

    /// Hands one request over, whatever waits in the chain; an error is the device's code.
    ///
    /// # Safety
    /// As [`Chain::post`].
    #[inline]
    pub(super) unsafe fn post_alone(&mut self, qp: *mut Qp, request: &Request) -> Result<(), u32> {
        let (wr, sge) = &mut *self.alone;
        request.patch(wr, sge);
        wr.send_flags |= sys::SEND_SIGNALED;
        let mut bad = std::ptr::null_mut();
        // SAFETY: as promised by the caller; nothing is behind the request.
        match unsafe { (self.post)(qp, wr, &raw mut bad) } {
            0 => Ok(()),
            failed => Err(failed.unsigned_abs()),
        }
    }

    /// Hands the chain over; an error says how many of it were taken,
    /// and the device's code.
    ///
    /// # Safety
    /// `qp` lives, [`Chain::new`] was given its device's function, and the memory that
    /// the requests name stays registered until they have completed.
    pub(super) unsafe fn post(&mut self, qp: *mut Qp) -> Result<(), (usize, u32)> {
        let Some(last) = self.len.checked_sub(1) else { return Ok(()) };
        self.len = 0;
        let next = std::mem::replace(&mut self.requests[last].next, std::ptr::null_mut());
        self.requests[last].send_flags |= sys::SEND_SIGNALED;
        let mut bad = std::ptr::null_mut();
        let first = self.requests.as_mut_ptr();
        // SAFETY: as promised by the caller; the chain ends at `last`.
        let failed = unsafe { (self.post)(qp, first, &raw mut bad) };
        self.requests[last].next = next;
        if failed == 0 {
            return Ok(());
        }
        let taken = (bad as usize).wrapping_sub(first as usize) / std::mem::size_of::<SendWr>();
        Err((if taken <= last { taken } else { 0 }, failed.unsigned_abs()))
    }
}

impl Request {
    #[inline]
    fn patch(&self, wr: &mut SendWr, sge: &mut Sge) {
        wr.wr_id = self.id;
        wr.num_sge = (self.local.length > 0).into();
        wr.send_flags = if self.is_inline { sys::SEND_INLINE } else { 0 };
        match self.imm {
            Some(imm) => (wr.opcode, wr.imm_data) = (sys::WR_RDMA_WRITE_WITH_IMM, imm.to_be()),
            None => wr.opcode = sys::WR_RDMA_WRITE,
        }
        (wr.remote_addr, wr.rkey) = self.remote;
        *sge = self.local;
    }
}

/// `ibv_post_send` of a device.
pub(super) type PostSend = unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int;

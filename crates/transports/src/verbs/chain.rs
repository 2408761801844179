//! Work requests that are handed to the device together.
//!
//! The requests are linked once and for all; posting a write patches the few
//! fields that differ. Only the last of a chain asks for a completion: on a
//! reliable connected queue pair it speaks for all before it.

use std::ffi::c_int;

use super::fixed::Fixed;
use super::sys::{self, Qp, SendWr, Sge};

/// A template of [`Chain::LEN`] work requests, of which the first `len` are
/// patched and wait.
pub(super) struct Chain {
    // Each points to the next, and to its piece of memory.
    requests: Fixed<SendWr, { Chain::LEN }>,
    sges: Fixed<Sge, { Chain::LEN }>,
    len: usize,
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

    pub(super) fn new() -> Self {
        let (requests, sges) = (Fixed::new([SendWr::EMPTY; Self::LEN]), Fixed::new([Sge::default(); Self::LEN]));
        for idx in 0..Self::LEN {
            // SAFETY: the item is there, and only we have it.
            let request = unsafe { &mut *requests.at(idx) };
            request.sg_list = sges.at(idx);
            if idx + 1 < Self::LEN {
                request.next = requests.at(idx + 1);
            }
        }
        Self { requests, sges, len: 0 }
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
        // SAFETY: the item is there, and the device has it only while `post` runs.
        let wr = unsafe { &mut *self.requests.at(idx) };
        wr.wr_id = request.id;
        wr.num_sge = (request.local.length > 0).into();
        wr.send_flags = if request.is_inline { sys::SEND_INLINE } else { 0 };
        match request.imm {
            Some(imm) => (wr.opcode, wr.imm_data) = (sys::WR_RDMA_WRITE_WITH_IMM, imm.to_be()),
            None => wr.opcode = sys::WR_RDMA_WRITE,
        }
        (wr.remote_addr, wr.rkey) = request.remote;
        // SAFETY: as above.
        unsafe { self.sges.at(idx).write(request.local) };
    }

    /// Hands the chain over; an error says how many of it were taken,
    /// and the device's code.
    ///
    /// # Safety
    /// `qp` lives, `post` is its device's function, and the memory that the
    /// requests name stays registered until they have completed.
    pub(super) unsafe fn post(&mut self, post: PostSend, qp: *mut Qp) -> Result<(), (usize, u32)> {
        let Some(last) = self.len.checked_sub(1) else { return Ok(()) };
        self.len = 0;
        let (first, end) = (self.requests.at(0), self.requests.at(last));
        let mut bad = std::ptr::null_mut();
        // SAFETY: as promised by the caller; both items are there, and the chain ends at `last` while it is posted.
        let failed = unsafe {
            let next = std::mem::replace(&mut (*end).next, std::ptr::null_mut());
            (*end).send_flags |= sys::SEND_SIGNALED;
            let failed = post(qp, first, &raw mut bad);
            (*end).next = next;
            failed
        };
        if failed == 0 {
            return Ok(());
        }
        let taken = (bad as usize).wrapping_sub(first as usize) / std::mem::size_of::<SendWr>();
        Err((if taken <= last { taken } else { 0 }, failed.unsigned_abs()))
    }
}

/// `ibv_post_send` of a device.
pub(super) type PostSend = unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int;

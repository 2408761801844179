//! Operations on their way into an endpoint.

use std::ffi::c_void;

use super::buffers::Brought;
use super::endpoint::Endpoint;
use super::faults::{fault_of, is_unsupported};
use super::nic::{now_ns, FabricNic, Open};
use super::rail::Peer;
use super::slots::Use;
use super::sys::*;
use crate::rdma::{Fault, RailIdx};

/// One write, as the provider sees it.
pub(super) struct Write {
    pub(super) peer: fi_addr_t,
    pub(super) source: u64,
    pub(super) desc: *mut c_void,
    pub(super) address: u64,
    pub(super) key: u64,
    pub(super) nbytes: u64,
    pub(super) has_imm: bool,
    pub(super) data: u64,
}

impl FabricNic {
    /// The rail, its endpoint and its peer, if something may be posted on it.
    #[inline]
    pub(super) fn parts(&mut self, rail: RailIdx) -> Option<(u16, &mut Open, Peer)> {
        let rail = self.rails.get(rail as usize)?.as_ref().filter(|rail| !rail.is_broken)?;
        let open = self.endpoints.get_mut(usize::from(rail.endpoint))?.as_mut()?;
        Some((rail.endpoint, open, rail.peer?))
    }

    /// Posts one operation with `post`; false when the endpoint takes no more, else
    /// the library's error, positive.
    #[inline]
    pub(super) fn submit(
        &mut self,
        endpoint: u16,
        (what, batch): (Use, u32),
        post: impl FnOnce(&Endpoint, *mut c_void) -> isize,
    ) -> Result<bool, i32> {
        let Some(open) = self.endpoints[usize::from(endpoint)].as_mut() else { return Err(libc::ECANCELED) };
        let Some(slot) = self.slots.take(what, endpoint, batch) else { return Ok(false) };
        let code = -post(&open.endpoint, self.slots.context(slot));
        if code == 0 {
            if open.outstanding == 0 {
                open.waiting_since_ns = now_ns();
            }
            open.outstanding += 1;
            self.under_way += 1;
            self.slots.batch(batch).remaining += 1;
            return Ok(true);
        }
        self.slots.put_back(slot);
        if code == FI_EAGAIN {
            open.is_blocked = true;
            self.unsettled = 2;
            if open.waiting_since_ns == 0 {
                open.waiting_since_ns = now_ns();
            }
            return Ok(false);
        }
        Err(code as i32)
    }

    /// Posts a write of a batch.
    #[inline]
    pub(super) fn submit_write(&mut self, endpoint: u16, write: &Write, batch: u32, more: bool) -> Result<bool, Fault> {
        let iov = libc::iovec { iov_base: write.source as *mut _, iov_len: write.nbytes as usize };
        let mut desc = write.desc;
        let to = fi_rma_iov { addr: write.address, len: write.nbytes as usize, key: write.key };
        let mut message = fi_msg_rma {
            msg_iov: &raw const iov,
            desc: &raw mut desc,
            iov_count: usize::from(write.nbytes > 0),
            addr: write.peer,
            rma_iov: &raw const to,
            rma_iov_count: 1,
            context: std::ptr::null_mut(),
            data: write.data,
        };
        let with_imm = write.has_imm && self.has_write_data;
        let flags = self.op_flags | if with_imm { FI_REMOTE_CQ_DATA } else { 0 } | if more { FI_MORE } else { 0 };
        let what = if write.has_imm && !with_imm { Use::Announced } else { Use::Write };
        let result = self.submit(endpoint, (what, batch), |endpoint, context| {
            message.context = context;
            // SAFETY: the caller of `post` checked the bounds and keeps the memory; the message lives through the call.
            unsafe { endpoint.write(&message, flags) }
        });
        match result {
            Err(code) if with_imm && is_unsupported(code) => {
                // The provider has no immediates with writes after all: from now on they follow in messages.
                log::info!("{}: no immediates with writes ({code}); they are sent in messages", self.about.name);
                self.has_write_data = false;
                self.submit_write(endpoint, write, batch, more)
            }
            result => result.map_err(fault_of),
        }
    }

    /// Posts a message of a batch from a free send buffer.
    pub(super) fn submit_message(&mut self, rail: RailIdx, brought: Brought<'_>, batch: u32) -> Result<bool, Fault> {
        let Some((endpoint, _, peer)) = self.parts(rail) else { return Err(Fault::Flushed) };
        let Some(buffer) = self.free_sends.pop() else { return Ok(false) };
        let nbytes = self.sends.write(buffer, peer.tag, brought);
        let iov = self.sends.iovec(buffer, nbytes);
        let mut desc = self.sends.memory().desc();
        let mut message = fi_msg {
            msg_iov: &raw const iov,
            desc: &raw mut desc,
            iov_count: 1,
            addr: peer.address,
            context: std::ptr::null_mut(),
            data: 0,
        };
        let flags = self.op_flags;
        let result = self.submit(endpoint, (Use::Send(buffer), batch), |endpoint, context| {
            message.context = context;
            // SAFETY: the buffer is this operation's until it completes; the message lives through the call.
            unsafe { endpoint.send(&message, flags) }
        });
        if result != Ok(true) {
            self.free_sends.push(buffer);
        }
        result.map_err(fault_of)
    }

    /// Sends the immediate of a write that has completed, now or at a later poll.
    pub(super) fn announce(&mut self, batch: u32) {
        let (rail, endpoint, imm) = {
            let state = self.slots.batch(batch);
            (state.rail, state.endpoint, state.imm)
        };
        match self.submit_message(rail, Brought::Imm(imm), batch) {
            // The message has taken the place in the batch that was kept for it.
            Ok(true) => self.slots.batch(batch).remaining -= 1,
            Ok(false) => self.announcements.push_back(batch),
            Err(fault) => self.close_endpoint(endpoint, fault, Some(batch), None),
        }
    }

    /// Ends a post: of what was posted, how much; a fault breaks the rail, unless
    /// something was posted before it, which then ends the batch.
    pub(super) fn posted(
        &mut self,
        rail: RailIdx,
        batch: u32,
        count: usize,
        result: Result<bool, Fault>,
    ) -> Result<usize, Fault> {
        if count == 0 {
            self.slots.forget(batch);
        }
        if let Err(fault) = result {
            let endpoint = self.rails[rail as usize].as_ref().map(|rail| rail.endpoint);
            endpoint.into_iter().for_each(|endpoint| self.close_endpoint(endpoint, fault, Some(batch), None));
            if count == 0 {
                return Err(fault);
            }
        }
        Ok(count)
    }
}

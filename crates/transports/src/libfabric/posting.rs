//! Operations on their way into an endpoint.

use std::ffi::c_void;

use anyfabric_plan::Extent;

use super::buffers::Brought;
use super::endpoint::Endpoint;
use super::faults::{fault_of, is_unsupported};
use super::nic::{now_ns, FabricNic, Open};
use super::rail::Peer;
use super::slots::Use;
use super::sys::*;
use crate::rdma::{Fault, Marks, RailIdx, RemoteMemory};

/// Writes of one batch, as the provider sees them.
pub(super) struct Writes<'w> {
    pub(super) peer: fi_addr_t,
    /// Where the source begins, and what its registration is called.
    pub(super) source: u64,
    pub(super) desc: *mut c_void,
    pub(super) target: RemoteMemory,
    /// Those that there is room for, the first of `num_in_batch`.
    pub(super) writes: &'w [Extent],
    pub(super) num_in_batch: usize,
    pub(super) marks: Marks,
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
            open.posted(1);
            self.under_way += 1;
            self.slots.batch(batch).remaining += 1;
            return Ok(true);
        }
        self.slots.put_back(slot);
        self.refused(endpoint, code as i32)
    }

    /// Posts writes of a batch, in this order, as many as the endpoint takes: how
    /// many, and why no more.
    #[inline]
    pub(super) fn submit_writes(
        &mut self,
        endpoint: u16,
        batch: u32,
        writes: &Writes<'_>,
    ) -> (usize, Result<bool, Fault>) {
        let Some(open) = self.endpoints.get_mut(usize::from(endpoint)).and_then(Option::as_mut) else {
            return (0, Err(fault_of(libc::ECANCELED)));
        };
        let (mut posted, mut failed) = (0, None);
        while let Some(write) = writes.writes.get(posted) {
            let has_imm = match writes.marks {
                Marks::None => false,
                Marks::Each(_) => true,
                Marks::Last(_) => posted + 1 == writes.num_in_batch,
            };
            let with_imm = has_imm && self.has_write_data;
            let what = if has_imm && !with_imm { Use::Announced } else { Use::Write };
            let Some(slot) = self.slots.take(what, endpoint, batch) else { break };
            let (base, nbytes) = (writes.source + write.src, write.nbytes as usize);
            let iov = libc::iovec { iov_base: base as *mut _, iov_len: nbytes };
            let mut desc = writes.desc;
            // The base is the peer's word; the NIC there judges it.
            let (addr, key) = (writes.target.base.wrapping_add(write.dst), writes.target.key);
            let to = fi_rma_iov { addr, len: nbytes, key };
            let message = fi_msg_rma {
                msg_iov: &raw const iov,
                desc: &raw mut desc,
                iov_count: usize::from(nbytes > 0),
                addr: writes.peer,
                rma_iov: &raw const to,
                rma_iov_count: 1,
                context: self.slots.context(slot),
                data: writes.data,
            };
            let is_last = posted + 1 == writes.writes.len();
            let flags =
                self.op_flags | if with_imm { FI_REMOTE_CQ_DATA } else { 0 } | if is_last { 0 } else { FI_MORE };
            // SAFETY: the caller of `post` checked the bounds and keeps the memory; the message lives through the call.
            let code = -unsafe { open.endpoint.write(&message, flags) };
            if code == 0 {
                posted += 1;
                continue;
            }
            self.slots.put_back(slot);
            if with_imm && is_unsupported(code as i32) {
                // The provider has no immediates with writes after all: from now on they follow in messages.
                log::info!("{}: no immediates with writes ({code}); they are sent in messages", self.about.name);
                self.has_write_data = false;
                continue;
            }
            failed = Some(code as i32);
            break;
        }
        if posted > 0 {
            open.posted(posted as u32);
            self.under_way += posted as u32;
            self.slots.batch(batch).remaining += posted as u32;
        }
        let result = match failed {
            None => Ok(posted == writes.writes.len()),
            Some(code) => self.refused(endpoint, code).map_err(fault_of),
        };
        (posted, result)
    }

    /// An endpoint took no more, which is no error, or refused.
    #[cold]
    fn refused(&mut self, endpoint: u16, code: i32) -> Result<bool, i32> {
        if code as isize != FI_EAGAIN {
            return Err(code);
        }
        self.unsettled = 2;
        if let Some(open) = self.endpoints.get_mut(usize::from(endpoint)).and_then(Option::as_mut) {
            open.is_blocked = true;
            if open.waiting_since_ns == 0 {
                open.waiting_since_ns = now_ns();
            }
        }
        Ok(false)
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

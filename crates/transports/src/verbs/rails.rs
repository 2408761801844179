//! What a NIC keeps of its rails, and how its completions find them.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::device::VerbsDomain;
use super::events::Notices;
use super::port::Port;
use super::qp::QueuePair;
use super::sys::{self, CompChannel, Cq, Wc};
use crate::rdma::{Fault, NicError, RailIdx};
use crate::sys::{close_in_children, set_nonblocking};

/// Our end of a rail.
#[derive(Default)]
pub(super) struct Rail {
    /// For writes and for messages; none while the number is free, and when they
    /// had to be destroyed to be stopped.
    pub(super) pairs: Option<(QueuePair, QueuePair)>,
    /// The device neither stopped nor destroyed them: what they were given they may still use.
    pub(super) is_stuck: bool,
    pub(super) is_open: bool,
    /// Tells stale completions of an earlier rail of this number from ours.
    pub(super) life: u8,
    pub(super) is_connected: bool,
    pub(super) fault: Option<Fault>,
    /// Whether the fault has been reported, or was asked for.
    pub(super) is_told: bool,
    pub(super) writes: Posted,
    pub(super) messages: Posted,
}

/// What waits for completions on one queue pair.
#[derive(Default)]
pub(super) struct Posted {
    /// Of request 0; the numbers of the others are added.
    pub(super) id: u64,
    /// Requests so far: held back too, taken by the device, and completed.
    pub(super) next: u32,
    pub(super) taken: u32,
    pub(super) done: u32,
    /// In the order of posting.
    pub(super) batches: VecDeque<Waiting>,
}

/// A batch that has not ended.
#[derive(Clone, Copy)]
pub(super) struct Waiting {
    pub(super) token: u32,
    /// One past its last request.
    pub(super) end: u32,
    /// Of a message.
    pub(super) buffer: Option<u32>,
}

impl Rail {
    /// Whether what had arrived on it may be lost.
    pub(super) const fn has_missed(&self) -> bool {
        matches!(self.fault, Some(Fault::Missed(_)))
    }

    /// Stops both queue pairs: from now on nothing lands. False when the device
    /// refuses.
    pub(super) fn stop(&self) -> bool {
        self.pairs.as_ref().map_or(!self.is_stuck, |(writes, messages)| writes.stop() & messages.stop())
    }
}

impl Posted {
    pub(super) const fn under_way(&self) -> u32 {
        self.next.wrapping_sub(self.done)
    }

    /// Takes the first batch, if it ends no later than request `until`.
    pub(super) fn take_until(&mut self, until: u32) -> Option<Waiting> {
        let first = *self.batches.front()?;
        if is_after(first.end, until) {
            return None;
        }
        self.batches.pop_front()
    }
}

/// Whether request `a` comes after `b`; both are less than 2^31 apart.
const fn is_after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// What a completion is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Send,
    Imm,
    Message,
}

impl Kind {
    pub(super) const fn of(id: u64) -> Self {
        match id >> 56 {
            0 => Self::Write,
            1 => Self::Send,
            2 => Self::Imm,
            _ => Self::Message,
        }
    }
}

/// ```text
/// bits 56..64  kind     48..56  life of the rail    32..48  rail
/// bits  0..32  request, or receive buffer
/// ```
#[inline]
pub(super) const fn id_of(kind: Kind, life: u8, rail: RailIdx, low: u32) -> u64 {
    (kind as u64) << 56 | (life as u64) << 48 | ((rail & 0xffff) as u64) << 32 | low as u64
}

/// Life, rail and the rest of an id.
#[inline]
pub(super) const fn parts_of(id: u64) -> (u8, RailIdx, u32) {
    ((id >> 48) as u8, (id >> 32) as u32 & 0xffff, id as u32)
}

/// Most rails of one NIC: an id has 16 bits for them.
pub(super) const MAX_RAILS: usize = 1 << 16;

pub(super) const fn fault_of(wc: &Wc) -> Fault {
    match wc.status {
        sys::WC_REM_ACCESS_ERR | sys::WC_REM_INV_REQ_ERR | sys::WC_REM_OP_ERR => Fault::Refused,
        sys::WC_RETRY_EXC_ERR => Fault::Unanswered,
        sys::WC_RNR_RETRY_EXC_ERR => Fault::NotReady,
        sys::WC_WR_FLUSH_ERR => Fault::Flushed,
        sys::WC_LOC_LEN_ERR..=sys::WC_LOC_PROT_ERR => Fault::Local(wc.status),
        other => Fault::Other(other),
    }
}

/// How a port is driven, for people.
pub(super) fn manner(port: &Port) -> String {
    let gid = port.gid.raw;
    match (port.is_ethernet, port.gid_type) {
        (false, _) => format!("InfiniBand, LID {}", port.lid),
        (true, sys::GID_TYPE_ROCE_V2) => format!("RoCE v2, GID {} ({})", port.gid_index, ip_of(gid)),
        (true, _) => format!("RoCE v1, GID {} ({})", port.gid_index, ip_of(gid)),
    }
}

fn ip_of(gid: [u8; 16]) -> std::net::IpAddr {
    std::net::Ipv6Addr::from(gid).to_canonical()
}

/// One completion queue with its channel.
pub(super) struct CompletionQueue {
    pub(super) domain: Arc<VerbsDomain>,
    channel: *mut CompChannel,
    pub(super) cq: *mut Cq,
    /// What was announced of it, and of what uses it; at an address that stays.
    pub(super) notices: Arc<Notices>,
}

impl CompletionQueue {
    pub(super) fn new(domain: &Arc<VerbsDomain>) -> Result<Self, NicError> {
        // SAFETY: an open device; destroyed on drop.
        let channel = unsafe { (domain.library.create_comp_channel)(domain.context) };
        let mut this = Self { domain: Arc::clone(domain), channel, cq: std::ptr::null_mut(), notices: Arc::default() };
        this.renew()?;
        set_nonblocking(this.fd());
        close_in_children(this.fd(), true);
        Ok(this)
    }

    /// Puts another queue in the place of the one that there was, which no queue pair uses any more; the channel stays.
    pub(super) fn renew(&mut self) -> Result<(), NicError> {
        let depth = CQ_DEPTH.min(self.domain.attributes.max_cqe);
        let (mut cq, context) = (std::ptr::null_mut(), self.notices.as_context());
        if !self.channel.is_null() {
            // SAFETY: an open device and its channel; destroyed before the channel.
            cq = unsafe { (self.domain.library.create_cq)(self.domain.context, depth, context, self.channel, 0) };
        }
        if cq.is_null() {
            let error = std::io::Error::last_os_error();
            return Err(NicError::Device(format!("{}: no completion queue of {depth}: {error}", self.domain.name)));
        }
        self.destroy_queue();
        // What was said of the one that is gone does not concern this one.
        self.notices.take();
        self.cq = cq;
        Ok(())
    }

    fn destroy_queue(&self) {
        if !self.cq.is_null() {
            // SAFETY: made in `renew`, and destroyed once, after every queue pair: on drop, or when another takes its place.
            unsafe { (self.domain.library.destroy_cq)(self.cq) };
        }
    }

    pub(super) fn depth(&self) -> usize {
        // SAFETY: the queue lives as long as this.
        usize::try_from(unsafe { (*self.cq).cqe }).unwrap_or(0)
    }

    pub(super) fn fd(&self) -> RawFd {
        // SAFETY: as above.
        unsafe { (*self.channel).fd }
    }

    /// Takes events that came, and asks for the next; false when the device refuses.
    pub(super) fn arm(&self) -> bool {
        let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: channel and queue live; the descriptor does not block. Every event is acknowledged.
        unsafe {
            while (self.domain.library.get_cq_event)(self.channel, &raw mut cq, &raw mut context) == 0 {
                (self.domain.library.ack_cq_events)(cq, 1);
            }
            ((*self.domain.context).ops.req_notify_cq)(self.cq, 0) == 0
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        if !self.channel.is_null() {
            close_in_children(self.fd(), false);
        }
        self.destroy_queue();
        if !self.channel.is_null() {
            // SAFETY: made in `new`, dropped once, after its queue.
            unsafe { (self.domain.library.destroy_comp_channel)(self.channel) };
        }
    }
}

/// Completions that may wait; the least that Soft-RoCE allows.
const CQ_DEPTH: i32 = 32_767;

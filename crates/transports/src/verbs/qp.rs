//! One reliable connected queue pair, and the address of a rail's end.

use std::sync::Arc;

use super::device::VerbsDomain;
use super::events::Notices;
use super::port::Port;
use super::rails::CompletionQueue;
use super::sys::{self, AhAttr, Gid, Qp, QpAttr, QpCap, QpInitAttr, Srq};
use super::VerbsSettings;
use crate::rdma::NicError;

/// A queue pair.
pub(super) struct QueuePair {
    pub(super) domain: Arc<VerbsDomain>,
    /// Null once it has ended.
    pub(super) qp: *mut Qp,
    pub(super) psn: u32,
    pub(super) max_inline: u32,
}

/// What makes up a rail's end.
///
/// ```text
/// 0   1  version of this layout
/// 1   1  1 on Ethernet
/// 2   1  path MTU, as a code
/// 3   1  1 for RoCE v2
/// 4   2  LID, little endian
/// 6  16  GID
/// 22  4  queue pair for writes      26  4  its first packet number
/// 30  4  queue pair for messages    34  4  its first packet number
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) is_ethernet: bool,
    pub(super) is_roce_v2: bool,
    pub(super) mtu: u8,
    pub(super) lid: u16,
    pub(super) gid: Gid,
    pub(super) writes: (u32, u32),
    pub(super) messages: (u32, u32),
}

impl QueuePair {
    /// A queue pair that takes arrivals from `receives`, in its first state.
    pub(super) fn new(
        queue: &CompletionQueue,
        receives: *mut Srq,
        depth: u32,
        port: &Port,
        settings: &VerbsSettings,
    ) -> Result<Self, NicError> {
        let domain = &queue.domain;
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| NicError::Device(format!("random numbers: {error}")))?;
        let psn = u32::from_le_bytes(random) & PSN_MASK;
        let cap = QpCap {
            max_send_wr: depth,
            max_recv_wr: 0,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: INLINE_BYTES,
        };
        let mut init = QpInitAttr {
            qp_context: queue.notices.as_context(),
            send_cq: queue.cq,
            recv_cq: queue.cq,
            srq: receives,
            cap,
            qp_type: sys::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queues are open; a device without inline data is asked for none.
        let qp = unsafe {
            let mut qp = (domain.library.create_qp)(domain.pd, &raw mut init);
            if qp.is_null() {
                init.cap = QpCap { max_inline_data: 0, ..cap };
                qp = (domain.library.create_qp)(domain.pd, &raw mut init);
            }
            qp
        };
        if qp.is_null() {
            let error = std::io::Error::last_os_error();
            let most = domain.attributes.max_qp;
            return Err(NicError::Device(format!("{}: no queue pair is left (it has {most}): {error}", domain.name)));
        }
        let this = Self { domain: Arc::clone(domain), qp, psn, max_inline: init.cap.max_inline_data };
        let attr = QpAttr {
            qp_state: sys::QPS_INIT,
            pkey_index: settings.pkey_index,
            port_num: port.number,
            qp_access_flags: sys::ACCESS_REMOTE_WRITE as u32,
            ..QpAttr::default()
        };
        let mask = sys::QP_STATE | sys::QP_PKEY_INDEX | sys::QP_PORT | sys::QP_ACCESS_FLAGS;
        this.modify(attr, mask, "initialised")?;
        Ok(this)
    }

    pub(super) fn number(&self) -> u32 {
        // SAFETY: it lives until this is dropped.
        unsafe { (*self.qp).qp_num }
    }

    /// Connects to another: its number and first packet number there.
    pub(super) fn connect(
        &self,
        port: &Port,
        settings: &VerbsSettings,
        end: &End,
        (number, psn): (u32, u32),
    ) -> Result<(), NicError> {
        // On InfiniBand within a subnet the LID is enough.
        let is_global = port.is_ethernet || port.lid == 0 || end.gid.raw[..8] != port.gid.raw[..8];
        let ah_attr = AhAttr {
            dgid: end.gid,
            sgid_index: port.gid_index,
            hop_limit: HOP_LIMIT,
            traffic_class: settings.traffic_class,
            dlid: end.lid,
            sl: settings.service_level,
            is_global: is_global.into(),
            port_num: port.number,
            ..AhAttr::default()
        };
        let receive = QpAttr {
            qp_state: sys::QPS_RTR,
            path_mtu: port.mtu.min(end.mtu).into(),
            dest_qp_num: number,
            rq_psn: psn,
            max_dest_rd_atomic: 1,
            min_rnr_timer: settings.rnr_timer,
            ah_attr,
            ..QpAttr::default()
        };
        let mask = sys::QP_STATE
            | sys::QP_AV
            | sys::QP_PATH_MTU
            | sys::QP_DEST_QPN
            | sys::QP_RQ_PSN
            | sys::QP_MAX_DEST_RD_ATOMIC
            | sys::QP_MIN_RNR_TIMER;
        self.modify(receive, mask, "connected: do both sides use GIDs of the same network?")?;
        let send = QpAttr {
            qp_state: sys::QPS_RTS,
            timeout: settings.timeout,
            retry_cnt: settings.retry_count,
            rnr_retry: settings.rnr_retry,
            sq_psn: self.psn,
            max_rd_atomic: 1,
            ..QpAttr::default()
        };
        let mask = sys::QP_STATE
            | sys::QP_TIMEOUT
            | sys::QP_RETRY_CNT
            | sys::QP_RNR_RETRY
            | sys::QP_SQ_PSN
            | sys::QP_MAX_QP_RD_ATOMIC;
        self.modify(send, mask, "made ready to send")
    }

    /// Stops it: nothing is sent or taken any more, everything posted is flushed.
    /// False when the device refuses.
    pub(super) fn stop(&self) -> bool {
        let attr = QpAttr { qp_state: sys::QPS_ERR, ..QpAttr::default() };
        self.modify(attr, sys::QP_STATE, "stopped").is_ok()
    }

    /// Destroys it, once, at its drop at the latest; false when the device refuses.
    pub(super) fn end(&mut self) -> bool {
        let qp = std::mem::replace(&mut self.qp, std::ptr::null_mut());
        if qp.is_null() || !self.domain.is_ours() {
            return true;
        }
        // SAFETY: made in `new`, with that context, and destroyed once.
        let (context, error) = unsafe { ((*qp).qp_context, (self.domain.library.destroy_qp)(qp)) };
        // As of memory: of a device that was taken away the kernel says EIO.
        let is_over = matches!(error, 0 | libc::EIO);
        if !is_over {
            log::error!("{}: a queue pair is not destroyed: error {error}", self.domain.name);
            // SAFETY: the queue, which is dropped later, still has its share of it.
            unsafe { Notices::keep(context) };
        }
        is_over
    }

    fn modify(&self, mut attr: QpAttr, mask: i32, what: &str) -> Result<(), NicError> {
        // SAFETY: the queue pair lives; the attributes live through the call.
        let failed = unsafe { (self.domain.library.modify_qp)(self.qp, &raw mut attr, mask) };
        if failed == 0 {
            return Ok(());
        }
        let error = std::io::Error::from_raw_os_error(failed);
        Err(NicError::Device(format!("{}: a queue pair cannot be {what} ({error})", self.domain.name)))
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.end();
    }
}

impl End {
    pub(super) const BYTES: usize = 38;

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend([LAYOUT, self.is_ethernet.into(), self.mtu, self.is_roce_v2.into()]);
        bytes.extend(self.lid.to_le_bytes());
        bytes.extend(self.gid.raw);
        for number in [self.writes.0, self.writes.1, self.messages.0, self.messages.1] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// Reads what a peer sent.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, NicError> {
        let wrong = |what: &str| NicError::Peer(format!("the address of the peer's rail has {what}"));
        let bytes: &[u8; Self::BYTES] = bytes.try_into().map_err(|_| wrong("another length"))?;
        if bytes[0] != LAYOUT {
            return Err(wrong("another version"));
        }
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[6..22]);
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let end = Self {
            is_ethernet: bytes[1] == 1,
            is_roce_v2: bytes[3] == 1,
            mtu: bytes[2],
            lid: u16::from_le_bytes([bytes[4], bytes[5]]),
            gid: Gid::new(gid),
            writes: (number(22), number(26)),
            messages: (number(30), number(34)),
        };
        let numbers = [end.writes.0, end.writes.1, end.messages.0, end.messages.1];
        if !(1..=5).contains(&end.mtu) || numbers.iter().any(|number| *number > PSN_MASK) {
            return Err(wrong("numbers out of range"));
        }
        Ok(end)
    }
}

/// Writes up to this length travel in the work request itself.
const INLINE_BYTES: u32 = 64;
/// Queue pair and packet numbers have 24 bits.
const PSN_MASK: u32 = 0xff_ffff;
const HOP_LIMIT: u8 = 64;
const LAYOUT: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_read_as_it_was_written() {
        let end = End {
            is_ethernet: true,
            is_roce_v2: true,
            mtu: 3,
            lid: 7,
            gid: Gid::new([9; 16]),
            writes: (17, 0x12_3456),
            messages: (18, 0xff_ffff),
        };
        let bytes = end.encode();
        assert_eq!(bytes.len(), End::BYTES);
        assert_eq!(End::decode(&bytes), Ok(end));
    }

    #[test]
    fn no_bytes_of_a_peer_are_taken_on_trust() {
        assert!(End::decode(&[]).is_err());
        assert!(End::decode(&[0; End::BYTES]).is_err());
        assert!(End::decode(&[0xff; End::BYTES]).is_err());
        for len in 0..64 {
            let _ = End::decode(&vec![1; len]);
        }
    }
}

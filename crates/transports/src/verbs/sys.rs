//! libibverbs: what is used of its ABI.
//!
//! Layouts are rdma-core's, which has kept them since 2005; where a C compiler
//! and `infiniband/verbs.h` are there, the tests in `layout.rs`
//! compare each with the real one. Only the beginnings are declared of structures that the
//! library allocates.

use std::ffi::{c_int, c_uint, c_void};

// ---- what the library allocates ----------------------------------------------------------------

/// A device in the list; only its name is asked for, by function.
#[repr(C)]
pub(super) struct Device {
    opaque: [u8; 0],
}

/// An open device.
#[repr(C)]
pub(super) struct Context {
    pub(super) device: *mut Device,
    pub(super) ops: ContextOps,
    pub(super) cmd_fd: c_int,
    pub(super) async_fd: c_int,
    pub(super) num_comp_vectors: c_int,
}

/// What the device's own library does without a system call.
#[repr(C)]
pub(super) struct ContextOps {
    before_poll: [*const c_void; 11],
    pub(super) poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int,
    pub(super) req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    before_srq: [*const c_void; 7],
    pub(super) post_srq_recv: unsafe extern "C" fn(*mut Srq, *mut RecvWr, *mut *mut RecvWr) -> c_int,
    before_send: [*const c_void; 4],
    pub(super) post_send: unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int,
    after_send: [*const c_void; 6],
}

/// A protection domain.
#[repr(C)]
pub(super) struct Pd {
    opaque: [u8; 0],
}

/// A registration.
#[repr(C)]
pub(super) struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    pub(super) addr: *mut c_void,
    pub(super) length: usize,
    handle: u32,
    pub(super) lkey: u32,
    pub(super) rkey: u32,
}

/// A completion channel.
#[repr(C)]
pub(super) struct CompChannel {
    context: *mut Context,
    pub(super) fd: c_int,
    refcnt: c_int,
}

/// A completion queue.
#[repr(C)]
pub(super) struct Cq {
    context: *mut Context,
    channel: *mut CompChannel,
    pub(super) cq_context: *mut c_void,
    handle: u32,
    pub(super) cqe: c_int,
}

/// A shared receive queue.
#[repr(C)]
pub(super) struct Srq {
    context: *mut Context,
    pub(super) srq_context: *mut c_void,
}

/// A queue pair.
#[repr(C)]
pub(super) struct Qp {
    context: *mut Context,
    pub(super) qp_context: *mut c_void,
    pd: *mut Pd,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut Srq,
    handle: u32,
    pub(super) qp_num: u32,
}

// ---- what we allocate --------------------------------------------------------------------------

/// A port's address.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Gid {
    pub(super) raw: [u8; 16],
    // The C union holds 64-bit words.
    align: [u64; 0],
}

impl Gid {
    pub(super) const fn new(raw: [u8; 16]) -> Self {
        Self { raw, align: [] }
    }
}

/// A GID with its type.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GidEntry {
    pub(super) gid: Gid,
    pub(super) gid_index: u32,
    pub(super) port_num: u32,
    pub(super) gid_type: u32,
    pub(super) ndev_ifindex: u32,
}

/// What a device can do.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceAttr {
    pub(super) fw_ver: [u8; 64],
    node_guid: u64,
    sys_image_guid: u64,
    pub(super) max_mr_size: u64,
    page_size_cap: u64,
    pub(super) vendor_id: u32,
    pub(super) vendor_part_id: u32,
    hw_ver: u32,
    pub(super) max_qp: c_int,
    pub(super) max_qp_wr: c_int,
    device_cap_flags: c_uint,
    max_sge: c_int,
    max_sge_rd: c_int,
    max_cq: c_int,
    pub(super) max_cqe: c_int,
    rest: [c_int; 19],
    max_srq: c_int,
    pub(super) max_srq_wr: c_int,
    max_srq_sge: c_int,
    max_pkeys: u16,
    local_ca_ack_delay: u8,
    pub(super) phys_port_cnt: u8,
}

/// A port. The symbol fills the first 48 bytes, which hold all that is used.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct PortAttr {
    pub(super) state: c_uint,
    pub(super) max_mtu: c_uint,
    pub(super) active_mtu: c_uint,
    pub(super) gid_tbl_len: c_int,
    port_cap_flags: u32,
    pub(super) max_msg_sz: u32,
    bad_pkey_cntr: u32,
    qkey_viol_cntr: u32,
    pkey_tbl_len: u16,
    pub(super) lid: u16,
    sm_lid: u16,
    lmc: u8,
    max_vl_num: u8,
    sm_sl: u8,
    subnet_timeout: u8,
    init_type_reply: u8,
    pub(super) active_width: u8,
    pub(super) active_speed: u8,
    phys_state: u8,
    pub(super) link_layer: u8,
    flags: u8,
    port_cap_flags2: u16,
    active_speed_ex: u32,
}

/// Depths of a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct QpCap {
    pub(super) max_send_wr: u32,
    pub(super) max_recv_wr: u32,
    pub(super) max_send_sge: u32,
    pub(super) max_recv_sge: u32,
    pub(super) max_inline_data: u32,
}

/// How to make a queue pair.
#[repr(C)]
pub(super) struct QpInitAttr {
    pub(super) qp_context: *mut c_void,
    pub(super) send_cq: *mut Cq,
    pub(super) recv_cq: *mut Cq,
    pub(super) srq: *mut Srq,
    pub(super) cap: QpCap,
    pub(super) qp_type: c_uint,
    pub(super) sq_sig_all: c_int,
}

/// How to make a shared receive queue.
#[repr(C)]
pub(super) struct SrqInitAttr {
    pub(super) srq_context: *mut c_void,
    pub(super) max_wr: u32,
    pub(super) max_sge: u32,
    pub(super) srq_limit: u32,
}

/// Where to send to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AhAttr {
    pub(super) dgid: Gid,
    pub(super) flow_label: u32,
    pub(super) sgid_index: u8,
    pub(super) hop_limit: u8,
    pub(super) traffic_class: u8,
    pub(super) dlid: u16,
    pub(super) sl: u8,
    pub(super) src_path_bits: u8,
    pub(super) static_rate: u8,
    pub(super) is_global: u8,
    pub(super) port_num: u8,
}

/// How to change a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct QpAttr {
    pub(super) qp_state: c_uint,
    pub(super) cur_qp_state: c_uint,
    pub(super) path_mtu: c_uint,
    pub(super) path_mig_state: c_uint,
    pub(super) qkey: u32,
    pub(super) rq_psn: u32,
    pub(super) sq_psn: u32,
    pub(super) dest_qp_num: u32,
    pub(super) qp_access_flags: c_uint,
    pub(super) cap: QpCap,
    pub(super) ah_attr: AhAttr,
    pub(super) alt_ah_attr: AhAttr,
    pub(super) pkey_index: u16,
    pub(super) alt_pkey_index: u16,
    pub(super) en_sqd_async_notify: u8,
    pub(super) sq_draining: u8,
    pub(super) max_rd_atomic: u8,
    pub(super) max_dest_rd_atomic: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) port_num: u8,
    pub(super) timeout: u8,
    pub(super) retry_cnt: u8,
    pub(super) rnr_retry: u8,
    pub(super) alt_port_num: u8,
    pub(super) alt_timeout: u8,
    pub(super) rate_limit: u32,
}

/// A piece of local memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sge {
    pub(super) addr: u64,
    pub(super) length: u32,
    pub(super) lkey: u32,
}

/// A work request to send; of its unions the members that are used.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct SendWr {
    pub(super) wr_id: u64,
    pub(super) next: *mut SendWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
    pub(super) opcode: c_uint,
    pub(super) send_flags: c_uint,
    /// In network byte order.
    pub(super) imm_data: u32,
    pub(super) remote_addr: u64,
    pub(super) rkey: u32,
    pub(super) rest_of_wr: [u64; 2],
    pub(super) rest: [u64; 7],
}

impl SendWr {
    pub(super) const EMPTY: Self = Self {
        wr_id: 0,
        next: std::ptr::null_mut(),
        sg_list: std::ptr::null_mut(),
        num_sge: 0,
        opcode: 0,
        send_flags: 0,
        imm_data: 0,
        remote_addr: 0,
        rkey: 0,
        rest_of_wr: [0; 2],
        rest: [0; 7],
    };
}

/// A work request to receive.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RecvWr {
    pub(super) wr_id: u64,
    pub(super) next: *mut RecvWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
}

/// A completion.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wc {
    pub(super) wr_id: u64,
    pub(super) status: c_uint,
    pub(super) opcode: c_uint,
    pub(super) vendor_err: u32,
    pub(super) byte_len: u32,
    /// In network byte order.
    pub(super) imm_data: u32,
    pub(super) qp_num: u32,
    src_qp: u32,
    wc_flags: c_uint,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// What a device announces.
#[repr(C)]
#[derive(Debug)]
pub(super) struct AsyncEvent {
    /// A queue or a queue pair; of others the number of a port.
    pub(super) element: *mut c_void,
    pub(super) event_type: c_uint,
}

pub(super) const EVENT_CQ_ERR: c_uint = 0;
pub(super) const EVENT_QP_FATAL: c_uint = 1;
pub(super) const EVENT_QP_REQ_ERR: c_uint = 2;
pub(super) const EVENT_QP_ACCESS_ERR: c_uint = 3;
pub(super) const EVENT_DEVICE_FATAL: c_uint = 8;
pub(super) const EVENT_SRQ_ERR: c_uint = 14;

pub(super) const WC_LOC_LEN_ERR: c_uint = 1;
pub(super) const WC_LOC_PROT_ERR: c_uint = 4;
pub(super) const WC_WR_FLUSH_ERR: c_uint = 5;
pub(super) const WC_REM_INV_REQ_ERR: c_uint = 9;
pub(super) const WC_REM_ACCESS_ERR: c_uint = 10;
pub(super) const WC_REM_OP_ERR: c_uint = 11;
pub(super) const WC_RETRY_EXC_ERR: c_uint = 12;
pub(super) const WC_RNR_RETRY_EXC_ERR: c_uint = 13;

pub(super) const WR_RDMA_WRITE: c_uint = 0;
pub(super) const WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
pub(super) const WR_SEND: c_uint = 2;
pub(super) const SEND_SIGNALED: c_uint = 1 << 1;
pub(super) const SEND_INLINE: c_uint = 1 << 3;

pub(super) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(super) const ACCESS_REMOTE_WRITE: c_int = 1 << 1;
pub(super) const ACCESS_RELAXED_ORDERING: c_int = 1 << 20;

pub(super) const QPT_RC: c_uint = 2;
pub(super) const QPS_INIT: c_uint = 1;
pub(super) const QPS_RTR: c_uint = 2;
pub(super) const QPS_RTS: c_uint = 3;
pub(super) const QPS_ERR: c_uint = 6;
pub(super) const QP_STATE: c_int = 1;
pub(super) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(super) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(super) const QP_PORT: c_int = 1 << 5;
pub(super) const QP_AV: c_int = 1 << 7;
pub(super) const QP_PATH_MTU: c_int = 1 << 8;
pub(super) const QP_TIMEOUT: c_int = 1 << 9;
pub(super) const QP_RETRY_CNT: c_int = 1 << 10;
pub(super) const QP_RNR_RETRY: c_int = 1 << 11;
pub(super) const QP_RQ_PSN: c_int = 1 << 12;
pub(super) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(super) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(super) const QP_SQ_PSN: c_int = 1 << 16;
pub(super) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(super) const QP_DEST_QPN: c_int = 1 << 20;

pub(super) const PORT_ACTIVE: c_uint = 4;
pub(super) const LINK_LAYER_ETHERNET: u8 = 2;
pub(super) const GID_TYPE_ROCE_V2: u32 = 2;

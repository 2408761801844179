//! Our layouts against the real header, where there is one.

use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use super::sys;

/// A C expression, and what we think that it is.
macro_rules! facts {
    ($($rust:ident = $c:literal: [$($field:ident $(as $c_field:literal)?),*] $($size:ident)?;)*) => {
        vec![
            $(
                $((
                    format!("offsetof({}, {})", $c, [$($c_field,)? stringify!($field)][0]),
                    offset_of!(sys::$rust, $field),
                ),)*
                $((format!("{}({})", stringify!($size), $c), size_of::<sys::$rust>()),)?
            )*
        ]
    };
}

fn facts() -> Vec<(String, usize)> {
    facts! {
        Context = "struct ibv_context": [device, ops, cmd_fd, async_fd, num_comp_vectors];
        ContextOps = "struct ibv_context_ops": [poll_cq, req_notify_cq, post_srq_recv, post_send] sizeof;
        Mr = "struct ibv_mr": [addr, length, lkey, rkey];
        CompChannel = "struct ibv_comp_channel": [fd];
        Cq = "struct ibv_cq": [cq_context, cqe];
        Srq = "struct ibv_srq": [srq_context];
        Qp = "struct ibv_qp": [qp_context, qp_num];
        AsyncEvent = "struct ibv_async_event": [element, event_type] sizeof;
        Gid = "union ibv_gid": [raw] sizeof;
        GidEntry = "struct ibv_gid_entry": [gid, gid_index, port_num, gid_type, ndev_ifindex] sizeof;
        DeviceAttr = "struct ibv_device_attr":
            [fw_ver, max_mr_size, vendor_id, vendor_part_id, max_qp, max_qp_wr, max_cqe, max_srq_wr, phys_port_cnt]
            sizeof;
        PortAttr = "struct ibv_port_attr":
            [state, max_mtu, active_mtu, gid_tbl_len, max_msg_sz, lid, active_width, active_speed, link_layer];
        QpCap = "struct ibv_qp_cap":
            [max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data] sizeof;
        QpInitAttr = "struct ibv_qp_init_attr":
            [qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all] sizeof;
        SrqInitAttr = "struct ibv_srq_init_attr":
            [srq_context, max_wr as "attr.max_wr", max_sge as "attr.max_sge", srq_limit as "attr.srq_limit"] sizeof;
        AhAttr = "struct ibv_ah_attr":
            [dgid as "grh.dgid", flow_label as "grh.flow_label", sgid_index as "grh.sgid_index",
             hop_limit as "grh.hop_limit", traffic_class as "grh.traffic_class", dlid, sl, src_path_bits, static_rate,
             is_global, port_num] sizeof;
        QpAttr = "struct ibv_qp_attr":
            [qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap,
             ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic,
             max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
             rate_limit]
            sizeof;
        Sge = "struct ibv_sge": [addr, length, lkey] sizeof;
        SendWr = "struct ibv_send_wr":
            [wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data, remote_addr as "wr.rdma.remote_addr",
             rkey as "wr.rdma.rkey"] sizeof;
        RecvWr = "struct ibv_recv_wr": [wr_id, next, sg_list, num_sge] sizeof;
        Wc = "struct ibv_wc": [wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num] sizeof;
    }
}

/// Numbers that the header names.
fn values() -> Vec<(&'static str, usize)> {
    vec![
        ("IBV_EVENT_CQ_ERR", sys::EVENT_CQ_ERR as usize),
        ("IBV_EVENT_QP_FATAL", sys::EVENT_QP_FATAL as usize),
        ("IBV_EVENT_QP_REQ_ERR", sys::EVENT_QP_REQ_ERR as usize),
        ("IBV_EVENT_QP_ACCESS_ERR", sys::EVENT_QP_ACCESS_ERR as usize),
        ("IBV_EVENT_DEVICE_FATAL", sys::EVENT_DEVICE_FATAL as usize),
        ("IBV_EVENT_SRQ_ERR", sys::EVENT_SRQ_ERR as usize),
        ("IBV_WC_LOC_LEN_ERR", sys::WC_LOC_LEN_ERR as usize),
        ("IBV_WC_LOC_PROT_ERR", sys::WC_LOC_PROT_ERR as usize),
        ("IBV_WC_WR_FLUSH_ERR", sys::WC_WR_FLUSH_ERR as usize),
        ("IBV_WC_REM_INV_REQ_ERR", sys::WC_REM_INV_REQ_ERR as usize),
        ("IBV_WC_REM_ACCESS_ERR", sys::WC_REM_ACCESS_ERR as usize),
        ("IBV_WC_REM_OP_ERR", sys::WC_REM_OP_ERR as usize),
        ("IBV_WC_RETRY_EXC_ERR", sys::WC_RETRY_EXC_ERR as usize),
        ("IBV_WC_RNR_RETRY_EXC_ERR", sys::WC_RNR_RETRY_EXC_ERR as usize),
        ("IBV_WR_RDMA_WRITE", sys::WR_RDMA_WRITE as usize),
        ("IBV_WR_RDMA_WRITE_WITH_IMM", sys::WR_RDMA_WRITE_WITH_IMM as usize),
        ("IBV_WR_SEND", sys::WR_SEND as usize),
        ("IBV_SEND_SIGNALED", sys::SEND_SIGNALED as usize),
        ("IBV_SEND_INLINE", sys::SEND_INLINE as usize),
        ("IBV_ACCESS_LOCAL_WRITE", sys::ACCESS_LOCAL_WRITE as usize),
        ("IBV_ACCESS_REMOTE_WRITE", sys::ACCESS_REMOTE_WRITE as usize),
        ("IBV_ACCESS_RELAXED_ORDERING", sys::ACCESS_RELAXED_ORDERING as usize),
        ("IBV_QPT_RC", sys::QPT_RC as usize),
        ("IBV_QPS_INIT", sys::QPS_INIT as usize),
        ("IBV_QPS_RTR", sys::QPS_RTR as usize),
        ("IBV_QPS_RTS", sys::QPS_RTS as usize),
        ("IBV_QPS_ERR", sys::QPS_ERR as usize),
        ("IBV_QP_STATE", sys::QP_STATE as usize),
        ("IBV_QP_ACCESS_FLAGS", sys::QP_ACCESS_FLAGS as usize),
        ("IBV_QP_PKEY_INDEX", sys::QP_PKEY_INDEX as usize),
        ("IBV_QP_PORT", sys::QP_PORT as usize),
        ("IBV_QP_AV", sys::QP_AV as usize),
        ("IBV_QP_PATH_MTU", sys::QP_PATH_MTU as usize),
        ("IBV_QP_TIMEOUT", sys::QP_TIMEOUT as usize),
        ("IBV_QP_RETRY_CNT", sys::QP_RETRY_CNT as usize),
        ("IBV_QP_RNR_RETRY", sys::QP_RNR_RETRY as usize),
        ("IBV_QP_RQ_PSN", sys::QP_RQ_PSN as usize),
        ("IBV_QP_MAX_QP_RD_ATOMIC", sys::QP_MAX_QP_RD_ATOMIC as usize),
        ("IBV_QP_MIN_RNR_TIMER", sys::QP_MIN_RNR_TIMER as usize),
        ("IBV_QP_SQ_PSN", sys::QP_SQ_PSN as usize),
        ("IBV_QP_MAX_DEST_RD_ATOMIC", sys::QP_MAX_DEST_RD_ATOMIC as usize),
        ("IBV_QP_DEST_QPN", sys::QP_DEST_QPN as usize),
        ("IBV_PORT_ACTIVE", sys::PORT_ACTIVE as usize),
        ("IBV_LINK_LAYER_ETHERNET", sys::LINK_LAYER_ETHERNET as usize),
        ("IBV_GID_TYPE_ROCE_V2", sys::GID_TYPE_ROCE_V2 as usize),
    ]
}

#[test]
fn every_layout_is_the_header_s() {
    if !Path::new("/usr/include/infiniband/verbs.h").exists() {
        println!("skipped: no /usr/include/infiniband/verbs.h (libibverbs-dev)");
        return;
    }
    let mut probe = String::from("#include <stddef.h>\n#include <infiniband/verbs.h>\n");
    for (expression, value) in facts() {
        writeln!(probe, "_Static_assert({expression} == {value}, \"{expression} is not {value}\");").unwrap();
    }
    for (name, value) in values() {
        writeln!(probe, "_Static_assert({name} == {value}, \"{name} is not {value}\");").unwrap();
    }
    // More than the symbol may fill, whatever the header is like.
    writeln!(probe, "_Static_assert(sizeof(struct ibv_port_attr) <= {}, \"port\");", size_of::<sys::PortAttr>())
        .unwrap();
    let source = std::env::temp_dir().join(format!("anyfabric-layout-{}.c", std::process::id()));
    std::fs::write(&source, probe).unwrap();
    let output = Command::new("cc").args(["-fsyntax-only", "-std=c11"]).arg(&source).output();
    let _ = std::fs::remove_file(&source);
    let output = output.expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

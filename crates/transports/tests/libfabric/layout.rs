//! The hand-kept bindings against the headers, where those are installed (Debian's
//! `libfabric-dev`), through a C compiler.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyfabric_transports::libfabric::sys;

/// One number of the headers: an expression of C, our value, and the header version
/// from which on it is there.
struct Fact {
    expression: String,
    ours: i128,
    since: (u32, u32),
}

macro_rules! offsets {
    ($facts:ident, $since:expr, $($of:ident { $($field:ident $(= $c:literal)?),* $(,)? })*) => { $( $({
        #[allow(unused_mut, unused_assignments, reason = "some fields have another name in C")]
        let mut name = stringify!($field).trim_start_matches("r#").to_owned();
        $( name = $c.to_owned(); )?
        let expression = format!("offsetof(struct {}, {name})", stringify!($of));
        let ours = std::mem::offset_of!(sys::$of, $field) as i128;
        $facts.push(Fact { expression, ours, since: $since });
    })* )* };
}

macro_rules! constants {
    ($facts:ident, $since:expr, $($name:ident),* $(,)?) => { $(
        $facts.push(Fact { expression: stringify!($name).into(), ours: sys::$name as i128, since: $since });
    )* };
}

macro_rules! sizes {
    ($facts:ident, $($of:ident),* $(,)?) => { $(
        let expression = format!("sizeof(struct {})", stringify!($of));
        $facts.push(Fact { expression, ours: size_of::<sys::$of>() as i128, since: OLD });
    )* };
}

#[test]
fn structures_and_constants_are_those_of_the_headers() {
    let Some(include) = ["/usr/include", "/opt/amazon/efa/include"]
        .into_iter()
        .find(|include| Path::new(include).join("rdma/fabric.h").exists())
    else {
        println!("skipped: no headers of libfabric (libfabric-dev)");
        return;
    };
    let facts = facts();
    let mut code = String::from(
        "#include <stdio.h>\n#include <stddef.h>\n#include <rdma/fabric.h>\n#include <rdma/fi_domain.h>\n\
         #include <rdma/fi_endpoint.h>\n#include <rdma/fi_rma.h>\n#include <rdma/fi_cm.h>\n#include <rdma/fi_eq.h>\n\
         #include <rdma/fi_errno.h>\n#include <rdma/fi_ext.h>\nint main(void) {\n",
    );
    for (idx, Fact { expression, since: (major, minor), .. }) in facts.iter().enumerate() {
        writeln!(
            code,
            "#if FI_VERSION_GE(FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION), FI_VERSION({major}, {minor}))"
        )
        .and_then(|()| writeln!(code, "printf(\"{idx} %lld\\n\", (long long) ({expression}));\n#endif"))
        .unwrap();
    }
    code += "return 0; }\n";
    let Some(output) = compile_and_run(&code, include) else {
        println!("skipped: no C compiler");
        return;
    };
    let mut compared = 0;
    for line in output.lines() {
        let (idx, theirs) = line.split_once(' ').unwrap();
        let Fact { expression, ours, .. } = &facts[idx.parse::<usize>().unwrap()];
        // As 64 bits: flags use the highest.
        assert_eq!(*ours as u64, theirs.parse::<i64>().unwrap() as u64, "{expression}: ours and the headers'");
        compared += 1;
    }
    println!("{compared} of {} compared", facts.len());
    assert!(compared > 150, "only {compared} facts were compared");
}

#[test]
fn structures_that_only_newer_headers_have_in_full_are_as_documented() {
    // What a library of 1.22 or 2.0 reads and writes, counted by hand from its headers.
    assert_eq!(size_of::<sys::fi_mr_attr>(), 112);
    assert_eq!(std::mem::offset_of!(sys::fi_mr_attr, page_size), 88);
    assert_eq!(size_of::<sys::fi_cq_err_entry>(), 88);
    assert_eq!(size_of::<sys::fi_mr_dmabuf>(), 32);
    assert_eq!(sys::FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV, -0xefa_0000 + 8);
}

fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    offsets! { facts, OLD,
        fid { fclass, context, ops }
        fi_ops { size, close, bind, control }
        fi_info {
            next, caps, mode, addr_format, src_addrlen, dest_addrlen, src_addr, dest_addr, handle, tx_attr, rx_attr,
            ep_attr, domain_attr, fabric_attr, nic,
        }
        fi_tx_attr { caps, mode, op_flags, msg_order, comp_order, inject_size, size, iov_limit, rma_iov_limit, tclass }
        fi_rx_attr { caps, mode, op_flags, msg_order, comp_order, total_buffered_recv, size, iov_limit }
        fi_ep_attr { r#type, protocol, protocol_version, max_msg_size }
        fi_domain_attr {
            domain, name, threading, control_progress, data_progress, resource_mgmt, av_type, mr_mode, mr_key_size,
            cq_data_size, cq_cnt, ep_cnt,
        }
        fi_fabric_attr { fabric, name, prov_name, prov_version, api_version }
        fid_nic { fid, device_attr, bus_attr, link_attr }
        fi_device_attr { name }
        fi_bus_attr { bus_type, pci = "attr.pci" }
        fi_pci_attr { domain_id, bus_id, device_id, function_id }
        fi_link_attr { address, mtu, speed, state }
        fid_fabric { fid, ops }
        fi_ops_fabric { size, domain, passive_ep, eq_open, wait_open, trywait }
        fid_domain { fid, ops, mr }
        fi_ops_domain { size, av_open, cq_open, endpoint }
        fi_ops_mr { size, reg, regv, regattr }
        fid_mr { fid, mem_desc, key }
        fid_av { fid, ops }
        fi_ops_av { size, insert, insertsvc, insertsym, remove }
        fid_ep { fid, ops, cm, msg, rma }
        fi_ops_ep { size, cancel, getopt, setopt }
        fi_ops_cm { size, setname, getname }
        fi_ops_msg { size, recv, recvv, recvmsg, send, sendv, sendmsg }
        fi_ops_rma { size, read, readv, readmsg, write, writev, writemsg }
        fid_cq { fid, ops }
        fi_ops_cq { size, read, readfrom, readerr, sread, sreadfrom, signal, strerror }
        fi_av_attr { r#type, rx_ctx_bits, count, ep_per_node, name, map_addr, flags }
        fi_cq_attr { size, flags, format, wait_obj, signaling_vector, wait_cond, wait_set }
        fi_cq_data_entry { op_context, flags, len, buf, data }
        fi_cq_err_entry {
            op_context, flags, len, buf, data, tag, olen, err, prov_errno, err_data, err_data_size,
        }
        fi_mr_attr {
            mr_iov, iov_count, access, offset, requested_key, context, auth_key_size, auth_key, iface, device,
        }
        fi_msg { msg_iov, desc, iov_count, addr, context, data }
        fi_msg_rma { msg_iov, desc, iov_count, addr, rma_iov, rma_iov_count, context, data }
        fi_rma_iov { addr, len, key }
    }
    offsets! { facts, (1, 20),
        fi_cq_err_entry { src_addr }
        fi_mr_dmabuf { fd, offset, len, base_addr }
        fi_mr_attr { hmem_data }
    }
    offsets! { facts, (1, 22), fi_mr_attr { page_size } }
    offsets! { facts, (2, 0), fi_mr_attr { base_mr, sub_mr_cnt } }
    sizes! { facts, fi_av_attr, fi_cq_attr, fi_cq_data_entry, fi_msg, fi_msg_rma, fi_rma_iov, fi_tx_attr, fi_rx_attr, fi_info }
    constants! { facts, OLD,
        FI_MSG, FI_RMA, FI_WRITE, FI_RECV, FI_SEND, FI_TRANSMIT, FI_REMOTE_WRITE, FI_REMOTE_CQ_DATA, FI_MORE,
        FI_COMPLETION, FI_DELIVERY_COMPLETE, FI_LOCAL_COMM, FI_REMOTE_COMM, FI_HMEM, FI_PROV_ATTR_ONLY, FI_SOURCE, FI_CONTEXT2, FI_RX_CQ_DATA,
        FI_CONTEXT, FI_MR_LOCAL, FI_MR_VIRT_ADDR, FI_MR_ALLOCATED, FI_MR_PROV_KEY, FI_MR_ENDPOINT, FI_MR_HMEM, FI_EP_RDM,
        FI_SOCKADDR, FI_SOCKADDR_IB,
        FI_THREAD_SAFE, FI_RM_ENABLED, FI_AV_TABLE, FI_CQ_FORMAT_DATA, FI_WAIT_NONE, FI_WAIT_FD, FI_BUS_PCI,
        FI_HMEM_CUDA, FI_GETWAIT, FI_ENABLE, FI_OPT_ENDPOINT, FI_ADDR_UNSPEC, FI_EAVAIL, FI_EAGAIN, FI_EBADFLAGS,
        FI_EOVERRUN, FI_ENORX,
    }
    constants! { facts, (1, 20), FI_OPT_CUDA_API_PERMITTED, FI_MR_DMABUF }
    constants! { facts, (2, 0), FI_OPT_SHARED_MEMORY_PERMITTED, FI_OPT_MAX_MSG_SIZE, FI_OPT_MAX_RMA_SIZE }
    constants! { facts, (2, 2), FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV }
    facts
}

/// What the program prints; `None` without a compiler.
fn compile_and_run(code: &str, include: &str) -> Option<String> {
    let stem = std::env::temp_dir().join(format!("anyfabric-layout-{}", std::process::id()));
    let (source, program) = (stem.with_extension("c"), stem.with_extension("out"));
    std::fs::write(&source, code).unwrap();
    let mut command = Command::new("cc");
    let compiled = command.arg("-I").arg(include).arg(&source).arg("-o").arg(&program).output();
    let output = compiled.ok().map(|compiled| {
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        Command::new(&program).output().unwrap()
    });
    let _ = (std::fs::remove_file(source), std::fs::remove_file(program));
    output.map(|output| String::from_utf8(output.stdout).unwrap())
}

const OLD: (u32, u32) = (1, 17);

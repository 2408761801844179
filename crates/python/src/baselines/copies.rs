//! Copies: within this process, and into another by `process_vm_writev`.

use std::convert::Infallible;
use std::io;

use anyfabric_engine::transports::sys::IOV_MAX;
use anyfabric_engine::Code;
use pyo3::prelude::*;

use super::{fail, indices_at, time_rounds, Indices};

/// `memcpy` of one range.
#[pyfunction]
pub(crate) fn baseline_memcpy(py: Python<'_>, dst: usize, src: usize, nbytes: usize, rounds: usize) -> Vec<u64> {
    py.detach(|| {
        let Ok(times) = time_rounds(rounds, || {
            // SAFETY: the contract of the stub: both ranges are the caller's, and do not overlap.
            unsafe { libc::memcpy(dst as *mut libc::c_void, src as *const libc::c_void, nbytes) };
            Ok::<(), Infallible>(())
        });
        times
    })
}

/// A loop of `memcpy`, page by page.
#[pyfunction]
pub(crate) fn baseline_copy_pages(
    py: Python<'_>,
    dst: usize,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> Vec<u64> {
    let (dst_indices, src_indices, num_pages) = indices;
    py.detach(|| {
        // SAFETY: the contract of the stub: the caller holds the arrays through the call.
        let (dst_indices, src_indices) =
            unsafe { (indices_at(dst_indices, num_pages), indices_at(src_indices, num_pages)) };
        let Ok(times) = time_rounds(rounds, || {
            for (dst_idx, src_idx) in dst_indices.iter().zip(src_indices) {
                let to = (dst + *dst_idx as usize * page_bytes) as *mut libc::c_void;
                let from = (src + *src_idx as usize * page_bytes) as *const libc::c_void;
                // SAFETY: the contract of the stub: every page lies inside the caller's ranges, which do not overlap.
                unsafe { libc::memcpy(to, from, page_bytes) };
            }
            Ok::<(), Infallible>(())
        });
        times
    })
}

/// Full batches of `process_vm_writev` into another process.
#[allow(clippy::too_many_arguments, reason = "the contract of the stub; nobody else calls it")]
#[pyfunction]
pub(crate) fn baseline_process_vm_writev(
    py: Python<'_>,
    pid: i32,
    dst: usize,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> PyResult<Vec<u64>> {
    let (dst_indices, src_indices, num_pages) = indices;
    py.detach(|| {
        // SAFETY: the contract of the stub: the caller holds the arrays through the call.
        let (dst_indices, src_indices) =
            unsafe { (indices_at(dst_indices, num_pages), indices_at(src_indices, num_pages)) };
        let remote = ranges(dst, dst_indices, page_bytes);
        let local = ranges(src, src_indices, page_bytes);
        time_rounds(rounds, || {
            local.chunks(IOV_MAX).zip(remote.chunks(IOV_MAX)).try_for_each(|(local, remote)| {
                // SAFETY: the lists live through the call; the kernel checks both sides' ranges.
                let moved = unsafe {
                    libc::process_vm_writev(
                        pid,
                        local.as_ptr(),
                        local.len() as libc::c_ulong,
                        remote.as_ptr(),
                        remote.len() as libc::c_ulong,
                        0,
                    )
                };
                let wanted: usize = local.iter().map(|range| range.iov_len).sum();
                match usize::try_from(moved) {
                    Ok(moved) if moved == wanted => Ok(()),
                    Ok(moved) => Err(format!("process_vm_writev moved {moved} of {wanted} bytes")),
                    Err(_) => Err(format!("process_vm_writev: {}", io::Error::last_os_error())),
                }
            })
        })
    })
    .map_err(|message| fail(py, Code::Unsupported, message))
}

/// The pages as ranges that the kernel takes; none so large that a batch of
/// them would not go in one call.
fn ranges(base: usize, indices: &[u32], page_bytes: usize) -> Vec<libc::iovec> {
    let range = |address: usize, nbytes| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: nbytes };
    indices
        .iter()
        .flat_map(|idx| {
            let page = base + *idx as usize * page_bytes;
            (0..page_bytes).step_by(MAX_RANGE).map(move |at| range(page + at, MAX_RANGE.min(page_bytes - at)))
        })
        .collect()
}

/// A full batch of these is half of what the kernel moves in one call.
const MAX_RANGE: usize = 1 << 20;

//! Baselines of `anyfabric perf`: the least that the hardware and the kernel
//! allow, with nothing of the engine on the way.
//!
//! They take addresses from `anyfabric.cli`, which holds the memory through the
//! call, check nothing, and return the nanoseconds of each round.

use std::time::Instant;

use pyo3::prelude::*;

use anyfabric_engine as native;

use crate::error::exception;

pub(crate) mod copies;
pub(crate) mod ring;
pub(crate) mod sockets;

/// `(dst_indices_address, src_indices_address, num_pages)`.
pub(crate) type Indices = (usize, usize, usize);

/// The indices that lie at an address.
///
/// # Safety
/// `num_pages` aligned `u32` lie there and stay as they are for `'a`.
unsafe fn indices_at<'a>(address: usize, num_pages: usize) -> &'a [u32] {
    if num_pages == 0 {
        return &[];
    }
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts(address as *const u32, num_pages) }
}

/// Times each of `rounds` calls; the first failure ends it.
fn time_rounds<E>(rounds: usize, mut round: impl FnMut() -> Result<(), E>) -> Result<Vec<u64>, E> {
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        round()?;
        times.push(began.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

fn fail(py: Python<'_>, code: native::Code, message: String) -> PyErr {
    exception(py, &native::Error::new(code, message).during("baseline"))
}

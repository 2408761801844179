//! What NICs write into GPU memory, made visible before it is counted.
//!
//! Most GPUs take a NIC's writes in before whatever is submitted to them later,
//! and then there is nothing to do. Of the others the driver must be asked. An
//! arrival does not tell which region it is for, so once such a GPU's memory can
//! be written by peers, every arrival waits for one flush of it: one for all that
//! a poll has found.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use anyfabric_cuda::{Gpu, GpuMemory, Visibility};

use super::nic::NicError;
use crate::lock;

/// The GPUs of which the driver must be asked.
#[derive(Default)]
pub(super) struct Visible {
    is_needed: AtomicBool,
    gpus: Mutex<Vec<&'static Gpu>>,
}

impl Visible {
    /// Peers will be able to write into that memory.
    ///
    /// # Errors
    /// When nothing would make their writes visible.
    pub(super) fn expect(&self, memory: &GpuMemory) -> Result<(), NicError> {
        let gpu = memory.gpu();
        match gpu.visibility {
            Visibility::Ordered => return Ok(()),
            Visibility::Flushed => {}
            Visibility::Never => {
                return Err(NicError::Unsupported(format!(
                "peers cannot write into {}: its driver neither orders what NICs write nor flushes it; use driver 470 \
                     or later",
                gpu.label()
            )))
            }
        }
        let mut gpus = lock(&self.gpus);
        if !gpus.iter().any(|known| std::ptr::eq(*known, gpu)) {
            gpus.push(gpu);
        }
        // ORDERING: before any peer is given a key, and so before what it writes arrives; partner: `is_needed`.
        self.is_needed.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether an arrival that was just taken must wait for a flush.
    #[inline]
    pub(super) fn is_needed(&self) -> bool {
        // ORDERING: see `expect`.
        self.is_needed.load(Ordering::Acquire)
    }

    /// Makes visible what arrived until now.
    ///
    /// # Errors
    /// Why some of it may not be.
    pub(super) fn flush(&self) -> Result<(), String> {
        let gpus = lock(&self.gpus).clone();
        gpus.iter().try_for_each(|gpu| gpu.flush().map_err(|error| format!("{}: {error}", gpu.label())))
    }
}

//! Memory registered with a device: the host's, and GPUs'.
//!
//! A GPU's memory is exported as a dmabuf and registered as that. Where the
//! driver, the kernel or the library cannot, it is registered by its address,
//! which works with nvidia-peermem loaded and is refused by the kernel without.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyfabric_cuda::{CudaError, Dmabuf, GpuMemory};

use super::device::VerbsDomain;
use super::sys::{self, Mr};
use crate::rdma::{Domain, NicError, RemoteMemory};

/// Memory registered with one device.
pub struct VerbsMemory {
    domain: Arc<VerbsDomain>,
    /// Null for no bytes at all.
    mr: *mut Mr,
    pub(super) base: u64,
    pub(super) lkey: u32,
    rkey: u32,
    /// Whether the CPU may read it, as it does to put bytes into a work request.
    pub(super) is_on_host: bool,
}

// SAFETY: the registration is only read, and ended once.
unsafe impl Send for VerbsMemory {}
// SAFETY: as above.
unsafe impl Sync for VerbsMemory {}

impl Domain for VerbsDomain {
    type Memory = VerbsMemory;

    unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
    ) -> Result<VerbsMemory, NicError> {
        // SAFETY: as promised by the caller.
        unsafe { self.register_for(address, nbytes, access(writable)) }
    }

    unsafe fn register_gpu(self: &Arc<Self>, memory: &GpuMemory, writable: bool) -> Result<VerbsMemory, NicError> {
        let (base, nbytes, access) = (memory.address(), memory.nbytes(), access(writable));
        let by_dmabuf = match memory.dmabuf() {
            Ok(exported) => self.pin_dmabuf(&exported, memory, access),
            Err(error @ CudaError::Lost(_)) => return Err(error.into()),
            Err(error) => Err(error.to_string()),
        };
        let mr = by_dmabuf.or_else(|by_dmabuf| {
            // SAFETY: as promised by the caller.
            let by_address = unsafe { self.pin(base, nbytes, access) };
            by_address.map_err(|error| NicError::no_way_to(memory, &self.name, &by_dmabuf, &error.to_string()))
        })?;
        Ok(VerbsMemory::of(Arc::clone(self), mr, base, false))
    }

    fn forget(mut memory: VerbsMemory) -> bool {
        memory.end()
    }

    fn remote(memory: &VerbsMemory) -> RemoteMemory {
        RemoteMemory { base: memory.base, key: memory.rkey.into() }
    }
}

impl VerbsDomain {
    /// Registers buffers of ours for messages that are sent or received: no peer may write into
    /// them by itself.
    ///
    /// # Safety
    /// As [`Domain::register`], of memory that may be written.
    pub(super) unsafe fn register_buffers(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
    ) -> Result<VerbsMemory, NicError> {
        // SAFETY: as promised by the caller.
        unsafe { self.register_for(address, nbytes, sys::ACCESS_LOCAL_WRITE) }
    }

    unsafe fn register_for(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
        access: c_int,
    ) -> Result<VerbsMemory, NicError> {
        let base = address as u64;
        if nbytes == 0 {
            let mr = std::ptr::null_mut();
            return Ok(VerbsMemory { domain: Arc::clone(self), mr, base, lkey: 0, rkey: 0, is_on_host: true });
        }
        // SAFETY: as promised by the caller.
        let mr = unsafe { self.pin(base, nbytes, access) }.map_err(|error| self.cannot_register(nbytes, &error))?;
        Ok(VerbsMemory::of(Arc::clone(self), mr, base, true))
    }

    /// Registers memory by its address, which peers use too.
    ///
    /// # Safety
    /// As [`Domain::register`].
    unsafe fn pin(&self, base: u64, nbytes: u64, access: c_int) -> io::Result<*mut Mr> {
        let len = usize::try_from(nbytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let address = base as *mut c_void;
        let relaxed = self.library.reg_mr_iova2.filter(|_| self.relaxed_ordering);
        let with_flags = |flags: c_int| {
            // SAFETY: the domain is open; the caller vouches for the memory.
            unsafe {
                match relaxed {
                    Some(register) if flags & sys::ACCESS_RELAXED_ORDERING != 0 => {
                        register(self.pd, address, len, base, flags as u32)
                    }
                    _ => (self.library.reg_mr)(self.pd, address, len, flags),
                }
            }
        };
        self.most_relaxed(access, relaxed.is_some(), with_flags)
    }

    /// Registers what was exported of a GPU's memory; peers use its address there.
    fn pin_dmabuf(&self, exported: &Dmabuf, memory: &GpuMemory, access: c_int) -> Result<*mut Mr, String> {
        let Some(register) = self.library.reg_dmabuf_mr else {
            return Err("libibverbs has no ibv_reg_dmabuf_mr, which came with rdma-core 34".into());
        };
        let (len, fd) = (memory.nbytes() as usize, exported.fd.as_raw_fd());
        let with_flags = |flags| {
            // SAFETY: the domain is open; the kernel checks the descriptor and takes a reference of its own.
            unsafe { register(self.pd, exported.offset, len, memory.address(), fd, flags) }
        };
        self.most_relaxed(access, self.relaxed_ordering, with_flags)
            .map_err(|error| format!("the kernel or the NIC's driver refuses it: {error}"))
    }

    /// A device that knows no relaxed ordering ignores the flag, an old kernel
    /// refuses it, and then it is left out.
    fn most_relaxed(&self, access: c_int, relaxed: bool, register: impl Fn(c_int) -> *mut Mr) -> io::Result<*mut Mr> {
        let mut mr = std::ptr::null_mut();
        if relaxed {
            mr = register(access | sys::ACCESS_RELAXED_ORDERING);
        }
        if mr.is_null() {
            mr = register(access);
        }
        if mr.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(mr)
    }

    fn cannot_register(&self, nbytes: u64, error: &io::Error) -> NicError {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: fills the limit.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } == 0;
        if error.raw_os_error() == Some(libc::ENOMEM) && known && limit.rlim_cur != libc::RLIM_INFINITY {
            return NicError::LockedMemory { nic: self.name.clone(), nbytes, limit: limit.rlim_cur };
        }
        NicError::Device(format!("{}: {nbytes} bytes cannot be registered: {error}", self.name))
    }
}

impl VerbsMemory {
    fn of(domain: Arc<VerbsDomain>, mr: *mut Mr, base: u64, is_on_host: bool) -> Self {
        // SAFETY: just returned by the library, so it points to a registration.
        let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
        Self { domain, mr, base, lkey, rkey, is_on_host }
    }
}

impl VerbsMemory {
    /// Once; false when the device refuses.
    pub(super) fn end(&mut self) -> bool {
        let mr = std::mem::replace(&mut self.mr, std::ptr::null_mut());
        if mr.is_null() || !self.domain.is_ours() {
            return true;
        }
        // SAFETY: registered in `register` or `register_gpu`, and ended once.
        let error = unsafe { (self.domain.library.dereg_mr)(mr) };
        // Of a device that was taken away, and with it all that it knew, the kernel says EIO.
        let is_over = matches!(error, 0 | libc::EIO);
        if !is_over {
            log::error!("{}: memory at {:#x} stays registered: error {error}", self.domain.name, self.base);
        }
        is_over
    }
}

impl Drop for VerbsMemory {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for VerbsMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsMemory").field("base", &self.base).finish_non_exhaustive()
    }
}

const fn access(writable: bool) -> c_int {
    if writable {
        sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE
    } else {
        0
    }
}

//! A range of GPU memory, and how NICs get at it.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use crate::driver::{CudaError, Driver};
use crate::gpu::Gpu;
use crate::sys;

/// A range of one GPU's memory, at addresses that the CPU must not touch. Names
/// it, and does not keep it.
#[derive(Debug, Clone, Copy)]
pub struct GpuMemory {
    gpu: &'static Gpu,
    address: u64,
    nbytes: u64,
}

/// GPU memory as a file descriptor that a NIC's driver takes.
#[derive(Debug)]
pub struct Dmabuf {
    /// Needed until the memory is registered: the kernel then holds it itself.
    pub fd: OwnedFd,
    /// Where in it the memory begins; it is exported in whole pages.
    pub offset: u64,
}

impl GpuMemory {
    /// Finds out what lies at an address.
    ///
    /// # Errors
    /// [`CudaError::Memory`] for host memory, managed memory, memory that NICs
    /// cannot be given, and when a part of the range belongs to nothing or to
    /// another GPU.
    pub fn find(driver: &'static Driver, address: u64, nbytes: u64) -> Result<Self, CudaError> {
        let end = address.checked_add(nbytes).filter(|_| nbytes > 0);
        let end = end.ok_or_else(|| refused(address, nbytes, "no bytes, or more than there are addresses"))?;
        let gpu = Self::gpu_at(driver, address, (address, nbytes))?;
        // Allocations may lie back to back, as the segments of an allocator that grows in place.
        let mut at = address;
        while at < end {
            let next = end_of_piece(driver, at)?;
            let next = next.ok_or_else(|| refused(address, nbytes, &format!("nothing is allocated at {at:#x}")))?;
            at = next;
            if at < end && Self::gpu_at(driver, at, (address, nbytes))?.ordinal != gpu.ordinal {
                return Err(refused(address, nbytes, "it lies on more than one GPU"));
            }
        }
        let memory = Self { gpu, address, nbytes };
        // Then a synchronous copy into it has ended when it returns, for NICs as well. What cannot be told so (memory
        // of a pool) is its owner's to synchronise.
        let is_on: c_uint = 1;
        // SAFETY: reads the flag; the address was just found to be the GPU's.
        unsafe { (driver.functions.set_pointer_attribute)((&raw const is_on).cast(), sys::SYNC_MEMOPS, address) };
        Ok(memory)
    }

    /// Whose memory it is.
    pub const fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// First byte, in the address space that this process shares with its GPUs.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub const fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Exports it.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] says what is missing; otherwise the driver's.
    pub fn dmabuf(&self) -> Result<Dmabuf, CudaError> {
        let driver = self.gpu.driver;
        let (label, version) = (self.gpu.label(), driver.version());
        let Some(export) = driver.functions.handle_for_range else {
            return Err(CudaError::Unsupported(format!("the driver (CUDA {version}) is older than CUDA 11.7")));
        };
        if !self.gpu.exports_dmabuf {
            let why = "the driver exports none: that takes its open kernel modules and Linux 5.12";
            return Err(CudaError::Unsupported(format!("{label} (CUDA {version}): {why}")));
        }
        // SAFETY: asks for a number.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let start = self.address / page * page;
        let end = (self.address + self.nbytes).div_ceil(page) * page;
        let mut fd: c_int = -1;
        // SAFETY: fills in a descriptor; the driver checks the range.
        let code = unsafe { export(&raw mut fd, start, (end - start) as usize, sys::DMA_BUF_FD, 0) };
        driver.check("cuMemGetHandleForAddressRange", code)?;
        if fd < 0 {
            return Err(CudaError::Call(format!("{label}: the driver exported a dmabuf without a descriptor")));
        }
        // SAFETY: the descriptor is new, and ours alone.
        Ok(Dmabuf { fd: unsafe { OwnedFd::from_raw_fd(fd) }, offset: self.address - start })
    }

    fn gpu_at(driver: &'static Driver, at: u64, (address, nbytes): (u64, u64)) -> Result<&'static Gpu, CudaError> {
        let (mut kind, mut is_managed, mut ordinal): (c_uint, c_uint, c_int) = (0, 0, -1);
        if !attribute(driver, sys::MEMORY_TYPE, at, &mut kind)? || kind != sys::TYPE_DEVICE {
            return Err(refused(address, nbytes, &format!("at {at:#x} there is no memory of a GPU")));
        }
        attribute(driver, sys::IS_MANAGED, at, &mut is_managed)?;
        if is_managed != 0 {
            let why = "it is managed memory, which moves between host and GPU; copy it into memory of the GPU";
            return Err(refused(address, nbytes, why));
        }
        attribute(driver, sys::DEVICE_ORDINAL, at, &mut ordinal)?;
        let gpu = driver.gpus().iter().find(|gpu| i64::from(gpu.ordinal) == i64::from(ordinal));
        let gpu = gpu.ok_or_else(|| refused(address, nbytes, &format!("the driver knows no GPU {ordinal}")))?;
        // The attribute speaks of registering by address. A driver from before it does not answer, and has none of the
        // memory for which that is impossible.
        let mut is_capable: c_uint = 1;
        if attribute(driver, sys::IS_RDMA_CAPABLE, at, &mut is_capable)? && is_capable == 0 && !gpu.exports_dmabuf {
            let why =
                "it was not allocated for NICs (by cudaMallocAsync, or cuMemCreate without gpuDirectRDMACapable), and \
                       the driver exports no dmabuf; allocate it by cudaMalloc";
            return Err(refused(address, nbytes, why));
        }
        Ok(gpu)
    }
}

/// The kernel module that lets NICs register GPU memory by its address, if one
/// is loaded below that root.
pub fn peer_memory_module(root: &Path) -> Option<&'static str> {
    PEER_MEMORY_MODULES.into_iter().find(|name| root.join("sys/module").join(name).exists())
}

/// Asks for one attribute of an address; false when there is none.
fn attribute<T>(driver: &Driver, attribute: c_int, address: u64, to: &mut T) -> Result<bool, CudaError> {
    // SAFETY: `T` is what the attribute fills in, as `cuda.h` says; an address of nothing is refused.
    let code = unsafe { (driver.functions.pointer_attribute)((to as *mut T).cast::<c_void>(), attribute, address) };
    if code == sys::INVALID_VALUE {
        return Ok(false);
    }
    driver.check("cuPointerGetAttribute", code).map(|()| true)
}

/// Where the memory at an address surely ends: its allocation does, or what is
/// mapped of a reserved range, of which an allocator maps more later.
fn end_of_piece(driver: &Driver, at: u64) -> Result<Option<u64>, CudaError> {
    let mut ends = [None; 2];
    let pieces = [(sys::RANGE_START, sys::RANGE_SIZE), (sys::MAPPING_START, sys::MAPPING_SIZE)];
    for (end, (start_of, size_of)) in ends.iter_mut().zip(pieces) {
        let (mut start, mut size): (u64, usize) = (0, 0);
        if attribute(driver, start_of, at, &mut start)? && attribute(driver, size_of, at, &mut size)? {
            *end = start.checked_add(size as u64).filter(|end| start <= at && at < *end);
        }
    }
    let [range, mapping] = ends;
    // Drivers before CUDA 11.3 know nothing of mappings.
    Ok(range.map(|range| mapping.map_or(range, |mapping| range.min(mapping))))
}

fn refused(address: u64, nbytes: u64, why: &str) -> CudaError {
    CudaError::Memory(format!("{nbytes} bytes at {address:#x} are no GPU memory that can be registered: {why}"))
}

const PEER_MEMORY_MODULES: [&str; 3] = ["nvidia_peermem", "nv_peer_mem", "efa_nv_peermem"];

//! The bindings over a real driver and its first GPU; skipped, with the reason printed, where there is none.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::ffi::{c_int, c_uint, c_void, CStr};
use std::time::Instant;

use anyfabric_cuda::{CudaError, Driver, GpuMemory, Visibility};

/// What the tests do with the GPU themselves, in its primary context.
struct Cuda {
    driver: &'static Driver,
    handle: *mut c_void,
}

impl Cuda {
    fn open() -> Option<Self> {
        let driver = match Driver::get(None) {
            Ok(driver) if !driver.gpus().is_empty() => driver,
            Ok(_) => return skipped("the driver sees no GPU"),
            Err(error) => return skipped(&error.to_string()),
        };
        // SAFETY: the library is loaded already.
        let handle = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        let this = Self { driver, handle };
        let mut context: *mut c_void = std::ptr::null_mut();
        // SAFETY: the functions have these types.
        unsafe {
            let retain: extern "C" fn(*mut *mut c_void, c_int) -> c_int = this.function(c"cuDevicePrimaryCtxRetain");
            let current: extern "C" fn(*mut c_void) -> c_int = this.function(c"cuCtxSetCurrent");
            assert_eq!((retain(&raw mut context, 0), current(context)), (0, 0));
        }
        Some(this)
    }

    /// # Safety
    /// `F` is the function's type.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> F {
        // SAFETY: an open library; the caller vouches for the type.
        unsafe {
            let found = libc::dlsym(self.handle, name.as_ptr());
            assert!(!found.is_null());
            std::mem::transmute_copy(&found)
        }
    }

    fn alloc(&self, nbytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: the function has this type.
        let alloc: extern "C" fn(*mut u64, usize) -> c_int = unsafe { self.function(c"cuMemAlloc_v2") };
        assert_eq!(alloc(&raw mut address, nbytes), 0);
        address
    }

    /// Of the default pool, as cudaMallocAsync gives it.
    fn pooled(&self, nbytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: the functions have these types.
        unsafe {
            let alloc: extern "C" fn(*mut u64, usize, *mut c_void) -> c_int = self.function(c"cuMemAllocAsync");
            let synchronise: extern "C" fn() -> c_int = self.function(c"cuCtxSynchronize");
            assert_eq!((alloc(&raw mut address, nbytes, std::ptr::null_mut()), synchronise()), (0, 0));
        }
        address
    }

    fn managed(&self, nbytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: the function has this type.
        let alloc: extern "C" fn(*mut u64, usize, c_uint) -> c_int = unsafe { self.function(c"cuMemAllocManaged") };
        assert_eq!(alloc(&raw mut address, nbytes, 1), 0);
        address
    }

    fn pinned(&self, nbytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: the function has this type.
        let alloc: extern "C" fn(*mut u64, usize) -> c_int = unsafe { self.function(c"cuMemAllocHost_v2") };
        assert_eq!(alloc(&raw mut address, nbytes), 0);
        address
    }
}

fn skipped<T>(why: &str) -> Option<T> {
    println!("skipped: {why}");
    None
}

#[test]
fn a_real_gpu_says_what_it_is_and_exports_what_it_has() {
    let Some(cuda) = Cuda::open() else { return };
    for gpu in cuda.driver.gpus() {
        println!(
            "{} {} {} {}: rdma {}, dmabuf {}, {:?}",
            gpu.label(),
            gpu.name,
            gpu.uuid_text(),
            gpu.pci,
            gpu.can_do_rdma,
            gpu.exports_dmabuf,
            gpu.visibility
        );
        assert!(!gpu.name.is_empty() && gpu.pci.len() >= 12 && gpu.uuid != [0; 16]);
        assert!(std::path::Path::new("/sys/bus/pci/devices").join(&gpu.pci).exists(), "Linux knows {}", gpu.pci);
    }
    // Small ones share a page: each is exported with its neighbours, from its own offset.
    for nbytes in [64_usize, 512, 4096, 100_000, 8 << 20, 64, 1] {
        let address = cuda.alloc(nbytes);
        let memory = GpuMemory::find(cuda.driver, address, nbytes as u64).unwrap();
        assert_eq!((memory.gpu().ordinal, memory.address()), (0, address));
        let began = Instant::now();
        match memory.dmabuf() {
            Ok(exported) => {
                assert!(memory.gpu().exports_dmabuf);
                assert_eq!(exported.offset, address % 4096);
                println!("{nbytes} bytes at {address:#x}: exported from {} in {:?}", exported.offset, began.elapsed());
            }
            Err(error) => {
                println!("{nbytes} bytes at {address:#x}: {error}");
                assert!(!memory.gpu().exports_dmabuf, "the attribute says that it would: {error}");
            }
        }
        let beyond = GpuMemory::find(cuda.driver, address, (1 << 40) + nbytes as u64).unwrap_err();
        assert!(matches!(beyond, CudaError::Memory(_)), "{beyond}");
    }
}

#[test]
fn memory_of_other_kinds_is_told_apart() {
    let Some(cuda) = Cuda::open() else { return };
    let refused = |address: u64, words: &str| match GpuMemory::find(cuda.driver, address, 4096) {
        Err(CudaError::Memory(why)) => assert!(why.contains(words), "{why}"),
        other => panic!("{words}: {other:?}"),
    };
    let pooled = GpuMemory::find(cuda.driver, cuda.pooled(4096), 4096);
    assert_eq!(pooled.is_ok_and(|memory| memory.dmabuf().is_ok()), cuda.driver.gpus()[0].exports_dmabuf);
    refused(cuda.managed(4096), "managed memory");
    refused(cuda.pinned(4096), "no memory of a GPU");
    refused([0_u8; 4096].as_ptr() as u64, "no memory of a GPU");
}

#[test]
fn what_is_needed_to_make_writes_visible_works() {
    let Some(cuda) = Cuda::open() else { return };
    let gpu = &cuda.driver.gpus()[0];
    if gpu.visibility == Visibility::Never {
        return assert!(gpu.flush().is_err());
    }
    let began = Instant::now();
    (0..100).for_each(|_| gpu.flush().unwrap());
    println!("{:?}: 100 flushes in {:?}", gpu.visibility, began.elapsed());
}

//! The fake libcuda (`cuda.c`): a copy of it for each test.

use std::ffi::{c_int, c_void, CString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// `struct fake`: what the driver is, what goes wrong, and what was seen.
#[repr(C)]
pub(crate) struct Fake {
    pub(crate) num_gpus: i64,
    pub(crate) can_do_rdma: i64,
    pub(crate) exports_dmabuf: i64,
    pub(crate) ordering: i64,
    pub(crate) flush_options: i64,
    pub(crate) init_code: i64,
    pub(crate) pointer_code: i64,
    pub(crate) export_code: i64,
    pub(crate) flush_code: i64,
    pub(crate) exports: i64,
    pub(crate) flushes: i64,
    pub(crate) retained: i64,
    pub(crate) synced: i64,
    pub(crate) unbalanced: i64,
}

/// Which driver it is.
#[allow(dead_code, reason = "each user asks for some")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Age {
    Recent,
    Before11_7,
    Ancient,
}

/// What an allocation is.
#[allow(dead_code, reason = "each user asks for some")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Device,
    Managed,
    Host,
    /// Not to be registered by its address.
    Incapable,
    /// The part that is mapped of four times as much.
    Reserved,
}

/// One copy of the library, of which tests change what they like before it is
/// opened as a driver.
pub(crate) struct FakeCuda {
    path: PathBuf,
    handle: *mut c_void,
}

#[allow(dead_code, reason = "each user asks for some")]
impl FakeCuda {
    pub(crate) fn new(age: Age) -> Self {
        static COPIES: AtomicU32 = AtomicU32::new(0);
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/tests/fake/cuda.c");
        // Another file for each, so that the loader makes another library of it.
        let path = std::env::temp_dir().join(format!("anyfabric-fake-cuda-{}-{number}.so", std::process::id()));
        let flag = match age {
            Age::Recent => "-DRECENT",
            Age::Before11_7 => "-DBEFORE_11_7",
            Age::Ancient => "-DANCIENT",
        };
        let mut command = Command::new("cc");
        command.args(["-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", flag, "-o"]).args([&path, &source]);
        assert!(command.status().expect("a C compiler").success(), "the fake libcuda does not compile");
        let name = CString::new(path.to_str().expect("a path in UTF-8")).expect("a path");
        // SAFETY: our own library, which has no constructors and is never closed.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "the fake libcuda was just built");
        // Loaded it is found by its name, and stays until the process ends.
        let _ = std::fs::remove_file(&path);
        Self { path, handle }
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().expect("a path in UTF-8")
    }

    /// Its settings and what it has seen. Calls into the library must not happen while this is borrowed.
    #[allow(clippy::mut_from_ref, reason = "the library's own; tests change it between calls")]
    pub(crate) fn get(&self) -> &mut Fake {
        // SAFETY: exported by the library and alive for good.
        unsafe { &mut *self.symbol("fake_cuda").cast::<Fake>() }
    }

    /// Memory directly behind what was allocated last.
    pub(crate) fn alloc(&self, nbytes: u64, kind: Kind, gpu: u32) -> u64 {
        // SAFETY: the function has this type.
        let alloc: extern "C" fn(u64, c_int, c_int) -> u64 =
            unsafe { std::mem::transmute(self.symbol("fake_cuda_alloc")) };
        let address = alloc(nbytes, kind as c_int, gpu as c_int);
        assert_ne!(address, 0, "the fake GPU is full");
        address
    }

    /// The next allocation begins at that offset of a page.
    pub(crate) fn align(&self, offset: u64) {
        // SAFETY: the function has this type.
        let align: extern "C" fn(u64) = unsafe { std::mem::transmute(self.symbol("fake_cuda_align")) };
        align(offset);
    }

    pub(crate) fn free(&self, address: u64) {
        // SAFETY: the function has this type.
        let free: extern "C" fn(u64) = unsafe { std::mem::transmute(self.symbol("fake_cuda_free")) };
        free(address);
    }

    /// Puts bytes into the memory, as a kernel would.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: the function has this type.
        let write: extern "C" fn(u64, *const u8, u64) -> i64 =
            unsafe { std::mem::transmute(self.symbol("fake_cuda_write")) };
        assert_eq!(write(address, bytes.as_ptr(), bytes.len() as u64), bytes.len() as i64);
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let c_name = CString::new(name).expect("a name");
        // SAFETY: an open library and a string that lives through the call.
        let found = unsafe { libc::dlsym(self.handle, c_name.as_ptr()) };
        assert!(!found.is_null(), "the fake libcuda has no {name}");
        found
    }
}

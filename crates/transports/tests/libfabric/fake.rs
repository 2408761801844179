//! The fake libfabric (`fake.c`): a copy of it for each test.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Duration;

use anyfabric_transports::libfabric::{FabricNic, FabricSettings, Library};

use crate::support::{nic_of, Pair};

/// `struct fake`: what the provider is, what goes wrong, and what was seen.
#[repr(C)]
pub(crate) struct Fake {
    pub(crate) mode: u64,
    pub(crate) mr_mode: u64,
    pub(crate) cq_data_size: u64,
    pub(crate) ep_cnt: u64,
    pub(crate) version: u64,
    pub(crate) has_source: u64,
    pub(crate) has_delivery_complete: u64,
    pub(crate) has_write_data: u64,
    pub(crate) has_fd: u64,
    pub(crate) order: u64,
    pub(crate) fail_nth: u64,
    pub(crate) fail_with: u64,
    pub(crate) again_every: u64,
    pub(crate) swallow: u64,
    pub(crate) stale_on_close: u64,
    pub(crate) null: u64,
    pub(crate) stays_open: u64,
    pub(crate) memory_stays: u64,
    pub(crate) memory_fails: u64,
    pub(crate) writes: u64,
    pub(crate) immediates: u64,
    pub(crate) sends: u64,
    pub(crate) endpoints: u64,
    pub(crate) memories: u64,
    pub(crate) dmabufs: u64,
    pub(crate) options: u64,
    pub(crate) flags: u64,
    pub(crate) posts: u64,
    pub(crate) has_hmem: u64,
    pub(crate) no_dmabuf: u64,
    pub(crate) no_address: u64,
    pub(crate) gpu_memories: u64,
    pub(crate) dmabuf_offset: u64,
    pub(crate) dmabuf_word: u64,
    pub(crate) device: u64,
    pub(crate) is_full: u64,
    pub(crate) says_so: u64,
    pub(crate) deepest: u64,
    pub(crate) depth: u64,
    pub(crate) takes_keys: u64,
    pub(crate) late: u64,
    pub(crate) has_trywait: u64,
    pub(crate) not_now: u64,
    pub(crate) nics: u64,
    pub(crate) shut: u64,
    pub(crate) early: u64,
    pub(crate) reused: u64,
    pub(crate) addr_format: u64,
    pub(crate) key_bytes: u64,
    pub(crate) no_receives: u64,
    pub(crate) writable: u64,
    pub(crate) down: u64,
    pub(crate) posted_ns: u64,
    provider: [u8; 32],
    fabric: [u8; 32],
    machine: [u8; 256],
}

impl Fake {
    /// Another provider's name, and its fabric's.
    pub(crate) fn name(&mut self, provider: &str, fabric: &str) {
        for (field, text) in [(&mut self.provider, provider), (&mut self.fabric, fabric)] {
            field.fill(0);
            field[..text.len()].copy_from_slice(text.as_bytes());
        }
    }

    /// A folder that says of each NIC what /sys/class/net would.
    #[allow(dead_code, reason = "for tests of engines, which share this file")]
    pub(crate) fn place(&mut self, machine: &Path) {
        let text = machine.to_str().unwrap();
        self.machine[..text.len()].copy_from_slice(text.as_bytes());
    }
}

/// One copy of the library.
pub(crate) struct Copy {
    path: PathBuf,
    fake: *mut Fake,
}

impl Copy {
    /// `None`, with the reason printed, without a C compiler.
    pub(crate) fn new(change: impl FnOnce(&mut Fake)) -> Option<Self> {
        static COPIES: AtomicU32 = AtomicU32::new(0);
        let built = build()?;
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        // Another file, so that the loader makes another library of it.
        let path = built.with_extension(format!("{}.{number}.so", std::process::id()));
        std::fs::copy(built, &path).unwrap();
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: our own library, which has no constructors; it exports `fake` and is never closed.
        let fake = unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!handle.is_null(), "{}", path.display());
            libc::dlsym(handle, c"fake".as_ptr()).cast::<Fake>()
        };
        let mut copy = Self { path, fake };
        change(copy.get());
        Some(copy)
    }

    pub(crate) fn library(&self) -> &'static Library {
        Library::load(&self.path).unwrap()
    }

    /// Its settings and what it has seen. Calls into the library must not happen while this is borrowed.
    pub(crate) fn get(&mut self) -> &mut Fake {
        // SAFETY: exported by the library, used by one thread, and alive for good.
        unsafe { &mut *self.fake }
    }

    /// The field at that offset of [`Fake`], while engines use the library.
    #[allow(dead_code, reason = "for tests of engines, which share this file")]
    pub(crate) fn field(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < std::mem::offset_of!(Fake, provider));
        // SAFETY: one of its numbers, checked above, aligned and alive for good; others look at it, and change it, as at
        // any word of theirs.
        unsafe { AtomicU64::from_ptr(self.fake.cast::<u64>().add(offset / 8)) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Posts and completes that many writes with nothing of ours around the provider; one NIC is open.
    #[allow(dead_code, reason = "for the benchmark, which shares this file")]
    pub(crate) fn baseline(&self, count: u64) {
        let name = CString::new(self.path.to_str().unwrap()).unwrap();
        // SAFETY: our own library, which is open; the function has this type.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
            let baseline = libc::dlsym(handle, c"fake_baseline".as_ptr());
            std::mem::transmute::<*mut libc::c_void, extern "C" fn(u64)>(baseline)(count);
        }
    }

    pub(crate) fn nic(&mut self, settings: &FabricSettings) -> FabricNic {
        let end = self.get().provider.iter().position(|byte| *byte == 0).unwrap();
        let provider = String::from_utf8(self.get().provider[..end].to_vec()).unwrap();
        nic_of(self.library(), &provider, None, settings)
    }

    /// Two NICs with a rail.
    pub(crate) fn pair(&mut self) -> Pair {
        let settings = FabricSettings { answer_timeout: Duration::from_secs(20), ..FabricSettings::default() };
        let (here, there) = (self.nic(&settings), self.nic(&settings));
        Pair::new(here, there)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Compiles the library once; `None` without a compiler.
fn build() -> Option<&'static PathBuf> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transports/tests/libfabric");
            let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-libfabric.so");
            // Renamed when it is whole: other processes compile it too.
            let aside = built.with_extension(format!("{}.tmp", std::process::id()));
            let output = Command::new("cc")
                .args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-o"])
                .arg(&aside)
                .arg(format!("-Wl,--version-script={}", sources.join("fake.map").display()))
                .arg(sources.join("fake.c"))
                .output();
            let Ok(output) = output else {
                println!("skipped: no C compiler for the fake libfabric");
                return None;
            };
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            std::fs::rename(&aside, &built).unwrap();
            Some(built)
        })
        .as_ref()
}

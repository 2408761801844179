//! Mapped memory, and memory that can be shared.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{check, fork_generation, Fd};

/// A mapping, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
    unmapped: AtomicBool,
    generation: u32,
}

// SAFETY: plain memory; who reads and writes it concurrently is up to its users, who go through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zeroed memory.
    ///
    /// # Errors
    /// The system's, when there is no memory.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        unsafe { Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) }
    }

    /// The first `len` bytes of a memfd, shared. With `populate` its pages are
    /// entered into the page table now, so that the first copy does not fault.
    ///
    /// # Errors
    /// The system's.
    pub fn shared(fd: &impl AsRawFd, len: usize, populate: bool) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | if populate { libc::MAP_POPULATE } else { 0 };
        // SAFETY: a fresh mapping at an address of the kernel's choice. The memfd is sealed against shrinking, which
        // whoever received it checks, so no access can fault.
        let this = unsafe { Self::map(len, flags, fd.as_raw_fd(), 0) }?;
        // SAFETY: our own mapping; only advice, and it may be refused.
        unsafe { libc::madvise(this.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(this)
    }

    /// `len` bytes of a memfd from `offset` on, which is a multiple of 4096.
    ///
    /// # Errors
    /// The system's.
    pub fn shared_at(fd: &impl AsRawFd, offset: usize, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        unsafe { Self::map(len, libc::MAP_SHARED | libc::MAP_POPULATE, fd.as_raw_fd(), offset) }
    }

    /// First byte.
    #[inline]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The words from byte `at` on, which others read and write too.
    ///
    /// # Safety
    /// `at` is a multiple of 4, the words lie inside the mapping, which is not unmapped early, and in this process
    /// everybody accesses them atomically.
    #[inline]
    pub(crate) unsafe fn words<const N: usize>(&self, at: usize) -> &[AtomicU32; N] {
        debug_assert!(at.is_multiple_of(4) && at + 4 * N <= self.len, "no words at {at} of {} bytes", self.len);
        // SAFETY: as promised by the caller; a mapping begins at a page.
        unsafe { &*self.as_ptr().add(at).cast::<[AtomicU32; N]>() }
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the pages away now and keeps the addresses reserved until drop: a
    /// stray access faults instead of touching somebody's bytes.
    pub fn unmap_early(&self) {
        // ORDERING: once only; the caller made sure that nobody uses the pages.
        if self.len > 0 && !self.unmapped.swap(true, Ordering::AcqRel) {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: replaces our own mapping in place.
            unsafe { libc::mmap(self.as_ptr().cast(), self.len, libc::PROT_NONE, flags, -1, 0) };
        }
    }

    /// # Safety
    /// `flags` do not contain MAP_FIXED.
    unsafe fn map(len: usize, flags: libc::c_int, fd: libc::c_int, offset: libc::off_t) -> io::Result<Self> {
        let generation = fork_generation();
        if len == 0 {
            return Ok(Self { address: NonNull::dangling(), len, unmapped: AtomicBool::new(true), generation });
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: no MAP_FIXED, so nothing existing is replaced.
        let address = unsafe { libc::mmap(null_mut(), len, protection, flags, fd, offset) };
        match NonNull::new(address.cast::<u8>()) {
            Some(address) if address.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => {
                Ok(Self { address, len, unmapped: AtomicBool::new(false), generation })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 && self.generation == fork_generation() {
            // SAFETY: our own mapping, dropped once.
            unsafe { libc::munmap(self.as_ptr().cast(), self.len) };
        }
    }
}

/// A memfd of `len` bytes, allocated whole and sealed against resizing: no
/// peer can make an access of ours fault.
///
/// # Errors
/// The system's, when there is no memory or descriptor.
pub fn memfd(name: &CStr, len: usize) -> io::Result<Fd> {
    let size = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // The kernel would go on allocating until it has to kill somebody.
    if len >= ASKED_FIRST && len as u64 > available_bytes() / 16 * 15 {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    // SAFETY: `name` is a C string; the call returns a new descriptor.
    let fd =
        unsafe { Fd::from_raw(check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING))?) };
    // SAFETY: our own descriptor.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) })?;
    if len > 0 {
        // SAFETY: our own descriptor.
        check(unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, size) })?;
    }
    // SAFETY: our own descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) })?;
    Ok(fd)
}

/// Whether a received memfd is at least `len` bytes long and cannot shrink, and an access never faults for want of a page.
///
/// # Errors
/// Says what is wrong with it.
pub fn check_memfd(fd: &Fd, len: usize) -> io::Result<()> {
    // SAFETY: queries our own descriptor.
    let seals = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })?;
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the memory is not sealed against shrinking"));
    }
    // SAFETY: an all-zero statfs is valid, and fstatfs fills it.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: queries our own descriptor.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut system) })?;
    if system.f_type == libc::HUGETLBFS_MAGIC {
        // Whoever has the file can take them out of it, sealed or not, and what is touched then may find none left.
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the memory is of huge pages, which can be taken away"));
    }
    // SAFETY: an all-zero stat is valid, and fstat fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: queries our own descriptor.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) })?;
    if u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
        let why = format!("the memory has {} bytes, {len} were announced", stat.st_size);
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(())
}

/// Memory that this process can still get: of the machine, and of its control group.
fn available_bytes() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        number(line.trim_start_matches(':').trim_end_matches("kB"))
    };
    let mut available = field(&read("/proc/meminfo"), "MemAvailable").map_or(u64::MAX, |kib| kib * 1024);
    for line in read("/proc/self/cgroup").lines() {
        let (folder, limit, usage, cache) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "", path] => (format!("/sys/fs/cgroup{path}"), "memory.max", "memory.current", "inactive_file "),
            [_, "memory", path] => {
                let folder = format!("/sys/fs/cgroup/memory{path}");
                (folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            }
            _ => continue,
        };
        if let Some(limit) = number(&read(&format!("{folder}/{limit}"))) {
            let used = number(&read(&format!("{folder}/{usage}"))).unwrap_or(0);
            let cache = field(&read(&format!("{folder}/memory.stat")), cache).unwrap_or(0);
            available = available.min(limit.saturating_sub(used.saturating_sub(cache)));
        }
    }
    available
}

/// Memfds from this length on are weighed against what is available.
const ASKED_FIRST: usize = 64 << 20;
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Has the kernel find the pages of a range now, for writing if it is `writable`:
/// whoever touches them next does not fault. Best effort: older kernels than 5.14
/// know nothing of it.
pub fn populate(address: *const u8, nbytes: u64, writable: bool) {
    let (Ok(len), offset) = (usize::try_from(nbytes), address as usize % PAGE) else { return };
    let advice = if writable { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: changes no content and no rights; a range that is not mapped is refused.
    let _ = unsafe { libc::madvise(address.wrapping_sub(offset).cast_mut().cast(), len + offset, advice) };
}

/// Smallest page; ranges that are advised begin at one.
const PAGE: usize = 4096;

//! A NIC's domain: what registers memory, from any thread.
//!
//! Providers are asked for FI_THREAD_SAFE, so that registering needs no lock of
//! ours. (FI_THREAD_COMPLETION would allow the same, but the tcp provider of 2.5
//! calls a null pointer then.)
//!
//! Some providers (FI_MR_ENDPOINT) let memory be reached only through an endpoint
//! that it is bound to. They get one endpoint, and when that is closed to stop a
//! peer all memory is registered again, with the keys that it had, for the next.

use std::collections::HashSet;
use std::ffi::{c_int, c_void};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use anyfabric_cuda::{CudaError, Dmabuf, GpuMemory};

use super::library::{FabricError, Library};
use super::provider::Provider;
use super::sys::*;
use crate::lock;
use crate::rdma::{Domain, NicError, RemoteMemory};
use crate::sys::fork_generation;

/// A NIC's domain; closed when nothing uses it any more.
pub struct FabricDomain {
    provider: Arc<Provider>,
    fabric: *mut fid_fabric,
    domain: *mut fid_domain,
    bound: Mutex<Bound>,
    generation: u32,
}

/// Memory that the NIC knows.
pub struct FabricMemory {
    registration: Arc<Registration>,
    remote: RemoteMemory,
    domain: Arc<FabricDomain>,
}

impl FabricDomain {
    /// Opens the NIC.
    ///
    /// # Errors
    /// The library's: no permission, no such device, nothing left.
    pub fn open(provider: Arc<Provider>) -> Result<Arc<Self>, FabricError> {
        let library = provider.info().library();
        let fabric = library.fabric(provider.info())?;
        let mut domain = ptr::null_mut();
        // SAFETY: the fabric was just opened from this entry; `domain` receives the object.
        let code =
            unsafe { ((*(*fabric).ops).domain)(fabric, provider.info().as_ptr(), &raw mut domain, ptr::null_mut()) };
        if let Err(error) = library.check("fi_domain", code) {
            close(fabric.cast(), fork_generation());
            return Err(error);
        }
        Ok(Arc::new(Self { provider, fabric, domain, bound: Mutex::default(), generation: fork_generation() }))
    }

    /// What it is a domain of.
    pub const fn provider(&self) -> &Arc<Provider> {
        &self.provider
    }

    pub(super) fn library(&self) -> &'static Library {
        self.provider.info().library()
    }

    pub(super) const fn fabric(&self) -> *mut fid_fabric {
        self.fabric
    }

    pub(super) const fn as_ptr(&self) -> *mut fid_domain {
        self.domain
    }

    /// Whether memory is bound to an endpoint, so that there can be only one.
    pub(super) fn binds_memory(&self) -> bool {
        self.mr_mode() & FI_MR_ENDPOINT != 0
    }

    /// Takes all memory back from the endpoint that it is bound to, which can
    /// then be closed; must come before that.
    pub(super) fn unbind(&self) {
        let mut bound = self.bound();
        bound.endpoint = None;
        for registration in &bound.memory {
            registration.withdraw();
        }
    }

    /// Binds all memory, and what is registered later, to an endpoint.
    pub(super) fn bind_to(&self, endpoint: *mut fid_ep) -> Result<(), NicError> {
        let mut bound = self.bound();
        bound.endpoint = Some(Endpoint(endpoint));
        bound.memory.iter().try_for_each(|registration| self.register_now(registration, Some(endpoint)))
    }

    fn add(self: &Arc<Self>, what: What) -> Result<FabricMemory, NicError> {
        let key = what.key;
        self.add_with_key(what).inspect_err(|_| {
            self.bound().keys.remove(&key);
        })
    }

    fn add_with_key(self: &Arc<Self>, what: What) -> Result<FabricMemory, NicError> {
        let registration = Arc::new(Registration {
            what,
            mr: AtomicPtr::default(),
            desc: AtomicPtr::default(),
            stays: AtomicBool::default(),
            generation: fork_generation(),
        });
        if self.binds_memory() {
            let mut bound = self.bound();
            if let Some(Endpoint(endpoint)) = bound.endpoint {
                self.register_now(&registration, Some(endpoint))?;
            }
            bound.memory.push(Arc::clone(&registration));
        } else {
            self.register_now(&registration, None)?;
        }
        let base = if self.mr_mode() & FI_MR_VIRT_ADDR != 0 { registration.what.address } else { 0 };
        let remote = RemoteMemory { base, key: registration.key() };
        Ok(FabricMemory { registration, remote, domain: Arc::clone(self) })
    }
}

impl Domain for FabricDomain {
    type Memory = FabricMemory;

    unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
    ) -> Result<FabricMemory, NicError> {
        let key = self.fresh_key()?;
        self.add(What { address: address as u64, nbytes, access: access(writable), gpu: None, key })
    }

    unsafe fn register_gpu(self: &Arc<Self>, memory: &GpuMemory, writable: bool) -> Result<FabricMemory, NicError> {
        if !self.provider.reaches_gpus {
            let (nic, name, library) = (&self.provider.nic, &self.provider.name, self.library());
            return Err(NicError::Unsupported(format!(
                "{nic}: provider {name} of libfabric {} ({}) takes host memory only: it was built without CUDA, or opened \
                 before this process used CUDA; make the first GPU tensor before the engine",
                library.version_text(),
                library.path(),
            )));
        }
        let (key, gpu) = (self.fresh_key()?, Some(*memory));
        self.add(What { address: memory.address(), nbytes: memory.nbytes(), access: access(writable), gpu, key })
    }

    fn forget(mut memory: FabricMemory) -> bool {
        memory.end()
    }

    fn remote(memory: &FabricMemory) -> RemoteMemory {
        memory.remote
    }
}

impl FabricMemory {
    /// First byte, in this process.
    #[inline]
    pub(super) fn address(&self) -> u64 {
        self.registration.what.address
    }

    /// What the provider wants to see with every use of the memory here.
    #[inline]
    pub(super) fn desc(&self) -> *mut c_void {
        // ORDERING: changed only by the thread that has the NIC, which is the one that asks.
        self.registration.desc.load(Ordering::Relaxed)
    }

    /// The NIC forgets it, now or before; false when the library refuses.
    pub(super) fn end(&mut self) -> bool {
        let mut bound = self.domain.bound();
        bound.memory.retain(|other| !Arc::ptr_eq(other, &self.registration));
        let is_over = self.registration.withdraw();
        if is_over {
            bound.keys.remove(&self.registration.what.key);
        }
        is_over
    }
}

impl Drop for FabricMemory {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for FabricMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FabricMemory").field("nbytes", &self.registration.what.nbytes).finish_non_exhaustive()
    }
}

/// What is bound to the endpoint, where memory must be.
#[derive(Default)]
struct Bound {
    endpoint: Option<Endpoint>,
    memory: Vec<Arc<Registration>>,
    /// Keys of all memory, where we choose them.
    keys: HashSet<u64>,
}

struct Endpoint(*mut fid_ep);

// SAFETY: only handed to calls that any thread may make.
unsafe impl Send for Endpoint {}
// SAFETY: the pointers are objects of the library's that live until this is dropped, and every call on them that can be
// made through a shared reference may be made from any thread.
unsafe impl Send for FabricDomain {}
// SAFETY: as above.
unsafe impl Sync for FabricDomain {}

/// One registration, which may be made again for another endpoint.
struct Registration {
    what: What,
    mr: AtomicPtr<fid_mr>,
    desc: AtomicPtr<c_void>,
    /// The library has refused to forget it once.
    stays: AtomicBool,
    generation: u32,
}

struct What {
    address: u64,
    nbytes: u64,
    access: u64,
    gpu: Option<GpuMemory>,
    /// What we ask for, where the provider does not choose.
    key: u64,
}

impl FabricDomain {
    fn bound(&self) -> MutexGuard<'_, Bound> {
        lock(&self.bound)
    }

    fn mr_mode(&self) -> c_int {
        // SAFETY: an entry has domain attributes for as long as it lives.
        unsafe { (*(*self.provider.info().as_ptr()).domain_attr).mr_mode }
    }

    /// A random key as long as the provider's, which no other memory has.
    fn fresh_key(&self) -> Result<u64, NicError> {
        if self.mr_mode() & FI_MR_PROV_KEY != 0 {
            return Ok(0);
        }
        // SAFETY: as in `mr_mode`.
        let key_bytes = unsafe { (*(*self.provider.info().as_ptr()).domain_attr).mr_key_size };
        for _ in 0..MAX_DRAWS {
            let mut key = [0; 8];
            getrandom::fill(&mut key[..key_bytes.min(8)]).map_err(|error| NicError::Device(error.to_string()))?;
            let key = u64::from_le_bytes(key);
            if self.bound().keys.insert(key) {
                return Ok(key);
            }
        }
        Err(NicError::Device(format!("{}: no key of {key_bytes} bytes is left for memory", self.provider.nic)))
    }

    fn register_now(&self, registration: &Registration, endpoint: Option<*mut fid_ep>) -> Result<(), NicError> {
        let what = &registration.what;
        let mr = match &what.gpu {
            None => self.register_with(what, None).map_err(|error| self.explain(error, what.nbytes))?,
            Some(memory) => self.register_on_gpu(what, memory)?,
        };
        if let Some(endpoint) = endpoint {
            // SAFETY: both objects are open; the registration is ours alone.
            let code = unsafe {
                let ops = (*mr).fid.ops;
                match ((*ops).bind)(mr.cast(), endpoint.cast(), 0) {
                    0 => ((*ops).control)(mr.cast(), FI_ENABLE, ptr::null_mut()),
                    code => code,
                }
            };
            if let Err(error) = self.library().check("fi_mr_enable", code) {
                close(mr.cast(), registration.generation);
                return Err(self.explain(error, what.nbytes));
            }
        }
        // ORDERING: read by whoever was given the registration, or has the NIC.
        registration.mr.store(mr, Ordering::Release);
        // SAFETY: the registration is open.
        registration.desc.store(unsafe { (*mr).mem_desc }, Ordering::Relaxed);
        Ok(())
    }

    /// As a dmabuf, or else by its address: the provider then does what it can.
    fn register_on_gpu(&self, what: &What, memory: &GpuMemory) -> Result<*mut fid_mr, NicError> {
        let library = self.library();
        let by_dmabuf = if library.api_version() < version(1, 20) {
            Err(format!("{} is libfabric {}, and it came with 1.20", library.path(), library.version_text()))
        } else {
            match memory.dmabuf() {
                // The kernel holds what was exported once it is registered.
                Ok(exported) => self.register_with(what, Some(&exported)).map_err(|error| error.to_string()),
                Err(error @ CudaError::Lost(_)) => return Err(error.into()),
                Err(error) => Err(error.to_string()),
            }
        };
        by_dmabuf.or_else(|by_dmabuf| {
            let by_address = self.register_with(what, None);
            by_address.map_err(|error| NicError::no_way_to(memory, &self.provider.nic, &by_dmabuf, &error.to_string()))
        })
    }

    fn register_with(&self, what: &What, exported: Option<&Dmabuf>) -> Result<*mut fid_mr, FabricError> {
        // Nothing is registered as one byte: providers refuse a length of 0, and nobody can reach it.
        let len = what.nbytes.max(1) as usize;
        let iov = libc::iovec { iov_base: what.address as *mut c_void, iov_len: len };
        let dmabuf = exported.map(|from| fi_mr_dmabuf {
            fd: from.fd.as_raw_fd(),
            offset: from.offset,
            len,
            base_addr: what.address as *mut c_void,
        });
        // SAFETY: null pointers and zeroes are what the members that we do not use must be.
        let mut attr: fi_mr_attr = unsafe { std::mem::zeroed() };
        attr.mr_iov = dmabuf.as_ref().map_or((&raw const iov).cast(), |dmabuf| ptr::from_ref(dmabuf).cast());
        attr.iov_count = 1;
        attr.access = what.access;
        attr.requested_key = what.key;
        if let Some(memory) = &what.gpu {
            (attr.iface, attr.device) = (FI_HMEM_CUDA, memory.gpu().ordinal.into());
        }
        let flags = if dmabuf.is_some() { FI_MR_DMABUF } else { 0 };
        let mut mr = ptr::null_mut();
        // SAFETY: the attributes and what they point to live through the call; who registered vouches for the memory; `mr`
        // receives the object.
        let code = unsafe { ((*(*self.domain).mr).regattr)(self.domain.cast(), &raw const attr, flags, &raw mut mr) };
        self.library().check("fi_mr_regattr", code)?;
        Ok(mr)
    }

    fn explain(&self, error: FabricError, nbytes: u64) -> NicError {
        let (nic, limit) = (self.provider.nic.clone(), locked_memory_limit());
        match error {
            // It is the limit of all that is registered.
            FabricError::Call { code: libc::ENOMEM, .. } if limit != libc::RLIM_INFINITY => {
                NicError::LockedMemory { nic, nbytes, limit }
            }
            error => NicError::Device(format!("{nic} cannot register {nbytes} bytes: {error}")),
        }
    }
}

impl Drop for FabricDomain {
    fn drop(&mut self) {
        close(self.domain.cast(), self.generation);
        close(self.fabric.cast(), self.generation);
    }
}

impl Registration {
    fn key(&self) -> u64 {
        // ORDERING: see `register_now`.
        let mr = self.mr.load(Ordering::Acquire);
        // SAFETY: null, or open.
        unsafe { mr.as_ref() }.map_or(self.what.key, |mr| mr.key)
    }

    /// The NIC forgets it: from when this returns no byte lands through its key; false when the
    /// library refuses, or has refused before.
    fn withdraw(&self) -> bool {
        // ORDERING: whoever takes the pointer closes the object.
        let mr = self.mr.swap(ptr::null_mut(), Ordering::AcqRel);
        if !mr.is_null() {
            // ORDERING: see `FabricMemory::desc`. It was part of the object.
            self.desc.store(ptr::null_mut(), Ordering::Relaxed);
            if !close(mr.cast(), self.generation) {
                // ORDERING: calls come one after the other, under the domain's lock.
                self.stays.store(true, Ordering::Relaxed);
            }
        }
        // ORDERING: as above.
        !self.stays.load(Ordering::Relaxed)
    }
}

/// Closes an object of the library's, whose pointer is used no more, unless an
/// ancestor of this process opened it: a child would shut its parent's
/// connections. False when the library refuses, and still has what it was given.
pub(super) fn close(object: *mut fid, generation: u32) -> bool {
    if generation != fork_generation() {
        return true;
    }
    // SAFETY: callers own the object and give it up here.
    let code = unsafe { ((*(*object).ops).close)(object) };
    if code != 0 {
        log::warn!("libfabric does not close an object: error {code}");
    }
    code == 0
}

const fn access(writable: bool) -> u64 {
    FI_WRITE | FI_SEND | FI_RECV | if writable { FI_REMOTE_WRITE } else { 0 }
}

fn locked_memory_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills in a structure that lives through the call.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    limit.rlim_cur
}

/// Keys that are drawn for memory until one is free.
const MAX_DRAWS: u32 = 1000;

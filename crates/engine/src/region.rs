//! Regions and slices of them.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_cuda::GpuMemory;
use anyfabric_transports::sys::{self, Mapping};
use anyfabric_transports::{Backing, Region as Memory};
use anyfabric_wire::{Address, Descriptor, Device};

use crate::checks::check_memory;
use crate::error::seconds;
use crate::inner::Inner;
use crate::revoke::Patience;
use crate::{Code, Error, Result};

/// Memory registered with an engine. Closed on drop.
pub struct Region {
    pub(crate) inner: Arc<Inner>,
    pub(crate) memory: Arc<Memory>,
}

impl Region {
    pub(crate) fn allocate(inner: &Arc<Inner>, nbytes: u64) -> Result<Self> {
        let fail = |error: std::io::Error| {
            Error::system(&format!("cannot allocate {nbytes} bytes"), &error).during("allocate")
        };
        let len =
            usize::try_from(nbytes).map_err(|_| Error::invalid(format!("{nbytes} bytes do not fit an address")))?;
        let fd = sys::memfd(c"anyfabric-region", len).map_err(fail)?;
        let mapping = Mapping::shared(&fd, len, false).map_err(fail)?;
        Self::new(inner, nbytes, true, Backing::Memfd { fd: Arc::new(fd), mapping })
    }

    /// # Safety
    /// `address` is valid for reads, and for writes if `writable`, of `nbytes`
    /// bytes for as long as `owner` lives.
    pub(crate) unsafe fn register(
        inner: &Arc<Inner>,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        Self::new(inner, nbytes, writable, Backing::Foreign { address, owner })
    }

    /// Of a GPU; the caller vouches that the allocation stays while `owner` lives.
    pub(crate) fn on_gpu(
        inner: &Arc<Inner>,
        memory: GpuMemory,
        writable: bool,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        Self::new(inner, memory.nbytes(), writable, Backing::Gpu { memory, owner })
    }

    fn new(inner: &Arc<Inner>, nbytes: u64, writable: bool, backing: Backing) -> Result<Self> {
        let key = random_key(inner)?;
        let memory = Arc::new(Memory::new(inner.next_region_id(), key, nbytes, writable, backing));
        inner.regions.insert(Arc::clone(&memory));
        Ok(Self { inner: Arc::clone(inner), memory })
    }

    /// Its number in its engine.
    pub fn id(&self) -> u64 {
        self.memory.id
    }

    /// Its length in bytes.
    pub fn nbytes(&self) -> u64 {
        self.memory.nbytes()
    }

    /// Whether peers may write into it.
    pub fn is_writable(&self) -> bool {
        self.memory.writable
    }

    /// Whether it was closed, or its engine was.
    pub fn is_closed(&self) -> bool {
        self.memory.is_closed() || self.inner.is_closed()
    }

    /// The device that it lies on: `cpu`, or `cuda:0`.
    pub fn device(&self) -> String {
        self.memory.gpu_memory().map_or_else(|| "cpu".to_owned(), |memory| memory.gpu().label())
    }

    /// First byte, in this process; of GPU memory an address that the CPU must not
    /// touch. Reading while a peer writes is a race, as with every one-sided
    /// transport: count first.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// The bytes of `range`.
    ///
    /// # Errors
    /// `InvalidArgument` when they leave the region.
    pub fn slice(&self, range: Range<u64>) -> Result<Slice> {
        check_range(&range, self.nbytes(), "region", self.id())?;
        let inner = Arc::clone(&self.inner);
        Ok(Slice { inner, memory: Arc::clone(&self.memory), offset: range.start, nbytes: range.end - range.start })
    }

    /// What a peer needs to write into the region; see [`Descriptor::encode`].
    ///
    /// # Errors
    /// `Unsupported` when the region is not writable; `Closed`.
    pub fn descriptor(&self) -> Result<Descriptor> {
        self.check_open("descriptor")?;
        if !self.memory.writable {
            let message = format!("region {} was registered read-only; peers cannot write into it", self.id());
            return Err(Error::new(Code::Unsupported, message).during("descriptor"));
        }
        let mut failed = None;
        let key = self.memory.key(|| {
            random_key(&self.inner).unwrap_or_else(|error| {
                failed = Some(error);
                0
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let address = self.inner.address.clone();
        let device = self.memory.gpu_memory().map_or(Device::Host, |memory| Device::Cuda(memory.gpu().uuid));
        Ok(Descriptor { address, region: self.id(), key, nbytes: self.nbytes(), device })
    }

    /// Fences writers out: returns when none can touch the region any more.
    /// Descriptors made before stop working for them.
    ///
    /// # Errors
    /// `WaitTimeout`: a writer could not be fenced in time; its bytes are
    /// quarantined until it answers or exits.
    pub fn revoke(&self, peer: Option<&Address>, timeout: Duration) -> Result<()> {
        self.revoke_while(peer, timeout, &|| true)
    }

    /// As [`Region::revoke`], for callers that look up while they wait: with
    /// false from `goes_on` it fails as if the time were over, but no NIC is
    /// stopped.
    ///
    /// # Errors
    /// As [`Region::revoke`].
    pub fn revoke_while(&self, peer: Option<&Address>, timeout: Duration, goes_on: &dyn Fn() -> bool) -> Result<()> {
        self.check_open("revoke")?;
        // A peer never met may hold a descriptor: it finds itself refused when it comes.
        let peer = peer.map(|address| self.inner.peer_at(address));
        if self.inner.fence(&self.memory, peer.as_ref(), Patience { timeout, goes_on }) {
            return Ok(());
        }
        self.inner.check_open_to("revoke")?;
        let message = format!(
            "region {}: a writer has not let go within {}; its bytes are quarantined until it does or exits",
            self.id(),
            seconds(Some(timeout))
        );
        let mut error = Error::new(Code::WaitTimeout, message).during("revoke");
        error.context.region = Some(self.id());
        Err(error)
    }

    /// Revokes for everybody and forgets the region. The memory is kept until
    /// its last transfer has quiesced and no writer can touch it. A thread that
    /// closes while another does waits too.
    pub fn close(&self, timeout: Duration) {
        self.close_while(timeout, &|| true);
    }

    /// As [`Region::close`], for callers that look up while they wait: with
    /// false from `goes_on` it returns at once, but no NIC is stopped.
    pub fn close_while(&self, timeout: Duration, goes_on: &dyn Fn() -> bool) {
        if self.inner.check_fork().is_ok() {
            self.inner.close_region(&self.memory, Patience { timeout, goes_on });
        }
    }

    /// Waits, after a [`revoke`](Self::revoke) or [`close`](Self::close) that
    /// was late, until no writer, or not that one, can touch the region, or the
    /// engine has ended.
    pub fn wait_fenced(&self, peer: Option<&Address>, timeout: Duration) -> bool {
        let peer = peer.and_then(|address| self.inner.find_peer(address.engine)).map(|peer| peer.idx);
        let is_out = || {
            let owed = self.memory.owed_by();
            self.inner.presence.is_stopped() || peer.map_or(owed.is_empty(), |peer| !owed.contains(&peer))
        };
        self.inner.check_fork().is_ok() && self.inner.wait(Some(timeout), is_out)
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        self.inner.check_open_to(operation)?;
        check_memory(&self.memory, operation)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Never blocks: what cannot be let go of at once is quarantined.
        self.close(Duration::ZERO);
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("id", &self.id()).field("nbytes", &self.nbytes()).finish_non_exhaustive()
    }
}

/// A byte range of a region.
#[derive(Clone)]
pub struct Slice {
    pub(crate) inner: Arc<Inner>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) offset: u64,
    pub(crate) nbytes: u64,
}

impl Slice {
    /// First byte, from the start of the region.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// The bytes of `range`, counted from the slice's start.
    ///
    /// # Errors
    /// `InvalidArgument` when they leave the slice.
    pub fn slice(&self, range: Range<u64>) -> Result<Self> {
        check_range(&range, self.nbytes, "region", self.memory.id)?;
        let (offset, nbytes) = (self.offset + range.start, range.end - range.start);
        Ok(Self { inner: Arc::clone(&self.inner), memory: Arc::clone(&self.memory), offset, nbytes })
    }
}

impl From<&Region> for Slice {
    fn from(region: &Region) -> Self {
        Self {
            inner: Arc::clone(&region.inner),
            memory: Arc::clone(&region.memory),
            offset: 0,
            nbytes: region.nbytes(),
        }
    }
}

impl std::fmt::Debug for Slice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice(region {}, {}..{})", self.memory.id, self.offset, self.offset + self.nbytes)
    }
}

pub(crate) fn check_range(range: &Range<u64>, nbytes: u64, what: &str, id: u64) -> Result<()> {
    if range.start <= range.end && range.end <= nbytes {
        return Ok(());
    }
    let message = format!("bytes {}..{} of {what} {id} do not lie inside its {nbytes} bytes", range.start, range.end);
    let mut error = Error::invalid(message).during("slice");
    error.context.region = Some(id);
    Err(error)
}

fn random_key(inner: &Inner) -> Result<u64> {
    inner.random().map(u64::from_le_bytes).map_err(|error| Error::system("random numbers", &error))
}

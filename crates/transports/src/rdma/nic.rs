//! One NIC, whatever library drives it.
//!
//! A [`Nic`] belongs to one thread at a time; its [`Domain`], which registers
//! memory, to all of them. A NIC owns its *rails*: the connection to one NIC of
//! one peer, named by a number. Nothing here knows of tickets, counters, shards
//! or peers; nothing on the way from [`Nic::post`] to [`Completions`] may
//! allocate, lock or call through a table of ours.
//!
//! The contract, for every library:
//!
//! - A batch ends exactly once: [`Completions::completed`] is called for its
//!   token when all of its bytes are *placed* at the peer, or when some are not
//!   and none of them moves any more. Batches may end in any order.
//! - An immediate arrives after the bytes of its own write are visible, once,
//!   or not at all. That is the only order promised, but see
//!   [`NicAbout::is_ordered`].
//! - After a fault the rail is *broken*: [`Completions::broken`] says so once,
//!   everything posted on it ends with a fault, and nothing more may be posted.
//!   Rails of other peers, and other NICs, are not touched. A broken rail is
//!   closed and another one opened; it never recovers by itself.

use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use anyfabric_cuda::{peer_memory_module, CudaError, GpuMemory};
use anyfabric_plan::Extent;
use thiserror::Error;

use crate::sys::are_descriptors_left;

/// A rail, by its number at its NIC; numbers of closed rails are used again.
pub type RailIdx = u32;

/// Whether a port is up, as far as its library can tell. From any thread, and without the NIC: devices take their time.
pub type PortLook = Box<dyn Fn() -> bool + Send + Sync>;

/// One port, its queues, and the rails that use them.
pub trait Nic: Send + 'static {
    /// What registers memory with this NIC.
    type Domain: Domain;

    /// What registers memory with this NIC, from any thread.
    fn domain(&self) -> &Arc<Self::Domain>;

    /// What this NIC is and can do.
    fn about(&self) -> &NicAbout;

    /// Looks at its port, and reads what its device has announced.
    fn port(&self) -> PortLook;

    /// Readable when its device has announced something: then look at the port. Ports of one device have it in common.
    fn announcements(&self) -> Option<RawFd> {
        None
    }

    /// Acts on what was announced by the last look, and tries again what its device refused. Rails that break are told at
    /// the next poll.
    fn heed(&mut self) {}

    // ---- rails ---------------------------------------------------------------------------------

    /// Makes our end of a rail.
    ///
    /// # Errors
    /// When the device has no more of something.
    fn open(&mut self) -> Result<RailIdx, NicError>;

    /// What the peer's NIC needs to connect to this end; at most
    /// [`MAX_ADDRESS_BYTES`] bytes that only the same library reads.
    fn address(&self, rail: RailIdx) -> Vec<u8>;

    /// Connects to the other end: arrivals are taken from when this returns, and
    /// batches may be posted once the other end has said the same.
    ///
    /// # Errors
    /// [`NicError::Peer`] for an address that cannot be one; it was sent by a
    /// peer and may be anything.
    fn connect(&mut self, rail: RailIdx, theirs: &[u8]) -> Result<(), NicError>;

    /// Stops a rail: from when this returns true no byte of the peer's lands through
    /// it. What was posted on it ends with a fault, in later polls; the rail is
    /// broken, without a call of [`Completions::broken`]. False when the library
    /// refuses: see [`Nic::close`].
    fn fence(&mut self, rail: RailIdx) -> bool;

    /// Closes a rail: from when this returns true neither side touches memory of ours
    /// through it, and batches that have not ended are the caller's to end. False when
    /// the library refuses: then that holds for each registration from when it has
    /// ended, and batches never end. What had arrived by now is still reported,
    /// and the number is not used again before.
    fn close(&mut self, rail: RailIdx) -> bool;

    // ---- posting -------------------------------------------------------------------------------

    /// Writes that could be posted on the rail now.
    fn room(&self, rail: RailIdx) -> usize;

    /// Posts the first writes of a batch, as many as there is room for; returns
    /// how many. If any, they end together, as one batch; if none, nothing was
    /// posted. May hold them back until [`Nic::flush`].
    ///
    /// # Errors
    /// When the rail is broken; what was posted before still ends by itself.
    fn post(&mut self, rail: RailIdx, batch: &Batch<'_, <Self::Domain as Domain>::Memory>) -> Result<usize, Fault>;

    /// Posts one write, as a batch of its own, and hands it to the device; false when
    /// there is no room. If the device refuses it, it ends with a fault.
    ///
    /// # Errors
    /// As [`Nic::post`].
    #[inline]
    fn post_one(&mut self, rail: RailIdx, one: &One<'_, <Self::Domain as Domain>::Memory>) -> Result<bool, Fault> {
        let One { source, target, write, imm, token } = *one;
        let marks = imm.map_or(Marks::None, Marks::Each);
        let writes = std::slice::from_ref(write);
        let is_posted = self.post(rail, &Batch { source, target, writes, marks, token })? == 1;
        let _ = self.flush(rail);
        Ok(is_posted)
    }

    /// As [`Nic::post_one`], of an immediate without bytes.
    ///
    /// # Errors
    /// As [`Nic::post`].
    fn signal(&mut self, rail: RailIdx, imm: u32, token: u32) -> Result<bool, Fault>;

    /// Something is posted on this rail after what comes now: what that takes may be brought near.
    #[inline]
    fn expect(&self, _rail: RailIdx) {}

    /// Posts a message of at most [`NicAbout::max_message_bytes`]; false when
    /// there is no room. The bytes are copied.
    ///
    /// # Errors
    /// As [`Nic::post`].
    fn send(&mut self, rail: RailIdx, message: &[u8], token: u32) -> Result<bool, Fault>;

    /// Hands everything held back to the device.
    ///
    /// # Errors
    /// As [`Nic::post`]. What could not be handed over ends with a fault.
    fn flush(&mut self, rail: RailIdx) -> Result<(), Fault>;

    // ---- completions ---------------------------------------------------------------------------

    /// Reports one batch of completions of all rails, and makes ready for more
    /// arrivals; true when there was something.
    fn poll(&mut self, to: &mut impl Completions) -> bool;

    /// Readable after [`Nic::arm`], when there is something to poll; `None` when
    /// the library has no such descriptor, and the NIC must be polled.
    fn event_fd(&self) -> Option<RawFd>;

    /// Asks for an event at the next completion, and takes events that came; what
    /// came before that is found by one more poll. False when no event is promised
    /// now: poll, and ask again before you wait.
    fn arm(&mut self) -> bool;
}

/// What registers memory with a NIC; usable from any thread.
pub trait Domain: Send + Sync + 'static {
    /// A registration; dropped, the NIC forgets it. It keeps its domain open.
    type Memory: Send + Sync + 'static;

    /// Registers memory.
    ///
    /// # Errors
    /// [`NicError::LockedMemory`] when a limit is in the way.
    ///
    /// # Safety
    /// The memory is valid for reads, and for writes if `writable`, until the
    /// registration is dropped.
    unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
    ) -> Result<Self::Memory, NicError>;

    /// Registers memory of a GPU, by the best way that machine and library have.
    ///
    /// # Errors
    /// [`NicError::Unsupported`] says what is missing for each way.
    ///
    /// # Safety
    /// As [`Domain::register`].
    unsafe fn register_gpu(self: &Arc<Self>, memory: &GpuMemory, writable: bool) -> Result<Self::Memory, NicError>;

    /// Ends a registration; false when the NIC refuses, and may use the memory for as long as the process lives.
    fn forget(memory: Self::Memory) -> bool;

    /// What a peer needs to write into registered memory.
    fn remote(memory: &Self::Memory) -> RemoteMemory;
}

/// A peer's memory, as a NIC addresses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteMemory {
    /// Address of the region's first byte: virtual, or 0 where NICs count from
    /// the start.
    pub base: u64,
    /// The key.
    pub key: u64,
}

/// Writes from one registration into one of a peer's, which end together.
#[derive(Debug)]
pub struct Batch<'a, M> {
    /// Where the bytes are; bounds have been checked.
    pub source: &'a M,
    /// Where they go.
    pub target: RemoteMemory,
    /// Which ones; each at most [`NicAbout::max_write_bytes`].
    pub writes: &'a [Extent],
    /// Which writes carry an immediate.
    pub marks: Marks,
    /// Given back by [`Completions::completed`].
    pub token: u32,
}

/// A write from a registration into one of a peer's.
#[derive(Debug)]
pub struct One<'a, M> {
    /// Where the bytes are; bounds have been checked.
    pub source: &'a M,
    /// Where they go.
    pub target: RemoteMemory,
    /// Which; at most [`NicAbout::max_write_bytes`]. By reference, for a copy of what was just written waits for all
    /// that was written before.
    pub write: &'a Extent,
    /// The immediate that it carries, if any.
    pub imm: Option<u32>,
    /// Given back by [`Completions::completed`].
    pub token: u32,
}

/// Which writes of a batch carry an immediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// None.
    None,
    /// Each: pages.
    Each(u32),
    /// The last, if it is posted: segments of one write. Only for NICs that are
    /// [ordered](NicAbout::is_ordered), and for a single write.
    Last(u32),
}

/// Where a NIC reports to.
pub trait Completions {
    /// A batch, a signal or a message of ours has ended.
    fn completed(&mut self, rail: RailIdx, token: u32, result: Result<(), Fault>);

    /// An immediate of the peer's has come, after its bytes.
    fn arrived(&mut self, rail: RailIdx, imm: u32);

    /// A message of the peer's has come.
    fn message(&mut self, rail: RailIdx, message: &[u8]);

    /// The rail is broken, and what caused it; after [`Nic::close`] only for
    /// [`Fault::Missed`].
    fn broken(&mut self, rail: RailIdx, why: Fault);
}

/// What a NIC is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicAbout {
    /// For people and settings: "mlx5_0", "rdmap16s27".
    pub name: String,
    /// How it is driven, for people: "RoCE v2, GID 3", "efa-direct".
    pub manner: String,
    /// Link speed.
    pub gbps: u32,
    /// Longest write.
    pub max_write_bytes: u64,
    /// Longest message.
    pub max_message_bytes: usize,
    /// Whether an immediate also follows the bytes of every write posted before
    /// it on the same rail: reliable connected queue pairs, not SRD.
    pub is_ordered: bool,
    /// Whether it may be given GPU memory.
    pub reaches_gpus: bool,
}

/// Which NICs of the machine to open.
#[derive(Debug, Clone, Copy)]
pub enum NicChoice<'a> {
    /// These, in this order; each must be there.
    Named(&'a [String]),
    /// Of these, which are near, as many as can be opened; when none can be, or none
    /// is near, the fastest that are up and can be. At most so many.
    Near(&'a [String], usize),
}

/// Why a batch failed or a rail broke; small, for it is made for every batch of
/// a broken rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    /// The peer's NIC refused: key, bounds or rights.
    #[error("the peer's NIC refused the access: the key is not valid there (any more)")]
    Refused,
    /// Nothing came back.
    #[error("the peer's NIC does not answer (link down, or its queue pair is gone)")]
    Unanswered,
    /// The peer posts no receives: it is stopped, or cannot keep up.
    #[error("the peer takes no more arrivals: it is stopped or overrun")]
    NotReady,
    /// Another work request broke the rail first, or it was fenced.
    #[error("the rail broke under another operation")]
    Flushed,
    /// Our own side: memory no longer registered, a queue overrun.
    #[error("the NIC refused the work request (code {0})")]
    Local(u32),
    /// The queue of completions is broken, overrun for instance: there may have
    /// been arrivals that were not reported, although their writers were told
    /// that they had arrived.
    #[error("the NIC's queue of completions broke, overrun perhaps (code {0}): arrivals may not have been counted")]
    Missed(u32),
    /// The device announced it by itself, with its code of the event.
    #[error("the NIC announced that a queue or a queue pair of it failed (event {0})")]
    Announced(u32),
    /// Anything else, with the library's code.
    #[error("the NIC reports error {0}")]
    Other(u32),
}

/// Why a NIC or a rail cannot be used, or memory not be registered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NicError {
    /// The library or a function of it is missing.
    #[error("{0}")]
    Library(String),
    /// The device: missing, no permission, no active port, nothing left.
    #[error("{0}")]
    Device(String),
    /// The limit of locked memory is in the way.
    #[error(
        "cannot register {nbytes} bytes with {nic}: at most {limit} bytes may be locked (RLIMIT_MEMLOCK); raise it with \
         `ulimit -l unlimited`, LimitMEMLOCK= or --ulimit memlock=-1, or give the process CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// The NIC.
        nic: String,
        /// What was to be registered.
        nbytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The process, or the system, has hardly a file descriptor left; later it may.
    #[error("hardly a file descriptor is left, raise the limit (ulimit -n): {0}")]
    Descriptors(String),
    /// What the peer sent makes no sense.
    #[error("{0}")]
    Peer(String),
    /// Machine or library cannot do it, and what is missing.
    #[error("{0}")]
    Unsupported(String),
    /// The GPU is gone.
    #[error("{0}")]
    DeviceLost(String),
}

impl NicError {
    /// What could not be opened, while descriptors are short, could not for that.
    pub(crate) fn or_descriptors(self) -> Self {
        match self {
            Self::Library(why) | Self::Device(why) if !are_descriptors_left() => Self::Descriptors(why),
            error => error,
        }
    }

    /// Neither way to a GPU's memory is open: not by dmabuf, for `by_dmabuf`, and
    /// not by its address, for `by_address`.
    pub(crate) fn no_way_to(memory: &GpuMemory, nic: &str, by_dmabuf: &str, by_address: &str) -> Self {
        let module = match peer_memory_module(Path::new("/")) {
            Some(module) => format!("although {module} is loaded"),
            None => "and nvidia_peermem is not loaded".to_owned(),
        };
        Self::Unsupported(format!(
            "{nic} cannot be given {} bytes of {}: by dmabuf: {by_dmabuf}; by address: {by_address}, {module}. Either \
             `modprobe nvidia-peermem`, or use the open kernel modules of NVIDIA driver 515 or later, Linux 5.12 or \
             later and rdma-core 34 or later; `anyfabric doctor` shows which is missing",
            memory.nbytes(),
            memory.gpu().label(),
        ))
    }
}

impl From<CudaError> for NicError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Lost(why) => Self::DeviceLost(why),
            error => Self::Unsupported(error.to_string()),
        }
    }
}

/// Longest address of a rail.
pub const MAX_ADDRESS_BYTES: usize = 256;

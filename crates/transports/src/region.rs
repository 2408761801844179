//! Memory registered with this engine, and who may write into it.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::mem::ManuallyDrop;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

use anyfabric_cuda::GpuMemory;
use anyfabric_wire::Refusal;

use crate::mutant::Mutant;
use crate::sys::{Fd, Mapping};
use crate::{lock, read, write};

/// A peer, by its number at this engine; never used twice.
pub type PeerIdx = u32;

/// Who owns a region's memory.
pub enum Backing {
    /// The engine: a sealed memfd, mapped here, that peers may map too.
    Memfd {
        /// The descriptor that peers are given.
        fd: Arc<Fd>,
        /// Our own mapping of it.
        mapping: Mapping,
    },
    /// The user, who hands over something that keeps it alive.
    Foreign {
        /// First byte.
        address: *mut u8,
        /// Dropped when nothing can touch the memory any more.
        owner: Box<dyn Any + Send + Sync>,
    },
    /// The user, on a GPU: only what [reaches GPU memory](crate::Link::reaches_gpu_memory)
    /// may touch it.
    Gpu {
        /// Where it is.
        memory: GpuMemory,
        /// As above.
        owner: Box<dyn Any + Send + Sync>,
    },
}

/// Memory registered with this engine.
pub struct Region {
    /// Its number; never used twice by one engine.
    pub id: u64,
    /// Whether peers may write into it.
    pub writable: bool,
    nbytes: u64,
    /// What each NIC made of the memory.
    natives: OnceLock<Box<[OnceLock<Native>]>>,
    /// Given up after those, and only when every NIC has forgotten it.
    backing: ManuallyDrop<Backing>,
    closed: AtomicBool,
    access: Mutex<AccessList>,
}

/// A native registration, shared with other regions over the same memory; see
/// [`crate::rdma::Registrations`].
pub(crate) struct Native {
    pub(crate) memory: Arc<dyn Any + Send + Sync>,
    /// Gives this share up; false when it was the last and the NIC does not forget the memory.
    pub(crate) end: fn(Arc<dyn Any + Send + Sync>) -> bool,
}

struct AccessList {
    /// Peers that mapped it or know its address: they write without us. With
    /// the keys that they came with and have not let go of.
    granted: HashMap<PeerIdx, Vec<u64>>,
    /// Random keys, and for whom each has been revoked. The last goes into new
    /// descriptors.
    keys: Vec<(u64, Revoked)>,
}

/// For whom a key has been revoked.
#[derive(Default)]
struct Revoked {
    peers: HashSet<PeerIdx>,
    /// Also for peers that have not come yet: they may hold a descriptor.
    everybody: bool,
}

// SAFETY: `Backing::Foreign` holds a raw pointer into memory that its owner, which is Send and Sync, keeps alive; this
// type only hands the pointer to copies whose bounds were checked. Data races on the bytes are the callers' contract,
// as with every RDMA library.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// A region of `nbytes` bytes.
    pub fn new(id: u64, key: u64, nbytes: u64, writable: bool, backing: Backing) -> Self {
        Self {
            id,
            writable,
            nbytes,
            natives: OnceLock::new(),
            backing: ManuallyDrop::new(backing),
            closed: AtomicBool::new(false),
            access: Mutex::new(AccessList { granted: HashMap::new(), keys: vec![(key, Revoked::default())] }),
        }
    }

    /// Its length in bytes.
    #[inline]
    pub const fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// First byte, in this process; of GPU memory an address that the CPU must
    /// not touch.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        match &*self.backing {
            Backing::Memfd { mapping, .. } => mapping.as_ptr(),
            Backing::Foreign { address, .. } => *address,
            Backing::Gpu { memory, .. } => memory.address() as *mut u8,
        }
    }

    /// The checksum of a range of host memory goes into `crc`.
    ///
    /// # Safety
    /// The range is inside the region.
    pub(crate) unsafe fn add_to(&self, crc: &mut crc32fast::Hasher, offset: u64, nbytes: usize) {
        // An empty region may lie nowhere, where no slice can be.
        if nbytes > 0 {
            // SAFETY: as promised by the caller.
            crc.update(unsafe { std::slice::from_raw_parts(self.as_ptr().add(offset as usize), nbytes) });
        }
    }

    /// Where it is on a GPU; `None` for host memory.
    #[inline]
    pub fn gpu_memory(&self) -> Option<&GpuMemory> {
        match &*self.backing {
            Backing::Gpu { memory, .. } => Some(memory),
            _ => None,
        }
    }

    /// Flips a bit: what a faulty wire does in a simulation.
    pub(crate) fn flip_bit(&self, offset: u64) {
        if offset < self.nbytes {
            // SAFETY: inside the region, as was just checked.
            unsafe { *self.as_ptr().add(offset as usize) ^= 1 };
        }
    }

    /// Where each of an engine's NICs keeps what it made of the memory.
    pub(crate) fn natives(&self, num_domains: usize) -> &[OnceLock<Native>] {
        self.natives.get_or_init(|| (0..num_domains).map(|_| OnceLock::new()).collect())
    }

    /// Who owns the memory.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Whether it was closed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        // ORDERING: with `close`: a stream that missed it is stopped by `Link::withhold`.
        self.closed.load(Ordering::SeqCst)
    }

    /// Refuses every new write; those under way are the caller's to wait for.
    /// True the first time.
    pub fn close(&self) -> bool {
        // ORDERING: see `is_closed`.
        !self.closed.swap(true, Ordering::SeqCst)
    }

    /// Notes that a peer can write without asking again.
    ///
    /// # Errors
    /// [`Refusal`] when it may not.
    pub fn grant(&self, peer: PeerIdx, key: u64) -> Result<(), Refusal> {
        let mut access = self.access();
        if self.is_closed() {
            return Err(Refusal::NoRegion);
        }
        access.check(peer, key)?;
        let keys = access.granted.entry(peer).or_default();
        if !keys.contains(&key) {
            keys.push(key);
        }
        Ok(())
    }

    /// The key for new descriptors; `fresh` makes it once some key of the past
    /// has been revoked for somebody.
    pub fn key(&self, fresh: impl FnOnce() -> u64) -> u64 {
        let mut access = self.access();
        match access.keys.last() {
            Some((key, revoked)) if revoked.is_empty() => *key,
            _ => {
                let key = fresh();
                access.keys.push((key, Revoked::default()));
                key
            }
        }
    }

    /// Refuses a peer's writes with every key that was given out so far. Returns
    /// those that it was granted with and has not been asked to let go of.
    pub fn revoke(&self, peer: PeerIdx) -> Vec<u64> {
        let AccessList { granted, keys } = &mut *self.access();
        let granted = granted.get(&peer).map_or(&[][..], Vec::as_slice);
        keys.iter_mut()
            .filter_map(|(key, revoked)| (revoked.peers.insert(peer) && granted.contains(key)).then_some(*key))
            .collect()
    }

    /// Whether some key was taken back from that peer in person.
    pub fn is_revoked_for(&self, peer: PeerIdx) -> bool {
        self.access().keys.iter().any(|(_, revoked)| revoked.peers.contains(&peer))
    }

    /// A peer is known by another number from now on: what was taken back from it
    /// stays so.
    pub fn rename(&self, before: PeerIdx, now: PeerIdx) {
        for (_, revoked) in &mut self.access().keys {
            if revoked.peers.remove(&before) {
                revoked.peers.insert(now);
            }
        }
    }

    /// Refuses everybody's writes with every key that was given out so far, also
    /// those of peers that are not known yet.
    pub fn revoke_for_all(&self) {
        self.access().keys.iter_mut().for_each(|(_, revoked)| revoked.everybody = true);
    }

    /// A peer has let go of what it was granted with that key.
    pub fn let_go_by(&self, peer: PeerIdx, key: u64) {
        let mut access = self.access();
        if let Some(keys) = access.granted.get_mut(&peer) {
            keys.retain(|granted| *granted != key);
            if keys.is_empty() {
                access.granted.remove(&peer);
            }
        }
    }

    /// Peers that have not let go of what was taken back from them.
    pub fn owed_by(&self) -> Vec<PeerIdx> {
        let is_closed = self.is_closed();
        let access = self.access();
        let is_owed = |peer, key| is_closed || access.check(peer, key) == Err(Refusal::Revoked);
        let owed = access.granted.iter().filter(|(peer, keys)| keys.iter().any(|key| is_owed(**peer, *key)));
        owed.map(|(peer, _)| *peer).collect()
    }

    /// A peer can no longer touch the bytes: it has said so, or has exited.
    pub fn released_by(&self, peer: PeerIdx) {
        self.access().granted.remove(&peer);
    }

    /// Peers that can write without asking.
    pub fn granted_to(&self) -> Vec<PeerIdx> {
        self.access().granted.keys().copied().collect()
    }

    /// Whether a peer may write with this key; checked again while a stream is
    /// read.
    ///
    /// # Errors
    /// [`Refusal`] says why not.
    pub fn check_peer(&self, peer: PeerIdx, key: u64) -> Result<(), Refusal> {
        if self.is_closed() {
            return Err(Refusal::NoRegion);
        }
        self.access().check(peer, key)
    }

    fn access(&self) -> MutexGuard<'_, AccessList> {
        lock(&self.access)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let natives = self.natives.take().unwrap_or_default().into_vec();
        // All are ended, also after one that is not.
        let shares = natives.into_iter().filter_map(OnceLock::into_inner);
        if shares.fold(true, |ended, Native { memory, end }| end(memory) & ended) {
            // SAFETY: dropped once, here, and used by nobody after.
            unsafe { ManuallyDrop::drop(&mut self.backing) };
        } else {
            log::error!("region {}: a NIC does not forget its memory, which therefore is never given back", self.id);
        }
    }
}

impl AccessList {
    fn check(&self, peer: PeerIdx, key: u64) -> Result<(), Refusal> {
        // Most come with the latest.
        match self.keys.iter().rev().find(|(known, _)| *known == key) {
            None if Mutant::IgnoreKey.is_on() => Ok(()),
            None => Err(Refusal::BadKey),
            Some((_, revoked)) if revoked.holds_for(peer) => Err(Refusal::Revoked),
            Some(_) => Ok(()),
        }
    }
}

impl Revoked {
    fn is_empty(&self) -> bool {
        !self.everybody && self.peers.is_empty()
    }

    fn holds_for(&self, peer: PeerIdx) -> bool {
        self.everybody || self.peers.contains(&peer)
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("id", &self.id).field("nbytes", &self.nbytes).finish_non_exhaustive()
    }
}

/// The regions of an engine that peers may name.
#[derive(Debug, Default)]
pub struct RegionTable {
    regions: RwLock<HashMap<u64, Arc<Region>>>,
}

impl RegionTable {
    /// Makes a region known.
    pub fn insert(&self, region: Arc<Region>) {
        write(&self.regions).insert(region.id, region);
    }

    /// Forgets a region.
    pub fn remove(&self, id: u64) {
        write(&self.regions).remove(&id);
    }

    /// Every region.
    pub fn all(&self) -> Vec<Arc<Region>> {
        read(&self.regions).values().cloned().collect()
    }

    /// The region that a peer names, if it holds the key and may write.
    ///
    /// # Errors
    /// [`Refusal`] says why not.
    pub fn admit(&self, peer: PeerIdx, id: u64, key: u64) -> Result<Arc<Region>, Refusal> {
        let regions = read(&self.regions);
        let region = regions.get(&id).ok_or(Refusal::NoRegion)?;
        if !region.writable {
            return Err(Refusal::ReadOnly);
        }
        region.check_peer(peer, key)?;
        Ok(Arc::clone(region))
    }

    /// As [`RegionTable::admit`], for what the CPU is to place.
    ///
    /// # Errors
    /// [`Refusal::OnGpu`] too.
    pub fn admit_host(&self, peer: PeerIdx, id: u64, key: u64) -> Result<Arc<Region>, Refusal> {
        let region = self.admit(peer, id, key)?;
        if region.gpu_memory().is_some() {
            return Err(Refusal::OnGpu);
        }
        Ok(region)
    }
}

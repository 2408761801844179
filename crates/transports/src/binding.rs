//! A peer's region as a link reaches it.

use std::collections::HashMap;
use std::sync::OnceLock;

use anyfabric_wire::Refusal;

use crate::lock;
use crate::mutant::Mutant;
use crate::rdma::RemoteMemory;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};
use crate::sys::Mapping;

/// How the bytes of a peer's region are reached.
#[derive(Debug)]
pub enum Target {
    /// Mapped into this process.
    Mapped(Mapping),
    /// Another process's virtual address, for process_vm_writev.
    Foreign(u64),
    /// By asking the owner: over a stream or a bounce ring.
    Owner,
    /// Through a NIC.
    Nics {
        /// What each NIC of the owner calls it, in its order.
        keys: Vec<RemoteMemory>,
        /// Its number at the path, which knows what is under way of legs.
        held: u32,
    },
}

/// Where a binding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingState {
    /// The owner has been asked and has not answered.
    Pending,
    /// Ready for operations.
    Ready,
    /// The owner refused, or took the region back.
    Refused(Refusal),
}

/// A peer's region, its key, and the right to post to it.
///
/// Operations under way are counted, so that a revocation can be acknowledged
/// when, and only when, none is left.
#[derive(Debug)]
pub struct Binding {
    /// The region's number at its owner.
    pub region: u64,
    /// Its key.
    pub key: u64,
    /// Its length in bytes.
    pub nbytes: u64,
    state: AtomicU32,
    under_way: AtomicU32,
    target: OnceLock<Target>,
    mapping_gone: Mutex<bool>,
}

impl Binding {
    /// One that waits for the owner's answer.
    pub fn pending(region: u64, key: u64, nbytes: u64) -> Self {
        Self {
            region,
            key,
            nbytes,
            state: AtomicU32::new(PENDING),
            under_way: AtomicU32::new(0),
            target: OnceLock::new(),
            mapping_gone: Mutex::new(false),
        }
    }

    /// One that is ready.
    pub fn ready(region: u64, key: u64, nbytes: u64, target: Target) -> Self {
        let this = Self::pending(region, key, nbytes);
        this.accept(target);
        this
    }

    /// The owner has agreed.
    pub fn accept(&self, target: Target) {
        if self.target.set(target).is_ok() {
            // ORDERING: release the target; partner: `state`. A revocation that came first stays.
            let _ = self.state.compare_exchange(PENDING, READY, Ordering::Release, Ordering::Relaxed);
        }
    }

    /// The owner refused or revoked: nothing new is posted from now on.
    pub fn refuse(&self, refusal: Refusal) {
        // ORDERING: sequentially consistent with `enter`: either `enter` sees this, or `is_idle` sees its count.
        self.state.store(REFUSED + u32::from(refusal.code()), Ordering::SeqCst);
    }

    /// Where it stands.
    pub fn state(&self) -> BindingState {
        // ORDERING: acquire the target; partner: `accept`.
        Self::decode(self.state.load(Ordering::Acquire))
    }

    /// Why the owner refuses, if it does.
    pub fn refusal(&self) -> Option<Refusal> {
        match self.state() {
            BindingState::Refused(refusal) => Some(refusal),
            BindingState::Pending | BindingState::Ready => None,
        }
    }

    /// How the bytes are reached; `None` unless the owner agreed.
    #[inline]
    pub fn target(&self) -> Option<&Target> {
        self.target.get()
    }

    /// Whether an operation may be carried out at once, under a lock that
    /// whoever waits for this binding to be idle takes too.
    ///
    /// # Errors
    /// The state, when it is not ready.
    #[inline]
    pub fn check(&self) -> Result<(), BindingState> {
        // ORDERING: the lock orders it with `refuse`.
        match self.state.load(Ordering::Acquire) {
            READY => Ok(()),
            state => Err(Self::decode(state)),
        }
    }

    /// Counts an operation as under way.
    ///
    /// # Errors
    /// The state, when it is not ready: nothing may be posted.
    #[inline]
    pub fn enter(&self) -> Result<(), BindingState> {
        // ORDERING: see `refuse`.
        self.under_way.fetch_add(1, Ordering::SeqCst);
        match self.state.load(Ordering::SeqCst) {
            READY => Ok(()),
            state => {
                self.leave();
                Err(Self::decode(state))
            }
        }
    }

    /// An operation has ended.
    #[inline]
    pub fn leave(&self) {
        // ORDERING: release the copied bytes; partner: `is_idle`.
        self.under_way.fetch_sub(1, Ordering::Release);
    }

    /// Whether no operation is under way.
    pub fn is_idle(&self) -> bool {
        // ORDERING: see `refuse` and `leave`.
        self.under_way.load(Ordering::SeqCst) == 0
    }

    /// Unmaps the target of a refused binding, once it is idle: the owner may
    /// then reuse the bytes.
    pub fn unmap(&self) {
        let mut gone = lock(&self.mapping_gone);
        if let (false, true, Some(Target::Mapped(mapping))) = (*gone, self.is_idle(), self.target.get()) {
            mapping.unmap_early();
            *gone = true;
        }
    }

    fn decode(state: u32) -> BindingState {
        match state {
            PENDING => BindingState::Pending,
            READY => BindingState::Ready,
            refused => {
                let code = u8::try_from(refused - REFUSED).unwrap_or(0);
                BindingState::Refused(Refusal::from_code(code).unwrap_or(Refusal::NoRegion))
            }
        }
    }
}

/// The regions of one peer, as a link reaches them: by number, and each by every
/// key that it was given. Another descriptor of a region asks its owner again,
/// and does not hide what is under way with the old one.
#[derive(Debug, Default)]
pub(crate) struct BindingTable {
    by_region: HashMap<u64, Vec<Arc<Binding>>>,
    /// Those whose owner has not answered, by the number of the request.
    asked: HashMap<u64, Arc<Binding>>,
    next_request: u64,
    /// That nobody asked for, made since it was last looked which are in use; and how many those were.
    made: usize,
    in_use: usize,
}

impl BindingTable {
    /// The one for that descriptor, ready at once: the owner checks every write.
    pub(crate) fn find_or_ready(&mut self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        if let Some(binding) = self.find(region, key, nbytes) {
            return Arc::clone(binding);
        }
        self.made += 1;
        if self.made > self.in_use.max(MOST_UNUSED) {
            self.forget_unused();
        }
        let binding = Arc::new(Binding::ready(region, key, nbytes, Target::Owner));
        self.insert(&binding);
        binding
    }

    /// The owner, who checks every write, does not say when a region is gone. What nobody holds can be made anew.
    fn forget_unused(&mut self) {
        self.by_region.retain(|_, bindings| {
            bindings.retain(|binding| Arc::strong_count(binding) > 1);
            !bindings.is_empty()
        });
        (self.made, self.in_use) = (0, self.by_region.values().map(Vec::len).sum());
    }

    /// The one for that descriptor; a pending one when there is none, and with it
    /// the number of the request to ask its owner.
    pub(crate) fn find_or_ask(&mut self, region: u64, key: u64, nbytes: u64) -> (Arc<Binding>, Option<u64>) {
        if let Some(binding) = self.find(region, key, nbytes) {
            return (Arc::clone(binding), None);
        }
        let binding = Arc::new(Binding::pending(region, key, nbytes));
        self.insert(&binding);
        let request = self.next_request;
        self.next_request += 1;
        self.asked.insert(request, Arc::clone(&binding));
        (binding, Some(request))
    }

    /// The one that its owner has answered for.
    pub(crate) fn answered(&mut self, request: u64) -> Option<Arc<Binding>> {
        self.asked.remove(&request)
    }

    /// The owner takes a key back: nothing new is posted with it. What it gave
    /// out later has another key, and stays.
    pub(crate) fn refuse(&self, region: u64, key: u64, refusal: Refusal) {
        self.of_key(region, key).for_each(|binding| binding.refuse(refusal));
    }

    /// Whether nothing with a refused key is under way any more; then nothing of
    /// it stays mapped, and it is forgotten.
    pub(crate) fn settle(&mut self, region: u64, key: u64) -> bool {
        if !self.of_key(region, key).all(|binding| binding.is_idle()) && !Mutant::SkipFence.is_on() {
            return false;
        }
        self.of_key(region, key).for_each(|binding| binding.unmap());
        // An answer that is still to come brings nothing: it may be memory to be mapped.
        self.asked.retain(|_, binding| (binding.region, binding.key) != (region, key));
        if let Some(bindings) = self.by_region.get_mut(&region) {
            bindings.retain(|binding| binding.key != key);
            if bindings.is_empty() {
                self.by_region.remove(&region);
            }
        }
        true
    }

    /// The link closes. Returns what it leaves behind: operations may be under way.
    pub(crate) fn close(&mut self) -> Vec<Arc<Binding>> {
        self.asked.clear();
        let left: Vec<_> = self.by_region.drain().flat_map(|(_, bindings)| bindings).collect();
        left.iter().for_each(|binding| binding.refuse(Refusal::Closing));
        left
    }

    fn find(&self, region: u64, key: u64, nbytes: u64) -> Option<&Arc<Binding>> {
        self.of_key(region, key).find(|binding| binding.nbytes == nbytes)
    }

    fn insert(&mut self, binding: &Arc<Binding>) {
        self.by_region.entry(binding.region).or_default().push(Arc::clone(binding));
    }

    /// There is more than one where descriptors claim different lengths.
    fn of_key(&self, region: u64, key: u64) -> impl Iterator<Item = &Arc<Binding>> {
        self.by_region.get(&region).into_iter().flatten().filter(move |binding| binding.key == key)
    }
}

const PENDING: u32 = 0;
const READY: u32 = 1;
const REFUSED: u32 = 16;
/// Of regions whose owner checks every write.
const MOST_UNUSED: usize = 1024;

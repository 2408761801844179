//! One native registration for each range of memory, however many regions lie
//! over it.
//!
//! Registering pins pages, and some devices have few keys. Users register what
//! a framework hands them, the same tensor again for every request; so regions
//! over the same bytes with the same rights share what the NIC made of them.
//! What a peer is given stays apart: every region has a number and a key of its
//! own, and is revoked and closed for itself.
//!
//! A range is known by address, length and rights while some region over it
//! lives. Each of those keeps the memory where it is, so that an address cannot
//! mean other memory before the last has let go. A region holds its share and
//! drops it before it lets go of its memory: a registration outlives none. If the
//! NIC does not forget what the last of them had, that one never lets go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::{Domain, NicError};
use crate::region::Native;
use crate::{lock, Region};

/// The registrations of one domain.
pub struct Registrations<D: Domain> {
    domain: Arc<D>,
    /// Its place among the domains of the engine, and how many those are.
    place: (usize, usize),
    known: Mutex<HashMap<Range, Weak<D::Memory>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Range {
    address: usize,
    nbytes: u64,
    writable: bool,
}

impl<D: Domain> Registrations<D> {
    /// Of the domain that has this index among `num_domains`.
    pub fn new(domain: Arc<D>, domain_idx: usize, num_domains: usize) -> Self {
        Self { domain, place: (domain_idx, num_domains), known: Mutex::default() }
    }

    /// Whether they are those of this domain.
    pub fn is_of(&self, domain: &Arc<D>) -> bool {
        Arc::ptr_eq(&self.domain, domain)
    }

    /// What the NIC made of a region's memory; registers it at its first use.
    ///
    /// # Errors
    /// As [`Domain::register`]; nothing of it is remembered.
    pub fn of<'r>(&self, region: &'r Region) -> Result<&'r D::Memory, NicError> {
        let (domain_idx, num_domains) = self.place;
        let strange = || NicError::Device(format!("domain {domain_idx} of {num_domains}: no such place at a region"));
        let slot = region.natives(num_domains).get(domain_idx).ok_or_else(strange)?;
        let native = match slot.get() {
            Some(native) => native,
            None => {
                let memory = self.register(region)?;
                // Of shares that end at the same time one is the last.
                slot.get_or_init(|| Native {
                    memory,
                    end: |share| share.downcast().ok().and_then(Arc::into_inner).is_none_or(D::forget),
                })
            }
        };
        native.memory.downcast_ref().ok_or_else(strange)
    }

    /// Whether [`Registrations::of`] would find it registered.
    pub fn knows(&self, region: &Region) -> bool {
        let (domain_idx, num_domains) = self.place;
        region.natives(num_domains).get(domain_idx).is_some_and(|slot| slot.get().is_some())
    }

    fn register(&self, region: &Region) -> Result<Arc<D::Memory>, NicError> {
        let range = Range { address: region.as_ptr() as usize, nbytes: region.nbytes(), writable: region.writable };
        // Held while the NIC registers: who comes meanwhile with the same range waits for it and takes it.
        let mut known = lock(&self.known);
        if let Some(memory) = known.get(&range).and_then(Weak::upgrade) {
            return Ok(memory);
        }
        // SAFETY: the region keeps the memory, and drops its share of the registration before it; so does every other
        // region that shares it.
        let memory = Arc::new(unsafe {
            match region.gpu_memory() {
                Some(memory) => self.domain.register_gpu(memory, region.writable),
                None => self.domain.register(region.as_ptr(), region.nbytes(), region.writable),
            }
        }?);
        known.retain(|_, memory| memory.strong_count() > 0);
        known.insert(range, Arc::downgrade(&memory));
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use anyfabric_cuda::GpuMemory;

    use super::*;
    use crate::rdma::RemoteMemory;
    use crate::Backing;

    /// Counts what is registered, and refuses when told to.
    #[derive(Default)]
    struct Counting {
        made: AtomicUsize,
        live: Arc<AtomicUsize>,
        refuses: AtomicUsize,
        remembers: Arc<AtomicUsize>,
    }

    struct Counted(Arc<AtomicUsize>, Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Domain for Counting {
        type Memory = Counted;

        unsafe fn register(self: &Arc<Self>, _: *mut u8, nbytes: u64, _: bool) -> Result<Counted, NicError> {
            if self.refuses.load(Ordering::SeqCst) > 0 {
                return Err(NicError::LockedMemory { nic: "counting".into(), nbytes, limit: 0 });
            }
            self.made.fetch_add(1, Ordering::SeqCst);
            self.live.fetch_add(1, Ordering::SeqCst);
            std::thread::yield_now();
            Ok(Counted(Arc::clone(&self.live), Arc::clone(&self.remembers)))
        }

        unsafe fn register_gpu(self: &Arc<Self>, memory: &GpuMemory, _: bool) -> Result<Counted, NicError> {
            Err(NicError::no_way_to(memory, "counting", "none", "none"))
        }

        fn forget(memory: Counted) -> bool {
            memory.1.load(Ordering::SeqCst) == 0
        }

        fn remote(_memory: &Counted) -> RemoteMemory {
            RemoteMemory { base: 0, key: 0 }
        }
    }

    impl Counting {
        fn counts(&self) -> (usize, usize) {
            (self.made.load(Ordering::SeqCst), self.live.load(Ordering::SeqCst))
        }
    }

    /// Keeps memory, and looks at its end whether something is still registered.
    struct Owner {
        _bytes: Arc<Vec<u8>>,
        live: Arc<AtomicUsize>,
        is_last: bool,
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            let live = self.live.load(Ordering::SeqCst);
            assert!(!self.is_last || live == 0, "the memory ends before its registration");
        }
    }

    fn region(bytes: &Arc<Vec<u8>>, domain: &Counting, nbytes: u64, writable: bool, is_last: bool) -> Region {
        let owner = Owner { _bytes: Arc::clone(bytes), live: Arc::clone(&domain.live), is_last };
        let address = bytes.as_ptr().cast_mut();
        Region::new(1, 2, nbytes, writable, Backing::Foreign { address, owner: Box::new(owner) })
    }

    #[test]
    fn the_same_memory_is_registered_once() {
        let (domain, bytes) = (Arc::new(Counting::default()), Arc::new(vec![0; 64]));
        let registrations = Registrations::new(Arc::clone(&domain), 0, 1);
        let first = region(&bytes, &domain, 64, true, false);
        let second = region(&bytes, &domain, 64, true, true);
        assert_eq!(domain.counts(), (0, 0));
        let shared = std::ptr::from_ref(registrations.of(&first).unwrap());
        assert_eq!(shared, std::ptr::from_ref(registrations.of(&second).unwrap()));
        registrations.of(&first).unwrap();
        assert_eq!(domain.counts(), (1, 1));
        // One goes, the other keeps what it needs; the last takes it along.
        drop(first);
        registrations.of(&second).unwrap();
        assert_eq!(domain.counts(), (1, 1));
        drop(second);
        assert_eq!(domain.counts(), (1, 0));
        // The address may be other memory's by now.
        registrations.of(&region(&bytes, &domain, 64, true, true)).unwrap();
        assert_eq!(domain.counts(), (2, 0));
    }

    #[test]
    fn length_rights_and_domain_tell_apart() {
        let (domain, bytes) = (Arc::new(Counting::default()), Arc::new(vec![0; 64]));
        let registrations: Vec<_> = (0..2).map(|idx| Registrations::new(Arc::clone(&domain), idx, 2)).collect();
        let regions = [(64, true), (64, false), (63, true)].map(|(len, rw)| region(&bytes, &domain, len, rw, false));
        for _ in 0..2 {
            for (registrations, region) in registrations.iter().flat_map(|of| regions.iter().map(move |it| (of, it))) {
                registrations.of(region).unwrap();
            }
        }
        assert_eq!(domain.counts(), (6, 6));
        assert!(matches!(Registrations::new(domain, 2, 2).of(&regions[0]), Err(NicError::Device(_))));
    }

    #[test]
    fn a_refusal_is_not_remembered() {
        let (domain, bytes) = (Arc::new(Counting::default()), Arc::new(vec![0; 64]));
        let (registrations, region) =
            (Registrations::new(Arc::clone(&domain), 0, 1), region(&bytes, &domain, 64, true, true));
        domain.refuses.store(1, Ordering::SeqCst);
        assert!(matches!(registrations.of(&region), Err(NicError::LockedMemory { nbytes: 64, .. })));
        domain.refuses.store(0, Ordering::SeqCst);
        registrations.of(&region).unwrap();
        assert_eq!(domain.counts(), (1, 1));
    }

    #[test]
    fn memory_that_a_nic_does_not_forget_is_never_given_back() {
        for remembers in [0, 1] {
            let (domain, bytes) = (Arc::new(Counting::default()), Arc::new(vec![0; 64]));
            domain.remembers.store(remembers, Ordering::SeqCst);
            let registrations: Vec<_> = (0..2).map(|idx| Registrations::new(Arc::clone(&domain), idx, 2)).collect();
            let regions = [(); 2].map(|()| region(&bytes, &domain, 64, true, false));
            for (registrations, region) in registrations.iter().flat_map(|of| regions.iter().map(move |it| (of, it))) {
                registrations.of(region).unwrap();
            }
            // The first leaves what it shares to the other.
            let [first, second] = regions;
            drop(first);
            assert_eq!(Arc::strong_count(&bytes), 2);
            drop(second);
            assert_eq!(Arc::strong_count(&bytes), 1 + remembers);
        }
    }

    #[test]
    fn threads_that_come_at_once_share() {
        let (domain, bytes) = (Arc::new(Counting::default()), Arc::new(vec![0; 64]));
        let registrations = Registrations::new(Arc::clone(&domain), 0, 1);
        for round in 1..=50 {
            let regions: Vec<_> = (0..4).map(|_| region(&bytes, &domain, 64, true, false)).collect();
            std::thread::scope(|scope| {
                for region in regions.iter().chain(&regions) {
                    scope.spawn(|| registrations.of(region).map(drop));
                }
            });
            assert_eq!(domain.counts(), (round, 1));
        }
    }
}

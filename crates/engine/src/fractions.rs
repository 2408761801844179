//! Quarters of counts: what has come of split writes. Those of one peer are never
//! put together with those of another, of whose write the rest may be lost.

use anyfabric_transports::PeerIdx;
use anyfabric_wire::Imm;
use rustc_hash::FxHashMap;

use crate::sync::atomic::{AtomicU64, Ordering};

/// Quarters for one open counter that do not make a whole yet, of as many peers as
/// have found a place. Without a lock: they come on the path of every split write.
pub(crate) struct Places([AtomicU64; NUM_PLACES]);

impl Places {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// What of `quarters` and those kept of `peer` makes whole counts; keeps the
    /// rest. `None`, for good, where others have taken all places.
    #[inline]
    pub(crate) fn whole(&self, peer: PeerIdx, quarters: u64) -> Option<u64> {
        if quarters.is_multiple_of(4) {
            return Some(quarters);
        }
        // A place is never given up, so that nothing of its peer is ever kept elsewhere.
        let owned = (u64::from(peer) + 1) << 2;
        let after = |kept: u64| (kept == 0 || kept & !3 == owned).then_some(owned | (kept + quarters) & 3);
        (0..NUM_PLACES).find_map(|step| {
            let place = &self.0[(peer as usize + step) % NUM_PLACES];
            // ORDERING: acquire the bytes of the parts before, release those of this one, whichever threads were told;
            // who makes a whole of them counts it.
            let kept = place.fetch_update(Ordering::AcqRel, Ordering::Acquire, after).ok()?;
            Some(((kept & 3) + quarters) & !3)
        })
    }
}

/// Quarters of which there is no open counter, or no place in it, by imm and peer.
#[derive(Default)]
pub(crate) struct Fractions(FxHashMap<u32, Vec<(PeerIdx, u8)>>);

impl Fractions {
    /// As [`Places::whole`]; there is room for all.
    pub(crate) fn whole(&mut self, peer: PeerIdx, imm: Imm, quarters: u64) -> u64 {
        if quarters.is_multiple_of(4) {
            return quarters;
        }
        let kept = self.0.entry(imm.value()).or_default();
        let idx = kept.iter().position(|(other, _)| *other == peer).unwrap_or_else(|| {
            kept.push((peer, 0));
            kept.len() - 1
        });
        let total = u64::from(kept[idx].1) + quarters;
        kept[idx].1 = (total % 4) as u8;
        total - total % 4
    }

    /// A counter for `imm` opens: moves what was kept for it to its places.
    pub(crate) fn hand_over(&mut self, imm: Imm) -> Places {
        let places = Places::new();
        if let Some(kept) = self.0.get_mut(&imm.value()) {
            kept.retain(|(peer, quarters)| places.whole(*peer, (*quarters).into()).is_none());
        }
        places
    }

    /// Nobody counts that imm any more.
    pub(crate) fn forget(&mut self, imm: Imm) {
        self.0.remove(&imm.value());
    }
}

/// So many peers may send split writes to one counter before a lock is taken for
/// those of further ones.
const NUM_PLACES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_of_peers_are_not_mixed() {
        let places = Places::new();
        // The second peer's first choice is taken by the first.
        for peer in [3, 3 + NUM_PLACES as PeerIdx] {
            assert_eq!(places.whole(peer, 3), Some(0));
        }
        assert_eq!(places.whole(5, 1), Some(0));
        assert_eq!(places.whole(3, 1), Some(4));
        assert_eq!(places.whole(3 + NUM_PLACES as PeerIdx, 6), Some(8));
        assert_eq!(places.whole(5, 2), Some(0));
        assert_eq!(places.whole(5, 1), Some(4));
        assert_eq!(places.whole(9, 8), Some(8));
    }

    #[test]
    fn who_finds_no_place_never_does() {
        let (places, more) = (Places::new(), 1000..1010);
        for _ in 0..2 {
            for peer in 0..NUM_PLACES as PeerIdx {
                assert!(places.whole(peer, 2).is_some());
            }
            assert!(more.clone().all(|peer| places.whole(peer, 2).is_none()));
            assert_eq!(places.whole(more.start, 4), Some(4), "a whole needs no place");
        }
    }

    #[test]
    fn what_came_early_is_handed_over() {
        let (mut early, imm) = (Fractions::default(), Imm::new(7).unwrap());
        let peers = 0..2 * NUM_PLACES as PeerIdx;
        for peer in peers.clone() {
            assert_eq!(early.whole(peer, imm, 3), 0);
        }
        // These have nothing left, and take no place.
        for peer in 0..NUM_PLACES as PeerIdx / 2 {
            assert_eq!(early.whole(peer, imm, 1), 4);
        }
        let places = early.hand_over(imm);
        let without = peers.clone().filter(|peer| places.whole(*peer, 1).is_none_or(|whole| whole != 4));
        let without: Vec<_> = without.collect();
        assert_eq!(without.len(), NUM_PLACES, "{without:?}");
        let left = without.iter().filter(|peer| early.whole(**peer, imm, 1) == 4).count();
        assert_eq!(left, NUM_PLACES / 2);
    }

    #[test]
    fn threads_lose_nothing() {
        const ROUNDS: u64 = 5_000;
        let places = Places::new();
        let whole: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4_u64)
                .map(|quarters| {
                    let places = &places;
                    // Two peers share a first choice; the threads split the writes of both.
                    scope.spawn(move || {
                        let peers = [1, 1 + NUM_PLACES as PeerIdx];
                        let calls = (0..ROUNDS).flat_map(|_| peers).map(|peer| places.whole(peer, 1 + quarters % 3));
                        calls.map(|whole| whole.expect("a place")).sum::<u64>()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread")).sum()
        });
        // 1 + 2 + 3 + 1 quarters a round of each peer; what is left of each is less than a whole.
        let all = 2 * 7 * ROUNDS;
        assert!((all - 6..=all).contains(&whole) && whole.is_multiple_of(4), "{whole} of {all}");
        assert_eq!(all - whole, places.0.iter().map(|place| place.load(Ordering::Relaxed) & 3).sum::<u64>());
    }
}

//! Shards: every byte and every page exactly once, every operation one count.

use anyfabric_plan::{quarters, Shard, MAX_SHARDS};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

// What is compared with lists of any length is a list.
fn shard_bytes(nbytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Vec<Shard> {
    anyfabric_plan::shard_bytes(nbytes, speeds, min_bytes, turn).to_vec()
}

fn shard_pages(num_pages: usize, page_bytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Vec<Shard> {
    anyfabric_plan::shard_pages(num_pages, page_bytes, speeds, min_bytes, turn).to_vec()
}

const ALIGN: u64 = 4096;

/// A failure prints its seed and keeps it beside the test; PROPTEST_RNG_SEED
/// repeats a run.
fn config() -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::default() }
}

/// 1 to 8 NICs: down, of ordinary speeds, or absurd.
fn any_speeds() -> impl Strategy<Value = Vec<u32>> {
    let speed = prop_oneof![
        2 => Just(0),
        4 => prop_oneof![Just(25_u32), Just(100), Just(200), Just(400)],
        1 => any::<u32>(),
        1 => Just(u32::MAX),
        1 => Just(1),
    ];
    vec(speed, 1..=8)
}

/// Small, near multiples of the alignment, and enormous.
fn any_nbytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..10_u64,
        (0..64_u64, -2..=2_i64).prop_map(|(pages, off)| (pages * ALIGN).saturating_add_signed(off)),
        0..1_u64 << 33,
        any::<u64>(),
        Just(u64::MAX),
    ]
}

fn any_min_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(ALIGN), Just(1 << 16), Just(u64::MAX), any::<u64>()]
}

/// Turns count operations, and may have counted for ever.
fn any_turn() -> impl Strategy<Value = usize> {
    prop_oneof![0..16_usize, Just(usize::MAX), Just(usize::MAX - 1), any::<usize>()]
}

fn num_up(speeds: &[u32]) -> usize {
    speeds.iter().filter(|speed| **speed > 0).count()
}

/// The parts lie end to end from 0 to `len`, none empty but of nothing at all,
/// each on a NIC of its own that is up.
fn check_cover(shards: &[Shard], len: u64, speeds: &[u32]) {
    assert_eq!(shards.is_empty(), num_up(speeds) == 0);
    assert!(shards.len() <= MAX_SHARDS.min(num_up(speeds)));
    let mut end = 0;
    for shard in shards {
        assert_eq!(shard.start, end);
        end += shard.len;
        assert!(shard.len > 0 || len == 0 && shards.len() == 1);
        assert!(speeds[shard.nic_idx] > 0);
    }
    assert!(shards.is_empty() || end == len);
    let mut nics: Vec<_> = shards.iter().map(|shard| shard.nic_idx).collect();
    nics.sort_unstable();
    nics.dedup();
    assert_eq!(nics.len(), shards.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, ..config() })]

    #[test]
    fn every_byte_once_and_one_count(
        nbytes in any_nbytes(),
        speeds in any_speeds(),
        min_bytes in any_min_bytes(),
        turn in any_turn(),
    ) {
        let shards = shard_bytes(nbytes, &speeds, min_bytes, turn);
        check_cover(&shards, nbytes, &speeds);
        if !shards.is_empty() {
            prop_assert!(shards.iter().all(|shard| shard.quarters >= 1));
            prop_assert_eq!(shards.iter().map(|shard| u32::from(shard.quarters)).sum::<u32>(), 4);
        }
        prop_assert!(shards.iter().all(|shard| shard.start % ALIGN == 0));
        prop_assert!(shards.len() <= 1 || nbytes / min_bytes.max(1) >= shards.len() as u64);
        prop_assert_eq!(shards, shard_bytes(nbytes, &speeds, min_bytes, turn));
    }

    #[test]
    fn every_page_once_and_one_count_each(
        num_pages in prop_oneof![0..10_usize, 0..100_000_usize, Just(usize::MAX)],
        page_bytes in any_nbytes(),
        speeds in any_speeds(),
        min_bytes in any_min_bytes(),
        turn in any_turn(),
    ) {
        let shards = shard_pages(num_pages, page_bytes, &speeds, min_bytes, turn);
        check_cover(&shards, num_pages as u64, &speeds);
        prop_assert!(shards.iter().all(|shard| shard.quarters == 4));
        prop_assert_eq!(shards, shard_pages(num_pages, page_bytes, &speeds, min_bytes, turn));
    }

    /// No part is off its NIC's share by more than the alignment. Speeds are such
    /// that nobody's share is less than that.
    #[test]
    fn parts_are_in_proportion_to_speeds(
        nbytes in (1_u64 << 20)..1 << 40,
        speeds in vec(prop_oneof![Just(0), 25..=400_u32], 1..=8),
        turn in any_turn(),
    ) {
        let shards = shard_bytes(nbytes, &speeds, 1, turn);
        prop_assert_eq!(shards.len(), num_up(&speeds).min(MAX_SHARDS));
        let total: u64 = shards.iter().map(|shard| u64::from(speeds[shard.nic_idx])).sum();
        for shard in &shards {
            let share = nbytes * u64::from(speeds[shard.nic_idx]) / total;
            prop_assert!(shard.len.abs_diff(share) <= ALIGN + 1, "{:?} of {}", shard, share);
        }
    }

    #[test]
    fn turns_visit_every_nic_that_is_up_equally(speeds in any_speeds(), first in any_turn()) {
        let num_up = num_up(&speeds);
        let mut visits = vec![0; speeds.len()];
        for turn in 0..num_up {
            visits[shard_bytes(8, &speeds, ALIGN, (first % 1000) + turn)[0].nic_idx] += 1;
        }
        for (speed, visits) in speeds.iter().zip(visits) {
            prop_assert_eq!(visits, i32::from(*speed > 0));
        }
    }
}

fn shard(nic_idx: usize, start: u64, len: u64, quarters: u8) -> Shard {
    Shard { nic_idx, start, len, quarters }
}

#[test]
fn quarters_are_at_least_one_and_four_in_all() {
    for num_parts in 0..10 {
        assert!(quarters(num_parts).iter().all(|weight| *weight >= 1));
        assert_eq!(quarters(num_parts).iter().sum::<u8>(), 4);
    }
    for num_parts in 1..=MAX_SHARDS {
        assert_eq!(quarters(num_parts).len(), num_parts);
    }
}

#[test]
fn examples_of_bytes() {
    const MIB: u64 = 1 << 20;
    assert_eq!(shard_bytes(MIB, &[100], 65536, 5), [shard(0, 0, MIB, 4)]);
    assert_eq!(shard_bytes(MIB, &[100, 100], 65536, 0), [shard(0, 0, MIB / 2, 2), shard(1, MIB / 2, MIB / 2, 2)]);
    assert_eq!(shard_bytes(8, &[100, 100], 65536, 1), [shard(1, 0, 8, 4)]);
    assert_eq!(shard_bytes(0, &[100, 100], 0, 1), [shard(1, 0, 0, 4)]);
    assert_eq!(shard_bytes(MIB, &[0, 100, 0, 300], 1, 0), [shard(1, 0, MIB / 4, 2), shard(3, MIB / 4, MIB / 4 * 3, 2)]);
    assert_eq!(
        shard_bytes(12 * 4096, &[100, 100, 100], 1, 1),
        [shard(1, 0, 16384, 1), shard(2, 16384, 16384, 1), shard(0, 32768, 16384, 2)]
    );
    // A slow NIC whose share is less than the alignment gets none, and its count goes to the others.
    assert_eq!(shard_bytes(65536, &[1, 400], 1, 0), [shard(1, 0, 65536, 4)]);
    assert_eq!(shard_bytes(100, &[100; 4], 1, 0), [shard(3, 0, 100, 4)]);
    // Eight NICs: four serve one write, another four the next but three.
    let nics = |turn| -> Vec<_> { shard_bytes(MIB, &[100; 8], 1, turn).iter().map(|shard| shard.nic_idx).collect() };
    assert_eq!((nics(0), nics(6)), (vec![0, 1, 2, 3], vec![6, 7, 0, 1]));
    assert_eq!(nics(usize::MAX), [7, 0, 1, 2]);
    for none in [&[][..], &[0, 0]] {
        assert_eq!(shard_bytes(MIB, none, 1, 3), []);
        assert_eq!(shard_pages(9, 4096, none, 1, 3), []);
    }
}

#[test]
fn examples_of_pages() {
    assert_eq!(shard_pages(10, 4096, &[100], 1, 0), [shard(0, 0, 10, 4)]);
    assert_eq!(shard_pages(10, 4096, &[100, 400], 1, 0), [shard(0, 0, 2, 4), shard(1, 2, 8, 4)]);
    assert_eq!(shard_pages(2, 4096, &[100; 4], 1, 3), [shard(3, 0, 1, 4), shard(0, 1, 1, 4)]);
    assert_eq!(shard_pages(10, 4096, &[100; 4], 1 << 16, 2), [shard(2, 0, 10, 4)]);
    assert_eq!(shard_pages(0, 4096, &[100; 4], 1, 2), [shard(2, 0, 0, 4)]);
    assert_eq!(shard_pages(1000, 0, &[100; 4], 1, 2), [shard(2, 0, 1000, 4)]);
    // More bytes than 64 bits count.
    assert_eq!(shard_pages(4, u64::MAX, &[100; 4], u64::MAX, 0), [shard(0, 0, 4, 4)]);
}

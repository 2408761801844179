//! Which of up to eight rails serve an operation: as many as may, each by its speed, and all of them in time.

use anyfabric_plan::{join_nics, shard_bytes, Rota, Speeds, MAX_NICS, MAX_SHARDS};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const LONG: u64 = 1 << 40;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: Some(Box::new(FileFailurePersistence::Off)), ..ProptestConfig::default() }
}

fn rota(ours: &[u32], theirs: &[u32]) -> Rota {
    Rota::new(join_nics(ours, theirs))
}

fn serving(speeds: &Speeds) -> Vec<usize> {
    (0..MAX_NICS).filter(|rail| speeds[*rail] > 0).collect()
}

/// What `num_operations` long writes at the same time reach together in Gbit/s.
fn gbps(ours: &[u32], theirs: &[u32], num_operations: usize) -> f64 {
    let (rails, mut rota) = (join_nics(ours, theirs), rota(ours, theirs));
    let (mut here, mut there) = (vec![0; ours.len()], vec![0; theirs.len()]);
    for _ in 0..num_operations {
        for shard in shard_bytes(LONG, &rota.serve(MAX_SHARDS, |_| true), 1, 0) {
            here[rails[shard.nic_idx].ours] += shard.len;
            there[rails[shard.nic_idx].theirs] += shard.len;
        }
    }
    let slowest = |nics: &[u32], bytes: &[u64]| {
        nics.iter().zip(bytes).map(|(gbps, bytes)| *bytes as f64 / f64::from(*gbps)).fold(0.0, f64::max)
    };
    num_operations as f64 * LONG as f64 / slowest(ours, &here).max(slowest(theirs, &there))
}

#[test]
fn one_operation_keeps_busy_what_four_rails_reach() {
    for ours in 1..=MAX_NICS {
        for theirs in 1..=MAX_NICS {
            let reached = gbps(&vec![400; ours], &vec![400; theirs], 1);
            let most = f64::from(400 * ours.min(theirs).min(MAX_SHARDS) as u32);
            assert!((0.999..1.001).contains(&(reached / most)), "{ours} and {theirs}: {reached}");
        }
    }
    // One NIC of 400 against four of 100, and both ends of different speeds.
    assert!(gbps(&[400], &[100; 4], 1) > 399.0);
    assert!(gbps(&[400, 100], &[100; 4], 1) > 299.0);
    assert!(gbps(&[400, 200], &[400, 200], 1) > 599.0);
    // What a slow NIC leaves of a fast one is for the rails beside it.
    assert!(gbps(&[400], &[100, 400], 1) > 399.0);
    assert!(gbps(&[100, 400], &[400], 1) > 399.0);
    assert!(gbps(&[400, 400], &[100, 100, 400, 400], 1) > 799.0);
    assert!(gbps(&[400, 100], &[100, 100, 400], 1) > 499.0);
}

#[test]
fn operations_one_after_the_other_use_all_that_there_is() {
    for (ours, theirs, most) in [(8, 8, 3200.0), (8, 4, 1600.0), (4, 8, 1600.0), (8, 3, 1200.0), (3, 8, 1200.0)] {
        let reached = gbps(&vec![400; ours], &vec![400; theirs], 6);
        assert!(reached > 0.999 * most, "{ours} and {theirs}: {reached} of {most}");
    }
    // Four fast and four slow ones, in any order: of five operations the slow ones serve one.
    assert!(gbps(&[400, 400, 400, 400, 100, 100, 100, 100], &[400; 8], 5) > 1999.0);
    assert!(gbps(&[400, 100, 400, 100, 400, 100, 400, 100], &[400; 8], 5) > 1999.0);
    assert!(gbps(&[400; 8], &[400, 100, 400, 100, 100, 400, 100, 400], 5) > 1999.0);
}

#[test]
fn four_serve_one_operation_and_the_other_four_the_next() {
    let mut rota = rota(&[400; 8], &[400; 8]);
    let mut next = |wanted| serving(&rota.serve(wanted, |_| true));
    assert_eq!([next(4), next(4), next(4)], [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]);
    // One that is worth fewer takes the next few.
    assert_eq!([next(2), next(2)], [[4, 5], [6, 7]]);
    assert_eq!(next(100), [0, 1, 2, 3], "no more than four, whatever is asked for");
    assert_eq!(serving(&Rota::default().serve(4, |_| true)), []);
}

#[test]
fn small_operations_go_round() {
    let mut rota = rota(&[400; 8], &[100]);
    let mut go = |is_up: fn(usize) -> bool| {
        let rail = rota.next(is_up)?;
        rota.took(rail);
        Some(rail)
    };
    assert_eq!((0..10).filter_map(|_| go(|_| true)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]);
    // Nobody has more for being behind one that is down.
    let without_three = (0..14).filter_map(|_| go(|rail| rail != 3)).collect::<Vec<_>>();
    assert_eq!(without_three, [2, 4, 5, 6, 7, 0, 1, 2, 4, 5, 6, 7, 0, 1]);
    assert_eq!(go(|_| false), None);
    assert_eq!(Rota::default().next(|_| true), None);
}

#[test]
fn what_was_missed_while_down_is_not_made_up_for() {
    let mut rota = rota(&[100; 8], &[100; 8]);
    for _ in 0..1001 {
        assert!(!serving(&rota.serve(4, |rail| rail != 5)).contains(&5));
    }
    let served: Vec<_> = (0..8).map(|_| serving(&rota.serve(4, |_| true)).contains(&5)).collect();
    assert!((3..=5).contains(&served.iter().filter(|served| **served).count()), "{served:?}");
}

proptest! {
    #![proptest_config(config())]

    /// Whatever a peer says of its NICs, and whichever are up.
    #[test]
    fn as_many_as_may_serve(
        ours in vec(any::<u32>(), 1..12),
        theirs in vec(any::<u32>(), 1..12),
        operations in vec((0_usize..6, any::<u8>()), 1..100),
    ) {
        let mut rota = rota(&ours, &theirs);
        let num_rails = join_nics(&ours, &theirs).len();
        for (wanted, up) in operations {
            let is_up = |rail: usize| up >> rail & 1 == 1;
            let serving = serving(&rota.serve(wanted, is_up));
            let num_up = (0..num_rails).filter(|rail| is_up(*rail)).count();
            prop_assert_eq!(serving.len(), wanted.clamp(1, MAX_SHARDS).min(num_up));
            prop_assert!(serving.iter().all(|rail| is_up(*rail)));
        }
    }

    /// No NIC of either side carries more than its speed, while an operation runs as fast as its rails promise; and none of
    /// these could promise more, for a NIC of it is full.
    #[test]
    fn no_nic_is_promised_twice(
        ours in vec(1_u32..1000, 1..=MAX_NICS),
        theirs in vec(1_u32..1000, 1..=MAX_NICS),
        wanted in 2..=MAX_SHARDS,
    ) {
        let (rails, mut rota) = (join_nics(&ours, &theirs), rota(&ours, &theirs));
        for _ in 0..20 {
            let speeds = rota.serve(wanted, |_| true);
            if serving(&speeds).len() < 2 {
                continue;
            }
            let promised = |of: &dyn Fn(usize) -> bool| serving(&speeds).iter().filter(|rail| of(**rail)).map(|rail| speeds[*rail]).sum::<u32>();
            for (nic, gbps) in ours.iter().enumerate() {
                prop_assert!(promised(&|rail| rails[rail].ours == nic) <= gbps * 12);
            }
            for (nic, gbps) in theirs.iter().enumerate() {
                prop_assert!(promised(&|rail| rails[rail].theirs == nic) <= gbps * 12);
            }
            for rail in serving(&speeds) {
                let here = promised(&|other| rails[other].ours == rails[rail].ours);
                let there = promised(&|other| rails[other].theirs == rails[rail].theirs);
                // Less than one twelfth is lost to rounding at each of four.
                let is_full = |promised: u32, gbps: u32| promised + 4 > gbps * 12;
                prop_assert!(is_full(here, rails[rail].our_gbps) || is_full(there, rails[rail].their_gbps));
            }
        }
    }

    /// Equal NICs are used equally, however many are up; and of unequal ones that are not far apart each by its speed,
    /// never more than a few operations behind.
    #[test]
    fn each_carries_its_share(
        speeds in vec(100_u32..=200, 5..=MAX_NICS),
        wanted in 1..=MAX_SHARDS,
        num_before in 0_usize..20,
        up in any::<u8>(),
    ) {
        const NUM: u64 = 500;
        let mut rota = rota(&speeds, &speeds);
        for _ in 0..num_before {
            rota.serve(wanted, |rail| up >> rail & 1 == 1);
        }
        let mut bytes = vec![0_u64; speeds.len()];
        for _ in 0..NUM {
            let shards = shard_bytes(1 << 30, &rota.serve(wanted, |_| true), 1, 0);
            shards.iter().for_each(|shard| bytes[shard.nic_idx] += shard.len);
        }
        let total: u64 = speeds.iter().map(|speed| u64::from(*speed)).sum();
        for (speed, bytes) in speeds.iter().zip(&bytes) {
            let share = (NUM << 30) as f64 * f64::from(*speed) / total as f64;
            let off = (*bytes as f64 - share).abs() / (1 << 30) as f64;
            prop_assert!(off < 3.0, "off by {} operations of {}: {:?} of {:?}", off, NUM, bytes, speeds);
        }
    }
}

//! Any numbers of NICs of any speeds on either side.

use anyfabric_plan::{join_nics, shard_bytes, RailPlan, MAX_SHARDS};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: Some(Box::new(FileFailurePersistence::Off)), ..ProptestConfig::default() }
}

fn speeds(rails: &[RailPlan]) -> Vec<u32> {
    rails.iter().map(|rail| rail.speed).collect()
}

/// What both sides can do together in Gbit/s, when a long write is cut by the speeds of the rails.
fn gbps(ours: &[u32], theirs: &[u32]) -> f64 {
    let rails = join_nics(ours, theirs);
    let shards = shard_bytes(1 << 40, &speeds(&rails), 1, 0);
    let (mut bytes_here, mut bytes_there) = ([0_u64; MAX_SHARDS], [0_u64; MAX_SHARDS]);
    for shard in &shards {
        bytes_here[rails[shard.nic_idx].ours] += shard.len;
        bytes_there[rails[shard.nic_idx].theirs] += shard.len;
    }
    let slowest = |nics: &[u32], bytes: &[u64]| {
        nics.iter().zip(bytes).map(|(gbps, bytes)| *bytes as f64 / f64::from(*gbps)).fold(0.0, f64::max)
    };
    (1_u64 << 40) as f64 / slowest(ours, &bytes_here).max(slowest(theirs, &bytes_there))
}

#[test]
fn the_smaller_side_is_busy_to_the_end() {
    for ours in 1..=4 {
        for theirs in 1..=4 {
            let (here, there) = (vec![400; ours], vec![400; theirs]);
            let reached = gbps(&here, &there) / f64::from(400 * ours.min(theirs) as u32);
            assert!((0.999..1.001).contains(&reached), "{ours} and {theirs}: {reached}");
        }
    }
    // One NIC of 400 against four of 100, and both ends of different speeds.
    assert!(gbps(&[400], &[100; 4]) > 399.0);
    assert!(gbps(&[400, 100], &[100; 4]) > 299.0);
    assert!(gbps(&[400, 200], &[400, 200]) > 599.0);
}

#[test]
fn four_rails_at_most_and_none_without_a_nic() {
    assert_eq!(join_nics(&[400; 8], &[400; 8]).len(), MAX_SHARDS);
    assert_eq!(join_nics(&[400; 8], &[400]).len(), MAX_SHARDS);
    assert!(join_nics(&[], &[400]).is_empty() && join_nics(&[400], &[]).is_empty());
}

proptest! {
    #![proptest_config(config())]

    /// A peer may say anything of its NICs.
    #[test]
    fn both_sides_get_the_same(ours in vec(any::<u32>(), 0..9), theirs in vec(any::<u32>(), 0..9)) {
        let (here, there) = (join_nics(&ours, &theirs), join_nics(&theirs, &ours));
        prop_assert_eq!(here.len(), there.len());
        for (one, other) in here.iter().zip(&there) {
            prop_assert_eq!((one.ours, one.theirs, one.speed), (other.theirs, other.ours, other.speed));
            prop_assert!(one.speed > 0 && one.ours < ours.len() && one.theirs < theirs.len());
        }
    }

    #[test]
    fn no_nic_is_promised_twice(ours in vec(1_u32..1000, 1..5), theirs in vec(1_u32..1000, 1..5)) {
        let rails = join_nics(&ours, &theirs);
        for (idx, gbps) in ours.iter().enumerate() {
            let promised: u32 = rails.iter().filter(|rail| rail.ours == idx).map(|rail| rail.speed).sum();
            prop_assert!(promised <= gbps * 12, "NIC {} of {} Gbit/s carries {} / 12", idx, gbps, promised);
        }
    }
}

//! Any numbers of NICs of any speeds on either side.

use anyfabric_plan::{join_nics, RailPlan, MAX_NICS};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: Some(Box::new(FileFailurePersistence::Off)), ..ProptestConfig::default() }
}

fn pairs(ours: usize, theirs: usize) -> Vec<(usize, usize)> {
    join_nics(&vec![400; ours], &vec![400; theirs]).iter().map(|rail| (rail.ours, rail.theirs)).collect()
}

#[test]
fn examples() {
    assert_eq!(pairs(1, 1), [(0, 0)]);
    assert_eq!(pairs(2, 3), [(0, 0), (1, 1), (0, 2)]);
    assert_eq!(pairs(8, 3), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2), (6, 0), (7, 1)]);
    assert_eq!(pairs(1, 8), (0..8).map(|theirs| (0, theirs)).collect::<Vec<_>>());
    assert!(pairs(0, 3).is_empty() && pairs(3, 0).is_empty());
    // A peer may claim more than there can be.
    assert_eq!(pairs(2, 100).len(), MAX_NICS);
}

proptest! {
    #![proptest_config(config())]

    /// A peer may say anything of its NICs.
    #[test]
    fn both_sides_get_the_same(ours in vec(any::<u32>(), 0..12), theirs in vec(any::<u32>(), 0..12)) {
        let (here, there) = (join_nics(&ours, &theirs), join_nics(&theirs, &ours));
        let turned = there.iter().map(|rail| RailPlan {
            ours: rail.theirs,
            theirs: rail.ours,
            our_gbps: rail.their_gbps,
            their_gbps: rail.our_gbps,
        });
        prop_assert_eq!(&here, &turned.collect::<Vec<_>>());
        for rail in &here {
            prop_assert!(rail.our_gbps > 0 && rail.their_gbps > 0);
            prop_assert!(rail.ours < ours.len() && rail.theirs < theirs.len());
        }
    }

    /// Neither side has a NIC that is left out.
    #[test]
    fn every_nic_has_a_rail(ours in 1..=MAX_NICS, theirs in 1..=MAX_NICS) {
        let rails = pairs(ours, theirs);
        prop_assert_eq!(rails.len(), ours.max(theirs));
        prop_assert!((0..ours).all(|nic| rails.iter().any(|rail| rail.0 == nic)));
        prop_assert!((0..theirs).all(|nic| rails.iter().any(|rail| rail.1 == nic)));
    }
}

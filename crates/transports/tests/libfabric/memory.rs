//! What becomes of registered memory when its endpoint, its region or the library's good will ends.

use anyfabric_transports::libfabric::FabricDomain;
use anyfabric_transports::rdma::{Domain, Nic};

use crate::faked::{check_all_arrives, with, CONTEXT2, MR_ENDPOINT};
use crate::support::Region;

#[test]
fn memory_bound_to_an_endpoint_keeps_its_key_when_that_is_closed() {
    with(
        |fake| (fake.mr_mode, fake.mode) = (MR_ENDPOINT, CONTEXT2),
        |copy, mut pair| {
            assert_eq!(copy.get().endpoints, 2);
            let to = Region::new(&pair.there, 1 << 14, 0);
            check_all_arrives(&mut pair, 5);
            let (before, memories) = (FabricDomain::remote(&to.memory), copy.get().memories);
            pair.there.close(pair.back);
            pair.here.close(pair.rail);
            assert!(copy.get().memories < memories, "nothing may be reachable without an endpoint");
            pair.connect();
            assert_eq!((copy.get().endpoints, copy.get().memories), (2, memories));
            assert_eq!(FabricDomain::remote(&to.memory), before);
            check_all_arrives(&mut pair, 5);
            drop(to);
            assert_eq!(copy.get().memories, memories - 1);
        },
    );
}

/// Also when another endpoint has had it since: what was refused once stays.
#[test]
fn memory_that_is_not_forgotten_is_told() {
    for again in [false, true] {
        with(
            |fake| fake.mr_mode = if again { MR_ENDPOINT } else { 0 },
            |copy, mut pair| {
                let to = Region::new(&pair.there, 64, 0);
                copy.get().memory_stays = 1;
                if again {
                    pair.there.close(pair.back);
                    copy.get().memory_stays = 0;
                }
                assert!(!FabricDomain::forget(to.memory));
                copy.get().memory_stays = 0;
                let to = Region::new(&pair.there, 64, 0);
                assert!(FabricDomain::forget(to.memory));
            },
        );
    }
}

/// A registration that fails on the way leaves nothing bound to an endpoint that is closed for it.
#[test]
fn an_endpoint_that_memory_cannot_be_bound_to_is_not_kept() {
    with(
        |fake| (fake.mr_mode, fake.mode) = (MR_ENDPOINT, CONTEXT2),
        |copy, mut pair| {
            let to = Region::new(&pair.there, 1 << 14, 0);
            let memories = copy.get().memories;
            pair.there.close(pair.back);
            pair.here.close(pair.rail);
            let before = copy.get().memories;
            // Those of the sends, the landing and the region, and then the receives'.
            for fails in 1..=4 {
                copy.get().memory_fails = fails;
                assert!(pair.there.open().is_err(), "registration {fails}");
                assert_eq!((copy.get().endpoints, copy.get().memories), (0, before), "registration {fails}");
                // What is registered meanwhile waits for the next.
                drop(Region::new(&pair.there, 4096, 0));
            }
            copy.get().memory_fails = 0;
            pair.connect();
            assert_eq!((copy.get().endpoints, copy.get().memories), (2, memories));
            check_all_arrives(&mut pair, 5);
            drop(to);
        },
    );
}

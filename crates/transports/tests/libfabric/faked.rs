//! What no provider here does: completions in any order, errors and refusals in the
//! middle, other ways of counting and of registering, EFA and Slingshot.

use std::time::{Duration, Instant};

use anyfabric_plan::Extent;
use anyfabric_transports::libfabric::{
    Arrivals, FabricDomain, FabricSettings, Library, Provider, Wanted, LIBRARY_VARIABLE,
};
use anyfabric_transports::rdma::{Batch, Domain, Fault, Marks, Nic, RemoteMemory};

use crate::allocations::allocations;
use crate::fake::{Copy, Fake};
use crate::support::{Ended, Pair, Region, LONG};

pub(crate) const PAGE: u64 = 256;

/// Pages `0..num` of a region into the same ones of another.
pub(crate) fn pages(num: u64) -> Vec<Extent> {
    (0..num).map(|page| Extent { src: page * PAGE, dst: (num - 1 - page) * PAGE, nbytes: PAGE }).collect()
}

/// Sends many batches and checks every byte, every count and every end.
pub(crate) fn check_all_arrives(pair: &mut Pair, num_batches: u32) {
    const NUM: u64 = 12;
    let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
    let (done, arrived) = (pair.seen.completed.len(), pair.seen_there.arrived.len());
    for token in 0..num_batches {
        // Pieces, where there was no room for all, carry the same token.
        pair.write((&from, &to), &pages(NUM), Marks::Each(1000 + token), token);
    }
    let mut signalled = false;
    while !signalled {
        signalled = pair.here.signal(pair.rail, 5, u32::MAX).unwrap();
        pair.poll();
    }
    let expected = arrived + num_batches as usize * NUM as usize + 1;
    pair.until("every immediate", |pair| pair.seen_there.arrived.len() >= expected);
    pair.until("every end", |pair| (0..num_batches).all(|token| pair.seen.result(token).is_some()));
    pair.until("the signal's end", |pair| pair.seen.result(u32::MAX).is_some());
    (0..100).for_each(|_| pair.poll());
    assert_eq!(pair.seen_there.arrived.len(), expected, "an immediate arrived twice");
    assert!(pair.seen_there.arrived[arrived..].iter().all(|(rail, _)| *rail == pair.back));
    for token in 0..num_batches {
        let count = pair.seen_there.arrived[arrived..].iter().filter(|(_, imm)| *imm == 1000 + token).count();
        assert_eq!(count, NUM as usize, "batch {token}");
    }
    assert!(pair.seen.completed[done..].iter().all(|(_, _, result)| result.is_ok()), "{:?}", pair.seen);
    assert!((0..(NUM * PAGE) as usize).all(|idx| to.at(idx) == 7));
    pair.seen.completed.clear();
}

pub(crate) fn with(change: impl FnOnce(&mut Fake), case: impl FnOnce(&mut Copy, Pair)) {
    if let Some(mut copy) = Copy::new(change) {
        let pair = copy.pair();
        case(&mut copy, pair);
        assert_eq!(copy.get().early, 0, "something was closed before what uses it");
    }
}

#[test]
fn completions_come_in_any_order() {
    for order in 0..3 {
        with(|fake| (fake.order, fake.mode) = (order, CONTEXT2), |_, mut pair| check_all_arrives(&mut pair, 100));
    }
}

#[test]
fn a_queue_that_is_often_full_delays_and_loses_nothing() {
    for every in [2, 3, 7] {
        with(|fake| (fake.again_every, fake.order) = (every, 2), |_, mut pair| check_all_arrives(&mut pair, 50));
    }
}

type Change = fn(&mut Fake);
const WAYS: [(Arrivals, Change); 5] = [
    (Arrivals::Tagged, |fake| fake.mode = CONTEXT2),
    (Arrivals::Tagged, |fake| fake.mode = CONTEXT2 | RX_CQ_DATA),
    (Arrivals::Sourced, |fake| fake.cq_data_size = 4),
    (Arrivals::Messages, |fake| (fake.cq_data_size, fake.has_source) = (4, 0)),
    (Arrivals::Messages, |fake| (fake.cq_data_size, fake.has_write_data) = (0, 0)),
];

#[test]
fn every_way_to_count_counts_the_same() {
    for (arrivals, change) in WAYS {
        with(change, |copy, mut pair| {
            assert_eq!(pair.here.domain().provider().arrivals, arrivals);
            check_all_arrives(&mut pair, 60);
            let (immediates, sends) = (copy.get().immediates, copy.get().sends);
            assert_eq!(immediates > 0, arrivals != Arrivals::Messages);
            assert_eq!(sends > 0, arrivals == Arrivals::Messages);
        });
    }
}

#[test]
fn a_provider_that_refuses_immediates_with_writes_gets_messages() {
    with(
        |fake| (fake.has_write_data, fake.order, fake.again_every) = (0, 2, 5),
        |copy, mut pair| {
            assert_eq!(
                pair.here.domain().provider().arrivals,
                Arrivals::Tagged,
                "nothing says so before the first write"
            );
            check_all_arrives(&mut pair, 60);
            assert_eq!(copy.get().immediates, 0);
        },
    );
}

#[test]
fn an_error_ends_its_batch_with_the_cause_and_no_other() {
    for (error, fault) in
        [(libc::EACCES, Fault::Refused), (libc::EHOSTUNREACH, Fault::Unanswered), (269, Fault::NotReady)]
    {
        with(
            |fake| (fake.fail_nth, fake.fail_with) = (20, error as u64),
            |copy, mut pair| {
                let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
                let target = FabricDomain::remote(&to.memory);
                for token in 0..6 {
                    let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token };
                    assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
                }
                pair.until("the end", |pair| !pair.seen.broken.is_empty() && pair.seen.completed.len() == 6);
                assert_eq!(pair.seen.broken, [(pair.rail, fault)]);
                for token in 0..6 {
                    // The fourth batch has the 20th write; those behind it had completed too.
                    let expected = if token == 3 { Err(fault) } else { Ok(()) };
                    assert_eq!(pair.seen.result(token), Some(expected), "batch {token}");
                }
                pair.here.close(pair.rail);
                pair.there.close(pair.back);
                pair.connect();
                copy.get().fail_nth = 0;
                pair.seen = crate::support::Seen::default();
                check_all_arrives(&mut pair, 10);
            },
        );
    }
}

#[test]
fn what_an_endpoint_held_when_it_was_closed_ends_once() {
    for stale in 0..3 {
        with(
            |fake| (fake.stale_on_close, fake.swallow) = (stale, 1),
            |copy, mut pair| {
                let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
                let target = FabricDomain::remote(&to.memory);
                for token in 0..9 {
                    let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token };
                    assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
                }
                pair.here.fence(pair.rail);
                // Another rail at once, whose operations must not be mistaken for those.
                let (old, old_back) = (pair.rail, pair.back);
                copy.get().swallow = 0;
                pair.connect();
                pair.until("the ends", |pair| pair.seen.completed.len() == 9);
                assert!(pair.seen.completed.iter().all(|(rail, _, end)| (*rail, *end) == (old, Err(Fault::Flushed))));
                assert!(pair.seen.broken.is_empty());
                pair.seen.completed.clear();
                check_all_arrives(&mut pair, 40);
                pair.here.close(old);
                pair.there.close(old_back);
            },
        );
    }
}

#[test]
fn a_closed_rail_reports_nothing() {
    with(
        |fake| fake.swallow = 1,
        |_, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let target = FabricDomain::remote(&to.memory);
            let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token: 1 };
            assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
            pair.here.close(pair.rail);
            (0..10).for_each(|_| pair.poll());
            assert!(pair.seen.completed.is_empty() && pair.seen.broken.is_empty());
            assert_eq!(pair.here.post(pair.rail, &batch), Err(Fault::Flushed));
        },
    );
}

/// What a peer says of its memory may be anything; its NIC judges it.
#[test]
fn an_address_of_the_peer_s_may_pass_the_end_of_numbers() {
    with(
        |_| {},
        |_, mut pair| {
            let from = Region::new(&pair.here, 1 << 14, 7);
            let target = RemoteMemory { base: u64::MAX, key: 1 };
            let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token: 1 };
            assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
            pair.until("it is refused", |pair| !pair.seen.broken.is_empty());
            assert_eq!(pair.seen.broken, [(pair.rail, Fault::Refused)]);
        },
    );
}

/// The peer was told of each that it arrived. Whatever ends the rail: all that is in the queue counts, of others too.
#[test]
fn what_arrived_counts_when_the_rail_ends() {
    type End = fn(&mut Pair) -> bool;
    let ends: [End; 3] = [
        |pair| pair.there.fence(pair.back),
        |pair| pair.there.close(pair.back),
        |pair| {
            // A write of its own breaks the rail: no NIC has memory there, whatever a peer may say.
            let from = Region::new(&pair.there, 64, 0);
            let target = RemoteMemory { base: u64::MAX, key: 1 };
            let writes = [Extent { src: 0, dst: 8, nbytes: 8 }; 1];
            let batch = Batch { source: &from.memory, target, writes: &writes, marks: Marks::None, token: 77 };
            assert_eq!(pair.there.post(pair.back, &batch), Ok(1));
            while pair.seen_there.broken.is_empty() {
                pair.there.poll(&mut pair.seen_there);
            }
            pair.there.close(pair.back)
        },
    ];
    for (cq_data_size, end) in [8, 4].into_iter().flat_map(|size| ends.map(|end| (size, end))) {
        with(
            |fake| (fake.cq_data_size, fake.order) = (cq_data_size, 2),
            |_, mut pair| {
                let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
                let (target, ended) = (FabricDomain::remote(&to.memory), pair.back);
                for token in 0..10 {
                    let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token };
                    assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
                }
                assert!(end(&mut pair));
                if pair.seen_there.arrived.is_empty() {
                    assert_ne!(pair.there.open(), Ok(ended), "the number rests");
                }
                (0..20).for_each(|_| pair.poll());
                assert_eq!(pair.seen_there.arrived, [(ended, 1); 60]);
            },
        );
    }
}

#[test]
fn a_rail_on_which_nothing_comes_back_is_broken() {
    let Some(mut copy) = Copy::new(|fake| fake.swallow = 1) else { return };
    let settings = FabricSettings { answer_timeout: Duration::from_millis(50), ..FabricSettings::default() };
    let (here, there) = (copy.nic(&settings), copy.nic(&settings));
    let mut pair = Pair::new(here, there);
    assert_eq!(pair.here.signal(pair.rail, 1, 1), Ok(true));
    pair.until("it is noticed", |pair| !pair.seen.broken.is_empty());
    assert_eq!(pair.seen.broken, [(pair.rail, Fault::Unanswered)]);
    assert_eq!(pair.seen.result(1), Some(Err(Fault::Unanswered)));
    // A queue that never takes anything is no better.
    (copy.get().swallow, copy.get().again_every) = (0, 1);
    pair.connect();
    pair.seen.broken.clear();
    let end = Instant::now() + LONG;
    while pair.seen.broken.is_empty() {
        let _ = pair.here.signal(pair.rail, 1, 2);
        pair.poll();
        assert!(Instant::now() < end, "a full queue was not noticed");
    }
}

#[test]
fn rails_beyond_the_endpoints_share_them_and_break_together() {
    with(
        |fake| fake.ep_cnt = 2,
        |copy, mut pair| {
            let first = pair.rail;
            for _ in 0..3 {
                pair.connect();
            }
            assert_eq!(copy.get().endpoints, 4, "two NICs with two endpoints each");
            check_all_arrives(&mut pair, 5);
            // The first and the third are on one endpoint.
            pair.here.fence(first);
            pair.until("the other rail breaks", |pair| !pair.seen.broken.is_empty());
            assert_eq!(pair.seen.broken, [(first + 2, Fault::Flushed)]);
            check_all_arrives(&mut pair, 5);
        },
    );
}

/// It may yet receive, into memory that must not be another's by then.
#[test]
fn an_endpoint_that_is_not_closed_keeps_its_receives() {
    with(
        |_| {},
        |copy, mut pair| {
            let memories = copy.get().memories;
            copy.get().stays_open = 1;
            assert!(!pair.there.fence(pair.back) && !pair.there.close(pair.back));
            assert_eq!(copy.get().memories, memories);
            copy.get().stays_open = 0;
            assert!(pair.here.fence(pair.rail) && pair.here.close(pair.rail));
            assert_eq!(copy.get().memories, memories - 1);
            pair.connect();
            check_all_arrives(&mut pair, 5);
        },
    );
}

/// Nor is what it was given for its operations, of which nobody knows whether they are over.
#[test]
fn an_endpoint_that_is_not_closed_keeps_its_operations() {
    with(
        |fake| (fake.mode, fake.swallow) = (CONTEXT2, 1),
        |copy, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let target = FabricDomain::remote(&to.memory);
            for token in 0..20 {
                let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token };
                assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
                assert_eq!(pair.here.send(pair.rail, b"hello", 100 + token), Ok(true));
            }
            copy.get().stays_open = 1;
            assert!(!pair.here.fence(pair.rail));
            (0..20).for_each(|_| pair.poll());
            assert!(!pair.here.close(pair.rail) && !pair.there.close(pair.back));
            (copy.get().stays_open, copy.get().swallow) = (0, 0);
            (0..20).for_each(|_| pair.poll());
            assert!(pair.seen.completed.is_empty(), "it may yet be carried out");
            pair.connect();
            for token in 0..100 {
                assert_eq!(pair.here.send(pair.rail, b"hello", token), Ok(true));
                pair.until("its end", |pair| pair.seen.result(token).is_some());
            }
            pair.seen.completed.clear();
            check_all_arrives(&mut pair, 100);
            assert_eq!(copy.get().reused, 0);
        },
    );
}

#[test]
fn addresses_and_keys_are_as_the_provider_has_them() {
    for (mr_mode, is_virtual) in [(0, false), (MR_VIRT_ADDR | MR_PROV_KEY, true)] {
        with(
            |fake| fake.mr_mode = mr_mode,
            |_, mut pair| {
                let region = Region::new(&pair.there, 4096, 0);
                let remote = FabricDomain::remote(&region.memory);
                assert_eq!(remote.base, if is_virtual { region.bytes.as_ptr() as u64 } else { 0 });
                check_all_arrives(&mut pair, 5);
            },
        );
    }
}

#[test]
fn efa_is_set_up_for_the_device_alone() {
    let direct = |fake: &mut Fake| {
        fake.name("efa", "efa-direct");
        (fake.mode, fake.mr_mode, fake.cq_data_size) = (CONTEXT2, MR_LOCAL | MR_VIRT_ADDR | MR_PROV_KEY, 4);
        fake.has_delivery_complete = 0;
    };
    with(direct, |copy, mut pair| {
        assert_eq!(pair.here.about().manner, "efa-direct");
        assert_eq!(pair.here.event_fd(), None);
        check_all_arrives(&mut pair, 20);
        // CUDA calls and shared memory off, unsolicited immediates on; bit pairs, as fake.c has them.
        assert_eq!(copy.get().options, 1 | 4 | 32);
        assert_eq!(copy.get().flags & DELIVERY_COMPLETE, 0);
    });
    with(
        |fake| fake.name("efa", "efa"),
        |copy, mut pair| {
            check_all_arrives(&mut pair, 20);
            assert_ne!(copy.get().flags & DELIVERY_COMPLETE, 0);
        },
    );
}

#[test]
fn a_provider_without_delivery_completeness_is_not_used() {
    let Some(copy) = Copy::new(|fake| fake.has_delivery_complete = 0) else { return };
    let wanted = Wanted { provider: Some("fake".into()), nic: None };
    let error = Provider::all(copy.library(), &wanted).unwrap_err();
    assert!(error.to_string().contains("complete on delivery"), "{error}");
    // It has no hardware, so that nobody gets it who did not ask for it.
    let Some(copy) = Copy::new(|_| {}) else { return };
    assert!(Provider::all(copy.library(), &Wanted::default()).is_err());
}

#[test]
fn slingshot_sends_messages() {
    with(
        |fake| fake.name("cxi", "cxi"),
        |copy, mut pair| {
            assert_eq!(pair.here.domain().provider().arrivals, Arrivals::Messages);
            check_all_arrives(&mut pair, 20);
            assert_eq!(copy.get().immediates, 0);
        },
    );
}

#[test]
fn an_old_library_is_refused_with_its_version() {
    let Some(copy) = Copy::new(|fake| fake.version = 1 << 16 | 9) else { return };
    let error = Library::load(copy.path()).unwrap_err().to_string();
    assert!(error.contains("it is 1.9, and 1.17 is the oldest") && error.contains(LIBRARY_VARIABLE), "{error}");
}

#[test]
fn posting_and_polling_allocate_nothing() {
    with(
        |fake| (fake.null, fake.order) = (1, 0),
        |_, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let target = FabricDomain::remote(&to.memory);
            let (writes, mut ended) = (pages(32), Ended::default());
            let count = allocations(|| {
                for token in 0..1000 {
                    let batch = Batch { source: &from.memory, target, writes: &writes, marks: Marks::Each(1), token };
                    assert_eq!(pair.here.post(pair.rail, &batch), Ok(32));
                    while ended.0 <= token {
                        pair.here.poll(&mut ended);
                    }
                }
            });
            assert_eq!(count, 0, "allocations on the way of 1000 batches");
            assert_eq!(ended.0, 1000);
            assert!(allocations(|| drop(std::hint::black_box(vec![0_u8; 8]))) > 0, "the count would show one");
        },
    );
}

/// Pages, an immediate and a message, until both ends have seen them, in each way in which immediates may come.
#[test]
fn arrivals_allocate_nothing() {
    for (arrivals, change) in WAYS {
        with(change, |_, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let (target, writes) = (FabricDomain::remote(&to.memory), pages(6));
            let (mut ended, mut there) = (Ended::default(), Ended::default());
            let mut rounds = |num: u32| {
                for _ in 0..num {
                    let until = ended.0 + 3;
                    let batch =
                        Batch { source: &from.memory, target, writes: &writes, marks: Marks::Each(1), token: 1 };
                    assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
                    assert_eq!(pair.here.signal(pair.rail, 1, 2), Ok(true));
                    assert_eq!(pair.here.send(pair.rail, b"hello", 3), Ok(true));
                    while ended.0 < until {
                        pair.here.poll(&mut ended);
                        pair.there.poll(&mut there);
                    }
                }
                // What is still in the queue there.
                while pair.there.poll(&mut there) {}
                there.1
            };
            let before = rounds(20);
            let mut after = 0;
            assert_eq!(allocations(|| after = rounds(200)), 0, "{arrivals:?}");
            assert_eq!(after - before, 200 * 8, "{arrivals:?}");
        });
    }
}

pub(crate) const CONTEXT2: u64 = 1 << 52;
const RX_CQ_DATA: u64 = 1 << 56;
const DELIVERY_COMPLETE: u64 = 1 << 28;
const MR_LOCAL: u64 = 1 << 2;
const MR_VIRT_ADDR: u64 = 1 << 4;
const MR_PROV_KEY: u64 = 1 << 6;
pub(crate) const MR_ENDPOINT: u64 = 1 << 9;

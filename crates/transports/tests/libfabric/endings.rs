//! What is certain when an endpoint is closed or somebody waits, whatever the provider: the fake library.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_transports::libfabric::{Arrivals, FabricDomain, FabricNic, FabricSettings, Provider, Wanted};
use anyfabric_transports::rdma::{Batch, Domain, Fault, Marks, Nic, NicError};

use crate::fake::{Copy, Fake};
use crate::faked::{check_all_arrives, pages, with};
use crate::locked::lock_at_most;
use crate::support::{Pair, Region};

#[test]
fn a_provider_that_lets_nobody_wait_is_asked_again() {
    with(
        |fake| fake.has_trywait = 1,
        |copy, mut pair| {
            assert!(pair.here.arm());
            copy.get().not_now = 1;
            assert!(!pair.here.arm());
            copy.get().not_now = 0;
            assert!(pair.here.arm());
        },
    );
}

/// No event says that a full queue has room again.
#[test]
fn what_a_provider_did_not_take_is_tried_again() {
    with(
        |fake| fake.has_trywait = 1,
        |copy, mut pair| {
            copy.get().again_every = 1;
            assert_eq!(pair.here.signal(pair.rail, 1, 1), Ok(false));
            assert!(!pair.here.arm());
            copy.get().again_every = 0;
            pair.poll();
            assert_eq!(pair.here.signal(pair.rail, 1, 1), Ok(true));
            pair.until("its end", |pair| pair.seen.result(1).is_some());
            (0..3).for_each(|_| pair.poll());
            assert!(pair.here.arm(), "nothing is left to try");
        },
    );
}

/// Tried again for ever it would keep a core busy, and the peer waiting.
#[test]
fn an_endpoint_that_takes_no_receives_is_closed() {
    with(
        |_| {},
        |copy, mut pair| {
            copy.get().no_receives = libc::EAGAIN as u64;
            assert_eq!(pair.here.send(pair.rail, b"hello", 1), Ok(true));
            (0..20).for_each(|_| pair.poll());
            assert_eq!(pair.seen_there.broken, [], "it may take them later");
            assert!(!pair.there.arm());
            copy.get().no_receives = libc::EINVAL as u64;
            pair.until("the rail breaks", |pair| !pair.seen_there.broken.is_empty());
            assert_eq!(pair.seen_there.broken, [(pair.back, Fault::Local(libc::EINVAL as u32))]);
            assert_eq!(pair.seen_there.messages, [(pair.back, b"hello".to_vec())]);
            assert!(pair.there.arm(), "nothing is left to try");
            pair.there.close(pair.back);
            pair.here.close(pair.rail);
            copy.get().no_receives = 0;
            pair.connect();
            pair.seen.completed.clear();
            check_all_arrives(&mut pair, 5);
        },
    );
}

/// A time so long that it does not fit is never over.
#[test]
fn a_peer_that_may_be_silent_for_centuries_is_waited_for() {
    let Some(mut copy) = Copy::new(|fake| fake.swallow = 1) else { return };
    // In nanoseconds a quarter of a second more than 64 bits have.
    let answer_timeout = Duration::from_secs(18_446_744_074);
    let settings = FabricSettings { answer_timeout, ..FabricSettings::default() };
    let mut pair = Pair::new(copy.nic(&settings), copy.nic(&settings));
    assert_eq!(pair.here.signal(pair.rail, 1, 1), Ok(true));
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        pair.poll();
    }
    assert_eq!(pair.seen.broken, []);
}

/// Peers are told that it has arrived until the very moment at which the endpoint is no more.
#[test]
fn what_came_while_an_endpoint_was_closed_counts() {
    type Change = fn(&mut Fake);
    let ways: [(Arrivals, Change); 4] = [
        (Arrivals::Tagged, |fake| fake.order = 2),
        (Arrivals::Tagged, |fake| fake.mode = RX_CQ_DATA),
        (Arrivals::Sourced, |fake| fake.cq_data_size = 4),
        (Arrivals::Messages, |fake| (fake.cq_data_size, fake.has_write_data) = (0, 0)),
    ];
    type End = fn(&mut Pair) -> bool;
    let ends: [End; 2] = [|pair| pair.there.fence(pair.back), |pair| pair.there.close(pair.back)];
    for ((arrivals, change), end) in ways.into_iter().flat_map(|way| ends.map(|end| (way, end))) {
        with(change, |copy, mut pair| {
            assert_eq!(pair.here.domain().provider().arrivals, arrivals);
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let (target, back) = (FabricDomain::remote(&to.memory), pair.back);
            copy.get().late = 1;
            for token in 0..4 {
                let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token };
                assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
            }
            assert_eq!(pair.here.send(pair.rail, b"hello", 4), Ok(true));
            pair.until("all of it was acknowledged", |pair| {
                (0..5).all(|token| pair.seen.result(token) == Some(Ok(())))
            });
            assert!(pair.seen_there.arrived.is_empty() && pair.seen_there.messages.is_empty());
            assert!(end(&mut pair));
            (0..20).for_each(|_| pair.poll());
            assert_eq!(pair.seen_there.arrived, [(back, 1); 24], "{arrivals:?}");
            assert_eq!(pair.seen_there.messages, [(back, b"hello".to_vec())], "{arrivals:?}");
            copy.get().late = 0;
            pair.there.close(back);
            pair.here.close(pair.rail);
            pair.connect();
            pair.seen.completed.clear();
            check_all_arrives(&mut pair, 5);
        });
    }
}

/// Peers were given the key that memory had with the endpoint before.
#[test]
fn a_provider_that_would_renew_keys_takes_ours() {
    with(
        |fake| (fake.mr_mode, fake.takes_keys) = (MR_ENDPOINT | MR_PROV_KEY, 1),
        |copy, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            pair.there.close(pair.back);
            pair.here.close(pair.rail);
            assert_eq!(copy.get().endpoints, 0);
            pair.connect();
            pair.write((&from, &to), &pages(6), Marks::Each(1), 1);
            pair.until("its end", |pair| pair.seen.result(1).is_some());
            assert_eq!(pair.seen.result(1), Some(Ok(())));
        },
    );
}

#[test]
fn a_provider_that_insists_on_renewing_keys_is_not_used() {
    let Some(copy) = Copy::new(|fake| fake.mr_mode = MR_ENDPOINT | MR_PROV_KEY) else { return };
    let wanted = Wanted { provider: Some("fake".into()), nic: None };
    let error = Provider::all(copy.library(), &wanted).unwrap_err();
    assert!(error.to_string().contains("keys that outlive an endpoint"), "{error}");
}

/// More came than the queue holds: who waits for a count must not do so for ever, and the NIC goes on with another queue.
#[test]
fn a_queue_that_is_overrun_breaks_every_rail_and_is_renewed() {
    for says_so in 0..2 {
        with(
            |fake| fake.says_so = says_so,
            |copy, mut pair| {
                let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
                let target = FabricDomain::remote(&to.memory);
                let (first, first_back) = (pair.rail, pair.back);
                pair.connect();
                copy.get().is_full = 1;
                let batch = Batch { source: &from.memory, target, writes: &pages(12), marks: Marks::Each(1), token: 1 };
                assert_eq!(pair.here.post(pair.rail, &batch), Ok(12));
                pair.until("both ends know", |pair| pair.seen.broken.len() == 2 && pair.seen_there.broken.len() == 2);
                let missed = Fault::Missed(268);
                for (seen, rails) in [(&pair.seen, [first, pair.rail]), (&pair.seen_there, [first_back, pair.back])] {
                    assert!(rails.iter().all(|rail| seen.broken.contains(&(*rail, missed))), "{:?}", seen.broken);
                }
                assert_eq!(pair.seen.result(1), Some(Err(missed)));
                for (rail, back) in [(first, first_back), (pair.rail, pair.back)] {
                    pair.here.close(rail);
                    pair.there.close(back);
                }
                copy.get().is_full = 0;
                pair.connect();
                pair.seen.completed.clear();
                check_all_arrives(&mut pair, 5);
                assert!(!pair.here.arm(), "nobody waits for the descriptor of a queue that is gone");
            },
        );
    }
}

/// Nobody has looked at the queue when the peer's word ends the rail: that something may be missing is told all the same.
#[test]
fn an_overrun_is_told_of_a_rail_that_is_closed() {
    with(
        |_| {},
        |copy, mut pair| {
            let (from, to) = (Region::new(&pair.here, 1 << 14, 7), Region::new(&pair.there, 1 << 14, 0));
            let target = FabricDomain::remote(&to.memory);
            copy.get().is_full = 1;
            let batch = Batch { source: &from.memory, target, writes: &pages(6), marks: Marks::Each(1), token: 1 };
            assert_eq!(pair.here.post(pair.rail, &batch), Ok(6));
            pair.there.close(pair.back);
            pair.there.poll(&mut pair.seen_there);
            assert_eq!(pair.seen_there.broken, [(pair.back, Fault::Missed(268))]);
        },
    );
}

/// Whatever is missing, what was opened before is closed in its order and nothing is left.
#[test]
fn a_nic_that_cannot_be_opened_whole_is_closed_in_order() {
    for mr_mode in [0, MR_ENDPOINT] {
        let Some(mut copy) = Copy::new(|fake| fake.mr_mode = mr_mode) else { return };
        let wanted = Wanted { provider: Some("fake".into()), nic: None };
        let mut open = |fails| {
            copy.get().memory_fails = fails;
            let provider = Provider::all(copy.library(), &wanted).unwrap().remove(0);
            let opened = FabricNic::open(Arc::new(provider), &FabricSettings::default()).map(drop);
            let fake = copy.get();
            assert_eq!((fake.endpoints, fake.memories, fake.early), (0, 0, 0), "registration {fails}");
            opened
        };
        // Those of the messages that are sent, the landing and the receives.
        (1..=3).for_each(|fails| assert!(open(fails).is_err()));
        assert_eq!(open(4), Ok(()));
    }
}

/// Keys of some providers are short, so that of random ones two are soon the same.
#[test]
fn no_two_memories_have_one_key() {
    for mr_mode in [0, MR_ENDPOINT] {
        let Some(mut copy) = Copy::new(|fake| (fake.key_bytes, fake.mr_mode) = (1, mr_mode)) else { return };
        let nic = copy.nic(&FabricSettings::default());
        let mut regions: Vec<Region> = (0..200).map(|_| Region::new(&nic, 64, 0)).collect();
        let keys: HashSet<u64> = regions.iter().map(|region| FabricDomain::remote(&region.memory).key).collect();
        assert_eq!(keys.len(), 200);
        // Keys of memory that is gone are free again.
        for _ in 0..10 {
            regions.truncate(100);
            regions.extend((0..100).map(|_| Region::new(&nic, 64, 0)));
        }
        let mut bytes = [0_u8; 64];
        // SAFETY: the bytes outlive the registrations.
        let mut register = || unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) };
        let taken: Vec<_> = (0..56).map_while(|_| register().ok()).collect();
        assert!((30..56).contains(&taken.len()), "a key of 256 is left for all that is registered: {}", taken.len());
    }
}

/// Keys are no secret everywhere, and messages are read where they were received.
#[test]
fn peers_may_write_into_no_buffer_of_ours_but_the_landing() {
    for arrivals in [8, 0] {
        with(
            |fake| fake.cq_data_size = arrivals,
            |copy, mut pair| {
                assert_eq!(copy.get().writable, 2, "one for each NIC");
                check_all_arrives(&mut pair, 5);
            },
        );
    }
}

/// A peer may say of its endpoint what it pleases, another peer's name too, and go.
#[test]
fn a_name_that_two_rails_have_is_known_until_both_are_closed() {
    with(
        |_| {},
        |_, mut pair| {
            let theirs = pair.there.address(pair.back);
            let other = pair.here.open().unwrap();
            pair.here.connect(other, &theirs).unwrap();
            pair.here.close(other);
            check_all_arrives(&mut pair, 5);
            let first = pair.rail;
            pair.rail = pair.here.open().unwrap();
            pair.here.connect(pair.rail, &theirs).unwrap();
            pair.here.close(first);
            check_all_arrives(&mut pair, 5);
        },
    );
}

/// Providers over sockets read as much of an address as its family has.
#[test]
fn an_address_of_another_family_is_refused() {
    for (format, is_of_sockets) in [(1, true), (2, true), (4, true), (7, false)] {
        with(
            |fake| fake.addr_format = format,
            |_, mut pair| {
                let mut theirs = pair.there.address(pair.back);
                theirs[NAME_AT] = libc::AF_INET6 as u8;
                let rail = pair.here.open().unwrap();
                assert_eq!(pair.here.connect(rail, &theirs).is_err(), is_of_sockets, "format {format}");
                pair.here.close(rail);
                check_all_arrives(&mut pair, 5);
            },
        );
    }
}

/// Where the name of the sender says which rail an immediate is of, no other peer can take its place.
#[test]
fn a_sender_is_of_one_rail() {
    with(
        |fake| fake.cq_data_size = 4,
        |_, mut pair| {
            assert_eq!(pair.there.domain().provider().arrivals, Arrivals::Sourced);
            let sender = pair.here.address(pair.rail);
            let other = pair.there.open().unwrap();
            assert!(matches!(pair.there.connect(other, &sender), Err(NicError::Peer(_))));
            check_all_arrives(&mut pair, 5);
            pair.there.close(other);
            check_all_arrives(&mut pair, 5);
            pair.there.close(pair.back);
            pair.back = pair.there.open().unwrap();
            pair.there.connect(pair.back, &sender).unwrap();
        },
    );
}

#[test]
fn a_queue_is_as_deep_as_what_may_complete() {
    let least = 2048 + (64 + 8) * 32;
    let efa = |fake: &mut Fake| fake.name("efa", "efa");
    with(|_| {}, |copy, _| assert_eq!(copy.get().depth, least));
    with(efa, |copy, _| assert_eq!(copy.get().depth, 1 << 16));
    with(|fake| (efa(fake), fake.deepest = 20_000).1, |copy, _| assert_eq!(copy.get().depth, 1 << 14));
    with(|fake| (efa(fake), fake.deepest = 5_000).1, |copy, _| assert_eq!(copy.get().depth, 1 << 12));
}

/// Also where one region alone would be within it: it is the limit of all that is registered.
#[test]
fn the_limit_of_locked_memory_is_named() {
    with(
        |_| {},
        |copy, pair| {
            let mut bytes = [0_u8; 64];
            copy.get().memory_fails = 1;
            let given = lock_at_most(1 << 20);
            // SAFETY: nothing is registered.
            let refused =
                unsafe { pair.here.domain().register(bytes.as_mut_ptr(), 64, true) }.err().unwrap().to_string();
            assert!(refused.contains("1048576") && refused.contains("ulimit -l"), "{refused}");
            lock_at_most(given);
            copy.get().memory_fails = 0;
        },
    );
}

/// Where an address of a rail has the name of its endpoint.
const NAME_AT: usize = 40;
const MR_PROV_KEY: u64 = 1 << 6;
const MR_ENDPOINT: u64 = 1 << 9;
const RX_CQ_DATA: u64 = 1 << 56;

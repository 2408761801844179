//! Over a libibverbs without hardware. Its knobs are the process's, so this is one test that goes through its chapters.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Code, Config, WriteOptions};

use crate::null_nic::{eventually, knob, library, Knob};
use crate::star::{target, Star, ALL, IMM, LONG, NBYTES, NUM_PEERS, OTHER_IMM};

const UNANSWERED: i64 = 12;
/// Work requests under way on one rail.
const DEPTH: u64 = 128;

#[test]
fn legs_over_the_null_nic() {
    knob(Knob::Delivers, Some(1));
    every_leg_counts_once();
    a_full_queue_half_way();
    a_request_fails();
    requests_are_refused();
    a_port_goes_down_half_way();
    a_peer_is_lost_half_way();
    a_region_is_revoked_half_way();
    given_up_half_way();
}

/// Everybody has those NICs.
fn star_of(nics: &[&str]) -> Star {
    let verbs = VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() };
    let nics = nics.iter().map(|nic| (*nic).to_owned()).collect();
    Star::new(&Config { transports: vec!["verbs".into()], nics, verbs, ..Config::default() })
}

fn every_leg_counts_once() {
    for nics in [&["null0"][..], &["null0", "null1"]] {
        let star = star_of(nics);
        let before = knob(Knob::NumRequests, None);
        for round in 0..10 {
            star.scatter(IMM, LONG).wait(None).unwrap();
            star.barrier(IMM).wait(None).unwrap();
            star.expect([1 + 2 * (round + 1); NUM_PEERS]);
        }
        // An immediate goes over the write queue too: one request each, and nothing else.
        assert_eq!(knob(Knob::NumRequests, None) - before, 20 * NUM_PEERS as i64);
        assert_eq!(star.used(), [[21, 11 * NBYTES, 0, 21, 0]; NUM_PEERS]);
        // Several targets at one peer, and not in the order of the peers.
        let mut targets = star.targets();
        targets.extend(star.targets().into_iter().rev());
        star.here.scatter(&star.region, &targets, None, WriteOptions::counted(IMM)).unwrap().wait(Some(LONG)).unwrap();
        star.expect([23; NUM_PEERS]);
        assert_eq!(star.used(), [[23, 13 * NBYTES, 0, 22, 0]; NUM_PEERS]);
    }
}

/// More legs than the queues take: the rest goes when there is room again, and nothing counts twice.
fn a_full_queue_half_way() {
    let star = star_of(&["null0"]);
    let before = knob(Knob::NumRequests, None);
    knob(Knob::Holds, Some(1));
    let targets: Vec<_> = (0..1000).map(|idx| target(&star.peers[idx % 2].remote, 8)).collect();
    let transfer = star.here.scatter(&star.region, &targets, None, WriteOptions::counted(IMM)).unwrap();
    eventually("both queues are full", || knob(Knob::NumRequests, None) - before == 2 * DEPTH as i64);
    assert!(!transfer.is_done());
    knob(Knob::Holds, Some(0));
    transfer.wait(Some(LONG)).unwrap();
    star.expect([501, 501, 1, 1, 1]);
    assert_eq!(knob(Knob::NumRequests, None) - before, 1000);
    assert_eq!(star.used()[0], [501, NBYTES + 500 * 8, 0, 2, 0]);
}

/// One of the requests fails: the transfer does, that receiver is told, and the others have what was sent to them.
fn a_request_fails() {
    for is_scatter in [true, false] {
        let star = star_of(&["null0"]);
        knob(Knob::Holds, Some(1));
        let transfer = if is_scatter { star.scatter(IMM, LONG) } else { star.barrier(IMM) };
        knob(Knob::Status, Some(UNANSWERED));
        knob(Knob::FailsAfter, Some(2));
        knob(Knob::Holds, Some(0));
        let error = transfer.wait(None).unwrap_err();
        assert_eq!(error.code, Code::ConnectionBroken, "{error}");
        transfer.wait_quiesced(Some(LONG)).unwrap();
        // The last that was posted to completes first.
        let culprit = NUM_PEERS - 1 - 2;
        assert_eq!(error.context.peer, Some(star.addresses()[culprit].to_string()), "{error}");
        let mut used = star.used();
        let failed = used.remove(culprit);
        assert_eq!((failed[2], failed[4]), (1, 1));
        assert!(used.iter().all(|used| (used[2], used[4]) == (0, 1)), "{used:?}");
        star.recovers(&[culprit]);
        for (idx, peer) in star.peers.iter().enumerate().filter(|(idx, _)| *idx != culprit) {
            assert_eq!(peer.counter.value(), 2, "peer {idx}");
        }
    }
}

/// The device takes none of the requests.
fn requests_are_refused() {
    let star = star_of(&["null0"]);
    knob(Knob::Refuses, Some(1));
    let transfer = star.scatter(IMM, LONG);
    let error = transfer.wait(None).unwrap_err();
    assert_eq!(error.code, Code::ConnectionBroken, "{error}");
    transfer.wait_quiesced(Some(LONG)).unwrap();
    knob(Knob::Refuses, Some(0));
    star.recovers(&ALL);
}

/// What was posted before fails; what is submitted while no port is up is not posted.
fn a_port_goes_down_half_way() {
    let star = star_of(&["null0"]);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(IMM, LONG);
    let before = knob(Knob::NumRequests, None);
    knob(Knob::PortIsDown, Some(1));
    eventually("the paths are degraded", || {
        star.addresses().iter().all(|address| star.here.path(address).state == "degraded")
    });
    let later = star.scatter(OTHER_IMM, LONG);
    assert_eq!(knob(Knob::NumRequests, None), before);
    knob(Knob::Holds, Some(0));
    assert_eq!(transfer.wait(None).unwrap_err().code, Code::ConnectionBroken);
    transfer.wait_quiesced(Some(LONG)).unwrap();
    assert_eq!(later.wait(None).unwrap_err().code, Code::ConnectionBroken);
    knob(Knob::PortIsDown, Some(0));
    star.recovers(&ALL);
}

fn a_peer_is_lost_half_way() {
    let mut star = star_of(&["null0"]);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(IMM, LONG);
    let lost = star.peers.remove(1);
    let address = lost.engine.address().clone();
    let closes = std::thread::spawn(move || drop(lost));
    let error = transfer.wait(None).unwrap_err();
    assert_eq!(error.code, Code::PeerLost, "{error}");
    assert_eq!(error.context.peer, Some(address.to_string()), "{error}");
    assert!(!transfer.is_quiesced(), "the other legs are held");
    knob(Knob::Holds, Some(0));
    transfer.wait_quiesced(Some(LONG)).unwrap();
    closes.join().unwrap();
    for peer in &star.peers {
        peer.counter.wait(2, Some(LONG)).unwrap();
    }
    star.scatter(IMM, LONG).wait(None).unwrap();
}

/// The owner has its region back only when no leg can touch it any more.
fn a_region_is_revoked_half_way() {
    let star = star_of(&["null0"]);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(IMM, LONG);
    let has_let_go = AtomicBool::new(false);
    let owner = &star.peers[2];
    std::thread::scope(|scope| {
        let revokes = scope.spawn(|| {
            owner.region.revoke(Some(star.here.address()), LONG).unwrap();
            assert!(has_let_go.load(Ordering::SeqCst), "a leg was under way");
        });
        let (src, dst) = (star.region.slice(0..8).unwrap(), owner.remote.slice(0..8).unwrap());
        eventually("the writer was asked", || {
            let write = star.here.write(&src, &dst, WriteOptions::default()).unwrap();
            write.is_done() && write.error().is_some_and(|error| error.code == Code::Refused)
        });
        // A wrong answer would have come by then.
        std::thread::sleep(Duration::from_millis(20));
        has_let_go.store(true, Ordering::SeqCst);
        knob(Knob::Holds, Some(0));
        revokes.join().unwrap();
    });
    // What was posted was placed before the owner had its region back.
    transfer.wait(Some(LONG)).unwrap();
    // And the next is not posted there.
    let error = star.scatter(OTHER_IMM, LONG).wait(None).unwrap_err();
    assert_eq!(error.code, Code::Refused, "{error}");
}

/// What the NICs have been told is not taken back: the transfer ends at once, and quiesces when they have.
fn given_up_half_way() {
    for is_cancelled in [true, false] {
        let star = star_of(&["null0"]);
        knob(Knob::Holds, Some(1));
        let transfer = star.give_up(is_cancelled);
        for peer in &star.peers {
            let error = peer.counter.wait(u64::MAX, Some(LONG)).unwrap_err();
            assert_eq!(error.code, Code::TransferFailed, "{error}");
        }
        knob(Knob::Holds, Some(0));
        transfer.wait_quiesced(Some(LONG)).unwrap();
        star.recovers(&ALL);
    }
}

//! Scatters and barriers over a libibverbs without hardware: what becomes of their legs when something fails half-way.
//! The null NIC's knobs are the process's, so this is one test that goes through its chapters.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Address, Code, Config, Counter, Engine, Region, Remote, ScatterTarget, Transfer, WriteOptions};
use null_nic::{eventually, knob, library, Knob};

const LONG: Duration = Duration::from_secs(20);
const UNANSWERED: i64 = 12;
const NUM_PEERS: usize = 5;
const NBYTES: u64 = 512;
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

struct Peer {
    engine: Engine,
    remote: Remote,
    counter: Counter,
    region: Region,
}

/// One engine, and those that it scatters to.
struct Star {
    here: Engine,
    region: Region,
    peers: Vec<Peer>,
}

impl Star {
    /// Everybody has those NICs; `imm` is counted.
    fn new(nics: &[&str], imm: u32) -> Self {
        let here = engine(nics);
        let region = here.allocate(NBYTES).unwrap();
        let peers = (0..NUM_PEERS).map(|_| {
            let engine = engine(nics);
            let region = engine.allocate(NBYTES).unwrap();
            let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
            here.connect(engine.address(), Some(LONG)).unwrap();
            let counter = engine.counter(Some(imm), &[]).unwrap();
            Peer { engine, remote, counter, region }
        });
        let star = Self { peers: peers.collect(), here, region };
        // What is found at first use is found.
        star.scatter(imm, LONG).wait(None).unwrap();
        star.expect([1; NUM_PEERS]);
        star
    }

    fn targets(&self) -> Vec<ScatterTarget> {
        self.peers.iter().map(|peer| target(&peer.remote, NBYTES)).collect()
    }

    fn addresses(&self) -> Vec<Address> {
        self.peers.iter().map(|peer| peer.engine.address().clone()).collect()
    }

    fn scatter(&self, imm: u32, timeout: Duration) -> Transfer {
        let options = WriteOptions { timeout: Some(timeout), ..WriteOptions::counted(imm) };
        self.here.scatter(&self.region, &self.targets(), None, options).unwrap()
    }

    fn barrier(&self, imm: u32) -> Transfer {
        self.here.barrier(&self.addresses(), imm, Some(LONG)).unwrap()
    }

    /// How much each has counted, and no more.
    fn expect(&self, counts: [u64; NUM_PEERS]) {
        for (peer, count) in self.peers.iter().zip(counts) {
            peer.counter.wait(count, Some(LONG)).unwrap();
            assert_eq!(peer.counter.value(), count);
        }
    }

    /// Of the legs so far: parts, bytes and errors at the NICs, then operations and their errors, of each peer.
    fn used(&self) -> Vec<[u64; 5]> {
        let stats = self.here.stats();
        let of = |address: &Address| {
            let used = &stats.peers[&address.to_string()];
            let sum = |of: fn(&anyfabric_engine::NicUse) -> u64| used.nics.values().map(of).sum();
            [sum(|nic| nic.parts), sum(|nic| nic.bytes), sum(|nic| nic.errors), used.operations, used.errors]
        };
        self.addresses().iter().map(of).collect()
    }

    fn is_ready(&self) -> bool {
        self.addresses().iter().all(|address| self.here.path(address).state == "ready")
    }

    /// The receivers of these know that a count will never come; the others have theirs. Then all is well again.
    fn recovers(&self, imm: u32, failed: &[usize]) {
        for (idx, peer) in self.peers.iter().enumerate().filter(|(idx, _)| failed.contains(idx)) {
            let error = peer.counter.wait(u64::MAX, Some(LONG)).unwrap_err();
            assert_eq!(error.code, Code::TransferFailed, "{idx}: {error}");
        }
        eventually("the rails are made again", || self.is_ready());
        self.scatter(imm + 1, LONG).wait(None).unwrap();
        self.barrier(imm + 1).wait(None).unwrap();
    }
}

fn target(remote: &Remote, nbytes: u64) -> ScatterTarget {
    ScatterTarget { remote: remote.clone(), src_offset: 0, dst_offset: 0, nbytes }
}

fn engine(nics: &[&str]) -> Engine {
    let verbs = VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() };
    let nics = nics.iter().map(|nic| (*nic).to_owned()).collect();
    Engine::new(Config { transports: vec!["verbs".into()], nics, verbs, ..Config::default() }).unwrap()
}

fn every_leg_counts_once() {
    for nics in [&["null0"][..], &["null0", "null1"]] {
        let star = Star::new(nics, 7);
        let before = knob(Knob::NumRequests, None);
        for round in 0..10 {
            star.scatter(7, LONG).wait(None).unwrap();
            star.barrier(7).wait(None).unwrap();
            star.expect([1 + 2 * (round + 1); NUM_PEERS]);
        }
        // An immediate goes over the write queue too: one request each, and nothing else.
        assert_eq!(knob(Knob::NumRequests, None) - before, 20 * NUM_PEERS as i64);
        assert_eq!(star.used(), [[21, 11 * NBYTES, 0, 21, 0]; NUM_PEERS]);
        // Several targets at one peer, and not in the order of the peers.
        let mut targets = star.targets();
        targets.extend(star.targets().into_iter().rev());
        star.here.scatter(&star.region, &targets, None, WriteOptions::counted(7)).unwrap().wait(Some(LONG)).unwrap();
        star.expect([23; NUM_PEERS]);
        assert_eq!(star.used(), [[23, 13 * NBYTES, 0, 22, 0]; NUM_PEERS]);
    }
}

/// More legs than the queues take: the rest goes when there is room again, and nothing counts twice.
fn a_full_queue_half_way() {
    let star = Star::new(&["null0"], 7);
    let before = knob(Knob::NumRequests, None);
    knob(Knob::Holds, Some(1));
    let targets: Vec<_> = (0..1000).map(|idx| target(&star.peers[idx % 2].remote, 8)).collect();
    let transfer = star.here.scatter(&star.region, &targets, None, WriteOptions::counted(7)).unwrap();
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
        let star = Star::new(&["null0"], 7);
        knob(Knob::Holds, Some(1));
        let transfer = if is_scatter { star.scatter(7, LONG) } else { star.barrier(7) };
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
        star.recovers(7, &[culprit]);
        for (idx, peer) in star.peers.iter().enumerate().filter(|(idx, _)| *idx != culprit) {
            assert_eq!(peer.counter.value(), 2, "peer {idx}");
        }
    }
}

/// The device takes none of the requests.
fn requests_are_refused() {
    let star = Star::new(&["null0"], 7);
    knob(Knob::Refuses, Some(1));
    let transfer = star.scatter(7, LONG);
    let error = transfer.wait(None).unwrap_err();
    assert_eq!(error.code, Code::ConnectionBroken, "{error}");
    transfer.wait_quiesced(Some(LONG)).unwrap();
    knob(Knob::Refuses, Some(0));
    star.recovers(7, &[0, 1, 2, 3, 4]);
}

/// What was posted before fails; what is submitted while no port is up is not posted.
fn a_port_goes_down_half_way() {
    let star = Star::new(&["null0"], 7);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(7, LONG);
    let before = knob(Knob::NumRequests, None);
    knob(Knob::PortIsDown, Some(1));
    eventually("the paths are degraded", || {
        star.addresses().iter().all(|address| star.here.path(address).state == "degraded")
    });
    let later = star.scatter(8, LONG);
    assert_eq!(knob(Knob::NumRequests, None), before);
    knob(Knob::Holds, Some(0));
    assert_eq!(transfer.wait(None).unwrap_err().code, Code::ConnectionBroken);
    transfer.wait_quiesced(Some(LONG)).unwrap();
    assert_eq!(later.wait(None).unwrap_err().code, Code::ConnectionBroken);
    knob(Knob::PortIsDown, Some(0));
    star.recovers(7, &[0, 1, 2, 3, 4]);
}

fn a_peer_is_lost_half_way() {
    let mut star = Star::new(&["null0"], 7);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(7, LONG);
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
    star.scatter(7, LONG).wait(None).unwrap();
}

/// The owner has its region back only when no leg can touch it any more.
fn a_region_is_revoked_half_way() {
    let star = Star::new(&["null0"], 7);
    knob(Knob::Holds, Some(1));
    let transfer = star.scatter(7, LONG);
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
    let error = star.scatter(8, LONG).wait(None).unwrap_err();
    assert_eq!(error.code, Code::Refused, "{error}");
}

/// What the NICs have been told is not taken back: the transfer ends at once, and quiesces when they have.
fn given_up_half_way() {
    for is_cancelled in [true, false] {
        let star = Star::new(&["null0"], 7);
        knob(Knob::Holds, Some(1));
        let transfer = star.scatter(7, if is_cancelled { LONG } else { Duration::from_millis(20) });
        if is_cancelled {
            transfer.cancel();
        }
        let code = if is_cancelled { Code::Cancelled } else { Code::TransferTimeout };
        assert_eq!(transfer.wait(None).unwrap_err().code, code);
        assert!(!transfer.is_quiesced());
        for peer in &star.peers {
            let error = peer.counter.wait(u64::MAX, Some(LONG)).unwrap_err();
            assert_eq!(error.code, Code::TransferFailed, "{error}");
        }
        knob(Knob::Holds, Some(0));
        transfer.wait_quiesced(Some(LONG)).unwrap();
        star.recovers(7, &[0, 1, 2, 3, 4]);
    }
}

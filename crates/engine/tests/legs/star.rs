//! One engine, and those that it scatters to.

use std::time::Duration;

use anyfabric_engine::{Address, Code, Config, Counter, Engine, Region, Remote, ScatterTarget, Transfer, WriteOptions};

use crate::null_nic::eventually;

pub(crate) const LONG: Duration = Duration::from_secs(20);
pub(crate) const NUM_PEERS: usize = 5;
pub(crate) const ALL: [usize; NUM_PEERS] = [0, 1, 2, 3, 4];
pub(crate) const NBYTES: u64 = 512;
/// Counted by every peer; and one that nobody counts.
pub(crate) const IMM: u32 = 7;
pub(crate) const OTHER_IMM: u32 = 8;

pub(crate) struct Peer {
    pub(crate) engine: Engine,
    pub(crate) remote: Remote,
    pub(crate) counter: Counter,
    pub(crate) region: Region,
}

/// One engine, and those that it scatters to.
pub(crate) struct Star {
    pub(crate) here: Engine,
    pub(crate) region: Region,
    pub(crate) peers: Vec<Peer>,
}

impl Star {
    /// All engines alike; each peer counts `IMM`.
    pub(crate) fn new(config: &Config) -> Self {
        let engine = || Engine::new(config.clone()).unwrap();
        let here = engine();
        let region = here.allocate(NBYTES).unwrap();
        let peers = (0..NUM_PEERS).map(|_| {
            let engine = engine();
            let region = engine.allocate(NBYTES).unwrap();
            let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
            here.connect(engine.address(), Some(LONG)).unwrap();
            let counter = engine.counter(Some(IMM), &[]).unwrap();
            Peer { engine, remote, counter, region }
        });
        let star = Self { peers: peers.collect(), here, region };
        // What is found at first use is found.
        star.scatter(IMM, LONG).wait(None).unwrap();
        star.expect([1; NUM_PEERS]);
        star
    }

    pub(crate) fn targets(&self) -> Vec<ScatterTarget> {
        self.peers.iter().map(|peer| target(&peer.remote, NBYTES)).collect()
    }

    pub(crate) fn addresses(&self) -> Vec<Address> {
        self.peers.iter().map(|peer| peer.engine.address().clone()).collect()
    }

    pub(crate) fn scatter(&self, imm: u32, timeout: Duration) -> Transfer {
        let options = WriteOptions { timeout: Some(timeout), ..WriteOptions::counted(imm) };
        self.here.scatter(&self.region, &self.targets(), None, options).unwrap()
    }

    pub(crate) fn barrier(&self, imm: u32) -> Transfer {
        self.here.barrier(&self.addresses(), imm, Some(LONG)).unwrap()
    }

    /// A scatter that ends at once, before its legs do.
    pub(crate) fn give_up(&self, is_cancelled: bool) -> Transfer {
        let transfer = self.scatter(IMM, if is_cancelled { LONG } else { Duration::from_millis(20) });
        if is_cancelled {
            transfer.cancel();
        }
        let code = if is_cancelled { Code::Cancelled } else { Code::TransferTimeout };
        assert_eq!(transfer.wait(None).unwrap_err().code, code);
        assert!(!transfer.is_quiesced());
        transfer
    }

    /// How much each has counted, and no more.
    pub(crate) fn expect(&self, counts: [u64; NUM_PEERS]) {
        for (peer, count) in self.peers.iter().zip(counts) {
            peer.counter.wait(count, Some(LONG)).unwrap();
            assert_eq!(peer.counter.value(), count);
        }
    }

    /// Of the legs so far: parts, bytes and errors at the NICs, then operations and their errors, of each peer.
    pub(crate) fn used(&self) -> Vec<[u64; 5]> {
        let stats = self.here.stats();
        let of = |address: &Address| {
            let used = &stats.peers[&address.to_string()];
            let sum = |of: fn(&anyfabric_engine::NicUse) -> u64| used.nics.values().map(of).sum();
            [sum(|nic| nic.parts), sum(|nic| nic.bytes), sum(|nic| nic.errors), used.operations, used.errors]
        };
        self.addresses().iter().map(of).collect()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.addresses().iter().all(|address| self.here.path(address).state == "ready")
    }

    /// The receivers of these know that a count will never come; the others have theirs. Then all is well again.
    pub(crate) fn recovers(&self, failed: &[usize]) {
        for (idx, peer) in self.peers.iter().enumerate().filter(|(idx, _)| failed.contains(idx)) {
            let error = peer.counter.wait(u64::MAX, Some(LONG)).unwrap_err();
            assert_eq!(error.code, Code::TransferFailed, "{idx}: {error}");
        }
        eventually("the rails are made again", || self.is_ready());
        self.scatter(OTHER_IMM, LONG).wait(None).unwrap();
        self.barrier(OTHER_IMM).wait(None).unwrap();
    }
}

pub(crate) fn target(remote: &Remote, nbytes: u64) -> ScatterTarget {
    ScatterTarget { remote: remote.clone(), src_offset: 0, dst_offset: 0, nbytes }
}

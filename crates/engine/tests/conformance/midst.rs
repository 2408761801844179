//! Something happens to a peer in the midst of an operation, for each kind of operation: it is killed, it is stopped
//! and goes on, or it is stopped for so long that its NICs have no receive left.

use std::time::Duration;

use anyfabric_engine::{Code, Engine, Error, PageList, Region, ScatterTarget, Transfer, WriteOptions};

use crate::ask::Fault;
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{eventually, fill, Pair, Peer, PeerRegion, LONG};

on_every_fabric!(killed_in_the_midst, paused_in_the_midst);

/// Different numbers of NICs.
mod uneven {
    use super::*;

    on_fabrics! { [killed_in_the_midst, paused_in_the_midst] [verbs_4_2 VERBS_4_2, verbs_1_3 VERBS_1_3] }
}

on_fabrics! { [overrun] [verbs_1 VERBS_1, verbs_2 VERBS_2, verbs_4_2 VERBS_4_2] }

const PAGES: u32 = 600;
const PAGE_BYTES: u64 = 1000;
const TARGET_BYTES: u64 = 1 << 20;
const MESSAGES: u32 = 20;

/// Who writes, and two who are written to.
struct Three {
    engine: Engine,
    region: Region,
    peers: Vec<(Peer, PeerRegion)>,
}

/// Kinds of operations; each is counted by an imm of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pages,
    Scatter,
    Barrier,
    Messages,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Pages, Self::Scatter, Self::Barrier, Self::Messages];

    /// What each peer counts when all goes well.
    const fn count(self) -> u64 {
        match self {
            Self::Pages => PAGES as u64,
            Self::Scatter => 2,
            Self::Barrier => 1,
            Self::Messages => 0,
        }
    }
}

impl Three {
    fn new(fabric: &Fabric) -> Self {
        let engine = Engine::new(fabric.here().config()).unwrap();
        let region = fabric.region(&engine, 4 << 20);
        fill(&region, 1);
        let peers = (0..2).map(|_| {
            let mut peer = Peer::start(&fabric.there());
            let there = peer.region(4 << 20, fabric.memory);
            engine.connect(&peer.address, Some(LONG)).unwrap();
            (peer, there)
        });
        let peers = peers.collect();
        Self { engine, region, peers }
    }

    /// Operations to both peers.
    fn submit(&self, kind: Kind, imm: u32) -> Result<Vec<Transfer>, Error> {
        let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(imm) };
        let peers = || self.peers.iter();
        match kind {
            Kind::Pages => peers()
                .map(|(_, there)| {
                    let list = |first: u32| PageList::new((first..first + PAGES).collect(), PAGE_BYTES, PAGE_BYTES, 0);
                    let remote = there.remote();
                    self.engine.write_pages((&self.region, list(0)), (&remote, list(100)), options)
                })
                .collect(),
            Kind::Scatter => {
                let target = |there: &PeerRegion, dst_offset| {
                    let remote = there.remote();
                    ScatterTarget { remote, src_offset: 0, dst_offset, nbytes: TARGET_BYTES }
                };
                let targets: Vec<_> =
                    peers().flat_map(|(_, there)| [target(there, 0), target(there, 2 * TARGET_BYTES)]).collect();
                Ok(vec![self.engine.scatter(&self.region, &targets, None, options)?])
            }
            Kind::Barrier => {
                let addresses: Vec<_> = peers().map(|(peer, _)| peer.address.clone()).collect();
                Ok(vec![self.engine.barrier(&addresses, imm, Some(LONG))?])
            }
            Kind::Messages => {
                let all = peers().flat_map(|(peer, _)| (0..MESSAGES).map(|_| &peer.address));
                all.map(|to| self.engine.send(to, vec![imm as u8; 100], Some(LONG))).collect()
            }
        }
    }

    /// That everything of one operation is at a peer and counted; or why it is not.
    fn arrived(&mut self, idx: usize, kind: Kind, imm: u32) -> Result<(), Fault> {
        let (peer, there) = &mut self.peers[idx];
        if kind.count() > 0 {
            let counter = peer.open(imm, &[]);
            peer.wait_count(counter, kind.count())?;
            assert_eq!(peer.value(counter), kind.count(), "{kind:?} at peer {idx}");
        }
        match kind {
            Kind::Pages => {
                let pages = (0..u64::from(PAGES)).map(|page| ((100 + page) * PAGE_BYTES, page * PAGE_BYTES)).collect();
                assert_eq!(peer.page_mismatch(there, pages, PAGE_BYTES, 1), None, "pages at peer {idx}");
            }
            Kind::Scatter => {
                for at in [0, 2 * TARGET_BYTES] {
                    assert_eq!(peer.mismatch(there, (at, TARGET_BYTES), 1, 0), None, "a target at peer {idx}");
                }
            }
            Kind::Barrier => {}
            Kind::Messages => {
                for _ in 0..MESSAGES {
                    assert_eq!(peer.receive()?, vec![imm as u8; 100]);
                }
            }
        }
        Ok(())
    }
}

/// One of two peers dies. Everything ends, and what went to the other is there and counted; of a transfer to both, which
/// failed, it is there or its counter fails.
fn killed_in_the_midst(fabric: &Fabric) {
    for (kind, imm) in Kind::ALL.into_iter().zip(1..) {
        let mut three = Three::new(fabric);
        let transfers = three.submit(kind, imm).unwrap();
        three.peers[0].0.kill();
        let mut has_failed = false;
        for transfer in transfers {
            if let Err(error) = transfer.wait(Some(LONG)) {
                has_failed = true;
                // A NIC may see the memory of a process that ends go before its queue pairs: a key that is no more.
                let is_key = fabric.transport == "verbs" && error.code == Code::Refused;
                let is_loss = matches!(error.code, Code::PeerLost | Code::ConnectionBroken);
                assert!(is_loss || is_key, "{kind:?}: {error}");
                assert!(error.context.peer.is_none_or(|peer| peer == three.peers[0].0.address.to_string()), "{kind:?}");
            }
            transfer.wait_quiesced(Some(LONG)).unwrap();
        }
        if let Err(fault) = three.arrived(1, kind, imm) {
            assert!(has_failed && matches!(kind, Kind::Scatter | Kind::Barrier), "{kind:?}: {fault:?}");
            assert_eq!(fault.code, Code::TransferFailed.as_str(), "{kind:?}: {}", fault.message);
        }
        let dead = three.peers[0].0.address.clone();
        eventually("the peer is lost", || three.engine.path(&dead).state == "lost");
        assert!(three.submit(kind, 9).is_err_and(|error| error.code == Code::PeerLost), "{kind:?} to a dead peer");
    }
}

/// A peer that is stopped for less than it may be silent delays what goes to it, and breaks nothing.
fn paused_in_the_midst(fabric: &Fabric) {
    let mut three = Three::new(fabric);
    for (kind, imm) in Kind::ALL.into_iter().zip(1..) {
        let transfers = three.submit(kind, imm).unwrap();
        three.peers[0].0.stop();
        std::thread::sleep(Duration::from_millis(200));
        three.peers[0].0.go_on();
        for transfer in transfers {
            transfer.wait(Some(LONG)).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        }
        for idx in 0..2 {
            three.arrived(idx, kind, imm).unwrap_or_else(|fault| panic!("{kind:?} at peer {idx}: {fault:?}"));
        }
    }
}

/// A peer that is stopped for less than it may be silent, and more arrives than its NICs have receives for: what is on a
/// rail then fails, within its bound. When it goes on so does the rest, and nothing that was counted is missing.
fn overrun(fabric: &Fabric) {
    // More than two NICs have receives.
    const CALLS: u32 = 8;
    const PAGES_PER_CALL: u32 = 3000;
    const BYTES: u64 = 16;
    const CALL_BYTES: u64 = PAGES_PER_CALL as u64 * BYTES;
    let mut pair = Pair::with(fabric, u64::from(CALLS + 1) * CALL_BYTES, |settings| settings.heartbeats_lost = 60);
    pair.connect(fabric);
    fill(&pair.region, 1);
    let counters: Vec<_> = (0..CALLS).map(|call| pair.peer.open(1 + call, &[])).collect();
    let write = |pair: &Pair, call: u32| {
        let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(1 + call) };
        let first = call * PAGES_PER_CALL;
        let list = || PageList::new((first..first + PAGES_PER_CALL).collect(), BYTES, BYTES, 0);
        pair.engine.write_pages((&pair.region, list()), (&pair.remote, list()), options).unwrap()
    };
    // Only its engine tells the keys.
    write(&pair, CALLS).wait(Some(LONG)).unwrap();
    pair.peer.stop();
    let transfers: Vec<_> = (0..CALLS).map(|call| write(&pair, call)).collect();
    let first = || transfers.iter().find_map(|transfer| transfer.error());
    eventually("no receive is left", || first().is_some());
    assert!(first().is_some_and(|error| error.message.contains("overrun")), "{:?}", first());
    pair.peer.go_on();
    let ends: Vec<_> = transfers.iter().map(|transfer| transfer.wait(Some(LONG))).collect();
    for (call, end) in ends.iter().enumerate() {
        let counted = pair.peer.wait_count(counters[call], PAGES_PER_CALL.into());
        match (end, counted) {
            (_, Ok(())) => {
                let at = call as u64 * CALL_BYTES;
                assert_eq!(pair.peer.mismatch(&pair.there, (at, CALL_BYTES), 1, at), None, "call {call}");
                assert_eq!(pair.peer.value(counters[call]), PAGES_PER_CALL.into(), "call {call}");
            }
            (Ok(()), Err(fault)) => panic!("call {call} was done: {fault:?}"),
            (Err(error), Err(fault)) => {
                assert_eq!(error.code, Code::ConnectionBroken, "{error}");
                assert_eq!(fault.code, Code::TransferFailed.as_str(), "{}", fault.message);
            }
        }
    }
    eventually("later writes go well", || write(&pair, CALLS).wait(Some(LONG)).is_ok());
    eventually("the path is whole again", || pair.engine.path(&pair.peer.address).state == "ready");
}

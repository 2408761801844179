//! Semantic 12: a barrier is one immediate to each listed peer, itself excluded.

use anyfabric_engine::Engine;

use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{Pair, Peer, LONG};

on_every_fabric!(everybody_counts_everybody, messages_pass_both_ways);

fn everybody_counts_everybody(fabric: &Fabric) {
    let engine = Engine::new(fabric.here().config()).unwrap();
    let mut peers: Vec<_> = (0..3).map(|_| Peer::start(&fabric.there())).collect();
    let mut all: Vec<_> = peers.iter().map(|peer| peer.address.clone()).collect();
    all.push(engine.address().clone());
    let counter = engine.counter(Some(4), &[]).unwrap();
    let counters: Vec<_> = peers.iter_mut().map(|peer| peer.open(4, &[])).collect();
    // Calls cross: everybody meets everybody for the first time.
    for round in 1..=3 {
        let here = engine.barrier(&all, 4, Some(LONG)).unwrap();
        let addresses: Vec<_> = all.iter().collect();
        let there: Vec<_> = peers.iter_mut().map(|peer| peer.barrier(&addresses, 4).unwrap()).collect();
        here.wait(None).unwrap();
        for (peer, transfer) in peers.iter_mut().zip(there) {
            peer.wait(transfer).unwrap();
        }
        counter.wait(3 * round, Some(LONG)).unwrap();
        assert_eq!(counter.value(), 3 * round);
        for (peer, &counter) in peers.iter_mut().zip(&counters) {
            peer.wait_count(counter, 3 * round).unwrap();
            assert_eq!(peer.value(counter), 3 * round);
        }
    }
    // To nobody but oneself: nothing to do.
    engine.barrier(&[engine.address().clone()], 4, None).unwrap().wait(None).unwrap();
    engine.barrier(&[], 4, None).unwrap().wait(None).unwrap();
    assert_eq!(counter.value(), 9);
}

fn messages_pass_both_ways(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    // 4072 and 8168 are the longest that rails carry over libfabric and verbs; longer ones go another way.
    for nbytes in [0, 1, 1000, 4072, 4073, 8168, 8169, 1 << 16] {
        let bytes: Vec<u8> = (0..nbytes).map(|idx| idx as u8).collect();
        pair.engine.send(&pair.peer.address, bytes.clone(), None).unwrap().wait(Some(LONG)).unwrap();
        assert_eq!(pair.peer.receive().unwrap(), bytes);
        pair.peer.send(pair.engine.address(), &bytes).unwrap();
        let message = pair.engine.receive(Some(LONG)).unwrap();
        assert_eq!(message.data, bytes);
        assert_eq!(message.source, pair.peer.address);
    }
}

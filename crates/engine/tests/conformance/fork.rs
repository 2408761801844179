//! Semantic 11: in a child every call fails and nothing of the engine's is open; the parent is unaffected.

use crate::ask::{Answer, Ask, How};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{eventually, Pair, LONG};

on_every_fabric!(child_gets_nothing);

fn child_gets_nothing(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    eventually("every stream stands", || pair.engine.path(&pair.peer.address).state == "ready");
    for round in 1..=3 {
        let transfer = pair.peer.write(&pair.there, (0, 64), &pair.region, 0, How::counted(1)).unwrap();
        pair.peer.wait(transfer).unwrap();
        let Answer::Text(text) = pair.peer.ask(Ask::Fork { engine: 0, region: pair.there.idx }) else {
            panic!("the peer did not fork");
        };
        let words: Vec<_> = text.split(' ').collect();
        let (left, codes) = words.split_last().expect("the child's report");
        assert_eq!(codes.len(), 7, "{text}");
        assert!(codes.iter().all(|code| *code == "engine_forked"), "{text}");
        // What libfabric opened for itself is not known to us; an exec closes it.
        assert!(*left == "0" || fabric.transport == "libfabric", "{left} descriptors are left in the child");
        // The parent goes on, and so does its peer.
        counter.wait(round, Some(LONG)).unwrap();
        assert_eq!(pair.engine.path(&pair.peer.address).state, "ready");
    }
    // The child's end closed nothing of the parent's.
    let transfer = pair.peer.write(&pair.there, (0, 64), &pair.region, 0, How::counted(1)).unwrap();
    pair.peer.wait(transfer).unwrap();
    counter.wait(4, Some(LONG)).unwrap();
}

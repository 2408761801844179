//! Semantic 2: counts never depend on the NICs.

use anyfabric_engine::{Engine, PageList, ScatterTarget, WriteOptions};

use crate::ask::How;
use crate::fabric::{on_every_fabric, on_fabrics, random, Fabric};
use crate::harness::{fill, wait_for_streams, Pair, Peer, LONG};
use crate::pattern;

on_every_fabric!(write_counts_once, page_counts_once, target_counts_once);

/// Peers with different numbers of streams.
mod uneven {
    use super::*;

    on_fabrics! { [write_counts_once, page_counts_once, target_counts_once] [
        tcp_1_4 TCP_1_4, tcp_4_1 TCP_4_1, verbs_1_2 VERBS_1_2, verbs_2_1 VERBS_2_1, verbs_1_3 VERBS_1_3,
        verbs_3_2 VERBS_3_2, verbs_3_4 VERBS_3_4, verbs_4_2 VERBS_4_2, verbs_8 VERBS_8, verbs_8_3 VERBS_8_3,
        libfabric_1_4 LIBFABRIC_1_4, libfabric_3_2 LIBFABRIC_3_2, libfabric_8 LIBFABRIC_8, libfabric_8_3 LIBFABRIC_8_3
    ] }
}

fn write_counts_once(fabric: &Fabric) {
    let mut random = random();
    let mut pair = Pair::connected(fabric, 8 << 20);
    wait_for_streams(&pair.engine, &pair.peer.address, fabric);
    fill(&pair.region, 1);
    let counter = pair.peer.open(7, &[]);
    // From the smallest to sizes that every stream gets a share of, at odd places.
    let mut sizes = vec![0, 1, 63, 4096, 16 << 10, (16 << 10) + 1, (128 << 10) + 1, 1 << 20, 3_000_001, 6 << 20];
    random.shuffle(&mut sizes);
    for (idx, &nbytes) in sizes.iter().enumerate() {
        let (at, to) = (random.below((8 << 20) - nbytes + 1), random.below((8 << 20) - nbytes + 1));
        let (src, dst) = (pair.region.slice(at..at + nbytes), pair.remote.slice(to..to + nbytes));
        let transfer = pair.engine.write(&src.unwrap(), &dst.unwrap(), WriteOptions::counted(7)).unwrap();
        transfer.wait(Some(LONG)).unwrap();
        pair.peer.wait_count(counter, idx as u64 + 1).unwrap();
        assert_eq!(pair.peer.mismatch(&pair.there, (to, nbytes), 1, at), None, "{nbytes} bytes from {at} to {to}");
        assert_eq!(pair.peer.value(counter), idx as u64 + 1, "after {nbytes} bytes");
    }
    // And the other way, where the other side's streams decide.
    pair.peer.fill(&pair.there, (0, 8 << 20), 2);
    let counter = pair.engine.counter(Some(7), &[]).unwrap();
    for (idx, &nbytes) in sizes.iter().enumerate() {
        let transfer = pair.peer.write(&pair.there, (0, nbytes), &pair.region, 1000, How::counted(7)).unwrap();
        counter.wait(idx as u64 + 1, Some(LONG)).unwrap();
        assert_eq!(pattern::mismatch(&pair.bytes()[1000..1000 + nbytes as usize], 2, 0), None, "{nbytes} bytes");
        pair.peer.wait(transfer).unwrap();
        assert_eq!(counter.value(), idx as u64 + 1, "after {nbytes} bytes");
    }
}

fn page_counts_once(fabric: &Fabric) {
    let mut random = random();
    let mut pair = Pair::connected(fabric, 8 << 20);
    wait_for_streams(&pair.engine, &pair.peer.address, fabric);
    fill(&pair.region, 3);
    let counter = pair.peer.open(8, &[]);
    let mut counted = 0;
    for (page_bytes, num_pages) in [(1, 100), (1000, 1), (1024, 4096), (4096, 700), (300_000, 9), (777, 2049)] {
        let num_slots = (8 << 20) / page_bytes;
        let mut from: Vec<u32> = (0..num_slots.min(1 << 16) as u32).collect();
        let mut to = from.clone();
        random.shuffle(&mut from);
        random.shuffle(&mut to);
        from.truncate(num_pages);
        to.truncate(num_pages);
        let list = |indices: &[u32]| PageList::new(indices.into(), page_bytes, page_bytes, 0);
        let (src, dst) = ((&pair.region, list(&from)), (&pair.remote, list(&to)));
        let transfer = pair.engine.write_pages(src, dst, WriteOptions::counted(8)).unwrap();
        transfer.wait(Some(LONG)).unwrap();
        counted += num_pages as u64;
        pair.peer.wait_count(counter, counted).unwrap();
        let pages = from.iter().zip(&to).map(|(&from, &to)| (u64::from(to) * page_bytes, u64::from(from) * page_bytes));
        let wrong = pair.peer.page_mismatch(&pair.there, pages.collect(), page_bytes, 3);
        assert_eq!(wrong, None, "pages of {page_bytes} bytes");
        assert_eq!(pair.peer.value(counter), counted, "after {num_pages} pages of {page_bytes} bytes");
    }
}

fn target_counts_once(fabric: &Fabric) {
    let engine = Engine::new(fabric.here().config()).unwrap();
    let region = fabric.region(&engine, 4 << 20);
    fill(&region, 4);
    let mut peers: Vec<_> = (0..3)
        .map(|_| {
            let mut peer = Peer::start(&fabric.there());
            let there = peer.region(4 << 20, fabric.memory);
            let counter = peer.open(9, &[]);
            (peer, there, counter)
        })
        .collect();
    for (peer, ..) in &peers {
        engine.connect(&peer.address, Some(LONG)).unwrap();
        wait_for_streams(&engine, &peer.address, fabric);
    }
    // Two targets at each peer; one large enough to be split.
    let mut targets = Vec::new();
    for (idx, (_, there, _)) in peers.iter().enumerate() {
        for (src_offset, dst_offset, nbytes) in [(idx as u64 * 17, 5, 100), (1000, 1 << 20, (2 << 20) + 7)] {
            targets.push(ScatterTarget { remote: there.remote(), src_offset, dst_offset, nbytes });
        }
    }
    for round in 1..=2 {
        engine.scatter(&region, &targets, None, WriteOptions::counted(9)).unwrap().wait(Some(LONG)).unwrap();
        for (idx, (peer, there, counter)) in peers.iter_mut().enumerate() {
            peer.wait_count(*counter, round * 2).unwrap();
            assert_eq!(peer.mismatch(there, (5, 100), 4, idx as u64 * 17), None);
            assert_eq!(peer.mismatch(there, (1 << 20, (2 << 20) + 7), 4, 1000), None);
            assert_eq!(peer.value(*counter), round * 2);
        }
    }
}

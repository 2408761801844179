//! Small operations are not stuck behind large ones.

use std::time::{Duration, Instant};

use anyfabric_engine::{PageList, Remote, ScatterTarget, WriteOptions};

use crate::ask::Memory;
use crate::cabled::Cabled;
use crate::fabric::{new_region, on_fabrics, Fabric};
use crate::harness::{eventually, fill, wait_for_streams, Pair, LONG};

on_fabrics! { [behind_a_large_write, beside_large_pages] [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED, tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4] }
on_fabrics! { [first_large_waits_for_a_stream, large_without_streams] [tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4] }

/// 8 bytes to the same peer while a GiB is on its way: how long they take is reported, that they overtake it is tested.
fn behind_a_large_write(fabric: &Fabric) {
    const LARGE: u64 = 1 << 30;
    let mut pair = Pair::connected(fabric, 4096);
    let source = new_region(&pair.engine, LARGE, Memory::Alias);
    let there = pair.peer.region(LARGE, Memory::Alias);
    let (src, dst) = (source.slice(0..LARGE).unwrap(), there.remote().slice(0..LARGE).unwrap());
    let patient = WriteOptions { timeout: Some(3 * LONG), ..WriteOptions::default() };
    let large = pair.engine.write(&src, &dst, patient).unwrap();
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    let (mut took, mut behind) = (Vec::new(), 0);
    while took.len() < 2000 && (took.len() < 100 || !large.is_done()) {
        let began = Instant::now();
        pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
        took.push(began.elapsed());
        behind += usize::from(!large.is_done());
    }
    large.wait(None).unwrap();
    took.sort_unstable();
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    println!("{}: {behind} of {} writes behind a GiB: p50 {p50:?}, p99 {p99:?}", fabric.name, took.len());
    let (began, ended) = large.interval_ns().unwrap();
    let large = Duration::from_nanos(ended - began);
    assert!(behind > 0 || large < Duration::from_millis(1), "the large write took all the turns");
    // A busy machine slows both.
    assert!(10 * p50 < large, "half of the small writes took more than {p50:?}, the large one {large:?}");
}

/// The first operation of all, before there is a path: streams are made for it, and the control connection is left to
/// what is small. Pages and the parts of a scatter likewise.
fn first_large_waits_for_a_stream(fabric: &Fabric) {
    const LARGE: u64 = 16 << 20;
    const PAGE: u64 = 64 << 10;
    let parts =
        |remote: &Remote| vec![ScatterTarget { remote: remote.clone(), src_offset: 0, dst_offset: 0, nbytes: LARGE }];
    let pages = || PageList::new((0..(LARGE / PAGE) as u32).collect(), PAGE, PAGE, 0);
    for operation in ["write", "write_pages", "scatter"] {
        let mut pair = Pair::new(fabric, LARGE);
        fill(&pair.region, 1);
        let (src, dst) = (pair.region.slice(0..LARGE).unwrap(), pair.remote.slice(0..LARGE).unwrap());
        let large = match operation {
            "write" => pair.engine.write(&src, &dst, WriteOptions::default()),
            "write_pages" => {
                let (src, dst) = ((&pair.region, pages()), (&pair.remote, pages()));
                pair.engine.write_pages(src, dst, WriteOptions::default())
            }
            _ => pair.engine.scatter(&pair.region, &parts(&pair.remote), None, WriteOptions::default()),
        };
        large.unwrap().wait(Some(LONG)).unwrap();
        assert_eq!(pair.peer.mismatch(&pair.there, (0, LARGE), 1, 0), None, "{operation}");
        let stats = pair.engine.stats();
        let nics = &stats.peers[&pair.peer.address.to_string()].nics;
        let over_control = nics["control"].bytes;
        assert_eq!(over_control, 0, "{operation}: {nics:?}");
    }
}

/// No stream can be made any more: what is large goes over the control connection.
fn large_without_streams(fabric: &Fabric) {
    let cabled = Cabled::new(fabric, 1 << 20, |_| {});
    wait_for_streams(&cabled.pair.engine, &cabled.proxy.address, fabric);
    cabled.proxy.refuse(true);
    (1..=fabric.streams.0).for_each(|stream| cabled.proxy.cut(stream));
    let manner = || cabled.pair.engine.path(&cabled.proxy.address).nics;
    eventually("no stream stands", || manner() == ["the control connection only"]);
    for round in 1..3 {
        fill(&cabled.pair.region, round);
        cabled.write(1 << 20, 1).unwrap();
    }
    // Streams come back, and carry what is large again.
    cabled.proxy.refuse(false);
    eventually("a stream stands", || manner() != ["the control connection only"]);
    cabled.write(1 << 20, 1).unwrap();
}

/// A page is cut where small operations come and go, and arrives whole.
fn beside_large_pages(fabric: &Fabric) {
    const PAGE: u64 = 100_000;
    const NUM_PAGES: u32 = 400;
    let mut pair = Pair::connected(fabric, PAGE * u64::from(NUM_PAGES) + 8);
    wait_for_streams(&pair.engine, &pair.peer.address, fabric);
    let counter = pair.peer.open(9, &[]);
    let small = PAGE * u64::from(NUM_PAGES);
    let (small_src, small_dst) = (pair.region.slice(small..small + 8), pair.remote.slice(small..small + 8));
    let (small_src, small_dst) = (small_src.unwrap(), small_dst.unwrap());
    for round in 1..=8 {
        let pages = || PageList::new((0..NUM_PAGES).collect(), PAGE, PAGE, 0);
        fill(&pair.region, round);
        let (src, dst) = ((&pair.region, pages()), (&pair.remote, pages()));
        let large = pair.engine.write_pages(src, dst, WriteOptions::counted(9)).unwrap();
        while !large.is_done() {
            pair.engine.write(&small_src, &small_dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
            // Long enough for turns to be long again.
            std::thread::sleep(Duration::from_millis(5));
        }
        large.wait(Some(LONG)).unwrap();
        pair.peer.wait_count(counter, round * u64::from(NUM_PAGES)).unwrap();
        assert_eq!(pair.peer.mismatch(&pair.there, (0, small), round, 0), None, "round {round}");
    }
}

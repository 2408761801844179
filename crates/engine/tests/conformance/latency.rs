//! Small operations are not stuck behind large ones.

use std::time::{Duration, Instant};

use anyfabric_engine::WriteOptions;

use crate::ask::Memory;
use crate::fabric::{new_region, on_fabrics, Fabric};
use crate::harness::{Pair, LONG};

on_fabrics! { [behind_a_large_write] [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED, tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4] }

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

//! Semantic 10: zero length, one byte, unaligned, 4 GiB and more; and a checksum end to end.

use anyfabric_engine::{PageList, WriteOptions};

use crate::alias;
use crate::ask::{How, Memory};
use crate::fabric::{new_region, on_every_fabric, on_fabrics, random, Fabric};
use crate::harness::{bytes, fill, Pair, LONG};
use crate::pattern;

on_every_fabric!(any_length_and_place, nothing_at_all, strided_pages, verified);
on_fabrics! { [more_than_four_gib] [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED, tcp_2 TCP_2, libfabric_1_4 LIBFABRIC_1_4] }

fn any_length_and_place(fabric: &Fabric) {
    const BYTES: u64 = 3 << 20;
    let mut random = random();
    let mut pair = Pair::connected(fabric, BYTES);
    fill(&pair.region, 1);
    let edges = [1, 2, 3, 7, 8, 63, 64, 65, 4095, 4096, 4097, (16 << 10) + 1, (128 << 10) - 1, (128 << 10) + 1];
    // All edges, and as many again as a fabric has time for: Soft-RoCE is emulated.
    let num_rounds = if fabric.transport == "verbs" { 2 * edges.len() } else { 80 };
    for round in 0..num_rounds {
        let nbytes = if round < edges.len() { edges[round] } else { 1 + random.below(BYTES / 2) };
        let (at, to) = (random.below(BYTES - nbytes + 1), random.below(BYTES - nbytes + 1));
        // A sentinel on both sides of the target: not one byte too many.
        pair.peer.fill(&pair.there, (0, BYTES), 2);
        let (src, dst) = (pair.region.slice(at..at + nbytes).unwrap(), pair.remote.slice(to..to + nbytes).unwrap());
        pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
        let what = format!("{nbytes} bytes from {at} to {to}");
        assert_eq!(pair.peer.mismatch(&pair.there, (to, nbytes), 1, at), None, "{what}");
        assert_eq!(pair.peer.mismatch(&pair.there, (0, to), 2, 0), None, "before {what}");
        let after = to + nbytes;
        assert_eq!(pair.peer.mismatch(&pair.there, (after, BYTES - after), 2, after), None, "after {what}");
    }
}

fn nothing_at_all(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let counter = pair.peer.open(1, &[]);
    // At the very end of both regions, and in empty regions.
    let (src, dst) = (pair.region.slice(4096..4096).unwrap(), pair.remote.slice(4096..4096).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    let empty = fabric.region(&pair.engine, 0);
    let there = pair.peer.region(0, fabric.memory);
    let dst = there.remote().slice(0..0).unwrap();
    pair.engine.write(&empty.slice(0..0).unwrap(), &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 2).unwrap();
    // No page counts nothing; pages of no bytes count.
    let list = |indices: Vec<u32>| PageList::new(indices.into(), 0, 16, 0);
    let none =
        pair.engine.write_pages((&pair.region, list(vec![])), (&pair.remote, list(vec![])), WriteOptions::counted(1));
    none.unwrap().wait(Some(LONG)).unwrap();
    let three = (&pair.region, list(vec![1, 2, 2]));
    let pages = pair.engine.write_pages(three, (&pair.remote, list(vec![0, 5, 3])), WriteOptions::counted(1));
    pages.unwrap().wait(Some(LONG)).unwrap();
    pair.engine.scatter(&pair.region, &[], None, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 5).unwrap();
    assert_eq!(pair.peer.value(counter), 5);
    assert_eq!(pair.peer.read(&pair.there, 0, 4096), vec![0; 4096]);
}

/// Rows of one matrix into the columns of another: page, stride and offset differ between the sides, and what lies
/// between the pages stays as it was.
fn strided_pages(fabric: &Fabric) {
    const BYTES: u64 = 1 << 20;
    let mut pair = Pair::connected(fabric, BYTES);
    fill(&pair.region, 1);
    // Page, stride and offset here, stride and offset there, number of pages.
    let shapes = [(1000, 3001, 17, 1000, 5, 300), (1000, 1000, 0, 2999, 1, 340), (4096, 9000, 3, 4097, 4095, 100)];
    for (page, src_stride, src_at, dst_stride, dst_at, num_pages) in shapes {
        pair.peer.fill(&pair.there, (0, BYTES), 2);
        let src: Vec<u32> = (0..num_pages).collect();
        let dst: Vec<u32> = (0..num_pages).rev().collect();
        let pages = |list: &[u32], stride, offset| PageList::new(list.into(), page, stride, offset);
        let (here, there) =
            ((&pair.region, pages(&src, src_stride, src_at)), (&pair.remote, pages(&dst, dst_stride, dst_at)));
        pair.engine.write_pages(here, there, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
        let place = |idx: u32, stride: u64, at: u64| at + u64::from(idx) * stride;
        let moved =
            src.iter().zip(&dst).map(|(&from, &to)| (place(to, dst_stride, dst_at), place(from, src_stride, src_at)));
        assert_eq!(pair.peer.page_mismatch(&pair.there, moved.collect(), page, 1), None, "pages of {page}");
        let gap = dst_stride - page;
        let gaps = dst.iter().map(|&to| place(to, dst_stride, dst_at) + page).map(|at| (at, at));
        assert_eq!(pair.peer.page_mismatch(&pair.there, gaps.collect(), gap, 2), None, "between pages of {page}");
        assert_eq!(pair.peer.mismatch(&pair.there, (0, dst_at), 2, 0), None, "before pages of {page}");
    }
}

fn verified(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4 << 20);
    pair.peer.fill(&pair.there, (0, 4 << 20), 5);
    let counter = pair.engine.counter(Some(3), &[]).unwrap();
    for (idx, nbytes) in [0, 1, 5000, 100_000, 4 << 20].into_iter().enumerate() {
        let how = How { imm: Some(3), verify: true, ..How::default() };
        let transfer = pair.peer.write(&pair.there, (0, nbytes), &pair.region, 0, how).unwrap();
        pair.peer.wait(transfer).unwrap();
        counter.wait(idx as u64 + 1, Some(LONG)).unwrap();
        assert_eq!(pattern::mismatch(&pair.bytes()[..nbytes as usize], 5, 0), None, "{nbytes} bytes");
    }
    let how = How { imm: Some(3), verify: true, ..How::default() };
    let pages: Vec<u32> = (0..500).rev().collect();
    pair.bytes().fill(0);
    let transfer = pair.peer.write_pages(&pair.there, pages.clone(), (&pair.region, pages), 4000, how).unwrap();
    pair.peer.wait(transfer).unwrap();
    counter.wait(505, Some(LONG)).unwrap();
    assert_eq!(pattern::mismatch(&pair.bytes()[..2_000_000], 5, 0), None);
}

fn more_than_four_gib(fabric: &Fabric) {
    const BYTES: u64 = (4 << 30) + (64 << 10) + 1;
    let is_mapped = fabric.memory == Memory::Allocated;
    if is_mapped && available_kib() < (8 << 20) {
        println!("skipped: {} KiB of memory, 8 GiB are needed", available_kib());
        return;
    }
    let mut pair = Pair::connected(fabric, 64);
    let source = new_region(&pair.engine, BYTES, Memory::Alias);
    pattern::fill(&mut bytes(&source)[..alias::PERIOD as usize], 3, 0);
    let there = pair.peer.region(BYTES, if is_mapped { Memory::Allocated } else { Memory::Alias });
    let counter = pair.peer.open(1, &[]);
    let (src, dst) = (source.slice(0..BYTES).unwrap(), there.remote().slice(0..BYTES).unwrap());
    // The pages are new to this process and to the machine: on a busy one that takes long.
    let options = WriteOptions { imm: Some(1), timeout: Some(3 * LONG), ..WriteOptions::default() };
    pair.engine.write(&src, &dst, options).unwrap().wait(None).unwrap();
    pair.peer.wait_count(counter, 1).unwrap();
    for start in [0, 1 << 31, (4 << 30) - 100_000, BYTES - 100_000] {
        let base = start % alias::PERIOD;
        let nbytes = 100_000.min(alias::PERIOD - base);
        assert_eq!(pair.peer.mismatch(&there, (start, nbytes), 3, base), None, "at {start}");
    }
    assert_eq!(pair.peer.value(counter), 1);
}

fn available_kib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

//! What only NICs with links show: very many pages over two of them, and a link that goes down and up again and again.
//!
//! `ANYFABRIC_TEST_LINK` names what `ip link set ... down` takes down, without it nothing is; `ANYFABRIC_TEST_FLAPS`
//! says how often (10), `ANYFABRIC_TEST_PAGES` how many pages (100 000).

use std::process::Command;
use std::time::Duration;

use anyfabric_engine::{PageList, WriteOptions};

use crate::fabric::{on_fabrics, random, Fabric};
use crate::harness::{eventually, fill, slot_imm, went_well, Pair, LONG};

on_fabrics! { [many_pages, flaps] [verbs_2 VERBS_2] }

/// Every page lies where it belongs, and every count is exact.
fn many_pages(fabric: &Fabric) {
    const PAGES_PER_CALL: u32 = 10_000;
    const PAGE_BYTES: u64 = 16;
    let num_calls = number("ANYFABRIC_TEST_PAGES", 100_000).div_ceil(PAGES_PER_CALL);
    let num_pages = num_calls * PAGES_PER_CALL;
    let mut pair = Pair::connected(fabric, u64::from(num_pages) * PAGE_BYTES);
    fill(&pair.region, 5);
    let (src, dst) = (shuffled(num_pages), shuffled(num_pages));
    let list = |indices: &[u32]| PageList::new(indices.into(), PAGE_BYTES, PAGE_BYTES, 0);
    let counters: Vec<usize> = (0..num_calls).map(|call| pair.peer.open(100 + call, &[])).collect();
    let calls = src.chunks(PAGES_PER_CALL as usize).zip(dst.chunks(PAGES_PER_CALL as usize));
    let transfers: Vec<_> = calls
        .zip(100..)
        .map(|((from, to), imm)| {
            let options = WriteOptions { timeout: Some(Duration::from_secs(150)), ..WriteOptions::counted(imm) };
            pair.engine.write_pages((&pair.region, list(from)), (&pair.remote, list(to)), options).unwrap()
        })
        .collect();
    for transfer in transfers {
        transfer.wait(None).unwrap();
    }
    for counter in counters {
        pair.peer.wait_count(counter, u64::from(PAGES_PER_CALL)).unwrap();
        assert_eq!(pair.peer.value(counter), u64::from(PAGES_PER_CALL));
    }
    let at = |page: u32| u64::from(page) * PAGE_BYTES;
    let pages = dst.iter().zip(&src).map(|(to, from)| (at(*to), at(*from))).collect();
    assert_eq!(pair.peer.page_mismatch(&pair.there, pages, PAGE_BYTES, 5), None);
}

/// What was reported done is there and was counted, once; what failed was counted whole or fails its counter.
fn flaps(fabric: &Fabric) {
    const WRITES_PER_FLAP: u64 = 16;
    const SLOT: u64 = 16 << 10;
    let Ok(link) = std::env::var("ANYFABRIC_TEST_LINK") else {
        println!("skipped: ANYFABRIC_TEST_LINK names no link");
        return;
    };
    let num_flaps = u64::from(number("ANYFABRIC_TEST_FLAPS", 10));
    let num_slots = num_flaps * WRITES_PER_FLAP;
    let mut pair = Pair::connected(fabric, num_slots * SLOT);
    fill(&pair.region, 6);
    let write = |pair: &Pair, slot: u64, imm: u32| {
        let range = slot * SLOT..(slot + 1) * SLOT;
        let (src, dst) = (pair.region.slice(range.clone()).unwrap(), pair.remote.slice(range).unwrap());
        pair.engine.write(&src, &dst, WriteOptions::counted(imm)).unwrap()
    };
    let mut done = Vec::new();
    for flap in 0..num_flaps {
        let slots = flap * WRITES_PER_FLAP..(flap + 1) * WRITES_PER_FLAP;
        let transfers: Vec<_> = slots
            .map(|slot| {
                if slot % WRITES_PER_FLAP == WRITES_PER_FLAP / 2 {
                    set_link(&link, "down");
                }
                (slot, write(&pair, slot, slot_imm(slot)))
            })
            .collect();
        // From hardly at all to long enough to exhaust every retry.
        std::thread::sleep(Duration::from_secs(1) * flap as u32 / num_flaps as u32);
        set_link(&link, "up");
        done.extend(went_well(transfers));
        eventually("later writes go well", || write(&pair, 0, 1).wait(Some(LONG)).is_ok());
    }
    println!("{} of {num_slots} writes went well", done.len());
    // One link of two: what is not on it goes well.
    assert!(done.len() as u64 > num_slots / 2, "{} of {num_slots}", done.len());
    pair.check_slots((num_slots, SLOT), 6, &done);
    eventually("the path is whole again", || pair.engine.path(&pair.peer.address).state == "ready");
}

/// What a variable of the environment says.
pub(crate) fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

pub(crate) fn set_link(name: &str, state: &str) {
    let set = Command::new("ip").args(["link", "set", name, state]).status().unwrap();
    assert!(set.success(), "ip link set {name} {state}");
}

/// Every number below `n`, once, in an order that the run's seed decides.
fn shuffled(n: u32) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..n).collect();
    random().shuffle(&mut numbers);
    numbers
}

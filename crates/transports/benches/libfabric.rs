//! Our own cost of a page on libfabric: everything from `Nic::post` to `Completions`, against a fake library whose writes
//! only fill a descriptor of 64 bytes, and the same calls of that library made from C.
//!
//! `cargo bench -p anyfabric-transports --bench libfabric`

// What the tests share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

#[path = "../tests/libfabric/fake.rs"]
mod fake;
#[path = "../tests/libfabric/support.rs"]
mod support;

use std::hint::black_box;
use std::time::Instant;

use anyfabric_plan::Extent;
use anyfabric_transports::libfabric::FabricDomain;
use anyfabric_transports::rdma::{Batch, Completions, Domain, Fault, Marks, Nic};

use fake::Copy;
use support::{Ended, Region};

fn main() {
    let Some(mut copy) = Copy::new(|fake| fake.null = 1) else { return };
    let mut pair = copy.pair();
    let (from, to) = (Region::new(&pair.here, 1 << 20, 7), Region::new(&pair.there, 1 << 20, 0));
    let target = FabricDomain::remote(&to.memory);
    // Random pages, so that neither side profits from their order.
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % 1024 * 1024
    };
    let writes: Vec<Extent> = (0..32).map(|_| Extent { src: next(), dst: next(), nbytes: 1024 }).collect();
    let mut ours = || {
        let (mut ended, began) = (Ended::default(), Instant::now());
        for batch_idx in 0..PAGES / 32 {
            let batch =
                Batch { source: &from.memory, target, writes: black_box(&writes), marks: Marks::Each(1), token: 1 };
            assert_eq!(pair.here.post(pair.rail, &batch), Ok(32));
            while u64::from(ended.0) <= batch_idx {
                pair.here.poll(&mut ended);
            }
        }
        began.elapsed().as_secs_f64() * 1e9 / PAGES as f64
    };
    let theirs = || {
        let began = Instant::now();
        copy.baseline(PAGES);
        began.elapsed().as_secs_f64() * 1e9 / PAGES as f64
    };
    let mut rounds: Vec<(f64, f64)> = (0..ROUNDS).map(|_| (ours(), theirs())).collect();
    rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (with, without) = rounds[ROUNDS / 2];
    println!("libfabric, null NIC, batches of 32: {with:.1} ns a page, of which {without:.1} ns in the fake library");
    println!("ours: {:.1} ns a page (median of {ROUNDS} rounds of {PAGES} pages)", with - without);
}

const PAGES: u64 = 1 << 20;
const ROUNDS: usize = 11;

//! Bytes that know where they belong: a copy to the wrong place, from the wrong place or of the wrong length shows.

use std::cell::RefCell;
use std::collections::HashMap;

use anyfabric_transports::loopback::Random;

/// Not a multiple of any page, frame, chunk or cache line.
const PERIOD: usize = 65_521;

thread_local! {
    static BLOCKS: RefCell<HashMap<u64, Vec<u8>>> = RefCell::default();
}

fn with_block<T>(seed: u64, use_block: impl FnOnce(&[u8]) -> T) -> T {
    BLOCKS.with_borrow_mut(|blocks| use_block(blocks.entry(seed).or_insert_with(|| Random::new(seed).bytes(PERIOD))))
}

/// Fills `bytes` as the part of the seed's pattern that begins at `base`.
pub(crate) fn fill(bytes: &mut [u8], seed: u64, base: u64) {
    with_block(seed, |block| {
        let mut at = (base % PERIOD as u64) as usize;
        let mut rest = bytes;
        while !rest.is_empty() {
            let nbytes = rest.len().min(PERIOD - at);
            let (head, tail) = rest.split_at_mut(nbytes);
            head.copy_from_slice(&block[at..at + nbytes]);
            (rest, at) = (tail, 0);
        }
    });
}

/// The first byte that is not as `fill` left it.
pub(crate) fn mismatch(bytes: &[u8], seed: u64, base: u64) -> Option<u64> {
    with_block(seed, |block| {
        let (mut at, mut done) = ((base % PERIOD as u64) as usize, 0);
        while done < bytes.len() {
            let nbytes = (bytes.len() - done).min(PERIOD - at);
            let (have, want) = (&bytes[done..done + nbytes], &block[at..at + nbytes]);
            if have != want {
                let first = have.iter().zip(want).position(|(have, want)| have != want).unwrap_or(0);
                return Some((done + first) as u64);
            }
            (done, at) = (done + nbytes, 0);
        }
        None
    })
}

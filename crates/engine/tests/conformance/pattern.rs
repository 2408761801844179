//! Bytes that know where they belong: a copy to the wrong place, from the wrong place or of the wrong length shows.

use std::cell::RefCell;
use std::collections::HashMap;

/// Not a multiple of any page, frame, chunk or cache line.
const PERIOD: usize = 65_521;

thread_local! {
    static BLOCKS: RefCell<HashMap<u64, Vec<u8>>> = RefCell::default();
}

/// Random numbers from a seed (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn bytes(&mut self, nbytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; nbytes];
        // By words: the emulated machine that runs this, not optimised, has every process make a block.
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]);
        }
        bytes
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for idx in (1..list.len()).rev() {
            list.swap(idx, self.below(idx as u64 + 1) as usize);
        }
    }
}

fn with_block<T>(seed: u64, use_block: impl FnOnce(&[u8]) -> T) -> T {
    BLOCKS.with_borrow_mut(|blocks| use_block(blocks.entry(seed).or_insert_with(|| Random(seed).bytes(PERIOD))))
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

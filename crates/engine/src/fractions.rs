//! Quarters of counts: what has come of split writes.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use anyfabric_transports::PeerIdx;
use anyfabric_wire::Imm;

/// Quarters that do not make a whole yet, by imm and peer.
#[derive(Default)]
pub(crate) struct Fractions(HashMap<u32, Vec<(PeerIdx, u8)>, BuildHasherDefault<ImmHasher>>);

impl Fractions {
    /// What of `quarters` and those kept makes whole counts; keeps the rest.
    #[inline]
    pub(crate) fn whole(&mut self, peer: PeerIdx, imm: Imm, quarters: u64) -> u64 {
        if quarters.is_multiple_of(4) {
            return quarters;
        }
        let kept = self.0.entry(imm.value()).or_default();
        let idx = kept.iter().position(|(other, _)| *other == peer).unwrap_or_else(|| {
            kept.push((peer, 0));
            kept.len() - 1
        });
        let total = u64::from(kept[idx].1) + quarters;
        kept[idx].1 = (total % 4) as u8;
        total - total % 4
    }

    /// Nobody counts that imm any more.
    pub(crate) fn forget(&mut self, imm: Imm) {
        self.0.remove(&imm.value());
    }
}

/// Immediates are small numbers that users choose; multiplying spreads them.
#[derive(Default)]
pub(crate) struct ImmHasher(u64);

impl Hasher for ImmHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(byte.into());
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0 ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

//! Quarters of counts: what has come of split writes.

use anyfabric_transports::PeerIdx;
use anyfabric_wire::Imm;
use rustc_hash::FxHashMap;

/// Quarters that do not make a whole yet, by imm and peer.
#[derive(Default)]
pub(crate) struct Fractions(FxHashMap<u32, Vec<(PeerIdx, u8)>>);

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

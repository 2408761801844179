//! Which counted writes may be split over NICs.
//!
//! A receiver that is told quarters, and not of which write, may add up the
//! quarters of two writes that are both halfway, and count one although neither
//! is whole; for good, when both failed there. So at most one split write of an imm is under way to a peer, and
//! after one has failed none of that imm is split any more: the others go whole,
//! over one NIC. The receiver keeps the quarters of different peers apart.

use std::collections::{HashMap, HashSet};

use anyfabric_wire::Imm;

/// The imms of split writes of one link.
#[derive(Debug, Default)]
pub(crate) struct Splits {
    /// Operation that is split, by imm.
    under_way: HashMap<Imm, u64>,
    /// A part of such a write is lost; the receiver may keep the rest.
    spoiled: HashSet<Imm>,
}

impl Splits {
    /// Whether an operation may be split now.
    pub(crate) fn allow(&self, imm: Imm) -> bool {
        !(self.under_way.contains_key(&imm) || self.spoiled.contains(&imm) || self.spoiled.len() >= MAX_SPOILED)
    }

    /// Whether operation `op` may be split; then [`Splits::end`] must follow.
    pub(crate) fn begin(&mut self, imm: Imm, op: u64) -> bool {
        let may = self.allow(imm);
        if may {
            self.under_way.insert(imm, op);
        }
        may
    }

    /// Operation `op` has ended, in whole or not.
    pub(crate) fn end(&mut self, imm: Imm, op: u64, whole: bool) {
        if self.under_way.get(&imm) == Some(&op) {
            self.under_way.remove(&imm);
            if !whole {
                self.spoiled.insert(imm);
            }
        }
    }
}

/// Beyond this many imms with a lost part no counted write is split.
const MAX_SPOILED: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_split_write_of_an_imm_at_a_time_and_none_after_a_loss() {
        let (mut splits, imm, other) = (Splits::default(), Imm::new(7).unwrap(), Imm::new(8).unwrap());
        assert!(splits.begin(imm, 1));
        assert!(!splits.begin(imm, 2));
        assert!(splits.begin(other, 3));
        splits.end(imm, 2, false);
        assert!(!splits.begin(imm, 4), "operation 2 was never split");
        splits.end(imm, 1, true);
        assert!(splits.begin(imm, 5));
        splits.end(imm, 5, false);
        assert!(!splits.begin(imm, 6));
    }
}

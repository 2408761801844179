//! Writes that come over several streams, until every part has come.
//!
//! Of one that has lost a part with a stream the rest never comes, and nobody says which one that is. So the oldest is
//! forgotten when there are too many. Should it go on after all, for one of its streams is that far behind the others, it
//! is refused: who sent it hears that it failed, and nobody waits for a count that never comes.

use std::collections::BTreeMap;

use anyfabric_wire::Refusal;

use crate::mutant::Mutant;

/// Writes of which some parts have come and others have not, by the number of the operation.
#[derive(Debug, Default)]
pub(super) struct Joins {
    begun: BTreeMap<u64, Join>,
    /// Before this one some were forgotten.
    known_from: u64,
}

#[derive(Debug, Default)]
struct Join {
    arrived: u16,
    refused: bool,
}

impl Joins {
    /// A part has come, and was placed or refused: true when all of the write is placed.
    ///
    /// # Errors
    /// This part was refused, or is of a write that was forgotten.
    pub(super) fn part_ended(&mut self, op: u64, num_parts: u16, result: Result<(), Refusal>) -> Result<bool, Refusal> {
        if !self.begun.contains_key(&op) {
            if op < self.known_from {
                return Err(result.err().unwrap_or(Refusal::Full));
            }
            if self.begun.len() >= MAX_BEGUN {
                let oldest = self.begun.pop_first();
                self.known_from = oldest.map_or(0, |(op, _)| op.saturating_add(1));
            }
        }
        let join = self.begun.entry(op).or_default();
        join.arrived += 1;
        join.refused |= result.is_err();
        let refused = join.refused;
        if join.arrived < num_parts && !Mutant::DropQuarter.is_on() {
            return result.map(|()| false);
        }
        self.begun.remove(&op);
        result.map(|()| !refused)
    }
}

/// Far more than one stream is ahead of another, each with a part of a quarter of a megabyte there.
const MAX_BEGUN: usize = 1 << 16;

//! What was on rails that no library would stop.
//!
//! A NIC that refuses to end a rail may carry out what was posted on it for as long as it is open, or the registrations
//! live. So that has failed and never quiesces: what it comes from and goes to stays as it is. It belongs to no rail any
//! more, for the next in its place has nothing to do with it.

use super::book::{Book, Of};
use super::legs::leg_of;
use crate::Failure;

impl Book {
    /// A rail was closed and not stopped: its batches fail for `why`, and never end.
    #[cold]
    pub(super) fn keep_batches(&mut self, path_idx: u32, rail_no: usize, why: &str) {
        let failure = Failure::ConnectionBroken(why.to_owned());
        for token in self.batches_on(path_idx, rail_no) {
            if let Some(leg) = leg_of(token) {
                self.keep_leg(leg, &failure);
                continue;
            }
            match self.batches.get_mut(token).map(|batch| &mut batch.of) {
                Some(Of::Lone(lone)) => {
                    lone.rail = NO_RAIL;
                    lone.stub.note_loss();
                    lone.stub.fail(failure.clone());
                }
                Some(Of::Part(part)) => {
                    // All that is under way of it is on this rail.
                    let Some(part) = self.parts.get_mut(*part) else { continue };
                    part.rail = NO_RAIL;
                    let flight = part.flight;
                    self.flights.get(flight).into_iter().for_each(|flight| flight.op.note_loss());
                    self.fail_flight(flight, |_| failure.clone());
                }
                None => {}
            }
        }
        if let Some(path) = self.paths.get_mut(path_idx) {
            path.is_stuck = true;
            let rail = &mut path.rails[rail_no];
            (rail.under_way, rail.bulk_bytes) = (0, 0);
        }
    }
}

/// In the place of a rail's number.
pub(super) const NO_RAIL: usize = u32::MAX as usize;

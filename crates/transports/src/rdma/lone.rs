//! The short way of an operation that is one write, or none: no shards, no queue.
//!
//! Most operations are small, and what is general about cutting and queueing
//! costs more than posting them. So one that fits a single work request, on a
//! rail where nothing waits, is posted at once, and its batch is the whole
//! flight. Whatever does not fit that goes the general way (`super::post`).

use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::{Extent, Extents};
use anyfabric_wire::WireImm;

use super::book::{failure_of, Batched, Book, Flight, Of, Path, Stage};
use super::nic::{Batch, Fault, Marks, Nic, RemoteMemory};
use super::post::SMALL_BYTES;
use super::registrations::Registrations;
use crate::{Op, Payload, Target};

impl Book {
    /// Posts an operation at once, if it can be; given back otherwise.
    #[inline]
    pub(super) fn post_alone<N: Nic>(
        &mut self,
        nics: &mut [N],
        registrations: &[Arc<Registrations<N::Domain>>],
        path_idx: u32,
        op: Op,
    ) -> Option<Op> {
        let write = match &op.payload {
            Payload::Write { extents: Extents::One(extent), .. } if extent.nbytes <= SMALL_BYTES => Some(*extent),
            Payload::Signal => None,
            _ => return Some(op),
        };
        let Some(path) = self.paths.get_mut(path_idx) else { return Some(op) };
        let Some(rail_no) = path.next_free() else { return Some(op) };
        let rail = &path.rails[rail_no];
        let (nic_no, theirs) = (rail.nic, rail.theirs);
        let (Some(idx), nic) = (rail.idx, &mut nics[nic_no]) else { return Some(op) };
        let nbytes = write.map_or(0, |write| write.nbytes);
        if nic.room(idx) == 0 || nbytes > nic.about().max_write_bytes {
            return Some(op);
        }
        let imm = op.imm.map(|(imm, _)| WireImm { imm, quarters: 4 }.encode());
        let began_ns = op.ticket.submitted_ns();
        let flight =
            Flight { op, parts_left: 1, failure: None, is_split: false, began_ns, alone: Some((path_idx, rail_no)) };
        let flight_idx = self.flights.insert(flight);
        let token = self.batches.insert(Batched { of: Of::Flight(flight_idx), nbytes });
        let is_posted = match (write, self.flights.get(flight_idx).map(|flight| &flight.op.payload)) {
            (Some(write), Some(Payload::Write { source, binding, .. })) => {
                match (registrations[nic_no].of(source), binding.target()) {
                    (Ok(source), Some(Target::Nics(keys))) => {
                        let target = keys.get(theirs).copied().unwrap_or(RemoteMemory { base: 0, key: 0 });
                        let marks = imm.map_or(Marks::None, Marks::Each);
                        let writes = std::slice::from_ref::<Extent>(&write);
                        nic.post(idx, &Batch { source, target, writes, marks, token }) == Ok(1)
                    }
                    _ => false,
                }
            }
            _ => nic.signal(idx, imm.unwrap_or(0), token) == Ok(true),
        };
        if !is_posted {
            self.batches.remove(token);
            return self.flights.remove(flight_idx).map(|flight| flight.op);
        }
        // What could not be handed over ends with a fault, as the next poll says.
        let _ = nic.flush(idx);
        path.rota.took(rail_no);
        path.rails[rail_no].under_way += 1;
        path.stats.nic(rail_no).sent_alone(nbytes);
        None
    }

    /// The batch that was the whole of a flight has ended.
    #[inline]
    pub(super) fn flight_ended(&mut self, flight_idx: u32, result: Result<(), Fault>, now_ns: u64) {
        let Some(Flight { op, failure, began_ns, alone, .. }) = self.flights.remove(flight_idx) else { return };
        let Some((path_idx, rail_no)) = alone else { return };
        let failure = failure.or_else(|| result.err().map(|fault| failure_of(&op, fault)));
        if let Some(path) = self.paths.get_mut(path_idx) {
            let has_more = path.rails.get_mut(rail_no).is_some_and(|rail| {
                rail.under_way -= 1;
                rail.has_more()
            });
            let nic = path.stats.nic(rail_no);
            nic.latency.record_alone(now_ns.saturating_sub(began_ns));
            if failure.is_some() {
                // ORDERING: statistics.
                nic.errors.fetch_add(1, Ordering::Relaxed);
            }
            if has_more {
                self.set_dirty(path_idx, rail_no);
            }
        }
        op.end(failure.map_or(Ok(()), Err));
    }
}

impl Path {
    /// The rail whose turn it is, if nothing waits on it.
    #[inline]
    fn next_free(&self) -> Option<usize> {
        let rail_no = self.rota.next(|rail_no| self.rails[rail_no].stage == Stage::Up)?;
        let rail = &self.rails[rail_no];
        (!rail.is_dirty && rail.small.is_empty()).then_some(rail_no)
    }
}

//! The short way of an operation that is one write, or none: no shards, no queue.
//!
//! Most operations are small, and what is general about cutting and queueing
//! costs more than posting them. So one that fits a single work request, on a
//! rail where nothing waits, is posted at once, and its batch is all of it.
//! Whatever does not fit that goes the general way (`super::post`).

use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::{Extent, Extents};
use anyfabric_wire::{Imm, WireImm};

use super::book::{failure_of, Batched, Book, Of, Path, Stage};
use super::nic::{Domain, Fault, Nic, One, RemoteMemory};
use super::post::SMALL_BYTES;
use super::registrations::Registrations;
use crate::{Op, Payload, Stub, Target};

/// What is kept of an operation that one work request carries.
pub(super) struct Lone {
    pub(super) stub: Stub,
    /// What carries it.
    pub(super) path: u32,
    pub(super) rail: usize,
}

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
        let at = (path_idx, self.batches.next());
        let source = |nic_no: usize, region| registrations[nic_no].of(region).ok();
        let posted = match &op.payload {
            Payload::Write { source: region, binding, extents: Extents::One(extent) } => match binding.target() {
                Some(Target::Nics { keys, .. }) => {
                    let write = Some((&keys[..], extent));
                    self.post_once(nics, |nic_no| source(nic_no, region), at, write, op.imm.map(|(imm, _)| imm))
                }
                _ => None,
            },
            Payload::Signal => self.post_once(nics, |_| None, at, None, op.imm.map(|(imm, _)| imm)),
            _ => None,
        };
        let Some((rail, nbytes)) = posted else { return Some(op) };
        let stub = op.into();
        self.batches.insert(Batched { of: Of::Lone(Lone { stub, path: path_idx, rail }), nbytes });
        None
    }

    /// Posts a write, or an immediate alone: over which rail, and how many bytes.
    #[inline]
    pub(super) fn post_once<'m, N: Nic>(
        &mut self,
        nics: &mut [N],
        source: impl FnOnce(usize) -> Option<&'m <N::Domain as Domain>::Memory>,
        (path_idx, token): (u32, u32),
        write: Option<(&[RemoteMemory], &Extent)>,
        imm: Option<Imm>,
    ) -> Option<(usize, u64)> {
        let nbytes = write.map_or(0, |(_, extent)| extent.nbytes);
        let Path { rails, rota, .. } = self.paths.get_mut(path_idx)?;
        let rail_no = rota.next(|rail_no| rails[rail_no].stage == Stage::Up)?;
        let rail = rails.get_mut(rail_no).filter(|rail| rail.is_free())?;
        let (nic_no, idx) = (rail.nic, rail.idx?);
        let nic = &mut nics[nic_no];
        if nbytes > SMALL_BYTES.min(nic.about().max_write_bytes) {
            return None;
        }
        let imm = imm.map(|imm| WireImm { imm, quarters: 4 }.encode());
        let is_posted = match write {
            Some((keys, write)) => {
                let target = keys.get(rail.theirs).copied().unwrap_or(RemoteMemory { base: 0, key: 0 });
                nic.post_one(idx, &One { source: source(nic_no)?, target, write, imm, token })
            }
            None => nic.signal(idx, imm.unwrap_or(0), token),
        };
        if is_posted != Ok(true) {
            return None;
        }
        rail.under_way += 1;
        rota.took(rail_no);
        Some((rail_no, nbytes))
    }

    /// The batch that was all of an operation has ended.
    #[inline]
    pub(super) fn lone_ended(&mut self, lone: Lone, nbytes: u64, result: Result<(), Fault>, now_ns: u64) {
        let Lone { stub, path: path_idx, rail: rail_no } = lone;
        let result = result.map_err(|fault| failure_of(fault, self.cause(path_idx, rail_no, fault), || stub.refusal()));
        if let Some(path) = self.paths.get_mut(path_idx) {
            let has_more = path.rails.get_mut(rail_no).is_some_and(|rail| {
                rail.under_way -= 1;
                rail.has_more()
            });
            let nic = path.stats.nic(rail_no);
            nic.sent_alone(nbytes);
            nic.latency.record_alone(now_ns.saturating_sub(stub.submitted_ns()));
            if result.is_err() || stub.has_failed() {
                // ORDERING: statistics.
                nic.errors.fetch_add(1, Ordering::Relaxed);
            }
            if has_more {
                self.set_dirty(path_idx, rail_no);
            }
        }
        stub.end(result);
    }
}

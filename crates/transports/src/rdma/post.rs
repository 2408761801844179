//! From operations to batches: shards, queues and windows.

use std::sync::Arc;

use anyfabric_plan::{num_shards, shard_bytes, shard_pages, Extent, Extents, Shard, Shards};
use anyfabric_wire::WireImm;

use super::book::{Batched, Book, Flight, Of, Part, Path, Stage};
use super::cut::{Cursor, Limits, Next};
use super::messages::frame;
use super::nic::{Batch, Marks, Nic, RemoteMemory};
use super::registrations::Registrations;
use crate::mutant::Mutant;
use crate::{Failure, Op, Payload, Target};

impl Book {
    /// Takes an operation: cuts it up and queues its parts. Kept waiting while no
    /// rail stands.
    #[inline]
    pub(super) fn start(&mut self, path_idx: u32, op: Op, now_ns: u64) {
        let Some(path) = self.paths.get_mut(path_idx) else {
            return op.end(Err(Failure::PeerLost("it was given up".into())));
        };
        let nbytes = op.nbytes();
        let is_bulk = nbytes > SMALL_BYTES;
        let (shards, is_split) = path.shards(&op, nbytes, is_bulk);
        if shards.is_empty() {
            return path.waiting.push_back(op);
        }
        let is_message = matches!(&op.payload, Payload::Message(_));
        let imm = op.imm.map(|(imm, _)| imm);
        let unit = match &op.payload {
            Payload::Write { extents: Extents::Pages { lists, .. }, .. } => lists.src.page_bytes(),
            _ => 1,
        };
        let flight = Flight { op, parts_left: shards.len() as u32, failure: None, is_split, began_ns: now_ns };
        let flight = self.flights.insert(flight);
        for (idx, Shard { nic_idx: rail_no, start, len, quarters }) in shards.iter().copied().enumerate() {
            let mut imm = imm.map(|imm| WireImm { imm, quarters });
            if Mutant::DropQuarter.is_on() && is_split && idx == 0 {
                imm = imm.filter(|imm| imm.quarters > 1).map(|imm| WireImm { quarters: imm.quarters - 1, ..imm });
            }
            let part = Part {
                flight,
                path: path_idx,
                rail: rail_no,
                cursor: Cursor::new(start, len),
                imm: imm.map(WireImm::encode),
                is_bulk,
                is_message,
                under_way: 0,
                is_parked: false,
                awaits_answer: false,
            };
            let part = self.parts.insert(part);
            if let Some(path) = self.paths.get_mut(path_idx) {
                path.stats.nic(rail_no).sent_alone(if is_message { nbytes } else { len * unit });
                path.rails[rail_no].queue(is_bulk, is_message).push_back(part);
            }
            self.set_dirty(path_idx, rail_no);
        }
    }

    /// Posts what there is room for on one rail.
    pub(super) fn pump<N: Nic>(
        &mut self,
        nics: &mut [N],
        registrations: &[Arc<Registrations<N::Domain>>],
        (path, rail_no): (u32, usize),
        writes: &mut Vec<Extent>,
        now_ns: u64,
    ) {
        let Some(rail) = self.rail(path, rail_no) else { return };
        rail.is_dirty = false;
        let (Stage::Up, Some(idx)) = (rail.stage, rail.idx) else { return };
        let (nic_no, theirs) = (rail.nic, rail.theirs);
        let nic = &mut nics[nic_no];
        let limits = Limits {
            max_writes: BATCH,
            segment_bytes: SEGMENT_BYTES.min(nic.about().max_write_bytes.max(1)),
            is_ordered: nic.about().is_ordered,
        };
        while let Some(part_idx) = self.next_part(path, rail_no) {
            let room = nic.room(idx);
            if room == 0 {
                // Others use what the NIC has in common; this rail's own completions wake it otherwise.
                if self.rail(path, rail_no).is_some_and(|rail| rail.under_way == 0) {
                    self.set_dirty(path, rail_no);
                }
                break;
            }
            let is_idle = self.rail(path, rail_no).is_some_and(|rail| rail.under_way == 0);
            let most = if is_idle { FIRST_BATCH } else { BATCH };
            let limits = Limits { max_writes: most.min(room), ..limits };
            let posted = self.post_part(nic, (&registrations[nic_no], theirs), part_idx, limits, writes);
            let Some(part) = self.parts.get_mut(part_idx) else { break };
            let (is_over, is_bulk) = (part.cursor.is_over(), part.is_bulk);
            let leaves = is_over || posted == Some(0) && part.is_parked;
            let Some(rail) = self.rail(path, rail_no) else { break };
            if leaves {
                let queue =
                    if is_bulk && rail.bulk.front() == Some(&part_idx) { &mut rail.bulk } else { &mut rail.small };
                queue.pop_front();
            }
            if is_over {
                self.settle_part(part_idx, now_ns);
            } else if is_idle {
                let _ = nic.flush(idx);
            }
            if posted.is_none() {
                // The NIC takes nothing just now; or the rail broke, as the next poll says.
                self.set_dirty(path, rail_no);
                break;
            }
        }
        while let Some(part_idx) = self.rail(path, rail_no).and_then(|rail| rail.messages.front().copied()) {
            if self.post_part(nic, (&registrations[nic_no], theirs), part_idx, limits, writes).is_none() {
                // All buffers are in use.
                self.set_dirty(path, rail_no);
                break;
            }
            self.rail(path, rail_no).map(|rail| rail.messages.pop_front());
            self.settle_part(part_idx, now_ns);
        }
        let _ = nic.flush(idx);
    }

    /// Small ones first; large ones while few of their bytes are under way, so
    /// that a small one is never far behind.
    fn next_part(&mut self, path: u32, rail_no: usize) -> Option<u32> {
        let rail = self.rail(path, rail_no)?;
        let bulk = || rail.bulk.front().filter(|_| rail.bulk_bytes < BULK_WINDOW);
        rail.small.front().or_else(bulk).copied()
    }

    /// Posts one batch of a part; how many writes, or `None` when the NIC did not
    /// take all of it.
    #[allow(clippy::too_many_lines, reason = "what it has in its hands it would have to look up again")]
    fn post_part<N: Nic>(
        &mut self,
        nic: &mut N,
        (registrations, theirs): (&Registrations<N::Domain>, usize),
        part_idx: u32,
        limits: Limits,
        writes: &mut Vec<Extent>,
    ) -> Option<usize> {
        let part = self.parts.get_mut(part_idx)?;
        let flight = self.flights.get_mut(part.flight)?;
        // Given up, taken back by its owner, or failed on another rail: what has not been posted is not.
        let given_up = flight.failure.clone().or_else(|| flight.op.given_up());
        if let Some(why) = given_up {
            part.cursor.stop();
            let flight = part.flight;
            self.fail_flight(flight, |_| why);
            return Some(0);
        }
        let rail = self.paths.get(part.path)?.rails.get(part.rail)?.idx?;
        let (taken, nbytes, is_whole) = match &flight.op.payload {
            Payload::Write { source, binding, extents } => {
                let (Ok(source), Some(Target::Nics { keys, .. })) = (registrations.of(source), binding.target()) else {
                    part.cursor.stop();
                    let flight = part.flight;
                    self.fail_flight(flight, |_| Failure::Exhausted("the source is not registered any more".into()));
                    return Some(0);
                };
                let before = part.cursor;
                let marks = match part.cursor.next(extents, part.imm, limits, part.under_way == 0, writes) {
                    Next::Batch(marks) => marks,
                    Next::Wait => {
                        part.is_parked = true;
                        return Some(0);
                    }
                    Next::Over => return Some(0),
                };
                let token = self.batches.insert(Batched { of: Of::Part(part_idx), nbytes: 0 });
                let target = keys.get(theirs).copied().unwrap_or(RemoteMemory { base: 0, key: 0 });
                let batch = Batch { source, target, writes, marks, token };
                let taken = nic.post(rail, &batch).unwrap_or(0);
                let nbytes = writes[..taken].iter().map(|write| write.nbytes).sum();
                if taken == 0 {
                    self.batches.remove(token);
                    part.cursor = before;
                    return None;
                }
                if taken < writes.len() {
                    part.cursor.take_back(writes.len(), taken);
                }
                if let Some(batched) = self.batches.get_mut(token) {
                    batched.nbytes = nbytes;
                }
                debug_assert!(taken == writes.len() || !matches!(marks, Marks::Last(_)));
                (taken, nbytes, taken == writes.len())
            }
            Payload::Signal => {
                let token = self.batches.insert(Batched { of: Of::Part(part_idx), nbytes: 0 });
                let Ok(true) = nic.signal(rail, part.imm.unwrap_or(0), token) else {
                    self.batches.remove(token);
                    return None;
                };
                part.cursor.stop();
                (1, 0, true)
            }
            Payload::Message(message) => {
                let path = self.paths.get_mut(part.path)?;
                let token = self.batches.insert(Batched { of: Of::Part(part_idx), nbytes: 0 });
                frame(&mut self.frame, flight.op.id, path.key, message);
                let Ok(true) = nic.send(rail, &self.frame, token) else {
                    self.batches.remove(token);
                    return None;
                };
                path.unanswered.insert(flight.op.id, part_idx);
                part.cursor.stop();
                part.awaits_answer = true;
                (1, 0, true)
            }
        };
        part.under_way += 1;
        let (path, rail_no, is_bulk) = (part.path, part.rail, part.is_bulk);
        let rail = self.rail(path, rail_no)?;
        rail.under_way += 1;
        if is_bulk {
            rail.bulk_bytes += nbytes;
        }
        // A provider may hold back what it was told more follows on: its completions cannot be waited for.
        is_whole.then_some(taken)
    }
}

impl Path {
    /// The parts of an operation, each on a rail that is up, and whether its
    /// count is split among them. None when no rail is.
    #[inline]
    fn shards(&mut self, op: &Op, nbytes: u64, is_bulk: bool) -> (Shards, bool) {
        let extents = match &op.payload {
            Payload::Write { extents, .. } => Some(extents),
            _ => None,
        };
        let (Some(extents), true) = (extents, is_bulk && self.rails.len() > 1) else {
            let len = match extents {
                Some(Extents::One(extent)) => extent.nbytes,
                Some(extents) => extents.num_extents() as u64,
                None => 0,
            };
            let whole = |nic_idx| Shard { nic_idx, start: 0, len, quarters: 4 };
            return (self.take_turn().map(whole).into_iter().collect(), false);
        };
        let Self { rails, rota, splits, .. } = self;
        let is_up = |rail: usize| rails[rail].stage == Stage::Up;
        let wanted = num_shards(nbytes, SHARD_BYTES);
        if let Extents::Pages { .. } = extents {
            let num_pages = extents.num_extents();
            let speeds = rota.serve(wanted.min(num_pages), is_up);
            return (shard_pages(num_pages, nbytes / num_pages.max(1) as u64, &speeds, SHARD_BYTES, 0), false);
        }
        let may_split = op.imm.is_none_or(|(imm, _)| splits.allow(imm));
        let speeds = rota.serve(if may_split { wanted } else { 1 }, is_up);
        let shards = shard_bytes(nbytes, &speeds, SHARD_BYTES, 0);
        let is_split = shards.len() > 1 && op.imm.is_some_and(|(imm, _)| splits.begin(imm, op.id));
        (shards, is_split)
    }
}

/// A write uses as many rails as get this much each.
const SHARD_BYTES: u64 = 128 << 10;
/// Operations up to this length overtake longer ones.
pub(super) const SMALL_BYTES: u64 = 64 << 10;
/// Bytes of long operations that are under way on one rail: four times what a
/// 400 Gbit/s link carries in 20 µs.
const BULK_WINDOW: u64 = 4 << 20;
/// Longest write.
const SEGMENT_BYTES: u64 = 1 << 20;
/// Most writes in a batch.
const BATCH: usize = 64;
/// Most in the first on a rail that carries nothing: its NIC begins while the rest is prepared.
const FIRST_BATCH: usize = 4;

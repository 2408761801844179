//! How an operation is cut up: one part a NIC, one a page.

use std::sync::Arc;

use anyfabric_plan::{shard_bytes, shard_pages, Extents, Shards};
use anyfabric_wire::{Imm, WireImm};

use super::fabric::{crc, Content, Part};
use super::link::SimLink;
use crate::mutant::Mutant;
use crate::{lock, Op, Payload};

impl SimLink {
    /// The parts of a write, each with its NIC, and whether its count is split.
    fn shards(&self, op: &Op, extents: &Extents, turn: usize) -> (Shards, bool) {
        let (speeds, least) = {
            let state = self.simulation.state();
            (state.speeds(self.ends.0), state.fabric.shard_bytes)
        };
        match extents {
            Extents::Pages { lists, .. } => {
                (shard_pages(extents.num_extents(), lists.src.page_bytes(), &speeds, least, turn), false)
            }
            Extents::One(extent) => {
                let shards = shard_bytes(extent.nbytes, &speeds, least, turn);
                match op.imm {
                    Some(_) if shards.len() < 2 => (shards, false),
                    Some((imm, _)) if lock(&self.splits).begin(imm, op.id) => (shards, true),
                    Some(_) => (shard_bytes(extent.nbytes, &speeds, u64::MAX, turn), false),
                    None => (shards, false),
                }
            }
        }
    }

    /// What an operation's NICs are told to carry, and the imm whose count is
    /// split among them.
    pub(super) fn parts(&self, op: &mut Op, turn: usize) -> (Vec<Part>, Option<Imm>) {
        let (from, to) = (self.ends.0, self.ends.1.unwrap_or(self.ends.0));
        let whole = |imm: Option<(Imm, u32)>| imm.map(|(imm, count)| (WireImm { imm, quarters: 4 }, count));
        let part = |nic_idx: usize, content: Content, imm: Option<(WireImm, u32)>| Part {
            from,
            to,
            nics: (nic_idx, 0),
            op: op.id,
            crc: None,
            content,
            imm,
            segments_left: 0,
        };
        let (source, binding, extents) = match &mut op.payload {
            Payload::Signal | Payload::Message(_) => {
                let speeds = self.simulation.state().speeds(from);
                let Some(nic) = shard_bytes(0, &speeds, 1, turn).first().copied() else { return (Vec::new(), None) };
                let content = match &mut op.payload {
                    Payload::Message(bytes) => Content::Message(std::mem::take(bytes)),
                    _ => Content::Signal,
                };
                return (vec![part(nic.nic_idx, content, whole(op.imm))], None);
            }
            Payload::Write { source, binding, extents } => (Arc::clone(source), Arc::clone(binding), extents.clone()),
        };
        let (shards, is_split) = self.shards(op, &extents, turn);
        let mut parts = Vec::new();
        for (shard_idx, shard) in shards.iter().enumerate() {
            let slice = extents.slice(shard.start, shard.len);
            for extent in (0..slice.num_extents()).map(|idx| slice.nth(idx)) {
                let mut imm = match (&extents, op.imm) {
                    (Extents::One(_), Some((imm, count))) => Some((WireImm { imm, quarters: shard.quarters }, count)),
                    (Extents::Pages { .. }, Some((imm, _))) => Some((WireImm { imm, quarters: 4 }, 1)),
                    (_, None) => None,
                };
                if Mutant::DropQuarter.is_on() && is_split && shard_idx == 0 {
                    imm = imm.filter(|(imm, _)| imm.quarters > 1);
                    imm.iter_mut().for_each(|(imm, _)| imm.quarters -= 1);
                }
                let content =
                    Content::Write { source: Arc::clone(&source), region: binding.region, key: binding.key, extent };
                let crc = op.verify.then(|| crc(&source, extent.src, extent.nbytes).unwrap_or_default());
                parts.push(Part { crc, ..part(shard.nic_idx, content, imm) });
            }
        }
        (parts, op.imm.filter(|_| is_split).map(|(imm, _)| imm))
    }
}

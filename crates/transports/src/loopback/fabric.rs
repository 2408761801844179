//! What is on its way: parts of operations, and the segments they go in.

use std::sync::{Arc, Weak};

use anyfabric_plan::Extent;
use anyfabric_wire::{Refusal, WireImm};

use super::link::{Hidden, News, SimLink};
use super::random::Random;
use super::simulation::{Event, State};
use crate::mutant::Mutant;
use crate::{Failure, Region};

/// How a simulated fabric behaves. Times are in nanoseconds.
#[derive(Debug, Clone)]
pub struct Fabric {
    /// A NIC's share of a split write is at least this long.
    pub shard_bytes: u64,
    /// Longest message of a NIC: what is longer goes in segments.
    pub segment_bytes: u64,
    /// Shortest and longest time on the way. One part in sixteen takes up to
    /// twenty times as long, so that every order happens.
    pub latency_ns: (u64, u64),
    /// The same for control messages, which stay in order.
    pub control_ns: (u64, u64),
    /// Whether the target's NIC knows which peer may write where, as a stream's
    /// reader does; otherwise a peer that was granted a region must be asked to
    /// let go of it.
    pub checks_rights: bool,
}

impl Default for Fabric {
    fn default() -> Self {
        Self {
            shard_bytes: 16 << 10,
            segment_bytes: 16 << 10,
            latency_ns: (2_000, 30_000),
            control_ns: (20_000, 200_000),
            checks_rights: false,
        }
    }
}

impl Fabric {
    /// One of the many that a seed may stand for.
    pub fn random(random: &mut Random) -> Self {
        let first = *random.pick(&[500, 2_000, 20_000]);
        Self {
            shard_bytes: *random.pick(&[1, 4096, 16 << 10]),
            segment_bytes: *random.pick(&[1000, 4096, 64 << 10]),
            latency_ns: (first, first * *random.pick(&[1, 4, 50])),
            control_ns: (20_000, *random.pick(&[20_000, 1_000_000, 50_000_000])),
            checks_rights: random.one_in(2),
        }
    }

    pub(super) fn latency(&self, random: &mut Random) -> u64 {
        let (first, last) = self.latency_ns;
        let latency = random.between(first, last);
        if random.one_in(16) {
            latency * random.between(2, 20)
        } else {
            latency
        }
    }
}

/// What a NIC was told to carry: the piece of an operation that is counted,
/// acknowledged and lost as one.
pub(super) struct Part {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) nics: (usize, usize),
    pub(super) op: u64,
    pub(super) content: Content,
    /// What the receiver counts when the part is placed whole, and how often.
    pub(super) imm: Option<(WireImm, u32)>,
    /// CRC-32 over the bytes, if the receiver checks it.
    pub(super) crc: Option<u32>,
    pub(super) segments_left: usize,
}

pub(super) enum Content {
    Write { source: Arc<Region>, region: u64, key: u64, extent: Extent },
    Signal,
    Message(Vec<u8>),
}

impl Content {
    fn nbytes(&self) -> u64 {
        match self {
            Self::Write { extent, .. } => extent.nbytes,
            Self::Signal | Self::Message(_) => 0,
        }
    }

    /// The segments that it goes in, at least one.
    pub(super) fn segments(&self, segment_bytes: u64) -> Vec<(u64, u64)> {
        let (nbytes, longest) = (self.nbytes(), segment_bytes.max(1));
        let count = nbytes.div_ceil(longest).max(1);
        (0..count).map(|idx| (idx * longest, longest.min(nbytes - idx * longest))).collect()
    }
}

/// Copies bytes of a part to where they belong, as the target's NIC does:
/// checked against its own table, and without asking anybody.
pub(super) fn place(
    source: &Region,
    target: &Region,
    extent: &Extent,
    (start, nbytes): (u64, u64),
) -> Result<(), Refusal> {
    let fits = |offset: u64, region: &Region| {
        offset.checked_add(extent.nbytes).is_some_and(|end| end <= region.nbytes() && start + nbytes <= extent.nbytes)
    };
    if !fits(extent.dst, target) || !fits(extent.src, source) {
        return Err(Refusal::OutOfBounds);
    }
    // SAFETY: both ranges were just checked, both regions are held by the caller; source and target may be one region
    // of an engine that writes to itself through a peer, hence `copy`.
    unsafe {
        let from = source.as_ptr().add((extent.src + start) as usize);
        let to = target.as_ptr().add((extent.dst + start) as usize);
        std::ptr::copy(from, to, nbytes as usize);
    }
    Ok(())
}

/// CRC-32 over bytes of a region.
pub(super) fn crc(region: &Region, offset: u64, nbytes: u64) -> Result<u32, Refusal> {
    if offset.checked_add(nbytes).is_none_or(|end| end > region.nbytes()) {
        return Err(Refusal::OutOfBounds);
    }
    let mut crc = crc32fast::Hasher::new();
    // SAFETY: inside the region, as was just checked; nobody else runs while a simulation does.
    unsafe { region.add_to(&mut crc, offset, nbytes as usize) };
    Ok(crc.finalize())
}

pub(super) fn nic_down() -> Failure {
    Failure::ConnectionBroken("a NIC on the way went down".into())
}

impl State {
    /// Speeds of an engine's NICs; 0 for one that is down.
    pub(super) fn speeds(&self, idx: usize) -> Vec<u32> {
        self.stands[idx].nics.iter().map(|nic| if nic.is_up { nic.speed } else { 0 }).collect()
    }

    /// Hands a part to a NIC. The target's NIC is one that is up, whatever
    /// their numbers.
    pub(super) fn launch(&mut self, mut part: Part, turn: usize) {
        if self.stands[part.from].is_dead() {
            return;
        }
        let speeds = self.speeds(part.to);
        let up: Vec<usize> = (0..speeds.len()).filter(|idx| speeds[*idx] > 0).collect();
        let segments = part.content.segments(self.fabric.segment_bytes);
        part.segments_left = segments.len();
        let id = self.next_id();
        match up.get((part.nics.0 + turn).checked_rem(up.len()).unwrap_or(0)) {
            Some(&nic_idx) if !self.stands[part.to].has_left() => part.nics.1 = nic_idx,
            _ => {
                self.parts.insert(id, part);
                return self.fail_part(id, nic_down());
            }
        }
        if Mutant::CountBeforeCopy.is_on() {
            if let Some((imm, count)) = part.imm.take() {
                let (from, to) = (part.from, part.to);
                let due_ns = self.now_ns() + 1;
                self.push_at(due_ns, Event::News { from, to, news: News::Arrived { imm, count } });
            }
        }
        let is_lost = self.stands[part.to].is_dead();
        if !is_lost {
            self.parts.insert(id, part);
            for (start, nbytes) in segments {
                let due_ns = self.due();
                self.push_at(due_ns, Event::Segment { part: id, start, nbytes });
            }
        }
    }

    /// Bytes reach the target's NIC.
    pub(super) fn segment(&mut self, id: u64, start: u64, nbytes: u64) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        let Some(link) = self.links.get(&(part.to, part.from)).and_then(Weak::upgrade).filter(|link| !link.is_closed())
        else {
            return self.fail_part(id, Failure::ConnectionBroken("the peer takes nothing from here any more".into()));
        };
        if let Content::Write { source, region, key, extent } = &part.content {
            let checks_rights = self.fabric.checks_rights;
            let placed = link.admit(*region, *key, checks_rights).and_then(|target| {
                place(source, &target, extent, (start, nbytes))?;
                if self.corrupt > 0 && nbytes > 0 {
                    self.corrupt -= 1;
                    target.flip_bit(extent.dst + start);
                }
                Ok(target)
            });
            let checked = placed.and_then(|target| match part.crc {
                Some(expected) if part.segments_left == 1 => {
                    let found = crc(&target, extent.dst, extent.nbytes)?;
                    if found == expected {
                        Ok(())
                    } else {
                        Err(Refusal::Checksum)
                    }
                }
                _ => Ok(()),
            });
            if let Err(refusal) = checked {
                return self.fail_part(id, Failure::Refused(refusal));
            }
        }
        part.segments_left -= 1;
        if part.segments_left == 0 {
            if let Some(part) = self.parts.remove(&id) {
                self.arrive(part, &link);
            }
        }
    }

    /// A part is placed whole: now, and not before, it counts.
    fn arrive(&mut self, part: Part, link: &SimLink) {
        let Part { from, to, nics, op, content, imm, .. } = part;
        if let Some((imm, count)) = imm {
            link.tell(News::Arrived { imm, count });
            if Mutant::DoublePart.is_on() && op % 3 == 1 {
                link.tell(News::Arrived { imm, count });
            }
        }
        match content {
            // The receiving engine answers, for it may have no room.
            Content::Message(bytes) => link.tell(News::Message { op, bytes: Hidden(bytes) }),
            Content::Write { .. } | Content::Signal => {
                self.push_news(to, from, News::Completed { op, nic_idx: nics.0, by_engine: false, result: Ok(()) });
            }
        }
    }

    fn fail_part(&mut self, id: u64, why: Failure) {
        if let Some(part) = self.parts.remove(&id) {
            let news = News::Completed { op: part.op, nic_idx: part.nics.0, by_engine: false, result: Err(why) };
            // The sender's own NIC says so: that arrives whatever becomes of the other side.
            let due_ns = self.due();
            self.push_at(due_ns, Event::News { from: part.to, to: part.from, news });
        }
    }

    pub(super) fn fail_parts(&mut self, hit: impl Fn(&Part) -> bool) {
        let ids: Vec<u64> = self.parts.iter().filter(|(_, part)| hit(part)).map(|(id, _)| *id).collect();
        for id in ids {
            self.fail_part(id, nic_down());
        }
    }

    /// A sender destroys its queue pairs to a peer: nothing of them lands from
    /// now on.
    pub(super) fn flush(&mut self, from: usize, to: usize) {
        self.parts.retain(|_, part| (part.from, part.to) != (from, to));
    }
}

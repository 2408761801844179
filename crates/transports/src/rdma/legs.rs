//! Operations with several peers: what is kept of the legs that NICs carry.
//!
//! ```text
//! operation ─ Fan ─┬─ Posted ─ the binding of the region that it goes into
//!                  └─ Posted
//! ```
//!
//! A leg that fits one work request, on a rail where nothing waits, is posted from
//! what its submitter lends. All that is kept of it is kept here, with the NICs in
//! hand and without atomics: of which operation it is, and into which region it
//! goes. That is what [`Book::let_go`] promises by.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::MAX_NICS;
use anyfabric_wire::Imm;

use super::book::{failure_of, Book, Path, Stage};
use super::limbo::NO_RAIL;
use super::nic::{Domain, Fault, Nic};
use super::registrations::Registrations;
use crate::mutant::Mutant;
use crate::{Binding, Failure, Leg, PeerIdx, Spread, Target, Ticket};

/// What the legs of one operation have in common.
pub(super) struct Fan {
    ticket: Arc<Ticket>,
    imm: Option<Imm>,
    /// Legs that have not ended, and those that have.
    num_left: u32,
    num_ended: u32,
}

/// A leg that a NIC carries.
#[derive(Clone, Copy)]
pub(super) struct Posted {
    fan: u32,
    peer: PeerIdx,
    path: u32,
    rail: u32,
    nbytes: u32,
    /// Where it goes; none for an immediate alone.
    held: Option<u32>,
    has_failed: bool,
    /// The receiver is told that its count will never come.
    is_lost: bool,
}

/// The legs of an operation while they are posted.
pub(super) struct Spreading<'s, 't, D: Domain> {
    pub(super) spread: &'s Spread<'t>,
    is_registered: bool,
    /// Where they come from, as each NIC knows it once that was asked.
    sources: [Option<&'t D::Memory>; MAX_NICS],
    /// Theirs, once one is posted, and how many are.
    fan: Option<u32>,
    num_posted: u32,
}

impl<'s, 't, D: Domain> Spreading<'s, 't, D> {
    pub(super) const fn of(spread: &'s Spread<'t>) -> Self {
        let is_registered = spread.source.is_none();
        Self { spread, is_registered, sources: [None; MAX_NICS], fan: None, num_posted: 0 }
    }

    /// Whether every NIC may post from where they come from.
    #[inline]
    pub(super) fn is_registered(&mut self, registrations: &[Arc<Registrations<D>>]) -> bool {
        if let (false, Some(region)) = (self.is_registered, self.spread.source) {
            self.is_registered = registrations.iter().all(|of| of.knows(region));
            if self.is_registered {
                for (known, of) in self.sources.iter_mut().zip(registrations) {
                    *known = of.of(region).ok();
                }
            }
        }
        self.is_registered
    }
}

impl Book {
    /// Posts a leg at once, if it can be; [`Book::keep_legs`] comes after the last.
    #[inline]
    pub(super) fn post_leg<N: Nic>(
        &mut self,
        nics: &mut [N],
        legs: &mut Spreading<'_, '_, N::Domain>,
        leg: &Leg<'_>,
    ) -> bool {
        let (held, write) = match &leg.write {
            // Looked at with the NICs in hand: see `let_go`.
            Some((binding, extent)) => match (binding.check(), binding.target()) {
                (Ok(()), Some(Target::Nics { held, keys })) => (Some(*held), Some((&keys[..], extent))),
                _ => return false,
            },
            None => (None, None),
        };
        let at = (leg.link, LEG | self.legs.next());
        let Some((rail, nbytes)) = self.post_once(nics, |nic_no| legs.sources[nic_no], at, write, legs.spread.imm)
        else {
            return false;
        };
        let fan = *legs.fan.get_or_insert_with(|| {
            let (ticket, imm) = (Arc::clone(legs.spread.ticket), legs.spread.imm);
            self.fans.insert(Fan { ticket, imm, num_left: 0, num_ended: 0 })
        });
        legs.num_posted += 1;
        let (peer, path, rail, nbytes) = (leg.peer, leg.link, rail as u32, nbytes as u32);
        self.legs.insert(Posted { fan, peer, path, rail, nbytes, held, has_failed: false, is_lost: false });
        true
    }

    /// This leg is posted after the one that comes now: its rail is brought near meanwhile.
    #[inline]
    pub(super) fn expect_leg<N: Nic>(&self, nics: &[N], leg: &Leg<'_>) {
        let Some(Path { rails, rota, .. }) = self.paths.get(leg.link) else { return };
        if let Some(rail_no) = rota.next(|rail_no| rails[rail_no].stage == Stage::Up) {
            rails[rail_no].idx.into_iter().for_each(|idx| nics[rails[rail_no].nic].expect(idx));
        }
    }

    /// Counts the legs of an operation, once all are posted that can be, and before
    /// anything is polled.
    pub(super) fn keep_legs<D: Domain>(&mut self, legs: &Spreading<'_, '_, D>) {
        if let Some(fan) = legs.fan.and_then(|fan| self.fans.get_mut(fan)) {
            fan.num_left = legs.num_posted;
        }
    }

    /// The batch that was a leg has ended.
    #[inline]
    pub(super) fn leg_ended(&mut self, leg_idx: u32, result: Result<(), Fault>, now_ns: u64) {
        let Some(leg) = self.legs.remove(leg_idx) else { return };
        let rail_no = leg.rail as usize;
        let cause = result.err().and_then(|fault| self.cause(leg.path, rail_no, fault));
        let Some(fan) = self.fans.get_mut(leg.fan) else { return };
        let mut refusal = None;
        let mut has_more = false;
        if let Some(path) = self.paths.get_mut(leg.path) {
            if let (Err(_), Some(held)) = (result, leg.held) {
                refusal = path.held.get(held).and_then(|binding| binding.refusal());
            }
            has_more = path.rails.get_mut(rail_no).is_some_and(|rail| {
                rail.under_way -= 1;
                rail.has_more()
            });
            let nic = path.stats.nic(rail_no);
            nic.sent_alone(leg.nbytes.into());
            nic.latency.record_alone(now_ns.saturating_sub(fan.ticket.submitted_ns()));
            if leg.has_failed || result.is_err() {
                // ORDERING: statistics.
                nic.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Err(fault) = result {
            fan.ticket.fail_by(leg.peer, failure_of(fault, cause, || refusal));
        }
        if (leg.has_failed || result.is_err()) && !leg.is_lost {
            fan.note_loss(&leg);
        }
        fan.num_left -= 1;
        if !(Mutant::LoseCompletion.is_on() && leg_idx % 7 == 3) {
            fan.ticket.note_ended(leg.peer);
            fan.num_ended += 1;
        }
        if fan.num_left == 0 {
            if let Some(fan) = self.fans.remove(leg.fan) {
                fan.ticket.parts_ended(fan.num_ended);
            }
        }
        if has_more {
            self.set_dirty(leg.path, rail_no);
        }
    }

    /// Fails the legs of a path; they only quiesce.
    pub(super) fn fail_legs(&mut self, path: u32, why: &Failure) {
        let Self { legs, fans, .. } = self;
        for leg in legs.iter_mut().filter(|leg| leg.path == path && !leg.has_failed) {
            leg.has_failed = true;
            fans.get(leg.fan).into_iter().for_each(|fan| fan.ticket.fail_by(leg.peer, why.clone()));
        }
    }

    /// Notes the legs of a path whose tickets were given up.
    pub(super) fn reap_legs(&mut self, path: u32) {
        let Self { legs, fans, .. } = self;
        for leg in legs.iter_mut().filter(|leg| leg.path == path && !leg.has_failed) {
            let Some((fan, why)) = fans.get(leg.fan).and_then(|fan| Some((fan, fan.ticket.given_up()?))) else {
                continue;
            };
            (leg.has_failed, leg.is_lost) = (true, true);
            // What a NIC has been told cannot be taken back; it may yet arrive.
            fan.note_loss(leg);
            fan.ticket.fail(why);
        }
    }

    /// The rail of a leg was not stopped: it has failed, and never ends.
    pub(super) fn keep_leg(&mut self, leg_idx: u32, why: &Failure) {
        let Self { legs, fans, .. } = self;
        let Some(leg) = legs.get_mut(leg_idx) else { return };
        let Some(fan) = fans.get(leg.fan) else { return };
        if !leg.is_lost {
            fan.note_loss(leg);
        }
        (leg.rail, leg.has_failed, leg.is_lost) = (NO_RAIL as u32, true, true);
        fan.ticket.fail_by(leg.peer, why.clone());
    }

    /// Tokens of the legs that a rail carries.
    pub(super) fn legs_on(&self, path: u32, rail_no: usize) -> impl Iterator<Item = u32> + '_ {
        let is_on = move |leg: &Posted| (leg.path, leg.rail as usize) == (path, rail_no);
        self.legs.iter().filter(move |(_, leg)| is_on(leg)).map(|(idx, _)| LEG | idx)
    }

    /// Legs may go into that region from now on; its number there.
    pub(super) fn hold(&mut self, path: u32, binding: &Arc<Binding>) -> u32 {
        self.paths.get_mut(path).map_or(u32::MAX, |path| path.held.insert(Arc::clone(binding)))
    }

    /// The region was taken back, and its bindings say so: true when no leg with that
    /// key is under way. None comes any more, for who posts looks at the binding while
    /// it has the NICs.
    pub(super) fn let_go(&mut self, path_idx: u32, region: u64, key: u64) -> bool {
        let Self { paths, legs, .. } = self;
        let Some(path) = paths.get_mut(path_idx) else { return true };
        let is_it = |binding: &Binding| (binding.region, binding.key) == (region, key);
        let matching: Vec<u32> = path.held.iter().filter(|(_, held)| is_it(held)).map(|(idx, _)| idx).collect();
        let goes_there = |leg: &Posted| leg.path == path_idx && leg.held.is_some_and(|held| matching.contains(&held));
        if !matching.is_empty() && legs.iter().any(|(_, leg)| goes_there(leg)) {
            return false;
        }
        matching.into_iter().for_each(|idx| drop(path.held.remove(idx)));
        true
    }
}

impl Fan {
    /// Has the receiver told that a leg's count will never come, if it has one.
    fn note_loss(&self, leg: &Posted) {
        self.imm.into_iter().for_each(|imm| self.ticket.note_loss(leg.peer, imm));
    }
}

/// The leg that a token names, if it is one's.
#[inline]
pub(super) const fn leg_of(token: u32) -> Option<u32> {
    if token & LEG == 0 {
        None
    } else {
        Some(token & !LEG)
    }
}

/// In the tokens of legs.
const LEG: u32 = 1 << 31;

//! What comes out of a NIC's queue, and what an endpoint takes along when it is
//! closed.

use std::collections::VecDeque;

use super::buffers::Brought;
use super::endpoint::Read;
use super::faults::fault_of;
use super::handshakes::{Ended, MAX_LOOKS};
use super::library::FabricError;
use super::nic::{now_ns, FabricNic, OPERATIONS, READ_BATCH};
use super::provider::Arrivals;
use super::rail::rail_of;
use super::slots::Use;
use super::sys::*;
use crate::rdma::{Completions, Fault, RailIdx};

/// Something to tell at the next poll.
pub(super) enum Report {
    Completed(RailIdx, u32, Result<(), Fault>),
    Arrived(RailIdx, u32),
    Message(RailIdx, Box<[u8]>),
    Broken(RailIdx, Fault),
}

impl Report {
    pub(super) const fn rail(&self) -> RailIdx {
        match self {
            Self::Completed(rail, ..) | Self::Arrived(rail, _) | Self::Message(rail, _) | Self::Broken(rail, _) => {
                *rail
            }
        }
    }
}

impl FabricNic {
    /// Takes what completions there are, of a long queue some batches; true when
    /// there was something.
    #[inline]
    pub(super) fn poll_queue(&mut self, to: &mut impl Completions) -> bool {
        let mut something = false;
        for _ in 0..MAX_BATCHES {
            match self.queue.read(&mut self.entries, &mut self.sources) {
                Read::Some(count) => {
                    something = true;
                    let now_ns = now_ns();
                    for idx in 0..count {
                        self.take(self.entries[idx], self.sources[idx], now_ns, to);
                    }
                    if count == READ_BATCH {
                        continue;
                    }
                }
                Read::Empty => self.on_empty(),
                Read::Failed(context, error, prov_error) => {
                    something = true;
                    self.on_failed(context, error, prov_error);
                }
                Read::Broken(error) => something |= self.close_all(Fault::Missed(error.unsigned_abs())),
            }
            break;
        }
        let is_pending = !(self.announcements.is_empty() && self.reposts.is_empty() && self.reports.is_empty());
        if is_pending {
            something |= self.catch_up(to);
        }
        if self.unsettled > 0 {
            self.unblock();
        }
        something
    }

    /// Closes an endpoint: no operation on it moves a byte any more, unless the library refuses. What was under
    /// way is told at the next poll: `first` with the cause and the rest as flushed, or
    /// without a first all with the cause; and so are the rails that break, but for `quiet`.
    #[cold]
    pub(super) fn close_endpoint(&mut self, idx: u16, why: Fault, first: Option<u32>, quiet: Option<RailIdx>) {
        if self.endpoints.get(usize::from(idx)).is_none_or(Option::is_none) {
            return;
        }
        // Peers were told of what has arrived that it has, and some providers forget it with the endpoint.
        let mut broken_too = self.set_aside(idx, false);
        if self.domain.binds_memory() {
            self.domain.unbind();
        }
        if self.domain.provider().quirks().forgets_handshakes {
            self.end_handshakes(idx, &mut broken_too);
        }
        let is_closed = self.endpoints[usize::from(idx)].as_mut().is_some_and(|open| open.endpoint.close());
        // More came meanwhile; from now on nothing does.
        broken_too.extend(self.set_aside(idx, true));
        if let Some(open) = self.endpoints[usize::from(idx)].take() {
            self.under_way -= open.outstanding;
        }
        self.queue.closed_endpoint();
        if is_closed { &mut self.resting } else { &mut self.stuck }.push(idx);
        let reports = &mut self.reports;
        let orphans = self.slots.orphan(idx, |batch, state| {
            let fault = if first.is_none_or(|first| first == batch) { why } else { Fault::Flushed };
            if is_closed {
                reports.push_back(Report::Completed(state.rail, state.token, Err(fault)));
            }
        });
        // What an endpoint that is not closed was given it may still use, and complete: that never ends.
        for (slot, what) in orphans.into_iter().filter(|_| is_closed) {
            if let Use::Send(buffer) = what {
                self.free_sends.push(buffer);
            }
            self.orphans.push(slot);
        }
        for (rail, state) in self.rails.iter_mut().enumerate() {
            let Some(state) = state.as_mut().filter(|state| state.endpoint == idx && !state.is_broken) else {
                continue;
            };
            state.is_broken = true;
            // What arrived before may be lost, whoever closed it.
            let missed = self.queue.broken().map(|error| Fault::Missed(error.unsigned_abs()));
            if missed.is_some() || quiet != Some(rail as RailIdx) {
                self.reports.push_back(Report::Broken(rail as RailIdx, missed.unwrap_or(why)));
            }
        }
        let slots = &mut self.slots;
        self.announcements.retain(|batch| slots.batch(*batch).remaining > 0);
        self.reposts.retain(|slot| (slot - OPERATIONS) / self.num_receives != u32::from(idx));
        for (other, fault, batch) in broken_too {
            self.close_endpoint(other, fault, batch, None);
        }
    }

    /// Ends the connections to an endpoint, until the provider has none of which it
    /// would still hear once the endpoint is closed.
    fn end_handshakes(&mut self, closing: u16, broken_too: &mut Vec<(u16, Fault, Option<u32>)>) {
        let mut ended = Ended::default();
        for _ in 0..MAX_LOOKS {
            let Some(open) = self.endpoints[usize::from(closing)].as_ref() else { return };
            if !ended.end_more(open.endpoint.name()) {
                return;
            }
            broken_too.extend(self.set_aside(closing, true));
        }
    }

    /// Empties the queue into what is told at the next poll; but no longer than what
    /// fits into it, for peers go on. Returns other endpoints that have failed
    /// meanwhile, with the fault and its batch.
    fn set_aside(&mut self, closing: u16, is_over: bool) -> Vec<(u16, Fault, Option<u32>)> {
        let (mut aside, mut failed) = (Aside(std::mem::take(&mut self.reports)), Vec::new());
        for _ in 0..self.queue.depth() / READ_BATCH {
            match self.queue.read(&mut self.entries, &mut self.sources) {
                Read::Some(count) => {
                    let now_ns = now_ns();
                    for idx in 0..count {
                        let (entry, source) = (self.entries[idx], self.sources[idx]);
                        // What closing did to operations of its own they end with below.
                        let is_own = |what| matches!(what, Some((of, Some(_))) if of == closing);
                        if !(is_over && is_own(self.operation(entry.op_context))) {
                            self.take(entry, source, now_ns, &mut aside);
                        }
                    }
                }
                Read::Failed(context, error, _) => {
                    if let Some((endpoint, batch)) =
                        self.operation(context).filter(|(endpoint, _)| *endpoint != closing)
                    {
                        failed.push((endpoint, fault_of(error), batch));
                    }
                }
                Read::Empty | Read::Broken(_) => break,
            }
        }
        self.reports = aside.0;
        failed
    }

    #[inline]
    fn take(&mut self, entry: fi_cq_data_entry, source: fi_addr_t, now_ns: u64, to: &mut impl Completions) {
        // One without a context is of the peer's doing, and so may be one with that of a receive.
        let Some(idx) = self.slots.of(entry.op_context) else { return self.arrived(&entry, source, to) };
        let state = self.slots.slot(idx);
        match state.what {
            Use::Free | Use::Orphan => return,
            Use::Receive if entry.flags & ARRIVED_WRITE != 0 => {
                self.arrived(&entry, source, to);
                self.post_receive(idx, state.endpoint);
                return;
            }
            Use::Receive => return self.received(idx, state.endpoint, entry.len, to),
            Use::Write => {}
            Use::Send(buffer) => self.free_sends.push(buffer),
            Use::Announced => {
                // Its message takes its place in the batch.
                self.slots.batch(state.batch).remaining += 1;
                self.announcements.push_back(state.batch);
            }
        }
        if let Some(open) = self.endpoints[usize::from(state.endpoint)].as_mut() {
            open.outstanding -= 1;
            self.under_way -= 1;
            open.waiting_since_ns = if open.outstanding == 0 { 0 } else { now_ns };
        }
        self.slots.put_back(idx);
        if let Some(batch) = self.slots.completed(state.batch) {
            to.completed(batch.rail, batch.token, Ok(()));
        }
    }

    #[inline]
    fn arrived(&mut self, entry: &fi_cq_data_entry, source: fi_addr_t, to: &mut impl Completions) {
        if entry.flags & FI_REMOTE_CQ_DATA == 0 {
            return;
        }
        let data = entry.data;
        let rail = if self.domain.provider().arrivals == Arrivals::Sourced {
            self.by_source.get(&source).copied()
        } else {
            self.rail_with((data >> 32) as u32)
        };
        match rail {
            Some(rail) => to.arrived(rail, data as u32),
            // Meant for a rail that is closed.
            None => log::debug!("an immediate for no rail"),
        }
    }

    fn received(&mut self, idx: u32, endpoint: u16, nbytes: usize, to: &mut impl Completions) {
        if let Some(open) = self.endpoints[usize::from(endpoint)].as_ref() {
            let buffer = (idx - OPERATIONS) % self.num_receives;
            if let Some((tag, brought)) = open.receives.read(buffer, nbytes) {
                match (self.rail_with(tag), brought) {
                    (Some(rail), Brought::Message(message)) => to.message(rail, message),
                    (Some(rail), Brought::Imm(imm)) => to.arrived(rail, imm),
                    (None, _) => log::debug!("a message for no rail"),
                }
            }
        }
        self.post_receive(idx, endpoint);
    }

    fn rail_with(&self, tag: u32) -> Option<RailIdx> {
        let rail = rail_of(tag);
        let state = self.rails.get(rail as usize)?.as_ref()?;
        (state.tag == tag).then_some(rail)
    }

    /// The queue was read to its end: nothing in it names what was closed before.
    #[inline]
    fn on_empty(&mut self) {
        if !self.resting.is_empty() {
            self.have_rested();
        }
        if self.under_way > 0 || self.unsettled > 0 {
            self.check_answers();
        }
    }

    fn have_rested(&mut self) {
        self.resting.clear();
        self.orphans.drain(..).for_each(|slot| self.slots.put_back(slot));
    }

    /// Lets endpoints that took no more try again. Of those that were not tried since
    /// nothing is waited for.
    #[cold]
    fn unblock(&mut self) {
        self.unsettled -= 1;
        for open in self.endpoints.iter_mut().flatten() {
            if !std::mem::take(&mut open.is_blocked) && open.outstanding == 0 {
                open.waiting_since_ns = 0;
            }
        }
    }

    /// Breaks rails whose peers are silent; few providers do it.
    fn check_answers(&mut self) {
        let now_ns = now_ns();
        if now_ns.saturating_sub(self.checked_ns) < CHECK_NS {
            return;
        }
        self.checked_ns = now_ns;
        for idx in 0..self.endpoints.len() {
            let Some(open) = self.endpoints[idx].as_mut() else { continue };
            let is_waiting = open.outstanding > 0 || open.is_blocked;
            if is_waiting
                && open.waiting_since_ns != 0
                && now_ns.saturating_sub(open.waiting_since_ns) > self.answer_timeout_ns
            {
                self.close_endpoint(idx as u16, Fault::Unanswered, None, None);
            }
        }
    }

    #[cold]
    fn on_failed(&mut self, context: *mut std::ffi::c_void, error: i32, prov_error: i32) {
        match self.operation(context) {
            Some((endpoint, batch)) => self.close_endpoint(endpoint, fault_of(error), batch, None),
            None => log::debug!("an error of no operation: {error} ({prov_error})"),
        }
    }

    /// The endpoint of an operation, and its batch, if it has one.
    fn operation(&self, context: *mut std::ffi::c_void) -> Option<(u16, Option<u32>)> {
        let slot = self.slots.slot(self.slots.of(context)?);
        match slot.what {
            Use::Free | Use::Orphan => None,
            Use::Receive => Some((slot.endpoint, None)),
            _ => Some((slot.endpoint, Some(slot.batch))),
        }
    }

    /// Closes every endpoint; true when there was one.
    #[cold]
    fn close_all(&mut self, why: Fault) -> bool {
        let open: Vec<usize> = (0..self.endpoints.len()).filter(|idx| self.endpoints[*idx].is_some()).collect();
        if !open.is_empty() {
            log::warn!("{}: {why}", self.about.name);
        }
        open.iter().for_each(|idx| self.close_endpoint(*idx as u16, why, None, None));
        !open.is_empty()
    }

    /// Puts another queue in the place of one that is broken, before an endpoint
    /// completes into it.
    pub(super) fn mend_queue(&mut self) -> Result<(), FabricError> {
        if let Some(error) = self.queue.broken() {
            self.close_all(Fault::Missed(error.unsigned_abs()));
            self.queue.renew(!self.stuck.is_empty())?;
            self.have_rested();
        }
        Ok(())
    }

    /// What could not be done at once, and what is still to be told.
    #[cold]
    fn catch_up(&mut self, to: &mut impl Completions) -> bool {
        for _ in 0..self.reposts.len() {
            let Some(slot) = self.reposts.pop_front() else { break };
            let endpoint = ((slot - OPERATIONS) / self.num_receives) as u16;
            let code = self.post_receive(slot, endpoint);
            // What a provider does not only lack the room for it will not take later either.
            if code != 0 && code != FI_EAGAIN {
                self.close_endpoint(endpoint, fault_of(code as i32), None, None);
            }
        }
        for _ in 0..self.announcements.len() {
            let Some(batch) = self.announcements.pop_front() else { break };
            self.announce(batch);
        }
        let something = !self.reports.is_empty();
        while let Some(report) = self.reports.pop_front() {
            match report {
                Report::Completed(rail, token, result) => to.completed(rail, token, result),
                Report::Arrived(rail, imm) => to.arrived(rail, imm),
                Report::Message(rail, message) => to.message(rail, &message),
                Report::Broken(rail, why) => to.broken(rail, why),
            }
        }
        something
    }
}

/// Keeps what is reported for later.
struct Aside(VecDeque<Report>);

impl Completions for Aside {
    fn completed(&mut self, rail: RailIdx, token: u32, result: Result<(), Fault>) {
        self.0.push_back(Report::Completed(rail, token, result));
    }

    fn arrived(&mut self, rail: RailIdx, imm: u32) {
        self.0.push_back(Report::Arrived(rail, imm));
    }

    fn message(&mut self, rail: RailIdx, message: &[u8]) {
        self.0.push_back(Report::Message(rail, message.into()));
    }

    fn broken(&mut self, rail: RailIdx, why: Fault) {
        self.0.push_back(Report::Broken(rail, why));
    }
}

/// How providers mark the end of a peer's write: some with the one, some with the
/// other.
const ARRIVED_WRITE: u64 = FI_RMA | FI_REMOTE_WRITE;
/// Full batches taken in one poll: a turn of the driver, which looks at every peer, costs as much as some dozen
/// completions, and whoever finds the NICs taken meanwhile has to leave what it submits.
const MAX_BATCHES: usize = 4;
/// Between two looks at the time since an endpoint's last completion.
const CHECK_NS: u64 = 10_000_000;

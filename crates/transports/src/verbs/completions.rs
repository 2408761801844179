//! What comes out of a port's completion queue.
//!
//! A completion ends all batches up to its own request. Of the first fault of a
//! queue pair those before it are placed; what comes after is flushed.

use super::nic::{VerbsNic, POLL};
use super::rails::{fault_of, parts_of, Kind, Posted, Waiting};
use super::sys::{self, Wc};
use crate::rdma::{Completions, Fault, RailIdx};

impl VerbsNic {
    /// Reports one batch of completions; true when there was something.
    #[inline]
    pub(super) fn poll_queue(&mut self, to: &mut impl Completions) -> bool {
        let has_aside = !self.aside.is_empty();
        if has_aside {
            self.report_aside(to);
        }
        let count = self.fetch();
        for idx in 0..count {
            let wc = self.completions[idx];
            match Kind::of(wc.wr_id) {
                kind @ (Kind::Write | Kind::Send) => self.sent(&wc, kind, to),
                kind => self.received(&wc, kind, self.by_number.get(&wc.qp_num).copied(), to),
            }
        }
        if !self.faulty.is_empty() {
            self.settle_faulty(to);
        }
        count > 0 || has_aside
    }

    fn sent(&mut self, wc: &Wc, kind: Kind, to: &mut impl Completions) {
        let (life, idx, sequence) = parts_of(wc.wr_id);
        let Some(rail) = self.rails.get_mut(idx as usize).filter(|rail| rail.life == life) else { return };
        let posted = if kind == Kind::Write { &mut rail.writes } else { &mut rail.messages };
        // Only of what the device has: not twice, and of nothing else.
        if sequence.wrapping_sub(posted.done) >= posted.taken.wrapping_sub(posted.done) {
            return;
        }
        let until = sequence.wrapping_add(1);
        let mut end = |posted: &mut Posted, until: u32, result: Result<(), Fault>| {
            while let Some(Waiting { token, buffer, .. }) = posted.take_until(until) {
                buffer.into_iter().for_each(|buffer| self.messages.release(buffer));
                to.completed(idx, token, result);
            }
        };
        if wc.status == 0 {
            end(posted, until, Ok(()));
        } else {
            let fault = fault_of(wc);
            // What was posted before the first fault is placed. Later, and when the device only flushes, a request
            // without a completion of its own may have been lost with the others.
            let is_first = rail.fault.is_none() && fault != Fault::Flushed;
            let fault = *rail.fault.get_or_insert(fault);
            end(posted, sequence, if is_first { Ok(()) } else { Err(fault) });
            end(posted, until, Err(fault));
            if !rail.is_told && !self.faulty.contains(&idx) {
                self.faulty.push(idx);
            }
        }
        self.budget += until.wrapping_sub(posted.done) as usize;
        posted.done = until;
    }

    /// Reports broken rails, and ends what their device never took.
    #[cold]
    fn settle_faulty(&mut self, to: &mut impl Completions) {
        for at in (0..self.faulty.len()).rev() {
            let idx = self.faulty[at];
            if self.queue_fault.is_some() {
                // Nothing of what it has under way would be told.
                self.destroy(idx);
            }
            let Some(rail) = self.rails.get_mut(idx as usize) else { continue };
            let Some(fault) = rail.fault else { continue };
            if !std::mem::replace(&mut rail.is_told, true) {
                rail.stop();
                to.broken(idx, fault);
            }
            if rail.is_stuck {
                // What it has under way may never be over.
                self.faulty.swap_remove(at);
                continue;
            }
            for posted in [&mut rail.writes, &mut rail.messages] {
                if posted.done != posted.taken {
                    // The device still flushes what it took.
                    continue;
                }
                self.budget += posted.under_way() as usize;
                (posted.taken, posted.done) = (posted.next, posted.next);
                for Waiting { token, buffer, .. } in posted.batches.drain(..) {
                    buffer.into_iter().for_each(|buffer| self.messages.release(buffer));
                    to.completed(idx, token, Err(fault));
                }
            }
            if rail.writes.batches.is_empty() && rail.messages.batches.is_empty() {
                self.faulty.swap_remove(at);
            }
        }
        if self.aside.is_empty() {
            self.free.append(&mut self.resting);
        }
    }

    fn received(&mut self, wc: &Wc, kind: Kind, rail: Option<RailIdx>, to: &mut impl Completions) {
        let posted = match kind {
            Kind::Imm => {
                if let (Some(rail), 0) = (rail, wc.status) {
                    to.arrived(rail, u32::from_be(wc.imm_data));
                }
                self.imms.take()
            }
            _ => {
                let buffer = parts_of(wc.wr_id).2 as usize;
                let Some(message) = self.messages.received(buffer, wc.byte_len as usize) else { return };
                if let (Some(rail), 0) = (rail, wc.status) {
                    to.message(rail, message);
                }
                self.messages.give_back(buffer)
            }
        };
        if let Err(error) = posted {
            // The queue is as deep as what is posted, so this is a device that is short of something, or gone. The next
            // arrival tries again, or the next look at the port.
            log::error!("{error}");
        }
        if let (Some(rail), true) = (rail, wc.status != 0 && wc.status != sys::WC_WR_FLUSH_ERR) {
            self.break_rail(rail, fault_of(wc));
        }
    }

    /// Takes the next completions out of the queue; how many.
    fn fetch(&mut self) -> usize {
        // SAFETY: the queue lives; there is room for POLL completions.
        let count = unsafe {
            let poll = (*self.domain.context).ops.poll_cq;
            poll(self.queue.cq, POLL as i32, self.completions.as_mut_ptr())
        };
        match usize::try_from(count) {
            Ok(count) => count.min(POLL),
            Err(_) => self.fail_queues(Fault::Missed(count.unsigned_abs())),
        }
    }

    /// The queues are of no more use, and what had arrived may be lost with them: every rail ends. Returns 0.
    #[cold]
    pub(super) fn fail_queues(&mut self, why: Fault) -> usize {
        if self.queue_fault.is_some() {
            return 0;
        }
        log::warn!("{}: {why}", self.about.name);
        self.queue_fault = Some(why);
        for (idx, rail) in self.rails.iter_mut().enumerate().filter(|(_, rail)| rail.is_open) {
            // Nothing can have arrived over one that was never connected.
            (rail.fault, rail.is_told) = (Some(if rail.is_connected { why } else { Fault::Flushed }), false);
            if !self.faulty.contains(&(idx as RailIdx)) {
                self.faulty.push(idx as RailIdx);
            }
        }
        0
    }

    /// Stops and destroys the queue pairs: nothing of them is left to be flushed. False when the device refuses both.
    pub(super) fn destroy(&mut self, rail: RailIdx) -> bool {
        let is_stopped = self.rails[rail as usize].stop();
        // After this nothing more arrives.
        self.set_aside();
        let destroyed = &mut self.rails[rail as usize];
        if let Some((mut writes, mut messages)) = destroyed.pairs.take() {
            self.by_number.remove(&writes.number());
            self.by_number.remove(&messages.number());
            destroyed.is_stuck = !(writes.end() & messages.end() || is_stopped);
            for posted in [&mut destroyed.writes, &mut destroyed.messages] {
                posted.taken = posted.done;
            }
        }
        !destroyed.is_stuck
    }

    /// Empties the queue before a queue pair is destroyed, for devices forget its
    /// completions with it: the peer was told that what arrived has arrived.
    #[cold]
    fn set_aside(&mut self) {
        loop {
            let count = self.fetch();
            if count == 0 {
                return;
            }
            for wc in &self.completions[..count] {
                self.aside.push((*wc, self.by_number.get(&wc.qp_num).copied()));
            }
        }
    }

    #[cold]
    fn report_aside(&mut self, to: &mut impl Completions) {
        for (wc, rail) in std::mem::take(&mut self.aside) {
            match Kind::of(wc.wr_id) {
                kind @ (Kind::Write | Kind::Send) => self.sent(&wc, kind, to),
                kind => self.received(&wc, kind, rail, to),
            }
        }
        self.free.append(&mut self.resting);
    }
}

//! Large operations that come before any stream stands.
//!
//! On the control connection everything small would wait behind them, so they
//! wait themselves: streams are made as soon as a path is. Only when none can be
//! made within a part of their time do they go over the control connection.

use std::sync::atomic::Ordering;

use super::link::TcpLink;
use crate::{lock, read, Failure, Op};

impl TcpLink {
    /// From now on streams are being made: this link carries the data.
    pub fn expect_streams(&self) {
        // ORDERING: with `hold`, which looks again under the lock.
        self.awaits_streams.store(true, Ordering::SeqCst);
    }

    /// Sends what has waited too long for a stream over the control connection,
    /// and whatever comes until one stands.
    pub fn tick(&self, now_ns: u64) {
        let is_late = |op: &Op| {
            let submitted_ns = op.ticket.submitted_ns();
            let patience_ns = PATIENCE_NS.min(op.ticket.deadline_ns().saturating_sub(submitted_ns) / 2);
            now_ns.saturating_sub(submitted_ns) >= patience_ns
        };
        if lock(&self.held).iter().any(is_late) {
            log::debug!("peer {}: no stream can be made; large operations share the control connection", self.peer);
            // ORDERING: before the list is taken; partner: `hold`.
            self.awaits_streams.store(false, Ordering::SeqCst);
            self.release_held();
        }
    }

    /// Keeps a large operation until a stream stands; gives it back when it can
    /// go.
    pub(super) fn hold(&self, op: Op) -> Option<Op> {
        if self.can_go() {
            return Some(op);
        }
        let mut held = lock(&self.held);
        // Looked at again: whoever changes it takes the list afterwards.
        if self.can_go() {
            return Some(op);
        }
        // ORDERING: as above.
        if self.closed.load(Ordering::SeqCst) {
            drop(held);
            op.end(Err(Failure::PeerLost("it was given up".into())));
            return None;
        }
        held.push(op);
        None
    }

    /// Sends what was kept: a stream stands, or none will.
    pub(super) fn release_held(&self) {
        let held = std::mem::take(&mut *lock(&self.held));
        for op in held {
            self.post_write(op);
        }
    }

    /// Ends what was kept and then given up.
    pub(super) fn reap_held(&self) {
        let gone: Vec<_> = lock(&self.held).extract_if(.., |op| op.given_up().is_some()).collect();
        for op in gone {
            let why = op.given_up().unwrap_or(Failure::Cancelled);
            op.end(Err(why));
        }
    }

    /// Ends everything that was kept.
    pub(super) fn fail_held(&self, why: &Failure) {
        let held = std::mem::take(&mut *lock(&self.held));
        held.into_iter().for_each(|op| op.end(Err(why.clone())));
    }

    fn can_go(&self) -> bool {
        let stands = || read(&self.lanes)[1..].iter().any(Option::is_some);
        // ORDERING: see `expect_streams` and `tick`.
        !self.awaits_streams.load(Ordering::SeqCst) || stands()
    }
}

/// Longest wait for a stream: many times what one takes between hosts.
const PATIENCE_NS: u64 = 500_000_000;

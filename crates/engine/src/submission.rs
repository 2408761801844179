//! Operations on their way to a link, and those that wait until their peer has one.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use anyfabric_plan::Extents;
use anyfabric_transports::{lock, BindingState, Failure, Link, Loss, Op, Payload, Region, Ticket};
use anyfabric_wire::{Imm, Refusal};

use crate::gpu::obstacle;
use crate::peer::Peer;
use crate::submit::Prepared;

/// An operation on its way to a link.
pub(crate) struct Submission {
    pub(crate) id: u64,
    pub(crate) content: Content,
    pub(crate) imm: Option<(Imm, u32)>,
    pub(crate) verify: bool,
    pub(crate) ticket: Arc<Ticket>,
}

/// What a submission moves.
pub(crate) enum Content {
    Write {
        source: Arc<Region>,
        region: u64,
        key: u64,
        nbytes: u64,
        /// Where it goes.
        is_on_gpu: bool,
        extents: Extents,
    },
    Signal,
    Message(Vec<u8>),
    /// Nothing: done as soon as there is a path.
    Probe,
}

impl Peer {
    /// Whether nothing waits, so that an operation may pass straight through.
    pub(crate) fn is_clear(&self) -> bool {
        // ORDERING: operations are not ordered; a hint.
        !self.has_waiting.load(Ordering::Relaxed)
    }

    pub(crate) fn push_waiting(&self, submission: Submission) {
        let mut waiting = self.waiting();
        waiting.push_back(submission);
        // ORDERING: under the lock.
        self.has_waiting.store(true, Ordering::Relaxed);
    }

    /// Passes on what can go; true when something did. `has_listened`: what the
    /// peer said has been read.
    pub(crate) fn dispatch_waiting(&self, has_listened: bool) -> bool {
        let is_behind = || self.link().is_some_and(|link| link.follows_control()) && self.base.has_news();
        if self.is_clear() || !has_listened && is_behind() {
            return false;
        }
        let batch = std::mem::take(&mut *self.waiting());
        let mut moved = false;
        let mut kept = VecDeque::new();
        for submission in batch {
            match self.dispatch(submission) {
                Some(submission) => kept.push_back(submission),
                None => moved = true,
            }
        }
        let mut waiting = self.waiting();
        kept.append(&mut waiting);
        *waiting = kept;
        // ORDERING: under the lock.
        self.has_waiting.store(!waiting.is_empty(), Ordering::Relaxed);
        drop(waiting);
        // The end of the engine may have come meanwhile, and not have seen what was in our hands.
        self.lost().into_iter().for_each(|why| self.fail_waiting(why));
        moved
    }

    /// Hands an operation to the link, or gives it back when it must wait.
    fn dispatch(&self, submission: Submission) -> Option<Submission> {
        match self.prepare_op(submission) {
            Prepared::Waits(submission) => return Some(submission),
            Prepared::Op(link, op) => drop(link.post(op)),
            Prepared::Ended => {}
        }
        None
    }

    /// What is to be posted, if it can be now.
    pub(crate) fn prepare_op(&self, submission: Submission) -> Prepared<'_> {
        if let Some(why) = self.lost().cloned().or_else(|| submission.ticket.given_up()) {
            submission.end(why, self);
            return Prepared::Ended;
        }
        // The receiver checks the checksum of framed bytes, on every path.
        let link: &dyn Link = match self.link() {
            None => return Prepared::Waits(submission),
            Some(_) if submission.verify => self.base.as_link(),
            Some(link) if matches!(&submission.content, Content::Message(bytes) if bytes.len() > link.max_message_bytes()) => {
                self.base.as_link()
            }
            Some(link) => &**link,
        };
        // Nothing new goes to a peer that may be gone.
        if !self.base.has_control() && !link.sees_exit() {
            return Prepared::Waits(submission);
        }
        let binding = match &submission.content {
            Content::Write { source, region, key, nbytes, is_on_gpu, .. } => {
                if let Some(why) = obstacle(link, self, source, *is_on_gpu, submission.verify) {
                    submission.end(Failure::Unsupported(why), self);
                    return Prepared::Ended;
                }
                let binding = link.bind(*region, *key, *nbytes);
                match binding.enter() {
                    Ok(()) => Some(binding),
                    Err(BindingState::Refused(refusal)) => {
                        // A link that closes refuses everything: the reason is why it does.
                        submission.end(self.lost().cloned().unwrap_or(Failure::Refused(refusal)), self);
                        return Prepared::Ended;
                    }
                    Err(_) => return Prepared::Waits(submission),
                }
            }
            Content::Message(bytes) if self.takes_at_most() < bytes.len() => {
                submission.end(Failure::Refused(Refusal::TooLarge), self);
                return Prepared::Ended;
            }
            _ => None,
        };
        let Submission { id, content, imm, verify, ticket } = submission;
        let payload = match (content, binding) {
            (Content::Write { source, extents, .. }, Some(binding)) => Payload::Write { source, binding, extents },
            (Content::Message(bytes), _) => Payload::Message(bytes),
            (Content::Signal, _) => Payload::Signal,
            // A probe; a write has a binding.
            _ => {
                ticket.part_ended(Ok(()));
                return Prepared::Ended;
            }
        };
        Prepared::Op(link, Op { id, peer: self.idx, payload, imm, verify, ticket, loss: Loss::default() })
    }

    /// Longest message that the peer takes.
    fn takes_at_most(&self) -> usize {
        self.state().session.as_ref().map_or(usize::MAX, |session| session.max_message_bytes as usize)
    }

    /// Ends everything that waits.
    pub(crate) fn fail_waiting(&self, why: &Failure) {
        let batch = std::mem::take(&mut *self.waiting());
        batch.into_iter().for_each(|submission| submission.end(why.clone(), self));
    }

    /// Ends what waits and was given up.
    pub(crate) fn reap_waiting(&self) {
        if self.is_clear() {
            return;
        }
        let gone = {
            let mut waiting = self.waiting();
            let (gone, kept): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(&mut *waiting).into_iter().partition(|waiting| waiting.ticket.given_up().is_some());
            *waiting = kept;
            gone
        };
        for submission in gone {
            let why = submission.ticket.given_up().unwrap_or(Failure::Cancelled);
            submission.end(why, self);
        }
    }

    /// Whether an operation with that imm waits here.
    pub(crate) fn waits_with(&self, imm: Imm) -> bool {
        self.waiting().iter().any(|waiting| waiting.imm.is_some_and(|(waits, _)| waits == imm))
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Submission>> {
        lock(&self.waiting)
    }
}

impl Submission {
    fn end(self, why: Failure, peer: &Peer) {
        if let Some((imm, _)) = self.imm {
            peer.note_loss(imm);
        }
        self.ticket.fail_by(peer.idx, why.clone());
        self.ticket.part_ended_at(peer.idx, Err(why));
    }
}

//! Submitted operations.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::{Failure, Ticket, TicketState};

use crate::error::seconds;
use crate::inner::Inner;
use crate::peer::Peer;
use crate::{Code, Error, Result};

/// A submitted operation: pending, then done, or failed with one error.
/// Dropping it does not cancel it.
#[derive(Clone)]
pub struct Transfer {
    state: State,
}

/// What the operation was, for its error.
#[derive(Clone)]
pub(crate) struct About {
    pub(crate) operation: &'static str,
    pub(crate) peer: Option<Arc<Peer>>,
    pub(crate) region: Option<u64>,
    pub(crate) nbytes: u64,
}

#[derive(Clone)]
enum State {
    /// Carried out in the caller's thread, from when to when.
    Done { nbytes: u64, interval_ns: Option<(u64, u64)> },
    /// Failed in the caller's thread.
    Failed { nbytes: u64, error: Error },
    /// Somebody carries it out.
    Pending { inner: Arc<Inner>, about: About, ticket: Arc<Ticket> },
}

impl Transfer {
    pub(crate) fn done(nbytes: u64, interval_ns: Option<(u64, u64)>) -> Self {
        Self { state: State::Done { nbytes, interval_ns } }
    }

    pub(crate) fn failed(nbytes: u64, error: Error) -> Self {
        Self { state: State::Failed { nbytes, error } }
    }

    pub(crate) fn pending(inner: Arc<Inner>, about: About, ticket: Arc<Ticket>) -> Self {
        Self { state: State::Pending { inner, about, ticket } }
    }

    /// Whether the outcome is known.
    pub fn is_done(&self) -> bool {
        let State::Pending { inner, ticket, .. } = &self.state else { return true };
        if !ticket.has_ended() {
            inner.glance();
        }
        ticket.has_ended()
    }

    /// Whether no byte of it can move any more.
    pub fn is_quiesced(&self) -> bool {
        match &self.state {
            State::Pending { ticket, .. } => ticket.has_quiesced(),
            State::Done { .. } | State::Failed { .. } => true,
        }
    }

    /// The error, once failed.
    pub fn error(&self) -> Option<Error> {
        match &self.state {
            State::Done { .. } => None,
            State::Failed { error, .. } => Some(error.clone()),
            State::Pending { inner, about, ticket } => match ticket.state() {
                TicketState::Failed(failure) => {
                    let culprit = ticket.culprit().and_then(|peer| inner.peer(peer));
                    let (unfinished, num_peers) =
                        if culprit.is_some() { Default::default() } else { ticket.unfinished() };
                    let unfinished: Vec<_> = unfinished.into_iter().filter_map(|peer| inner.peer(peer)).collect();
                    let peer = about.peer.clone().or(culprit).or_else(|| unfinished.first().cloned());
                    let mut error = About { peer, ..about.clone() }.error(inner, &failure);
                    if num_peers > 1 && !unfinished.is_empty() {
                        error.message += &name_unfinished(&unfinished, num_peers);
                    }
                    Some(error)
                }
                TicketState::Pending | TicketState::Done => None,
            },
        }
    }

    /// Bytes of the operation.
    pub fn nbytes(&self) -> u64 {
        match &self.state {
            State::Done { nbytes, .. } | State::Failed { nbytes, .. } => *nbytes,
            State::Pending { about, .. } => about.nbytes,
        }
    }

    /// When it began and ended, in nanoseconds of CLOCK_MONOTONIC. `None` while
    /// it is pending, and for writes below [`TIMED_BYTES`] that the caller's
    /// thread carried out.
    pub fn interval_ns(&self) -> Option<(u64, u64)> {
        match &self.state {
            State::Done { interval_ns, .. } => *interval_ns,
            State::Failed { .. } => None,
            State::Pending { ticket, .. } => ticket.interval_ns(),
        }
    }

    /// Waits for the outcome; `None` waits for it, which its deadline bounds.
    ///
    /// # Errors
    /// The transfer's error; `WaitTimeout` while it is pending.
    #[inline]
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        match &self.state {
            State::Done { .. } => Ok(()),
            State::Failed { error, .. } => Err(error.clone()),
            State::Pending { inner, about, ticket } => {
                inner.check_fork()?;
                if inner.wait(timeout, || ticket.has_ended()) {
                    return self.error().map_or(Ok(()), Err);
                }
                let message = format!("the {} is still pending after {}", about.operation, seconds(timeout));
                Err(Error::new(Code::WaitTimeout, message).during(about.operation))
            }
        }
    }

    /// Waits until no byte can move any more; after a failure too.
    ///
    /// # Errors
    /// `WaitTimeout`.
    pub fn wait_quiesced(&self, timeout: Option<Duration>) -> Result<()> {
        let State::Pending { inner, about, ticket } = &self.state else { return Ok(()) };
        inner.check_fork()?;
        if inner.wait(timeout, || ticket.has_quiesced()) {
            return Ok(());
        }
        let message = format!("the {} has not quiesced after {}", about.operation, seconds(timeout));
        Err(Error::new(Code::WaitTimeout, message).during(about.operation))
    }

    /// Asks for it not to happen: if it is still pending it fails with
    /// `Cancelled`. Never blocks.
    pub fn cancel(&self) {
        if let State::Pending { inner, ticket, .. } = &self.state {
            ticket.cancel();
            ticket.fail(Failure::Cancelled);
            inner.wake();
        }
    }

    /// Runs `on_end` once when the outcome is known; at once if it is. It must
    /// not block and not call the engine.
    pub fn on_end(&self, on_end: Box<dyn FnOnce() + Send>) {
        match &self.state {
            State::Done { .. } | State::Failed { .. } => on_end(),
            State::Pending { ticket, .. } => ticket.on_end(on_end),
        }
    }
}

impl About {
    pub(crate) fn error(&self, inner: &Inner, failure: &Failure) -> Error {
        let Self { operation, peer, region, nbytes } = self;
        Error::from_failure(failure, inner.context(operation, peer.as_deref(), *region, *nbytes))
    }

    /// That error, of this operation.
    pub(crate) fn name(&self, inner: &Inner, mut error: Error) -> Error {
        let Self { operation, peer, region, nbytes } = self;
        *error.context = inner.context(operation, peer.as_deref(), *region, *nbytes);
        error
    }
}

/// Where an operation with several peers was not done yet, as its error says it.
fn name_unfinished(unfinished: &[Arc<Peer>], num_peers: usize) -> String {
    let named: Vec<_> = unfinished.iter().take(MAX_NAMED).map(|peer| peer.address.to_string()).collect();
    let more = match unfinished.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("; {} of {num_peers} peers had not finished: {}{more}", unfinished.len(), named.join(", "))
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("nbytes", &self.nbytes())
            .field("quiesced", &self.is_quiesced())
            .finish_non_exhaustive()
    }
}

/// Peers that an error names.
const MAX_NAMED: usize = 4;
/// Below this length reading the clock twice would cost more than it tells.
pub(crate) const TIMED_BYTES: u64 = 4096;

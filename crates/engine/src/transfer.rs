//! Submitted operations.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::{Failure, Ticket, TicketState};

use crate::inner::Inner;
use crate::peer::Peer;
use crate::{Code, Error, Result};

/// A submitted operation: pending, then done, or failed with one error.
/// Dropping it does not cancel it.
#[derive(Clone)]
pub struct Transfer {
    inner: Arc<Inner>,
    about: About,
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
    Ended(Option<Failure>, u64, u64),
    Ticket(Arc<Ticket>),
}

impl Transfer {
    pub(crate) fn ended(
        inner: Arc<Inner>,
        about: About,
        result: std::result::Result<(), Failure>,
        began_ns: u64,
    ) -> Self {
        let ended_ns = if about.nbytes >= TIMED_BYTES { inner.clock.now_ns() } else { began_ns };
        Self { inner, about, state: State::Ended(result.err(), began_ns, ended_ns) }
    }

    pub(crate) fn pending(inner: Arc<Inner>, about: About, ticket: Arc<Ticket>) -> Self {
        Self { inner, about, state: State::Ticket(ticket) }
    }

    /// Whether the outcome is known.
    pub fn is_done(&self) -> bool {
        match &self.state {
            State::Ended(..) => true,
            State::Ticket(ticket) => {
                if !ticket.has_ended() {
                    self.inner.glance();
                }
                ticket.has_ended()
            }
        }
    }

    /// Whether no byte of it can move any more.
    pub fn is_quiesced(&self) -> bool {
        match &self.state {
            State::Ended(..) => true,
            State::Ticket(ticket) => ticket.has_quiesced(),
        }
    }

    /// The error, once failed.
    pub fn error(&self) -> Option<Error> {
        let failure = match &self.state {
            State::Ended(failure, ..) => failure.clone()?,
            State::Ticket(ticket) => match ticket.state() {
                TicketState::Failed(failure) => failure,
                TicketState::Pending | TicketState::Done => return None,
            },
        };
        let About { operation, peer, region, nbytes } = &self.about;
        Some(Error::from_failure(&failure, self.inner.context(operation, peer.as_deref(), *region, *nbytes)))
    }

    /// Bytes of the operation.
    pub fn nbytes(&self) -> u64 {
        self.about.nbytes
    }

    /// When it began and ended, in nanoseconds of CLOCK_MONOTONIC; writes
    /// below 4 KiB that the caller's thread carried out have no length.
    pub fn interval_ns(&self) -> Option<(u64, u64)> {
        match &self.state {
            State::Ended(_, began_ns, ended_ns) => Some((*began_ns, *ended_ns)),
            State::Ticket(ticket) => ticket.interval_ns(),
        }
    }

    /// Waits for the outcome; `None` waits for it, which its deadline bounds.
    ///
    /// # Errors
    /// The transfer's error; `WaitTimeout` while it is pending.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        self.inner.check_fork()?;
        if let State::Ticket(ticket) = &self.state {
            if !self.inner.wait(timeout, || ticket.has_ended()) {
                let message = format!("the {} is still pending after {timeout:?}", self.about.operation);
                return Err(Error::new(Code::WaitTimeout, message).during(self.about.operation));
            }
        }
        self.error().map_or(Ok(()), Err)
    }

    /// Waits until no byte can move any more; after a failure too.
    ///
    /// # Errors
    /// `WaitTimeout`.
    pub fn wait_quiesced(&self, timeout: Option<Duration>) -> Result<()> {
        self.inner.check_fork()?;
        let State::Ticket(ticket) = &self.state else { return Ok(()) };
        if self.inner.wait(timeout, || ticket.has_quiesced()) {
            return Ok(());
        }
        let message = format!("the {} has not quiesced within {timeout:?}", self.about.operation);
        Err(Error::new(Code::WaitTimeout, message).during(self.about.operation))
    }

    /// Asks for it not to happen: if it is still pending it fails with
    /// `Cancelled`. Never blocks.
    pub fn cancel(&self) {
        if let State::Ticket(ticket) = &self.state {
            ticket.cancel();
            ticket.fail(Failure::Cancelled);
            self.inner.wake();
        }
    }

    /// Runs `on_end` once when the outcome is known; at once if it is. It must
    /// not block and not call the engine.
    pub fn on_end(&self, on_end: Box<dyn FnOnce() + Send>) {
        match &self.state {
            State::Ended(..) => on_end(),
            State::Ticket(ticket) => ticket.on_end(on_end),
        }
    }
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("operation", &self.about.operation)
            .field("nbytes", &self.about.nbytes)
            .field("quiesced", &self.is_quiesced())
            .finish_non_exhaustive()
    }
}

/// Below this length reading the clock twice would cost more than it tells.
const TIMED_BYTES: u64 = 4096;

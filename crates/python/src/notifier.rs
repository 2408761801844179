//! `Notifier`: a queue of tokens behind an eventfd.
//!
//! Any thread delivers, without the GIL; one Python thread waits or watches the
//! descriptor, which is readable exactly while tokens wait. The queue is bounded
//! by what was armed: a token is delivered once for each time that it was
//! promised.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use anyfabric_engine as native;
use native::transports::lock;
use native::transports::sys::{fork_generation, EventFd};
use pyo3::prelude::*;

use crate::arguments::{duration, Number, Seconds};
use crate::error::exception;
use crate::waiting::wait_until;

/// A queue of finished tokens behind an eventfd.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Notifier {
    queue: Arc<Queue>,
}

impl Notifier {
    /// Where native code delivers.
    pub(crate) fn queue(&self) -> Arc<Queue> {
        Arc::clone(&self.queue)
    }
}

#[pymethods]
impl Notifier {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let fd = EventFd::new().map_err(|error| {
            let message = format!("no eventfd for a notifier: {error}; raise the limit of descriptors (ulimit -n)");
            let error = native::Error::new(native::Code::ResourceExhausted, message);
            exception(py, &error.during("notify"))
        })?;
        let state = State { tokens: Vec::new(), fd: Some(Arc::new(fd)) };
        Ok(Self { queue: Arc::new(Queue { state: Mutex::new(state), generation: fork_generation() }) })
    }

    fn fileno(&self) -> i32 {
        self.queue.open().and_then(|state| Some(state.fd.as_ref()?.as_raw_fd())).unwrap_or(-1)
    }

    fn drain(&self) -> Vec<u64> {
        self.queue.drain()
    }

    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<Seconds>) -> PyResult<Vec<u64>> {
        wait_until(py, duration(timeout_s), |slice| {
            let fd = self.queue.open().and_then(|state| state.fd.clone());
            fd.is_none_or(|fd| fd.wait(slice))
        })?;
        Ok(self.queue.drain())
    }

    fn wake(&self, token: Number) {
        self.queue.deliver(token.0);
    }

    fn close(&self) {
        if let Some(mut state) = self.queue.open() {
            state.tokens.clear();
            // Whoever waits holds the descriptor too, until it has looked.
            if let Some(fd) = state.fd.take() {
                fd.notify();
            }
        }
    }

    fn __repr__(&self) -> String {
        format!("Notifier(fd {})", self.fileno())
    }
}

/// The half that native code shares.
pub(crate) struct Queue {
    state: Mutex<State>,
    generation: u32,
}

struct State {
    tokens: Vec<u64>,
    /// `None` when closed.
    fd: Option<Arc<EventFd>>,
}

impl Queue {
    /// Adds a token; dropped when closed.
    pub(crate) fn deliver(&self, token: u64) {
        let Some(mut state) = self.open() else { return };
        let Some(fd) = state.fd.clone() else { return };
        state.tokens.push(token);
        if state.tokens.len() == 1 {
            fd.notify();
        }
    }

    /// Adds a token unless it waits already.
    pub(crate) fn deliver_once(&self, token: u64) {
        let is_waiting = |state: &State| state.tokens.contains(&token);
        if !self.open().is_none_or(|state| is_waiting(&state)) {
            self.deliver(token);
        }
    }

    fn drain(&self) -> Vec<u64> {
        let Some(mut state) = self.open() else { return Vec::new() };
        if let (Some(fd), false) = (&state.fd, state.tokens.is_empty()) {
            fd.clear();
        }
        std::mem::take(&mut state.tokens)
    }

    /// The state; none in a forked child: the descriptor is the parent's, and the
    /// lock may have been held when it forked.
    fn open(&self) -> Option<MutexGuard<'_, State>> {
        let same_process = self.generation == fork_generation();
        same_process.then(|| lock(&self.state))
    }
}

//! Waiting without the GIL, in slices between which signals are looked for.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyfabric_engine as native;
use pyo3::prelude::*;

use crate::error::{exception, OrRaise};

/// Calls `step`, which waits at most as long as it is told, until it returns
/// something else than `WaitTimeout`, or `timeout` has passed.
///
/// `late` says for which time, and for what, the wait was in vain.
pub(crate) fn wait<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    step: impl Fn(Duration) -> native::Result<T> + Sync,
    late: impl FnOnce(&str) -> String,
) -> PyResult<T> {
    let result = wait_outcome(py, timeout, step)?;
    result
        .map_err(|mut error| {
            if error.code == native::Code::WaitTimeout {
                error.message = late(&format!("{} s", timeout.unwrap_or_default().as_secs_f64()));
            }
            error
        })
        .or_raise(py)
}

/// As [`wait`]; leaves it to the caller what to raise. Fails by itself only
/// when a signal's handler raised.
pub(crate) fn wait_outcome<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    step: impl Fn(Duration) -> native::Result<T> + Sync,
) -> PyResult<native::Result<T>> {
    let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut left = timeout;
    loop {
        let slice = SLICE.min(left.unwrap_or(SLICE));
        let result = py.detach(|| step(slice));
        match &result {
            Err(error) if error.code == native::Code::WaitTimeout => {}
            _ => return Ok(result),
        }
        py.check_signals()?;
        left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(result);
        }
    }
}

/// As [`wait`], for what is a plain question; false when the time is over.
pub(crate) fn wait_until(
    py: Python<'_>,
    timeout: Option<Duration>,
    step: impl Fn(Duration) -> bool + Sync,
) -> PyResult<bool> {
    let late = || native::Error::new(native::Code::WaitTimeout, "");
    match wait_outcome(py, timeout, |slice| if step(slice) { Ok(()) } else { Err(late()) })? {
        Ok(()) => Ok(true),
        Err(error) if error.code == native::Code::WaitTimeout => Ok(false),
        Err(error) => Err(exception(py, &error)),
    }
}

/// For what waits in one call and asks now and then whether it shall go on:
/// until a signal's handler raises.
pub(crate) fn while_no_signal<T: Send>(
    py: Python<'_>,
    wait: impl FnOnce(&dyn Fn() -> bool) -> T + Send,
) -> PyResult<T> {
    let (result, raised) = py.detach(|| {
        let raised = RefCell::new(None);
        let result = wait(&|| {
            *raised.borrow_mut() = Python::attach(|py| py.check_signals()).err();
            raised.borrow().is_none()
        });
        (result, raised.into_inner())
    });
    raised.map_or(Ok(result), Err)
}

/// Longest time between two looks for signals.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

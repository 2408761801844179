//! `Transfer`.

use std::sync::OnceLock;
use std::time::Duration;

use anyfabric_engine as native;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::arguments::{duration, Number, Seconds};
use crate::engine::Engine;
use crate::error::{exception, exception_object, OrRaise};
use crate::hooks;
use crate::notifier::Notifier;
use crate::waiting::{wait, wait_outcome};

/// A submitted operation.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Transfer {
    native: native::Transfer,
    engine: Py<Engine>,
    /// Made once: everybody gets the same object.
    error: OnceLock<Py<PyAny>>,
}

impl Transfer {
    pub(crate) fn new(native: native::Transfer, engine: &Bound<'_, Engine>) -> Self {
        Self { native, engine: engine.clone().unbind(), error: OnceLock::new() }
    }

    fn error_object(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        if let Some(error) = self.error.get() {
            return Ok(Some(error.clone_ref(py)));
        }
        let Some(error) = self.native.error() else { return Ok(None) };
        // Made outside of the lock: making it runs Python, which may let another thread run.
        let error = exception_object(py, &error)?.unbind();
        Ok(Some(self.error.get_or_init(|| error).clone_ref(py)))
    }

    /// The outcome of a wait as Python sees it.
    fn raise(&self, py: Python<'_>, mut error: native::Error, timeout: Option<Duration>) -> PyErr {
        match error.code {
            native::Code::WaitTimeout => {
                let operation = error.context.operation.unwrap_or("transfer");
                error.message = format!(
                    "the {operation} of {} bytes is still pending after {} s; it goes on",
                    self.native.nbytes(),
                    timeout.unwrap_or_default().as_secs_f64()
                );
                exception(py, &error)
            }
            native::Code::EngineForked => exception(py, &error),
            _ => match self.error_object(py) {
                Ok(Some(object)) => PyErr::from_value(object.into_bound(py)),
                Ok(None) => exception(py, &error),
                Err(failed) => failed,
            },
        }
    }
}

#[pymethods]
impl Transfer {
    #[getter]
    fn done(&self) -> bool {
        self.native.is_done()
    }

    #[getter]
    fn failed(&self) -> bool {
        self.native.is_done() && self.native.error().is_some()
    }

    #[getter]
    fn quiesced(&self) -> bool {
        self.native.is_quiesced()
    }

    #[getter]
    fn error(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.error_object(py)
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.native.nbytes()
    }

    #[getter]
    fn interval_ns(&self) -> Option<(u64, u64)> {
        self.native.interval_ns()
    }

    #[getter]
    fn _engine(&self, py: Python<'_>) -> Py<Engine> {
        self.engine.clone_ref(py)
    }

    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<Seconds>) -> PyResult<()> {
        let timeout = duration(timeout_s);
        let result = if self.native.is_done() {
            self.native.wait(Some(Duration::ZERO))
        } else {
            wait_outcome(py, timeout, |slice| self.native.wait(Some(slice)))?
        };
        result.map_err(|error| self.raise(py, error, timeout))
    }

    #[pyo3(signature = (timeout_s=None))]
    fn wait_quiesced(&self, py: Python<'_>, timeout_s: Option<Seconds>) -> PyResult<()> {
        let late = |after: &str| {
            format!("bytes of the {} bytes of the transfer can still move after {after}", self.native.nbytes())
        };
        wait(py, duration(timeout_s), |slice| self.native.wait_quiesced(Some(slice)), late)
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.engine.get().native.check_fork().or_raise(py)?;
        self.native.cancel();
        Ok(())
    }

    fn on_done(slf: &Bound<'_, Self>, callback: Bound<'_, PyAny>) -> PyResult<()> {
        let py = slf.py();
        hooks::call(py, pyo3::intern!(py, "on_done"), (slf, callback))?;
        Ok(())
    }

    fn _notify(&self, py: Python<'_>, notifier: &Notifier, token: Number) -> PyResult<()> {
        self.engine.get().native.check_fork().or_raise(py)?;
        let queue = notifier.queue();
        self.native.on_end(Box::new(move || queue.deliver(token.0)));
        Ok(())
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        hooks::call(py, pyo3::intern!(py, "await_transfer"), (slf,))
    }

    fn __repr__(&self) -> String {
        let state = match self.native.error() {
            Some(error) => format!("failed: {error}"),
            None if self.native.is_done() => "done".to_owned(),
            None => "pending".to_owned(),
        };
        format!("Transfer({} bytes, {state})", self.native.nbytes())
    }

    /// The error's traceback may lead back here.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.engine)?;
        visit.call(self.error.get())
    }
}

//! `Counter`.

use anyfabric_engine as native;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::arguments::{duration, Number, Seconds};
use crate::engine::Engine;
use crate::error::OrRaise;
use crate::hooks;
use crate::notifier::Notifier;
use crate::waiting::wait;

/// The arrivals of one immediate at one engine.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Counter {
    native: native::Counter,
    engine: Py<Engine>,
}

impl Counter {
    pub(crate) fn new(native: native::Counter, engine: &Bound<'_, Engine>) -> Self {
        Self { native, engine: engine.clone().unbind() }
    }
}

#[pymethods]
impl Counter {
    #[getter]
    fn imm(&self) -> u32 {
        self.native.imm().value()
    }

    #[getter]
    fn value(&self) -> u64 {
        self.native.value()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.native.is_closed()
    }

    #[pyo3(signature = (n, timeout_s=None))]
    fn wait(&self, py: Python<'_>, n: Number, timeout_s: Option<Seconds>) -> PyResult<()> {
        let Number(n) = n;
        self.engine.get().native.check_fork().or_raise(py)?;
        // Whether it is there already is seen with the GIL: giving it up costs more than looking.
        if self.native.value() >= n {
            return Ok(());
        }
        let late = |after: &str| format!("imm {}: {} of {n} arrivals after {after}", self.imm(), self.native.value());
        wait(py, duration(timeout_s), |slice| self.native.wait(n, Some(slice)), late)
    }

    #[pyo3(signature = (n, *, timeout_s=None))]
    fn reached<'py>(
        slf: &Bound<'py, Self>,
        n: Bound<'py, PyAny>,
        timeout_s: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        hooks::call(py, pyo3::intern!(py, "counter_reached"), (slf, n, timeout_s))
    }

    fn _notify(&self, py: Python<'_>, n: Number, notifier: &Notifier, token: Number) -> PyResult<(u64, u64)> {
        self.engine.get().native.check_fork().or_raise(py)?;
        let queue = notifier.queue();
        Ok(self.native.on_settled(n.0, Box::new(move || queue.deliver(token.0))).to_parts())
    }

    fn _give_up(&self, waiter: (u64, u64)) {
        self.native.give_up(native::Waiter::from_parts(waiter));
    }

    fn close(&self) {
        self.native.close();
    }

    fn __enter__<'a, 'py>(slf: &'a Bound<'py, Self>) -> &'a Bound<'py, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(&self, exc_type: &Bound<'_, PyAny>, exc_value: &Bound<'_, PyAny>, traceback: &Bound<'_, PyAny>) {
        let _ = (exc_type, exc_value, traceback);
        self.close();
    }

    fn __repr__(&self) -> String {
        format!("Counter(imm {}, value {})", self.imm(), self.native.value())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.engine)
    }
}

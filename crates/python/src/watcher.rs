//! `Watcher`.

use anyfabric_engine as native;
use native::Operation;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::arguments::{Imm, Number};
use crate::descriptor::{destination, Descriptor};
use crate::engine::Engine;
use crate::error::OrRaise;
use crate::hooks;
use crate::pages::{page_list, NativePages};
use crate::region::{source, Region};
use crate::transfer::Transfer;

/// A 64-bit word and the operations that fire when it reaches a value.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Watcher {
    native: native::Watcher,
    engine: Py<Engine>,
}

impl Watcher {
    pub(crate) fn new(native: native::Watcher, engine: &Bound<'_, Engine>) -> Self {
        Self { native, engine: engine.clone().unbind() }
    }

    fn arm(&self, py: Python<'_>, value: Number, operation: Operation, imm: Option<Imm>) -> PyResult<Transfer> {
        let imm = imm.map(|Imm(imm)| imm);
        let transfer = py.detach(|| self.native.at(value.0, operation, imm)).or_raise(py)?;
        Ok(Transfer::new(transfer, self.engine.bind(py)))
    }
}

#[pymethods]
impl Watcher {
    #[getter]
    fn value(&self) -> u64 {
        self.native.value()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.native.is_closed()
    }

    #[getter]
    fn _address(&self) -> usize {
        self.native.as_ptr().map_or(0, |word| word as usize)
    }

    fn set(&self, py: Python<'_>, value: Number) -> PyResult<()> {
        py.detach(|| self.native.set(value.0)).or_raise(py)
    }

    #[pyo3(signature = (n=Number(1)), text_signature = "($self, n=1)")]
    fn add(&self, py: Python<'_>, n: Number) -> PyResult<u64> {
        py.detach(|| self.native.add(n.0)).or_raise(py)
    }

    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        slf.get().engine.get().native.check_open().or_raise(py)?;
        slf.get().native.as_ptr().or_raise(py)?;
        hooks::call(py, pyo3::intern!(py, "watcher_numpy"), (slf,))
    }

    fn at<'py>(
        slf: &Bound<'py, Self>,
        value: Bound<'py, PyAny>,
        operation: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        hooks::call(py, pyo3::intern!(py, "watcher_at"), (slf, value, operation))
    }

    #[pyo3(signature = (value, src, dst, imm))]
    fn _at_write(
        &self,
        py: Python<'_>,
        value: Number,
        src: &Bound<'_, PyAny>,
        dst: &Bound<'_, PyAny>,
        imm: Option<Imm>,
    ) -> PyResult<Transfer> {
        let operation = Operation::Write { src: source(src)?, dst: destination(dst)? };
        self.arm(py, value, operation, imm)
    }

    #[allow(clippy::too_many_arguments, reason = "the contract of the stub; nobody else calls it")]
    #[pyo3(signature = (value, src, src_pages, dst, dst_pages, imm))]
    fn _at_write_pages(
        &self,
        py: Python<'_>,
        value: Number,
        src: &Bound<'_, Region>,
        src_pages: NativePages,
        dst: &Bound<'_, Descriptor>,
        dst_pages: NativePages,
        imm: Option<Imm>,
    ) -> PyResult<Transfer> {
        // SAFETY: the contract of the stub: the caller holds both arrays through the call.
        let (src_pages, dst_pages) = unsafe { (page_list(src_pages), page_list(dst_pages)) };
        let (src, dst) = (source(src)?, destination(dst)?);
        self.arm(py, value, Operation::WritePages { src, src_pages, dst, dst_pages }, imm)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.native.close());
    }

    fn __repr__(&self) -> String {
        format!("Watcher(value {})", self.native.value())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.engine)
    }
}

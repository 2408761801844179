//! `Region` and `Slice`.
//!
//! A region holds what it was registered with until it is closed; views of it
//! hold it on their own account (`anyfabric.memory`). Allocated memory stays
//! mapped as long as the `Region` object lives, for its views hold that.

use std::sync::{Arc, Mutex, MutexGuard};

use anyfabric_engine as native;
use native::transports::lock;
use pyo3::prelude::*;
use pyo3::types::PySlice;
use pyo3::{PyTraverseError, PyVisit};

use crate::address::Peer;
use crate::arguments::{range_of, wrong_kind, Seconds};
use crate::descriptor::Descriptor;
use crate::engine::Engine;
use crate::error::{exception, OrRaise};
use crate::hooks;
use crate::waiting::while_no_signal;

/// Memory registered with an engine.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Region {
    state: Mutex<State>,
    engine: Py<Engine>,
    id: u64,
    nbytes: u64,
    writable: bool,
    device: String,
}

struct State {
    /// `None` once closed, unless the memory is the engine's own.
    native: Option<Arc<native::Region>>,
    owner: Option<Py<PyAny>>,
    /// Some `close` has come to its end.
    is_closed: bool,
}

impl State {
    /// The end of a `close`: what a closed region holds no longer.
    fn release(&mut self) -> (Option<Arc<native::Region>>, Option<Py<PyAny>>) {
        self.is_closed = true;
        let owner = self.owner.take();
        let native = if owner.is_some() { self.native.take() } else { None };
        (native, owner)
    }
}

impl Region {
    pub(crate) fn new(native: native::Region, owner: Option<Py<PyAny>>, engine: &Bound<'_, Engine>) -> Self {
        let (id, nbytes, writable, device) = (native.id(), native.nbytes(), native.is_writable(), native.device());
        let state = Mutex::new(State { native: Some(Arc::new(native)), owner, is_closed: false });
        Self { state, engine: engine.clone().unbind(), id, nbytes, writable, device }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The region, unless it is closed.
    pub(crate) fn open(&self, py: Python<'_>, operation: &'static str) -> PyResult<Arc<native::Region>> {
        self.engine.get().native.check_open().map_err(|error| error.during(operation)).or_raise(py)?;
        let region = self.state().native.clone().filter(|region| !region.is_closed());
        region.ok_or_else(|| self.closed_error(py, operation))
    }

    /// Bytes of it, for a write.
    fn source(&self, py: Python<'_>, offset: u64, nbytes: u64) -> PyResult<native::Slice> {
        let state = self.state();
        match &state.native {
            Some(region) => region.slice(offset..offset + nbytes).or_raise(py),
            None => {
                drop(state);
                Err(self.closed_error(py, "write"))
            }
        }
    }

    #[cold]
    fn closed_error(&self, py: Python<'_>, operation: &'static str) -> PyErr {
        let error = native::Error::new(native::Code::Closed, format!("region {} is closed", self.id));
        let mut error = error.during(operation);
        error.context.region = Some(self.id);
        exception(py, &error)
    }
}

#[pymethods]
impl Region {
    #[getter]
    fn nbytes(&self) -> u64 {
        self.nbytes
    }

    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    #[getter]
    fn writable(&self) -> bool {
        self.writable
    }

    #[getter]
    fn device(&self) -> &str {
        &self.device
    }

    #[getter]
    fn closed(&self) -> bool {
        self.state().native.as_ref().is_none_or(|region| region.is_closed())
    }

    #[getter]
    fn _address(&self) -> usize {
        let state = self.state();
        let region = state.native.as_ref().filter(|region| !region.is_closed());
        region.map_or(0, |region| region.as_ptr() as usize)
    }

    #[getter]
    fn _owner(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.state().owner.as_ref().map(|owner| owner.clone_ref(py))
    }

    fn __len__(&self) -> usize {
        self.nbytes as usize
    }

    fn __getitem__(slf: &Bound<'_, Self>, key: &Bound<'_, PySlice>) -> PyResult<Slice> {
        let range = range_of(key, slf.get().nbytes)?;
        Ok(Slice { region: slf.clone().unbind(), offset: range.start, nbytes: range.end - range.start })
    }

    fn descriptor(&self, py: Python<'_>) -> PyResult<Descriptor> {
        let descriptor = self.open(py, "descriptor")?.descriptor().or_raise(py)?;
        Ok(Descriptor::new(descriptor.into()))
    }

    #[pyo3(signature = (dtype=None, shape=None), text_signature = "($self, dtype='uint8', shape=None)")]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        slf.get().open(py, "view")?;
        let dtype = dtype.unwrap_or_else(|| pyo3::intern!(py, "uint8").clone().into_any());
        hooks::call(py, pyo3::intern!(py, "region_numpy"), (slf, dtype, shape))
    }

    #[pyo3(signature = (dtype=None, shape=None))]
    fn torch<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        slf.get().open(py, "view")?;
        hooks::call(py, pyo3::intern!(py, "region_torch"), (slf, dtype, shape))
    }

    #[pyo3(signature = (peer=None, *, timeout_s=Seconds::ONE), text_signature = "($self, peer=None, *, timeout_s=1.0)")]
    fn revoke(&self, py: Python<'_>, peer: Option<Peer<'_>>, timeout_s: Seconds) -> PyResult<()> {
        let Seconds(timeout) = timeout_s;
        let region = self.open(py, "revoke")?;
        let peer = peer.as_ref().map(Peer::native);
        while_no_signal(py, |goes_on| region.revoke_while(peer, timeout, goes_on))?.or_raise(py)
    }

    #[pyo3(signature = (peer=None, *, timeout_s=None), text_signature = "($self, peer=None, *, timeout_s=1.0)")]
    fn revoke_async<'py>(
        slf: &Bound<'py, Self>,
        peer: Option<Peer<'py>>,
        timeout_s: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, peer) = (slf.py(), peer.map(Py::from));
        hooks::call(py, pyo3::intern!(py, "revoke_async"), (slf, peer, timeout_s.unwrap_or(1.0)))
    }

    #[pyo3(signature = (*, timeout_s=Seconds::ONE), text_signature = "($self, *, timeout_s=1.0)")]
    fn close(&self, py: Python<'_>, timeout_s: Seconds) -> PyResult<()> {
        let Seconds(timeout) = timeout_s;
        // Whoever comes while another thread closes waits as that one does.
        let region = Some(self.state()).filter(|state| !state.is_closed).and_then(|state| state.native.clone());
        let Some(region) = region else { return Ok(()) };
        if self.engine.get().native.check_fork().is_err() {
            return Ok(());
        }
        let waited = while_no_signal(py, |goes_on| region.close_while(timeout, goes_on));
        let released = self.state().release();
        drop(released);
        waited
    }

    fn __repr__(&self) -> String {
        let closed = if self.closed() { ", closed" } else { "" };
        let device = if self.device == "cpu" { String::new() } else { format!(" on {}", self.device) };
        format!("Region({}, {} bytes{device}{closed})", self.id, self.nbytes)
    }

    /// The owner is not visited: the engine holds it too, so that it is never
    /// garbage before the region is.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.engine)
    }
}

/// A byte range of a region.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Slice {
    region: Py<Region>,
    offset: u64,
    nbytes: u64,
}

#[pymethods]
impl Slice {
    #[getter]
    fn region(&self, py: Python<'_>) -> Py<Region> {
        self.region.clone_ref(py)
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.offset
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.nbytes
    }

    fn __len__(&self) -> usize {
        self.nbytes as usize
    }

    fn __getitem__(&self, py: Python<'_>, key: &Bound<'_, PySlice>) -> PyResult<Self> {
        let range = range_of(key, self.nbytes)?;
        let (offset, nbytes) = (self.offset + range.start, range.end - range.start);
        Ok(Self { region: self.region.clone_ref(py), offset, nbytes })
    }

    fn __repr__(&self) -> String {
        format!("Slice({}..{} of region {})", self.offset, self.offset + self.nbytes, self.region.get().id)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.region)
    }
}

/// The source of a write: a region or a slice of one.
#[inline]
pub(crate) fn source(given: &Bound<'_, PyAny>) -> PyResult<native::Slice> {
    let py = given.py();
    if let Ok(slice) = given.cast::<Slice>() {
        let Slice { region, offset, nbytes } = slice.get();
        region.get().source(py, *offset, *nbytes)
    } else if let Ok(region) = given.cast::<Region>() {
        region.get().source(py, 0, region.get().nbytes)
    } else {
        Err(wrong_type("src", "a Region or a Slice of one", given))
    }
}

#[cold]
pub(crate) fn wrong_type(name: &str, expected: &str, given: &Bound<'_, PyAny>) -> PyErr {
    wrong_kind(&format!("`{name}` must be {expected}"), given)
}

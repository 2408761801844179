//! `Message`.

use anyfabric_engine as native;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::address::Address;

/// A received message.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Message {
    data: Py<PyBytes>,
    source: Py<Address>,
}

impl Message {
    pub(crate) fn new(py: Python<'_>, message: native::Message) -> PyResult<Self> {
        let data = PyBytes::new(py, &message.data).unbind();
        Ok(Self { data, source: Py::new(py, Address { native: message.source })? })
    }
}

#[pymethods]
impl Message {
    #[getter]
    fn data(&self, py: Python<'_>) -> Py<PyBytes> {
        self.data.clone_ref(py)
    }

    #[getter]
    fn source(&self, py: Python<'_>) -> Py<Address> {
        self.source.clone_ref(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Message({} bytes from {})", self.data.bind(py).len()?, self.source.get().native))
    }
}

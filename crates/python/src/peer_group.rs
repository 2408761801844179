//! `PeerGroup`.

use anyfabric_engine as native;
use pyo3::prelude::*;

use crate::address::Address;

/// An ordered list of peers with prepared paths.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct PeerGroup {
    pub(crate) native: native::PeerGroup,
    pub(crate) addresses: Vec<Py<Address>>,
}

#[pymethods]
impl PeerGroup {
    #[getter]
    fn addresses(&self, py: Python<'_>) -> Vec<Py<Address>> {
        self.addresses.iter().map(|address| address.clone_ref(py)).collect()
    }

    fn __len__(&self) -> usize {
        self.addresses.len()
    }

    fn __repr__(&self) -> String {
        format!("PeerGroup({} peers)", self.addresses.len())
    }
}

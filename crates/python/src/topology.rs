//! What Linux and the GPUs' driver say of the machine, and the groups chosen on it.

use std::path::Path;

use anyfabric_engine as native;
use pyo3::prelude::*;

use crate::engine::json;
use crate::error::OrRaise;

/// `anyfabric.topology.read_topology` as JSON.
#[pyfunction]
#[pyo3(signature = (root, nics, nics_per_device))]
pub(crate) fn topology_json(
    py: Python<'_>,
    root: &str,
    nics: Vec<String>,
    nics_per_device: Option<usize>,
) -> PyResult<String> {
    let found = py.detach(|| native::topology(Path::new(root), &nics, nics_per_device));
    json(py, &found)
}

/// The GPUs as their driver describes them, as JSON.
#[pyfunction]
#[pyo3(signature = (library))]
pub(crate) fn gpus_json(py: Python<'_>, library: Option<String>) -> PyResult<String> {
    let found = py.detach(|| native::gpus(library.as_deref())).or_raise(py)?;
    json(py, &found)
}

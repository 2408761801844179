//! `Address`.

use anyfabric_engine as native;
use anyfabric_wire::WireError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyType};

use crate::arguments::wrong_kind;
use crate::error::invalid;

/// Where an engine is reached, and which life of it.
#[pyclass(frozen, eq, hash, module = "anyfabric._core")]
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Address {
    pub(crate) native: native::Address,
}

#[pymethods]
impl Address {
    #[classmethod]
    fn parse(cls: &Bound<'_, PyType>, text: &Bound<'_, PyString>) -> PyResult<Self> {
        // Lossily: what cannot be encoded, as a lone surrogate, is in no address.
        parsed(cls.py(), &text.to_string_lossy())
    }

    #[classmethod]
    fn from_bytes(cls: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        let text = std::str::from_utf8(data).map_err(|error| invalid(cls.py(), format!("no address: {error}")))?;
        parsed(cls.py(), text)
    }

    /// The text: it says all there is, and every version reads it.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.native.to_string().as_bytes())
    }

    #[getter]
    fn incarnation(&self) -> String {
        self.native.engine.to_string()
    }

    #[getter]
    fn sockets(&self) -> Vec<String> {
        self.native.sockets.iter().map(ToString::to_string).collect()
    }

    fn __str__(&self) -> String {
        self.native.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Address({})", self.native)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let from_bytes = slf.get_type().getattr(pyo3::intern!(slf.py(), "from_bytes"))?;
        Ok((from_bytes, (slf.get().to_bytes(slf.py()),)))
    }
}

/// An address as an argument.
pub(crate) struct Peer<'py>(Bound<'py, Address>);

/// Several of them, in whatever is a sequence.
pub(crate) struct Peers<'py>(pub(crate) Vec<Peer<'py>>);

impl<'py> FromPyObject<'_, 'py> for Peer<'py> {
    type Error = PyErr;

    #[inline]
    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let refused = |_| wrong_kind("expected an Address, which `Address.parse` makes of text", &given);
        given.cast::<Address>().map(|address| Self(address.to_owned())).map_err(refused)
    }
}

impl<'py> FromPyObject<'_, 'py> for Peers<'py> {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let refused = |_| wrong_kind("expected a list of Addresses", &given);
        let listed: Vec<Bound<'py, PyAny>> = given.extract().map_err(refused)?;
        listed.iter().map(|one| one.extract()).collect::<PyResult<_>>().map(Self)
    }
}

impl Peer<'_> {
    pub(crate) fn native(&self) -> &native::Address {
        &self.0.get().native
    }
}

impl Peers<'_> {
    pub(crate) fn native(&self) -> Vec<native::Address> {
        self.0.iter().map(|peer| peer.native().clone()).collect()
    }
}

impl From<Peer<'_>> for Py<Address> {
    fn from(peer: Peer<'_>) -> Self {
        peer.0.unbind()
    }
}

fn parsed(py: Python<'_>, text: &str) -> PyResult<Address> {
    let native = text.parse();
    native.map(|native| Address { native }).map_err(|error: WireError| invalid(py, error.to_string()))
}

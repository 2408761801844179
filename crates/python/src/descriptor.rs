//! `Descriptor` and `RemoteSlice`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;

use anyfabric_engine as native;
use anyfabric_wire::Device;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PySlice, PyType};

use crate::address::Address;
use crate::arguments::range_of;
use crate::error::OrRaise;

/// What a peer needs to write into a region.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct Descriptor {
    /// One for the object's life: it remembers how the region is reached.
    pub(crate) native: native::Remote,
    address: OnceLock<Py<Address>>,
}

impl Descriptor {
    pub(crate) fn new(native: native::Remote) -> Self {
        Self { native, address: OnceLock::new() }
    }
}

#[pymethods]
impl Descriptor {
    #[classmethod]
    fn from_bytes(cls: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        native::Remote::decode(data).map(Self::new).or_raise(cls.py())
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.native.descriptor().encode())
    }

    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<Py<Address>> {
        if let Some(address) = self.address.get() {
            return Ok(address.clone_ref(py));
        }
        let address = Py::new(py, Address { native: self.native.address().clone() })?;
        Ok(self.address.get_or_init(|| address).clone_ref(py))
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.native.nbytes()
    }

    #[getter]
    fn device(&self) -> String {
        match self.native.descriptor().device {
            Device::Host => "cpu".into(),
            Device::Cuda(uuid) => format!("cuda:{:032x}", u128::from_be_bytes(uuid)),
        }
    }

    fn __len__(&self) -> usize {
        self.native.nbytes() as usize
    }

    fn __getitem__(slf: &Bound<'_, Self>, key: &Bound<'_, PySlice>) -> PyResult<RemoteSlice> {
        let remote = &slf.get().native;
        let range = range_of(key, remote.nbytes())?;
        Ok(RemoteSlice { native: remote.slice(range).or_raise(slf.py())?, descriptor: slf.clone().unbind() })
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| self.native.descriptor() == other.get().native.descriptor())
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.native.descriptor().hash(&mut hasher);
        hasher.finish()
    }

    /// Never the key.
    fn __repr__(&self) -> String {
        let descriptor = self.native.descriptor();
        format!("Descriptor(region {} of {}, {} bytes)", descriptor.region, descriptor.address, descriptor.nbytes)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let from_bytes = slf.get_type().getattr(pyo3::intern!(slf.py(), "from_bytes"))?;
        Ok((from_bytes, (slf.get().to_bytes(slf.py()),)))
    }
}

/// A byte range of a peer's region.
#[pyclass(frozen, module = "anyfabric._core")]
pub(crate) struct RemoteSlice {
    pub(crate) native: native::RemoteSlice,
    descriptor: Py<Descriptor>,
}

#[pymethods]
impl RemoteSlice {
    #[getter]
    fn descriptor(&self, py: Python<'_>) -> Py<Descriptor> {
        self.descriptor.clone_ref(py)
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.native.offset()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.native.nbytes()
    }

    fn __len__(&self) -> usize {
        self.native.nbytes() as usize
    }

    fn __getitem__(&self, py: Python<'_>, key: &Bound<'_, PySlice>) -> PyResult<Self> {
        let range = range_of(key, self.native.nbytes())?;
        Ok(Self { native: self.native.slice(range).or_raise(py)?, descriptor: self.descriptor.clone_ref(py) })
    }

    fn __repr__(&self) -> String {
        let (offset, end) = (self.native.offset(), self.native.offset() + self.native.nbytes());
        let native = self.native.remote();
        let descriptor = native.descriptor();
        format!("RemoteSlice({offset}..{end} of region {} of {})", descriptor.region, descriptor.address)
    }
}

/// The destination of an operation: a peer's region or a slice of one.
#[inline]
pub(crate) fn destination(given: &Bound<'_, PyAny>) -> PyResult<native::RemoteSlice> {
    if let Ok(slice) = given.cast::<RemoteSlice>() {
        Ok(slice.get().native.clone())
    } else if let Ok(descriptor) = given.cast::<Descriptor>() {
        Ok((&descriptor.get().native).into())
    } else {
        Err(crate::region::wrong_type("dst", "a Descriptor or a RemoteSlice of one", given))
    }
}

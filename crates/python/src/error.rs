//! Errors of the engine as exceptions of `anyfabric.errors`.

use anyfabric_engine as native;
use pyo3::prelude::*;

use crate::hooks;

/// Raises the errors of the engine.
pub(crate) trait OrRaise<T> {
    /// The value, or the exception for the error.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for Result<T, native::Error> {
    #[inline]
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| exception(py, &error))
    }
}

/// What to raise for an error.
#[cold]
pub(crate) fn exception(py: Python<'_>, error: &native::Error) -> PyErr {
    exception_object(py, error).map_or_else(|failed| failed, PyErr::from_value)
}

/// The exception itself.
pub(crate) fn exception_object<'py>(py: Python<'py>, error: &native::Error) -> PyResult<Bound<'py, PyAny>> {
    let native::Context { operation, peer, region, nbytes, path } = &*error.context;
    let arguments = (error.code.as_str(), &error.message, operation, peer, region, nbytes, path);
    hooks::call(py, pyo3::intern!(py, "make_error"), arguments)
}

/// An `InvalidArgument` of the conversion itself.
#[cold]
pub(crate) fn invalid(py: Python<'_>, message: String) -> PyErr {
    exception(py, &native::Error::invalid(message))
}

/// Every code that is raised, in the order of the enum.
#[pyfunction]
pub(crate) fn error_codes() -> Vec<&'static str> {
    native::Code::ALL.iter().map(|code| code.as_str()).collect()
}

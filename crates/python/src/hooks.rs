//! Calls into `anyfabric._hooks`, which is looked up with the first engine, or at
//! its first use before: the package is not there yet while this module is
//! imported. It imports the hooks itself, so that a process that can open no file
//! any more is told so.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple};

/// Looks the hooks up now: nothing can be imported once the interpreter ends, and
/// whoever uses an engine then (in a `__del__`) is to be told `Closed`.
pub(crate) fn find(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static HOOKS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let hooks = HOOKS.get_or_try_init(py, || py.import("anyfabric._hooks").map(Bound::unbind))?;
    Ok(hooks.bind(py))
}

/// Calls a hook.
pub(crate) fn call<'py>(
    py: Python<'py>,
    name: &Bound<'py, PyString>,
    arguments: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
) -> PyResult<Bound<'py, PyAny>> {
    let hook = find(py)?.getattr(name)?;
    let arguments = arguments.into_pyobject(py)?;
    // The last that is made, and nothing of ours or of PyO3's below: what a thread without the GIL dropped on its way here
    // would be taken from under others.
    let parks = ParksWhenUnwound;
    // SAFETY: both live through the call, which returns a reference of its own, or none and an exception.
    let answer = unsafe { PyObject_CallObject(hook.as_ptr(), arguments.as_ptr()) };
    std::mem::forget(parks);
    // SAFETY: as above.
    unsafe { Bound::from_owned_ptr_or_err(py, answer) }
}

/// Python before 3.14 unwinds a daemon thread that wants the GIL once the
/// interpreter ends, and Rust would abort the process for it: the thread sleeps
/// until the process is gone.
struct ParksWhenUnwound;

impl Drop for ParksWhenUnwound {
    fn drop(&mut self) {
        while !std::thread::panicking() {
            std::thread::park();
        }
    }
}

unsafe extern "C-unwind" {
    /// As in PyO3, for which it never unwinds: then nothing would be dropped here.
    fn PyObject_CallObject(callable: *mut ffi::PyObject, arguments: *mut ffi::PyObject) -> *mut ffi::PyObject;
}

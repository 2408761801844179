//! Calls into `anyfabric._hooks`, which is looked up on first use: the package
//! is not there yet while this module is imported. It imports the hooks itself, so
//! that a process that can open no file any more is told so.

use pyo3::call::PyCallArgs;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

/// Calls a hook.
pub(crate) fn call<'py>(
    py: Python<'py>,
    name: &Bound<'py, PyString>,
    arguments: impl PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    static HOOKS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let hooks = HOOKS.get_or_try_init(py, || py.import("anyfabric._hooks").map(Bound::unbind))?;
    let parks = ParksWhenUnwound;
    let answer = hooks.bind(py).getattr(name).and_then(|hook| hook.call1(arguments));
    std::mem::forget(parks);
    answer
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

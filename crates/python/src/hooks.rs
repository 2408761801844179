//! Calls into `anyfabric._hooks`, which is looked up with the first engine, or at
//! its first use before: the package is not there yet while this module is
//! imported. It imports the hooks itself, so that a process that can open no file
//! any more is told so.

use pyo3::call::PyCallArgs;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

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
    arguments: impl PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let hooks = find(py)?;
    let parks = ParksWhenUnwound;
    let answer = hooks.getattr(name).and_then(|hook| hook.call1(arguments));
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

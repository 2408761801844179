//! Numbers as Python passes them: a wrong type is a `TypeError`, a value that
//! does not fit is `InvalidArgument`.

use std::time::Duration;

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PySlice;

use crate::error::invalid;

/// A size, an offset, a number of something: 0 to 2^64 - 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Number(pub(crate) u64);

impl<'py> FromPyObject<'_, 'py> for Number {
    type Error = PyErr;

    #[inline]
    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        given.extract().map(Self).map_err(|error| does_not_fit(&given, error, "0 to 2^64 - 1"))
    }
}

/// An immediate; the engine knows how large it may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Imm(pub(crate) u32);

impl<'py> FromPyObject<'_, 'py> for Imm {
    type Error = PyErr;

    #[inline]
    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        given.extract().map(Self).map_err(|error| does_not_fit(&given, error, "an immediate: 0 to 2^29 - 1"))
    }
}

/// A time; without end when infinite.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seconds(pub(crate) Duration);

impl<'py> FromPyObject<'_, 'py> for Seconds {
    type Error = PyErr;

    #[inline]
    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        const EXPECTED: &str = "seconds, 0 or more";
        let seconds: f64 = given.extract().map_err(|error| does_not_fit(&given, error, EXPECTED))?;
        if seconds >= 0.0 {
            return Ok(Self(Duration::from_secs_f64(seconds.min(ENDLESS_S))));
        }
        Err(does_not_fit(&given, PyValueError::new_err(()), EXPECTED))
    }
}

impl Seconds {
    /// What regions wait by default.
    pub(crate) const ONE: Self = Self(Duration::from_secs(1));
}

/// As every wait takes it.
pub(crate) fn duration(timeout: Option<Seconds>) -> Option<Duration> {
    timeout.map(|Seconds(timeout)| timeout)
}

/// A range of `nbytes` bytes, as `bytes` would slice them, except that nothing
/// is cut off: what reaches outside is `InvalidArgument`.
pub(crate) fn range_of(key: &Bound<'_, PySlice>, nbytes: u64) -> PyResult<std::ops::Range<u64>> {
    let py = key.py();
    let refuse = || {
        let message = format!("{key} of {nbytes} bytes: expected a range inside of them, with step 1");
        invalid(py, message)
    };
    let bound = |name: &Bound<'_, pyo3::types::PyString>, default: i128| -> PyResult<i128> {
        let bound = key.getattr(name)?;
        if bound.is_none() {
            return Ok(default);
        }
        match bound.extract::<i64>() {
            Ok(bound) if bound < 0 => Ok(i128::from(bound) + i128::from(nbytes)),
            Ok(bound) => Ok(bound.into()),
            Err(error) if error.is_instance_of::<PyOverflowError>(py) => Err(refuse()),
            Err(error) => Err(error),
        }
    };
    let step = key.getattr(pyo3::intern!(py, "step"))?;
    if !step.is_none() && step.extract::<i64>().ok() != Some(1) {
        return Err(refuse());
    }
    let start = bound(pyo3::intern!(py, "start"), 0)?;
    let stop = bound(pyo3::intern!(py, "stop"), nbytes.into())?;
    match (u64::try_from(start), u64::try_from(stop)) {
        (Ok(start), Ok(stop)) if start <= stop && stop <= nbytes => Ok(start..stop),
        _ => Err(refuse()),
    }
}

/// A `TypeError` that says what was expected, and what was given.
#[cold]
pub(crate) fn wrong_kind(expected: &str, given: &Bound<'_, PyAny>) -> PyErr {
    let kind = given.get_type().name().map_or_else(|_| "something else".to_owned(), |name| name.to_string());
    PyTypeError::new_err(format!("{expected}; given a {kind}"))
}

#[cold]
fn does_not_fit(given: &Bound<'_, PyAny>, error: PyErr, expected: &str) -> PyErr {
    let py = given.py();
    if error.is_instance_of::<PyOverflowError>(py) || error.is_instance_of::<PyValueError>(py) {
        let given = given.repr().map_or_else(|_| "a number".to_owned(), |repr| repr.to_string());
        return invalid(py, format!("given {given}; expected {expected}"));
    }
    error
}

/// Thirty years: the clock of the engine counts no further than centuries.
const ENDLESS_S: f64 = 1e9;

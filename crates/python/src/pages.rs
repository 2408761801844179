//! Lists of pages, as `anyfabric.pages.operands` gives them.

use std::ffi::{c_char, c_int};
use std::sync::Arc;

use anyfabric_engine::PageList;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::arguments::Number;

/// `(indices, page_bytes, stride, offset)`.
pub(crate) type NativePages = (Indices, Number, Number, Number);

/// Where an array of NumPy keeps its contiguous, aligned `u32`.
#[derive(Clone, Copy)]
pub(crate) struct Indices {
    address: usize,
    pub(crate) num: usize,
}

impl<'py> FromPyObject<'_, 'py> for Indices {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let capsule = given.getattr(intern!(given.py(), "__array_struct__"))?.cast_into::<PyCapsule>()?;
        let interface = capsule.pointer_checked(None)?.cast::<ArrayInterface>();
        // SAFETY: a capsule of that attribute points to this structure, and lives.
        let array = unsafe { interface.as_ref() };
        let is_known = (array.two, array.nd) == (2, 1) && array.flags & PLAIN == PLAIN;
        if !(is_known && (array.typekind, array.itemsize) == (b'u' as c_char, 4)) {
            return Err(PyTypeError::new_err("expected a contiguous array of uint32 with one dimension"));
        }
        // SAFETY: it has one dimension.
        let num = unsafe { *array.shape };
        Ok(Self { address: array.data, num: usize::try_from(num)? })
    }
}

/// Copies the indices.
///
/// # Safety
/// The array lives, and nobody changes it meanwhile.
pub(crate) unsafe fn page_list(pages: NativePages) -> PageList {
    let (Indices { address, num }, Number(page_bytes), Number(stride), Number(offset)) = pages;
    let indices: Arc<[u32]> = if num == 0 {
        Arc::default()
    } else {
        // SAFETY: as promised by the caller; the rest was looked at.
        unsafe { std::slice::from_raw_parts(address as *const u32, num) }.into()
    };
    PageList::new(indices, page_bytes, stride, offset)
}

/// Bytes of all pages; what does not fit is refused by the engine.
pub(crate) fn nbytes_of(pages: &NativePages) -> u64 {
    (pages.0.num as u64).saturating_mul(pages.1 .0)
}

/// The beginning of `PyArrayInterface`: NumPy's array interface, version 3.
#[repr(C)]
struct ArrayInterface {
    /// 2, to tell it from anything else.
    two: c_int,
    nd: c_int,
    typekind: c_char,
    itemsize: c_int,
    flags: c_int,
    shape: *const isize,
    strides: *const isize,
    data: usize,
}

/// Flags: C-contiguous, aligned, not swapped.
const PLAIN: c_int = 0x1 | 0x100 | 0x200;

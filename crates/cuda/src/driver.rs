//! libcuda, opened at run time and never closed.

use std::ffi::{c_int, CStr, CString};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use thiserror::Error;

use crate::gpu::Gpu;
use crate::sys::{self, Code, Context, Functions};

/// Why the driver, or something of it, cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CudaError {
    /// No libcuda, or one that cannot be used here.
    #[error("{0}")]
    Missing(String),
    /// The memory is none that can be registered.
    #[error("{0}")]
    Memory(String),
    /// The machine lacks something, and what.
    #[error("{0}")]
    Unsupported(String),
    /// The GPU or its context is gone; this process cannot use it any more.
    #[error("{0}")]
    Lost(String),
    /// A call failed otherwise.
    #[error("{0}")]
    Call(String),
}

/// The libcuda of this process, and its GPUs.
pub struct Driver {
    pub(crate) functions: Functions,
    version: i32,
    gpus: OnceLock<Vec<Gpu>>,
    path: String,
}

impl Driver {
    /// The driver's library, or the one at `path`; opened and initialised at the
    /// first call for each.
    ///
    /// # Errors
    /// [`CudaError::Missing`].
    pub fn get(path: Option<&str>) -> Result<&'static Self, CudaError> {
        let mut drivers = lock_drivers();
        let name = path.unwrap_or(LIBRARY);
        if let Some(driver) = drivers.iter().find(|driver| driver.path == name) {
            return Ok(driver);
        }
        let driver: &'static Self = Box::leak(Box::new(Self::open(name)?));
        driver.look();
        drivers.push(driver);
        Ok(driver)
    }

    /// As [`Driver::get`], if this process has called that; opens nothing.
    pub fn opened(path: Option<&str>) -> Option<&'static Self> {
        lock_drivers().iter().find(|driver| driver.path == path.unwrap_or(LIBRARY)).copied()
    }

    /// Whether a libcuda is loaded, by whomever: the process may be using GPUs.
    pub fn is_loaded() -> bool {
        let Ok(name) = CString::new(LIBRARY) else { return false };
        // SAFETY: only asks the loader; a handle that is returned counts one more user and stays.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        !handle.is_null() || !lock_drivers().is_empty()
    }

    /// Its GPUs, in CUDA's order: those that `CUDA_VISIBLE_DEVICES` leaves.
    pub fn gpus(&self) -> &[Gpu] {
        self.gpus.get().map_or(&[], Vec::as_slice)
    }

    /// Version of CUDA that it supports: "13.0".
    pub fn version(&self) -> String {
        format!("{}.{}", self.version / 1000, self.version % 1000 / 10)
    }

    fn open(path: &str) -> Result<Self, CudaError> {
        let missing = |why: String| CudaError::Missing(why);
        let name = CString::new(path).map_err(|_| missing(format!("{path:?} cannot be a path")))?;
        // SAFETY: loads the library that the driver's installer put there for this.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failed dlopen dlerror gives a string that lives until the next call of it.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
            return Err(missing(format!(
                "{why}; install the NVIDIA driver, or give the container its GPUs (--gpus all)"
            )));
        }
        // SAFETY: it is libcuda, by its name or by the word of whoever set the path.
        let functions = unsafe { Functions::bind(handle) };
        let functions = functions.map_err(|name| {
            missing(format!(
                "{path} has no {}: the NVIDIA driver is older than 470 (CUDA 11.4)",
                name.to_string_lossy()
            ))
        })?;
        let mut driver = Self { functions, version: 0, gpus: OnceLock::new(), path: path.to_owned() };
        // SAFETY: may be called any number of times, with 0.
        driver.check("cuInit", unsafe { (driver.functions.init)(0) }).map_err(|error| missing(error.to_string()))?;
        // SAFETY: fills the number.
        unsafe { (driver.functions.driver_version)(&raw mut driver.version) };
        Ok(driver)
    }

    /// Looks at the GPUs, once the driver has its place: they refer to it.
    fn look(&'static self) {
        let mut count: c_int = 0;
        // SAFETY: fills the number.
        let code = unsafe { (self.functions.device_count)(&raw mut count) };
        let count = if code == sys::SUCCESS { u32::try_from(count).unwrap_or(0) } else { 0 };
        let _ = self.gpus.set((0..count).filter_map(|ordinal| Gpu::find(self, ordinal)).collect());
    }

    /// As an error, when `code` is one.
    pub(crate) fn check(&self, call: &'static str, code: Code) -> Result<(), CudaError> {
        if code == sys::SUCCESS {
            return Ok(());
        }
        let text = |function: unsafe extern "C" fn(Code, *mut *const std::ffi::c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: fills in a static string, or null.
            if unsafe { function(code, &raw mut text) } != sys::SUCCESS || text.is_null() {
                return String::new();
            }
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        let message =
            format!("{call}: {} ({}, {code})", text(self.functions.error_text), text(self.functions.error_name));
        Err(match code {
            sys::NOT_INITIALIZED => CudaError::Unsupported(format!(
                "{message}: a child made by fork cannot use CUDA after its parent has; start it with spawn or forkserver"
            )),
            code if LOST.contains(&code) => CudaError::Lost(message),
            _ => CudaError::Call(message),
        })
    }

    /// Runs a call with a context of that GPU current in this thread.
    pub(crate) fn within<T>(
        &self,
        context: Context,
        call: impl FnOnce() -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        // SAFETY: the context is retained for good.
        self.check("cuCtxPushCurrent", unsafe { (self.functions.push_context)(context) })?;
        let result = call();
        let mut popped = std::ptr::null_mut();
        // SAFETY: takes back what was pushed above.
        unsafe { (self.functions.pop_context)(&raw mut popped) };
        result
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("path", &self.path).field("version", &self.version()).finish_non_exhaustive()
    }
}

fn lock_drivers() -> MutexGuard<'static, Vec<&'static Driver>> {
    static DRIVERS: Mutex<Vec<&'static Driver>> = Mutex::new(Vec::new());
    #[allow(clippy::disallowed_methods, reason = "below what counts locks, and not on the way of an operation")]
    DRIVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name that the driver's package and the container toolkit give it.
const LIBRARY: &str = "libcuda.so.1";

/// After these nothing more can be done with the GPU from this process.
const LOST: [Code; 11] = [
    sys::DEINITIALIZED,
    sys::DEVICE_UNAVAILABLE,
    sys::NO_DEVICE,
    sys::ECC_UNCORRECTABLE,
    sys::NVLINK_UNCORRECTABLE,
    sys::CONTAINED,
    sys::ILLEGAL_ADDRESS,
    sys::CONTEXT_IS_DESTROYED,
    sys::ASSERT,
    sys::HARDWARE_STACK_ERROR,
    sys::LAUNCH_FAILED,
];

//! libfabric, opened at run time.
//!
//! Never linked and never closed. A library that the process has loaded already
//! is used, for two in one process see only half the devices each. The functions
//! are bound by symbol version: the default version of a newer library has longer
//! structures. `fi_getinfo`, `fi_freeinfo` and `fi_dupinfo` come from one version,
//! and every `fi_info` is allocated by the library.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::path::Path;
use std::ptr;
use std::sync::Mutex;

use anyfabric_cuda::Driver;
use thiserror::Error;

use super::environment::with_variable;
use super::sys::{fi_fabric_attr, fi_info, fid_fabric, version, FI_PROV_ATTR_ONLY, FI_SOURCE};
use crate::lock;
use crate::rdma::{kind_of, CHANNEL_ADAPTER};
use crate::sys::are_descriptors_left;

/// Why libfabric, or something of it, cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FabricError {
    /// No library was found.
    #[error("libfabric cannot be opened: {0}; install libfabric1, or name the file in {LIBRARY_VARIABLE}")]
    Missing(String),
    /// A library, but not one that can be used.
    #[error("{path} cannot be used: {why}")]
    Unfit {
        /// The file.
        path: String,
        /// What it lacks.
        why: String,
    },
    /// No provider has what is needed.
    #[error("{0}")]
    NoProvider(String),
    /// A call failed.
    #[error("{call}: {message}")]
    Call {
        /// Which.
        call: &'static str,
        /// Its error, positive.
        code: i32,
        /// The library's words for it.
        message: String,
    },
}

/// The functions that libfabric exports; everything else is reached through the
/// operation tables of its objects.
pub struct Library {
    fi_getinfo:
        unsafe extern "C" fn(u32, *const c_char, *const c_char, u64, *const fi_info, *mut *mut fi_info) -> c_int,
    fi_freeinfo: unsafe extern "C" fn(*mut fi_info),
    fi_dupinfo: unsafe extern "C" fn(*const fi_info) -> *mut fi_info,
    fi_fabric: unsafe extern "C" fn(*mut fi_fabric_attr, *mut *mut fid_fabric, *mut c_void) -> c_int,
    fi_strerror: unsafe extern "C" fn(c_int) -> *const c_char,
    version: u32,
    path: String,
}

impl Library {
    /// The library of this process, opened at the first call: that takes up to a
    /// fifth of a second where a distribution's build pulls in every provider. With
    /// `path` that file, unless another one is in use already.
    ///
    /// # Errors
    /// [`FabricError::Missing`] and [`FabricError::Unfit`], at every call with that path alike, unless descriptors were
    /// short.
    pub fn get(path: Option<&str>) -> Result<&'static Self, FabricError> {
        type Known = (Option<String>, Result<&'static Library, FabricError>);
        static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());
        let mut all = lock(&KNOWN);
        let known = all.iter().find(|(of, found)| found.is_ok() || of.as_deref() == path);
        let found = match known {
            Some((_, found)) => found.clone(),
            None => {
                let found = Self::find(path).map(|library| &*Box::leak(Box::new(library)));
                if found.is_ok() || are_descriptors_left() {
                    all.push((path.map(str::to_owned), found.clone()));
                }
                found
            }
        };
        drop(all);
        let library = found?;
        match path {
            Some(path) if path != library.path => {
                let why = format!("this process uses {} already, and two see only half the NICs each", library.path);
                Err(FabricError::Unfit { path: path.to_owned(), why })
            }
            _ => Ok(library),
        }
    }

    /// Opens a certain file beside the library of this process, and never closes
    /// it: for tests of several versions.
    ///
    /// # Errors
    /// As [`Library::get`].
    pub fn load(path: &Path) -> Result<&'static Self, FabricError> {
        let name = path.to_string_lossy().into_owned();
        Ok(Box::leak(Box::new(Self::bind(open(&name, 0).map_err(FabricError::Missing)?, name)?)))
    }

    /// Version of the library, as [`version`] makes it.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// "1.17", for people.
    pub fn version_text(&self) -> String {
        format!("{}.{}", self.version >> 16, self.version & 0xffff)
    }

    /// The API version that is asked for: what both the library and the bindings
    /// know. It, and not the symbols' version, decides which late members of
    /// arguments a provider reads.
    pub fn api_version(&self) -> u32 {
        self.version.min(NEWEST_API)
    }

    /// Name or path that it was opened by.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The library's words for an error; the sign does not matter.
    pub fn describe(&self, code: i64) -> String {
        // SAFETY: returns a static string for every number.
        let text = unsafe { (self.fi_strerror)(code.unsigned_abs().min(i32::MAX as u64) as c_int) };
        text_of(text).unwrap_or_else(|| format!("error {code}"))
    }

    /// The error of a call that returned `code`.
    pub fn error(&self, call: &'static str, code: i64) -> FabricError {
        let message = format!("{} ({code})", self.describe(code));
        FabricError::Call { call, code: code.unsigned_abs().min(i32::MAX as u64) as i32, message }
    }

    /// As an error, when `code` is one.
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<c_int, FabricError> {
        if code < 0 {
            Err(self.error(call, code.into()))
        } else {
            Ok(code)
        }
    }

    /// An empty entry, for hints.
    pub(super) fn new_info(&'static self) -> Result<Info, FabricError> {
        // SAFETY: null asks for a new entry with all its parts.
        Info::take(self, unsafe { (self.fi_dupinfo)(ptr::null()) })
    }

    /// Every entry that fits the hints, best first; none is no error. With
    /// `source`, those of the NIC that has this address.
    pub(super) fn entries(&'static self, hints: &Info, source: Option<&CStr>) -> Result<Vec<Info>, FabricError> {
        let mut list = ptr::null_mut();
        let (node, flags) = source.map_or((ptr::null(), 0), |node| (node.as_ptr(), FI_SOURCE));
        // SAFETY: the hints are an entry of this library; `list` receives a list of its own.
        let code =
            unsafe { (self.fi_getinfo)(self.api_version(), node, ptr::null(), flags, hints.as_ptr(), &raw mut list) };
        if code == -libc::ENODATA {
            return Ok(Vec::new());
        }
        self.check("fi_getinfo", code)?;
        let mut entries = Vec::new();
        let mut next = list;
        while !next.is_null() {
            // SAFETY: an entry of the list just received; a duplicate has no successor.
            entries.push(Info::take(self, unsafe { (self.fi_dupinfo)(next) }));
            // SAFETY: as above.
            next = unsafe { (*next).next };
        }
        // SAFETY: the list is ours, and every entry was copied.
        unsafe { (self.fi_freeinfo)(list) };
        entries.into_iter().collect()
    }

    /// Opens the fabric of an entry.
    pub(super) fn fabric(&self, info: &Info) -> Result<*mut fid_fabric, FabricError> {
        let mut fabric = ptr::null_mut();
        // SAFETY: the attributes are an entry's; `fabric` receives the object.
        let code = unsafe { (self.fi_fabric)((*info.as_ptr()).fabric_attr, &raw mut fabric, ptr::null_mut()) };
        self.check("fi_fabric", code)?;
        Ok(fabric)
    }

    fn find(path: Option<&str>) -> Result<Self, FabricError> {
        if Driver::is_loaded() || open(SONAME, libc::RTLD_NOLOAD).is_ok() {
            return Self::start(path);
        }
        // Where CUDA is not in use an EFA provider must not make a context of its own, of some 600 MB on the first GPU.
        // Whoever set it knows better; and processes that are started later may well want their GPUs.
        with_variable(c"FI_HMEM=system", || Self::start(path))
    }

    /// Opens the library, and has it read its settings.
    fn start(path: Option<&str>) -> Result<Self, FabricError> {
        let named = path.map(str::to_owned).or_else(|| std::env::var(LIBRARY_VARIABLE).ok());
        let (handle, name) = match named.filter(|path| !path.is_empty()) {
            Some(path) => (open(&path, 0), path),
            None => search(),
        };
        let library = Self::bind(handle.map_err(FabricError::Missing)?, name)?;
        let mut list = ptr::null_mut();
        // SAFETY: nothing is asked for but the names of providers; `list` receives a list of its own, or stays null.
        unsafe {
            let version = library.api_version();
            (library.fi_getinfo)(version, ptr::null(), ptr::null(), FI_PROV_ATTR_ONLY, ptr::null(), &raw mut list);
            if !list.is_null() {
                (library.fi_freeinfo)(list);
            }
        }
        Ok(library)
    }

    fn bind(handle: *mut c_void, path: String) -> Result<Self, FabricError> {
        // SAFETY: each function has had this type since the symbol version that is named.
        let library = unsafe {
            let fi_version: unsafe extern "C" fn() -> u32 = function(handle, &path, c"fi_version", c"FABRIC_1.0")?;
            Self {
                fi_getinfo: function(handle, &path, c"fi_getinfo", c"FABRIC_1.3")?,
                fi_freeinfo: function(handle, &path, c"fi_freeinfo", c"FABRIC_1.3")?,
                fi_dupinfo: function(handle, &path, c"fi_dupinfo", c"FABRIC_1.3")?,
                fi_fabric: function(handle, &path, c"fi_fabric", c"FABRIC_1.1")?,
                fi_strerror: function(handle, &path, c"fi_strerror", c"FABRIC_1.0")?,
                version: fi_version(),
                path,
            }
        };
        if library.version < OLDEST {
            let why = format!(
                "it is {}, and 1.17 is the oldest that is known to work; install a later one, or name it in \
                 {LIBRARY_VARIABLE}",
                library.version_text()
            );
            return Err(FabricError::Unfit { path: library.path, why });
        }
        Ok(library)
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").field("path", &self.path).field("version", &self.version_text()).finish()
    }
}

/// Whether a NIC may be there that only libfabric drives: a Slingshot device, or
/// an RDMA device that is no InfiniBand or RoCE adapter, as EFA is. Two looks into
/// sysfs, so that other machines never pay for opening the library.
pub fn may_have_nic(sys_class: &Path) -> bool {
    let names = |class: &str| std::fs::read_dir(sys_class.join(class)).into_iter().flatten().flatten();
    names("cxi").next().is_some()
        || names("infiniband").any(|device| {
            let class = sys_class.join("infiniband");
            kind_of(&class, &device.file_name().to_string_lossy()).is_some_and(|kind| kind != CHANNEL_ADAPTER)
        })
}

/// An entry of the library's, freed with it.
pub(super) struct Info {
    library: &'static Library,
    info: *mut fi_info,
}

// SAFETY: an entry is plain memory; the library keeps no reference to it.
unsafe impl Send for Info {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Info {}

impl Info {
    fn take(library: &'static Library, info: *mut fi_info) -> Result<Self, FabricError> {
        if info.is_null() {
            return Err(library.error("fi_dupinfo", libc::ENOMEM.into()));
        }
        Ok(Self { library, info })
    }

    pub(super) const fn as_ptr(&self) -> *mut fi_info {
        self.info
    }

    pub(super) const fn library(&self) -> &'static Library {
        self.library
    }

    /// Sets a string of the hints, which the library frees.
    pub(super) fn set_text(field: &mut *mut c_char, text: &str) {
        if let Ok(text) = CString::new(text) {
            // SAFETY: the string ends with a null; strdup copies it with malloc, which the library's free expects.
            *field = unsafe { libc::strdup(text.as_ptr()) };
        }
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: ours, from this library, and dropped once.
        unsafe { (self.library.fi_freeinfo)(self.info) };
    }
}

/// A string of the library's; `None` for null.
pub(super) fn text_of(text: *const c_char) -> Option<String> {
    // SAFETY: the library's strings end with a null.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The function of that name and version.
///
/// # Safety
/// `F` is its type.
unsafe fn function<F: Copy>(handle: *mut c_void, path: &str, name: &CStr, version: &CStr) -> Result<F, FabricError> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the handle is open, and both strings end with a null.
    let address = unsafe { libc::dlvsym(handle, name.as_ptr(), version.as_ptr()) };
    if address.is_null() {
        let (name, version) = (name.to_string_lossy(), version.to_string_lossy());
        let why = format!("it has no {name}@{version}, as libfabric has since 1.9");
        return Err(FabricError::Unfit { path: path.to_owned(), why });
    }
    // SAFETY: of one size; the rest is the caller's promise.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

/// The library that is loaded, or the one of an installer, or the system's.
fn search() -> (Result<*mut c_void, String>, String) {
    let loaded = (open(SONAME, libc::RTLD_NOLOAD), SONAME.to_owned());
    if loaded.0.is_ok() {
        return loaded;
    }
    for path in INSTALLED {
        // Not tried when absent: the error that is reported in the end is the loader's for the system's library.
        if Path::new(path).exists() {
            return (open(path, 0), path.to_owned());
        }
    }
    (open(SONAME, 0), SONAME.to_owned())
}

fn open(name: &str, flags: c_int) -> Result<*mut c_void, String> {
    let path = CString::new(name).map_err(|_| format!("{name:?} has a null byte"))?;
    // SAFETY: the name ends with a null. What the library does when it is loaded is its own affair.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) };
    if handle.is_null() {
        // SAFETY: the string is valid until the next call of this thread.
        return Err(text_of(unsafe { libc::dlerror() }).unwrap_or_else(|| format!("{name} is not loaded")));
    }
    Ok(handle)
}

/// Names the file to open, instead of searching.
pub const LIBRARY_VARIABLE: &str = "ANYFABRIC_LIBFABRIC_LIBRARY";

const SONAME: &str = "libfabric.so.1";
/// Where installers put theirs, which the loader does not search: the EFA
/// installer's.
const INSTALLED: [&str; 2] = ["/opt/amazon/efa/lib/libfabric.so.1", "/opt/amazon/efa/lib64/libfabric.so.1"];
/// Lays out `fi_mr_attr` up to `page_size`.
const NEWEST_API: u32 = version(1, 22);
const OLDEST: u32 = version(1, 17);

#[cfg(test)]
mod tests {
    use super::*;

    /// A class tree with one RDMA device of that kind.
    fn tree(node_type: &str) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("anyfabric-class-{}-{}", std::process::id(), node_type.len()));
        let device = root.join("infiniband/rdma0");
        std::fs::create_dir_all(&device).unwrap();
        std::fs::write(device.join("node_type"), node_type).unwrap();
        root
    }

    #[test]
    fn only_a_device_that_verbs_does_not_drive_asks_for_the_library() {
        let (efa, connectx) = (tree("7: unspecified\n"), tree("1: CA\n"));
        assert!(may_have_nic(&efa));
        assert!(!may_have_nic(&connectx));
        assert!(!may_have_nic(Path::new("/nonexistent")));
        for root in [efa, connectx] {
            std::fs::remove_dir_all(root).unwrap();
        }
    }

    #[test]
    fn a_file_that_is_no_libfabric_is_named() {
        let error = Library::load(Path::new("/nonexistent/libfabric.so.1")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/libfabric.so.1"), "{error}");
        let error = Library::load(Path::new("libc.so.6")).unwrap_err();
        assert!(matches!(&error, FabricError::Unfit { .. }), "{error}");
        assert!(error.to_string().contains("libc.so.6"), "{error}");
    }
}

//! libibverbs, opened at run time: just the functions that are used.
//!
//! Symbols are bound by version: `dlsym` would give whichever is the default.
//! Posting and polling have no symbols: they go through the table that the
//! device's own library has put into `context->ops`. The library is never
//! closed, for its providers stay loaded.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr, CString};

use super::sys::{
    AsyncEvent, CompChannel, Context, Cq, Device, DeviceAttr, Gid, GidEntry, Mr, Pd, PortAttr, Qp, QpAttr, QpInitAttr,
    Srq, SrqInitAttr,
};
use crate::rdma::NicError;

/// Declares the functions that are bound, and where to find each.
macro_rules! library {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)? = $symbol:literal, $version:literal;)*) => {
        /// The functions of libibverbs that are used.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            fork_init: Option<unsafe extern "C" fn() -> c_int>,
            /// IBVERBS_1.8: relaxed ordering needs it.
            pub(super) reg_mr_iova2:
                Option<unsafe extern "C" fn(*mut Pd, *mut c_void, usize, u64, c_uint) -> *mut Mr>,
            /// IBVERBS_1.11: GIDs with their types.
            pub(super) query_gid_table:
                Option<unsafe extern "C" fn(*mut Context, *mut GidEntry, usize, u32, usize) -> isize>,
            /// IBVERBS_1.12: memory of other devices.
            pub(super) reg_dmabuf_mr: Option<unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr>,
        }

        impl Library {
            /// Binds everything in an open library.
            ///
            /// # Safety
            /// `handle` is libibverbs, or a library with the same functions.
            unsafe fn bind(handle: *mut c_void) -> Result<Self, NicError> {
                // SAFETY: each symbol has, at that version, the type that is declared for it.
                unsafe {
                    Ok(Self {
                        $($name: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                            required(handle, $symbol, $version)?,
                        ),)*
                        fork_init: std::mem::transmute::<*mut c_void, Option<_>>(
                            symbol(handle, c"ibv_fork_init", c"IBVERBS_1.1"),
                        ),
                        reg_mr_iova2: std::mem::transmute::<*mut c_void, Option<_>>(
                            symbol(handle, c"ibv_reg_mr_iova2", c"IBVERBS_1.8"),
                        ),
                        query_gid_table: std::mem::transmute::<*mut c_void, Option<_>>(
                            symbol(handle, c"_ibv_query_gid_table", c"IBVERBS_1.11"),
                        ),
                        reg_dmabuf_mr: std::mem::transmute::<*mut c_void, Option<_>>(
                            symbol(handle, c"ibv_reg_dmabuf_mr", c"IBVERBS_1.12"),
                        ),
                    })
                }
            }
        }
    };
}

library! {
    get_device_list: fn(*mut c_int) -> *mut *mut Device = c"ibv_get_device_list", c"IBVERBS_1.1";
    free_device_list: fn(*mut *mut Device) = c"ibv_free_device_list", c"IBVERBS_1.1";
    get_device_name: fn(*mut Device) -> *const c_char = c"ibv_get_device_name", c"IBVERBS_1.1";
    open_device: fn(*mut Device) -> *mut Context = c"ibv_open_device", c"IBVERBS_1.1";
    close_device: fn(*mut Context) -> c_int = c"ibv_close_device", c"IBVERBS_1.1";
    query_device: fn(*mut Context, *mut DeviceAttr) -> c_int = c"ibv_query_device", c"IBVERBS_1.1";
    query_port: fn(*mut Context, u8, *mut PortAttr) -> c_int = c"ibv_query_port", c"IBVERBS_1.1";
    query_gid: fn(*mut Context, u8, c_int, *mut Gid) -> c_int = c"ibv_query_gid", c"IBVERBS_1.1";
    alloc_pd: fn(*mut Context) -> *mut Pd = c"ibv_alloc_pd", c"IBVERBS_1.1";
    dealloc_pd: fn(*mut Pd) -> c_int = c"ibv_dealloc_pd", c"IBVERBS_1.1";
    reg_mr: fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr = c"ibv_reg_mr", c"IBVERBS_1.1";
    dereg_mr: fn(*mut Mr) -> c_int = c"ibv_dereg_mr", c"IBVERBS_1.1";
    create_comp_channel: fn(*mut Context) -> *mut CompChannel = c"ibv_create_comp_channel", c"IBVERBS_1.0";
    destroy_comp_channel: fn(*mut CompChannel) -> c_int = c"ibv_destroy_comp_channel", c"IBVERBS_1.0";
    get_cq_event: fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int = c"ibv_get_cq_event", c"IBVERBS_1.1";
    ack_cq_events: fn(*mut Cq, c_uint) = c"ibv_ack_cq_events", c"IBVERBS_1.1";
    get_async_event: fn(*mut Context, *mut AsyncEvent) -> c_int = c"ibv_get_async_event", c"IBVERBS_1.1";
    ack_async_event: fn(*mut AsyncEvent) = c"ibv_ack_async_event", c"IBVERBS_1.1";
    create_cq: fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq
        = c"ibv_create_cq", c"IBVERBS_1.1";
    destroy_cq: fn(*mut Cq) -> c_int = c"ibv_destroy_cq", c"IBVERBS_1.1";
    create_srq: fn(*mut Pd, *mut SrqInitAttr) -> *mut Srq = c"ibv_create_srq", c"IBVERBS_1.1";
    destroy_srq: fn(*mut Srq) -> c_int = c"ibv_destroy_srq", c"IBVERBS_1.1";
    create_qp: fn(*mut Pd, *mut QpInitAttr) -> *mut Qp = c"ibv_create_qp", c"IBVERBS_1.1";
    modify_qp: fn(*mut Qp, *mut QpAttr, c_int) -> c_int = c"ibv_modify_qp", c"IBVERBS_1.1";
    destroy_qp: fn(*mut Qp) -> c_int = c"ibv_destroy_qp", c"IBVERBS_1.1";
}

impl Library {
    /// Opens libibverbs, or the library at `path`; loaded once, it stays.
    pub(super) fn open(path: Option<&str>) -> Result<Self, NicError> {
        let name = path.unwrap_or("libibverbs.so.1");
        let c_name = CString::new(name).map_err(|_| NicError::Library(format!("{name:?} cannot be a path")))?;
        // SAFETY: loads the library that administrators put there for this; its constructors register providers.
        let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failed dlopen dlerror gives a string that lives until the next call of it.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
            return Err(NicError::Library(format!("{why}; install libibverbs1 and ibverbs-providers (rdma-core)")));
        }
        // SAFETY: it is libibverbs, by its name or by the word of whoever set the path.
        let library = unsafe { Self::bind(handle) }?;
        library.prepare_for_forks();
        Ok(library)
    }

    /// Before 5.12 the kernel copies a page that is written after a fork, and the
    /// NIC goes on with the one that the child keeps. The library can keep registered
    /// memory from children, which must not touch it then; later kernels give the
    /// child the copy.
    fn prepare_for_forks(&self) {
        let Some(init) = self.fork_init.filter(|_| copies_for_the_parent(&kernel_release())) else { return };
        // SAFETY: may be called at any time; later than the first registration it fails.
        let failed = unsafe { init() };
        if failed != 0 {
            log::warn!("libibverbs cannot protect registered memory from fork(): error {failed}");
        }
    }
}

fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Whether a kernel of that release is older than 5.12.
fn copies_for_the_parent(release: &str) -> bool {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (5, 12),
        _ => false,
    }
}

unsafe extern "C" {
    fn dlvsym(handle: *mut c_void, symbol: *const c_char, version: *const c_char) -> *mut c_void;
}

/// A symbol at its version, null when there is none.
///
/// # Safety
/// `handle` is an open library.
unsafe fn symbol(handle: *mut c_void, name: &CStr, version: &CStr) -> *mut c_void {
    // SAFETY: both strings live through the call.
    unsafe { dlvsym(handle, name.as_ptr(), version.as_ptr()) }
}

/// A symbol that must be there.
///
/// # Safety
/// As [`symbol`].
unsafe fn required(handle: *mut c_void, name: &CStr, version: &CStr) -> Result<*mut c_void, NicError> {
    // SAFETY: as promised by the caller.
    let found = unsafe { symbol(handle, name, version) };
    if found.is_null() {
        let (name, version) = (name.to_string_lossy(), version.to_string_lossy());
        return Err(NicError::Library(format!("libibverbs has no {name}@{version}: it is too old, or something else")));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_kernels_need_help_with_forks() {
        for old in ["4.18.0-553.el8.x86_64", "5.4.0-150-generic\n", "5.11"] {
            assert!(copies_for_the_parent(old), "{old}");
        }
        for new in ["5.12.0", "5.15.0-1084-aws", "6.1.0-41-amd64\n", "", "unknown", "5"] {
            assert!(!copies_for_the_parent(new), "{new}");
        }
    }
}

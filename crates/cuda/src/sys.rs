//! libcuda's functions and numbers, those that are used.
//!
//! The `_v2` names are what `cuda.h` has made of the plain ones since CUDA 4;
//! `dlsym` of the plain name would find the functions of before. The tests in
//! `layout.rs` compare every number with `cuda.h`, where there is one.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};

/// What every function returns.
pub(crate) type Code = c_int;
/// A device, by its handle.
pub(crate) type Device = c_int;
/// A context.
pub(crate) type Context = *mut c_void;

macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) = $symbol:literal;)*) => {
        /// The functions of libcuda that are used.
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
            /// Of 11.7: handle, address, length, kind, flags.
            pub(crate) handle_for_range: Option<unsafe extern "C" fn(*mut c_int, u64, usize, c_uint, u64) -> Code>,
            /// Of 11.3: target, scope.
            pub(crate) flush_writes: Option<unsafe extern "C" fn(c_uint, c_uint) -> Code>,
        }

        impl Functions {
            /// Binds everything in an open library.
            ///
            /// # Errors
            /// The name of a function that it lacks.
            ///
            /// # Safety
            /// `handle` is libcuda, or a library with the same functions.
            pub(crate) unsafe fn bind(handle: *mut c_void) -> Result<Self, &'static CStr> {
                // SAFETY: every symbol has had this type since it was there.
                unsafe {
                    Ok(Self {
                        $($name: {
                            let found = libc::dlsym(handle, $symbol.as_ptr());
                            if found.is_null() {
                                return Err($symbol);
                            }
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> Code>(found)
                        },)*
                        handle_for_range: std::mem::transmute::<*mut c_void, Option<_>>(
                            libc::dlsym(handle, c"cuMemGetHandleForAddressRange".as_ptr()),
                        ),
                        flush_writes: std::mem::transmute::<*mut c_void, Option<_>>(
                            libc::dlsym(handle, c"cuFlushGPUDirectRDMAWrites".as_ptr()),
                        ),
                    })
                }
            }
        }
    };
}

functions! {
    init: fn(c_uint) = c"cuInit";
    driver_version: fn(*mut c_int) = c"cuDriverGetVersion";
    error_name: fn(Code, *mut *const c_char) = c"cuGetErrorName";
    error_text: fn(Code, *mut *const c_char) = c"cuGetErrorString";
    device_count: fn(*mut c_int) = c"cuDeviceGetCount";
    device: fn(*mut Device, c_int) = c"cuDeviceGet";
    device_name: fn(*mut c_char, c_int, Device) = c"cuDeviceGetName";
    device_uuid: fn(*mut [u8; 16], Device) = c"cuDeviceGetUuid_v2";
    device_pci: fn(*mut c_char, c_int, Device) = c"cuDeviceGetPCIBusId";
    device_attribute: fn(*mut c_int, c_int, Device) = c"cuDeviceGetAttribute";
    retain_primary: fn(*mut Context, Device) = c"cuDevicePrimaryCtxRetain";
    push_context: fn(Context) = c"cuCtxPushCurrent_v2";
    pop_context: fn(*mut Context) = c"cuCtxPopCurrent_v2";
    pointer_attribute: fn(*mut c_void, c_int, u64) = c"cuPointerGetAttribute";
    set_pointer_attribute: fn(*const c_void, c_int, u64) = c"cuPointerSetAttribute";
}

/// Declares constants, and a list of them for the test.
macro_rules! constants {
    ($($name:ident: $type:ty = $value:literal, $c_name:literal;)*) => {
        $(pub(crate) const $name: $type = $value;)*

        /// Every constant, with its name in `cuda.h`.
        #[cfg(test)]
        pub(crate) const ALL: &[(&str, i64)] = &[$(($c_name, $value)),*];
    };
}

constants! {
    SUCCESS: Code = 0, "CUDA_SUCCESS";
    INVALID_VALUE: Code = 1, "CUDA_ERROR_INVALID_VALUE";
    NOT_INITIALIZED: Code = 3, "CUDA_ERROR_NOT_INITIALIZED";
    DEINITIALIZED: Code = 4, "CUDA_ERROR_DEINITIALIZED";
    DEVICE_UNAVAILABLE: Code = 46, "CUDA_ERROR_DEVICE_UNAVAILABLE";
    NO_DEVICE: Code = 100, "CUDA_ERROR_NO_DEVICE";
    ECC_UNCORRECTABLE: Code = 214, "CUDA_ERROR_ECC_UNCORRECTABLE";
    NVLINK_UNCORRECTABLE: Code = 220, "CUDA_ERROR_NVLINK_UNCORRECTABLE";
    CONTAINED: Code = 226, "CUDA_ERROR_CONTAINED";
    ILLEGAL_ADDRESS: Code = 700, "CUDA_ERROR_ILLEGAL_ADDRESS";
    CONTEXT_IS_DESTROYED: Code = 709, "CUDA_ERROR_CONTEXT_IS_DESTROYED";
    ASSERT: Code = 710, "CUDA_ERROR_ASSERT";
    HARDWARE_STACK_ERROR: Code = 714, "CUDA_ERROR_HARDWARE_STACK_ERROR";
    LAUNCH_FAILED: Code = 719, "CUDA_ERROR_LAUNCH_FAILED";

    CAN_DO_RDMA: c_int = 116, "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED";
    FLUSH_OPTIONS: c_int = 117, "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS";
    WRITES_ORDERING: c_int = 118, "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING";
    EXPORTS_DMABUF: c_int = 124, "CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED";

    MEMORY_TYPE: c_int = 2, "CU_POINTER_ATTRIBUTE_MEMORY_TYPE";
    SYNC_MEMOPS: c_int = 6, "CU_POINTER_ATTRIBUTE_SYNC_MEMOPS";
    IS_MANAGED: c_int = 8, "CU_POINTER_ATTRIBUTE_IS_MANAGED";
    DEVICE_ORDINAL: c_int = 9, "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL";
    RANGE_START: c_int = 11, "CU_POINTER_ATTRIBUTE_RANGE_START_ADDR";
    RANGE_SIZE: c_int = 12, "CU_POINTER_ATTRIBUTE_RANGE_SIZE";
    IS_RDMA_CAPABLE: c_int = 15, "CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE";
    MAPPING_SIZE: c_int = 18, "CU_POINTER_ATTRIBUTE_MAPPING_SIZE";
    MAPPING_START: c_int = 19, "CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR";

    TYPE_DEVICE: c_uint = 2, "CU_MEMORYTYPE_DEVICE";
    DMA_BUF_FD: c_uint = 1, "CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD";
    FLUSH_BY_HOST: c_int = 1, "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST";
    ORDERED_FOR_OWNER: c_int = 100, "CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER";
    FLUSH_CURRENT: c_uint = 0, "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX";
    FLUSH_TO_OWNER: c_uint = 100, "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER";
}

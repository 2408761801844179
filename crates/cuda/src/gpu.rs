//! One GPU, and what its driver answers about NICs that reach its memory.

use std::ffi::{c_char, c_int, CStr};
use std::sync::OnceLock;

use crate::driver::{CudaError, Driver};
use crate::sys::{self, Context, Device};

/// One GPU.
pub struct Gpu {
    pub(crate) driver: &'static Driver,
    /// CUDA's number of it.
    pub ordinal: u32,
    /// "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// The same in every process, whatever it sees of the machine.
    pub uuid: [u8; 16],
    /// PCI address, as Linux writes it: "0000:53:00.0".
    pub pci: String,
    /// Whether the driver lets NICs reach its memory at all.
    pub can_do_rdma: bool,
    /// Whether its memory can be exported as a dmabuf.
    pub exports_dmabuf: bool,
    /// What makes a NIC's writes visible.
    pub visibility: Visibility,
    device: Device,
    /// Retained at first need, and for good.
    context: OnceLock<Result<Primary, CudaError>>,
}

/// What makes a NIC's writes visible to GPU work that is submitted later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Nothing is needed: the GPU itself takes writes in before later work.
    Ordered,
    /// The driver must be asked to flush, before the writes are counted.
    Flushed,
    /// Nothing does.
    Never,
}

struct Primary(Context);

// SAFETY: a context may be made current in any thread, and the pointer is only handed back to the driver.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Gpu {
    /// The GPU of that number; `None` when the driver says nothing of it.
    pub(crate) fn find(driver: &'static Driver, ordinal: u32) -> Option<Self> {
        let functions = &driver.functions;
        let mut device = 0;
        let mut uuid = [0; 16];
        // SAFETY: fills the handle, and then the bytes.
        let found = unsafe {
            (functions.device)(&raw mut device, c_int::try_from(ordinal).ok()?) == sys::SUCCESS
                && (functions.device_uuid)(&raw mut uuid, device) == sys::SUCCESS
        };
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: fills the number; an attribute that the driver does not know is refused.
            let code = unsafe { (functions.device_attribute)(&raw mut value, attribute, device) };
            if code == sys::SUCCESS {
                value
            } else {
                0
            }
        };
        let can_flush = attribute(sys::FLUSH_OPTIONS) & sys::FLUSH_BY_HOST != 0 && functions.flush_writes.is_some();
        let visibility = match attribute(sys::WRITES_ORDERING) {
            sys::ORDERED_FOR_OWNER.. => Visibility::Ordered,
            _ if can_flush => Visibility::Flushed,
            _ => Visibility::Never,
        };
        found.then(|| Self {
            driver,
            ordinal,
            name: text(|at, len| {
                // SAFETY: fills at most `len` bytes with a string that ends.
                unsafe { (functions.device_name)(at, len, device) }
            }),
            uuid,
            pci: text(|at, len| {
                // SAFETY: as above.
                unsafe { (functions.device_pci)(at, len, device) }
            })
            .to_ascii_lowercase(),
            can_do_rdma: attribute(sys::CAN_DO_RDMA) != 0,
            exports_dmabuf: attribute(sys::EXPORTS_DMABUF) != 0 && functions.handle_for_range.is_some(),
            visibility,
            device,
            context: OnceLock::new(),
        })
    }

    /// "cuda:0".
    pub fn label(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// "GPU-53c1…", as `nvidia-smi -L` prints it.
    pub fn uuid_text(&self) -> String {
        let hex: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// Returns once everything that NICs have written into its memory until now
    /// is visible to work that is submitted to it from now on.
    ///
    /// # Errors
    /// The driver's; what was written may not be visible.
    pub fn flush(&self) -> Result<(), CudaError> {
        match (self.visibility, self.driver.functions.flush_writes) {
            (Visibility::Ordered, _) => Ok(()),
            (Visibility::Flushed, Some(flush)) => self.driver.within(self.context()?, || {
                // SAFETY: a context of this GPU is current.
                let code = unsafe { flush(sys::FLUSH_CURRENT, sys::FLUSH_TO_OWNER) };
                self.driver.check("cuFlushGPUDirectRDMAWrites", code)
            }),
            _ => Err(CudaError::Unsupported(format!("{}: the driver cannot flush what NICs write", self.label()))),
        }
    }

    /// Its primary context, which is the one that frameworks use: nothing new is
    /// made where the memory's owner is one of them.
    fn context(&self) -> Result<Context, CudaError> {
        let retain = || {
            let mut context = std::ptr::null_mut();
            // SAFETY: fills in the context, which is kept for good.
            let code = unsafe { (self.driver.functions.retain_primary)(&raw mut context, self.device) };
            self.driver.check("cuDevicePrimaryCtxRetain", code)?;
            Ok(Primary(context))
        };
        self.context.get_or_init(retain).as_ref().map(|primary| primary.0).map_err(Clone::clone)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("ordinal", &self.ordinal).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A string that a function of the driver fills in.
fn text(fill: impl FnOnce(*mut c_char, c_int) -> sys::Code) -> String {
    let mut bytes = [0_u8; 256];
    if fill(bytes.as_mut_ptr().cast(), bytes.len() as c_int) != sys::SUCCESS {
        return String::new();
    }
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
}

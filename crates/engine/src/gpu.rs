//! GPU memory: regions of it, what can carry it, and what is said of GPUs.

use std::any::Any;

use anyfabric_cuda::{CudaError, Driver, Gpu, GpuMemory, Visibility};
use anyfabric_transports::{Link, Region as Memory};
use serde::Serialize;

use crate::peer::Peer;
use crate::rails::{name_of, LIBRARIES};
use crate::{Code, Engine, Error, Region, Result};

/// One GPU, as the driver describes it.
#[derive(Debug, Clone, Serialize)]
pub struct GpuAbout {
    /// `cuda:0`.
    pub device: String,
    /// Name of the product.
    pub name: String,
    /// `GPU-…`, the same in every process.
    pub uuid: String,
    /// PCI address.
    pub pci: String,
    /// Whether the driver lets NICs reach its memory.
    pub rdma: bool,
    /// Whether its memory can be exported as a dmabuf.
    pub dmabuf: bool,
    /// What makes a NIC's writes visible to later GPU work: `ordered` by the GPU,
    /// `flushed` by the driver before each count, or `never`.
    pub writes: String,
}

impl Engine {
    /// Registers memory of a GPU; `owner` is dropped when nothing can touch it any
    /// more. GPU work that fills or reads it is the caller's to wait for: a write
    /// reads what is there when it is submitted.
    ///
    /// # Errors
    /// `Unsupported` without a driver; `InvalidArgument` when the bytes are not of
    /// one GPU or cannot be given to NICs; `DeviceLost`; `Closed`.
    ///
    /// # Safety
    /// The allocation stays for as long as `owner` lives.
    pub unsafe fn register_gpu(
        &self,
        address: u64,
        nbytes: u64,
        writable: bool,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Region> {
        self.inner.check_open_to("register")?;
        let found = Driver::get(self.inner.config.cuda_library.as_deref())
            .and_then(|driver| GpuMemory::find(driver, address, nbytes));
        let memory = found.map_err(|error| error_of(&error).during("register"))?;
        Region::on_gpu(&self.inner, memory, writable, owner)
    }
}

/// The GPUs of this process; opens the driver for that.
///
/// # Errors
/// `Unsupported` without a driver.
pub fn gpus(library: Option<&str>) -> Result<Vec<GpuAbout>> {
    let driver = Driver::get(library).map_err(|error| error_of(&error))?;
    Ok(driver.gpus().iter().map(about).collect())
}

/// The GPUs, where this process has used the driver through us; nothing is
/// opened for that.
pub(crate) fn known_gpus(library: Option<&str>) -> Vec<GpuAbout> {
    Driver::opened(library).map_or_else(Vec::new, |driver| driver.gpus().iter().map(about).collect())
}

/// Why a write cannot go over a link: it would have the CPU touch a GPU's memory.
pub(crate) fn obstacle(
    link: &dyn Link,
    peer: &Peer,
    source: &Memory,
    is_destination_on_gpu: bool,
    verify: bool,
) -> Option<String> {
    let who = match source.gpu_memory() {
        _ if link.reaches_gpu_memory() => return None,
        Some(memory) => format!("the source lies on {}", memory.gpu().label()),
        None if is_destination_on_gpu => "the destination lies on a GPU".to_owned(),
        None => return None,
    };
    let name = link.transport();
    let is_rails = LIBRARIES.into_iter().any(|library| name_of(library) == name);
    let what_else = match peer.link() {
        _ if is_rails => "its libfabric was built without CUDA, or opened before this process used CUDA".to_owned(),
        Some(link) if verify && link.reaches_gpu_memory() => {
            format!("that is for the checksum; without verify=True it goes over {}", link.transport())
        }
        _ => {
            let state = peer.state();
            let why = |name| state.obstacle(name).map(|why| format!("{name}: {why}"));
            let known: Vec<_> = LIBRARIES.into_iter().filter_map(|library| why(name_of(library))).collect();
            if known.is_empty() {
                "verbs and libfabric reach it: give both engines transports=(\"verbs\", \"libfabric\", \"tcp\")".into()
            } else {
                format!("verbs and libfabric would reach it ({})", known.join("; "))
            }
        }
    };
    Some(format!("{name} moves host memory only, and {who}; {what_else}"))
}

fn about(gpu: &Gpu) -> GpuAbout {
    let writes = match gpu.visibility {
        Visibility::Ordered => "ordered",
        Visibility::Flushed => "flushed",
        Visibility::Never => "never",
    };
    GpuAbout {
        device: gpu.label(),
        name: gpu.name.clone(),
        uuid: gpu.uuid_text(),
        pci: gpu.pci.clone(),
        rdma: gpu.can_do_rdma,
        dmabuf: gpu.exports_dmabuf,
        writes: writes.into(),
    }
}

fn error_of(error: &CudaError) -> Error {
    let code = match error {
        CudaError::Missing(_) | CudaError::Unsupported(_) | CudaError::Call(_) => Code::Unsupported,
        CudaError::Memory(_) => Code::InvalidArgument,
        CudaError::Lost(_) => Code::DeviceLost,
    };
    Error::new(code, error.to_string())
}

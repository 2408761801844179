//! The CUDA driver, opened at run time: just what is needed to let NICs reach
//! GPU memory.
//!
//! A [`Driver`] is the libcuda of this process; a [`Gpu`] says what its driver
//! answers about NICs; a [`GpuMemory`] is a range that was found to lie on one
//! GPU. Nothing here copies, launches, or allocates GPU memory, and nothing is
//! opened before somebody hands over GPU memory or asks what GPUs there are: a
//! process that has initialised CUDA cannot fork children that use it.

mod driver;
mod gpu;
#[cfg(test)]
mod layout;
mod memory;
mod sys;

pub use driver::{CudaError, Driver};
pub use gpu::{Gpu, Visibility};
pub use memory::{peer_memory_module, Dmabuf, GpuMemory};

//! ConnectX and every other RoCE or InfiniBand NIC, through libibverbs.
//!
//! The library is opened at run time ([`library`]); without it, or without a device,
//! the transport is simply not there. A [`VerbsNic`] is one port of a device
//! with one completion queue and two shared receive queues; a rail is two
//! reliable connected queue pairs: one for writes and immediates, one for
//! messages, so that neither uses up the other's receives.
//!
//! Memory, for 1024 peers and 4 NICs: a queue pair for writes has room for 128
//! work requests and one for messages for 16. rdma-core's mlx5 takes 320 bytes for
//! each, rounded up to a power of two in all: 64 KiB and 8 KiB of locked memory, so
//! 288 MiB, and 576 MiB with 8 NICs. Completion queue, receive queues and message
//! buffers are a NIC's, about 4 MiB each, however many peers there are. A path has
//! as many rails as the side with more NICs: one NIC here and eight there take as
//! much as eight and eight.

mod chain;
mod completions;
mod device;
mod events;
#[cfg(test)]
mod layout;
mod library;
mod memory;
mod nic;
mod port;
mod qp;
mod rails;
mod receives;
mod settings;
mod sys;

pub use device::{no_device, VerbsDomain};
pub use memory::VerbsMemory;
pub use nic::VerbsNic;
pub use settings::VerbsSettings;

use crate::rdma::{NicChoice, NicError};

/// Opens NICs, by names such as "mlx5_0" or "mlx5_0:2". Those that are named all have to
/// open; of those that are near, one that cannot be opened is left out.
///
/// # Errors
/// Without libibverbs, for a NIC that is not there or may not be opened, and
/// when no port is active.
pub fn open(choice: NicChoice<'_>, settings: &VerbsSettings) -> Result<Vec<VerbsNic>, NicError> {
    if settings.library.is_none() {
        if let Some(why) = no_device() {
            return Err(NicError::Device(why));
        }
    }
    let library = library::Library::open(settings.library.as_deref()).map_err(NicError::or_descriptors)?;
    match choice {
        NicChoice::Named(names) => {
            let found = device::open_named(library, names, settings).map_err(NicError::or_descriptors)?;
            let open = |(domain, port)| VerbsNic::new(domain, port, settings).map_err(NicError::or_descriptors);
            found.into_iter().map(open).collect()
        }
        NicChoice::Near(names, max_nics) => device::open_near(library, names, max_nics, settings),
    }
}

//! NICs that libfabric drives: AWS EFA, HPE Slingshot, and every other provider
//! of reliable datagrams.
//!
//! The library is opened at run time ([`Library`]), and only where it is asked for
//! or [`may_have_nic`] says so. Providers are chosen by what they can do
//! ([`Provider`]), never by name but for [`Quirks`]. A [`FabricNic`] is one NIC.

mod buffers;
mod completions;
mod domain;
mod endpoint;
mod faults;
mod library;
mod nic;
mod posting;
mod provider;
mod quirks;
mod rail;
mod slots;
#[allow(unreachable_pub, reason = "public for the layout test")]
pub mod sys;

pub use domain::{Dmabuf, FabricDomain, FabricMemory};
pub use library::{may_have_nic, FabricError, Library, LIBRARY_VARIABLE};
pub use nic::{FabricNic, FabricSettings};
pub use provider::{Arrivals, Provider, Wanted};
pub use quirks::Quirks;

//! The native half of the Python package: `anyfabric._core`.
//!
//! Converts and waits; decides nothing. The contract, with everything that a
//! caller must know, is `python/anyfabric/_core.pyi`; the files here are named
//! after its classes. Rules that hold for all of them:
//!
//! - Whoever may wait does so without the GIL, in slices (`waiting.rs`), so that
//!   signals are noticed. What certainly does not wait keeps the GIL: giving it
//!   up lets another Python thread take it for milliseconds.
//! - Threads of the engine never enter Python. They push tokens into a
//!   [`notifier::Notifier`], and references that they drop are given up by the
//!   next thread that holds the GIL.
//! - Everything that an engine made holds the Python object of that engine.

use pyo3::prelude::*;

mod address;
mod arguments;
mod baselines;
mod counter;
mod descriptor;
mod engine;
mod error;
mod hooks;
mod log;
mod message;
mod notifier;
mod pages;
mod peer_group;
mod region;
mod settings;
mod topology;
mod transfer;
mod waiting;
mod watcher;

/// The native half of `anyfabric`; see `_core.pyi`.
#[pymodule(gil_used = false)]
mod _core {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use crate::address::Address;
    #[pymodule_export]
    use crate::baselines::copies::{baseline_copy_pages, baseline_memcpy, baseline_process_vm_writev};
    #[pymodule_export]
    use crate::baselines::ring::{baseline_ring_ping, baseline_ring_pong};
    #[pymodule_export]
    use crate::baselines::sockets::{baseline_socket_sink, baseline_socket_source};
    #[pymodule_export]
    use crate::build_info;
    #[pymodule_export]
    use crate::counter::Counter;
    #[pymodule_export]
    use crate::descriptor::{Descriptor, RemoteSlice};
    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::error::error_codes;
    #[pymodule_export]
    use crate::message::Message;
    #[pymodule_export]
    use crate::notifier::Notifier;
    #[pymodule_export]
    use crate::peer_group::PeerGroup;
    #[pymodule_export]
    use crate::region::{Region, Slice};
    #[pymodule_export]
    use crate::topology::{gpus_json, topology_json};
    #[pymodule_export]
    use crate::transfer::Transfer;
    #[pymodule_export]
    use crate::watcher::Watcher;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::log::install();
        module.add("MAX_NICS", anyfabric_engine::Config::MAX_NICS)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

/// What built the module.
#[pyfunction]
fn build_info() -> std::collections::BTreeMap<&'static str, String> {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    [
        ("profile", profile.to_owned()),
        ("rustc", env!("ANYFABRIC_RUSTC").to_owned()),
        ("target", env!("ANYFABRIC_TARGET").to_owned()),
        ("wire_version", anyfabric_engine::WIRE_VERSION.to_string()),
    ]
    .into()
}

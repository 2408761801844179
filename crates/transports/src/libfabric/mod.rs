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
mod environment;
mod faults;
mod handshakes;
mod library;
mod nic;
mod posting;
mod provider;
mod quirks;
mod rail;
mod settings;
mod slots;
#[allow(unreachable_pub, reason = "public for the layout test")]
pub mod sys;

use std::path::Path;
use std::sync::Arc;

use crate::rdma::{NicChoice, NicError, Opening};

pub use domain::{FabricDomain, FabricMemory};
pub use library::{may_have_nic, FabricError, Library, LIBRARY_VARIABLE};
pub use nic::FabricNic;
pub use provider::{Arrivals, Provider, Wanted};
pub use quirks::Quirks;
pub use settings::FabricSettings;

/// Opens NICs: those that are named by their domains, devices or an IP address of theirs,
/// those that are near as the system calls them. Those that are named all have to be up and
/// open; of those that are near, one that cannot be opened is left out.
///
/// # Errors
/// Without the library, for a NIC that is not there or cannot be opened, and when
/// there is none.
pub fn open(choice: NicChoice<'_>, settings: &FabricSettings) -> Result<Vec<FabricNic>, NicError> {
    let no_library = |error: FabricError| NicError::Library(error.to_string()).or_descriptors();
    let library = Library::get(settings.library.as_deref()).map_err(no_library)?;
    let all = |nic: Option<&String>| {
        let wanted = Wanted { provider: settings.provider.clone(), nic: nic.cloned() };
        Provider::all(library, &wanted).map_err(|error| NicError::Device(error.to_string()).or_descriptors())
    };
    let open = |provider| FabricNic::open(Arc::new(provider), settings);
    match choice {
        NicChoice::Named(names) => {
            let mut found = Vec::new();
            for name in names {
                let nic = all(Some(name))?.into_iter().next();
                if nic.as_ref().is_some_and(|nic| !nic.is_up()) {
                    return Err(NicError::Device(format!("{name}: no active port: it is down")));
                }
                found.extend(nic);
            }
            found.into_iter().map(|provider| open(provider).map_err(NicError::or_descriptors)).collect()
        }
        NicChoice::Near(names, max_nics) => {
            let mut up = all(None)?;
            up.retain(Provider::is_up);
            let mut opening = Opening::new(max_nics);
            for name in names {
                let Some(idx) = up.iter().position(|provider| provider.is_of(name)) else { continue };
                let provider = up.remove(idx);
                opening.add(name, || open(provider))?;
            }
            if opening.nics().is_empty() {
                let others = up.into_iter().map(|provider| (provider.gbps, provider.nic.clone(), provider)).collect();
                opening.add_fastest(others, open)?;
            }
            opening.finish(|| NicError::Device("no NIC that libfabric drives is up".into()))
        }
    }
}

/// Why libfabric certainly drives no NIC here; `None` when it may. Opens nothing.
pub fn no_device(settings: &FabricSettings) -> Option<String> {
    let is_named = settings.provider.is_some() || settings.library.is_some();
    let is_asked_for = is_named || std::env::var_os(LIBRARY_VARIABLE).is_some();
    let may_be = is_asked_for || may_have_nic(Path::new("/sys/class"));
    (!may_be).then(|| "no NIC that only libfabric drives (EFA, Slingshot) in /sys/class".to_owned())
}

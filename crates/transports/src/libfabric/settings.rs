//! What may be chosen about libfabric.

use std::time::Duration;

/// Settings of the libfabric transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FabricSettings {
    /// Only this provider, which may then be a software one ("tcp"); every
    /// provider of hardware when `None`.
    pub provider: Option<String>,
    /// The file to open, instead of searching; a process opens one library.
    pub library: Option<String>,
    /// A rail on which nothing completes for this long, while something should,
    /// is broken. Most software providers never report a peer that is gone.
    pub answer_timeout: Duration,
    /// Endpoints of a NIC at most; rails beyond that share them.
    pub max_endpoints: usize,
}

impl Default for FabricSettings {
    fn default() -> Self {
        Self { provider: None, library: None, answer_timeout: Duration::from_secs(5), max_endpoints: 256 }
    }
}

impl FabricSettings {
    /// The first value out of its range, and what was expected.
    pub fn fault(&self) -> Option<String> {
        match self {
            Self { answer_timeout: Duration::ZERO, .. } => Some("answer_timeout of libfabric must not be zero".into()),
            Self { max_endpoints: 1..=MAX_ENDPOINTS, .. } => None,
            Self { max_endpoints, .. } => {
                Some(format!("max_endpoints of libfabric is {max_endpoints}, expected 1 to {MAX_ENDPOINTS}"))
            }
        }
    }
}

const MAX_ENDPOINTS: usize = 4096;

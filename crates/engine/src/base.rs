//! The link that every peer has.

use std::ops::Deref;
use std::sync::Arc;

use anyfabric_transports::loopback::SimLink;
use anyfabric_transports::tcp::TcpLink;
use anyfabric_transports::{ControlPath, Link, Sink};

/// The link that every peer has: it carries the control messages, and the data
/// when nothing faster does.
pub(crate) enum Base {
    Tcp(Arc<TcpLink>),
    Simulated(Arc<SimLink>),
}

/// What is asked for on the path of every operation is asked without a table.
impl Base {
    #[inline]
    pub(crate) fn poll(&self, sink: &dyn Sink) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.poll(sink),
            Self::Simulated(link) => link.poll(sink),
        }
    }

    pub(crate) fn tcp(&self) -> Option<&Arc<TcpLink>> {
        match self {
            Self::Tcp(tcp) => Some(tcp),
            Self::Simulated(_) => None,
        }
    }

    pub(crate) fn as_link(&self) -> &dyn Link {
        match self {
            Self::Tcp(tcp) => &**tcp,
            Self::Simulated(link) => &**link,
        }
    }

    pub(crate) fn to_link(&self) -> Arc<dyn Link> {
        match self {
            Self::Tcp(tcp) => Arc::clone(tcp) as Arc<dyn Link>,
            Self::Simulated(link) => Arc::clone(link) as Arc<dyn Link>,
        }
    }
}

impl Deref for Base {
    type Target = dyn ControlPath;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Tcp(tcp) => &**tcp,
            Self::Simulated(link) => &**link,
        }
    }
}

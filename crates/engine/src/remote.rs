//! Peers' regions.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use anyfabric_plan::Extents;
use anyfabric_transports::{Binding, Link, Region as Memory};
use anyfabric_wire::{Address, Descriptor, Device};

use crate::inner::Inner;
use crate::peer::Peer;
use crate::region::{check_range, Slice};
use crate::submission::Content;
use crate::{Error, Result};

/// A peer's region; cheap to clone.
#[derive(Debug, Clone)]
pub struct Remote {
    pub(crate) shared: Arc<RemoteShared>,
}

/// What an operation looks at comes first, in one line of the cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct RemoteShared {
    /// How one engine reaches it; other engines of this process look it up.
    route: OnceLock<Route>,
    pub(crate) descriptor: Descriptor,
}

/// Found once, used for every operation.
pub(crate) struct Route {
    /// By a number that no later engine has; one may well lie where another lay.
    engine: u64,
    pub(crate) peer: Arc<Peer>,
    pub(crate) link: Arc<dyn Link>,
    pub(crate) binding: Arc<Binding>,
}

impl Route {
    /// The binding, if it stands.
    #[inline]
    pub(crate) fn binding(&self, source: &Memory) -> Option<&Arc<Binding>> {
        if source.gpu_memory().is_some() && !self.link.reaches_gpu_memory() {
            return None;
        }
        self.binding.check().is_ok().then_some(&self.binding)
    }
}

impl Remote {
    /// Reads what [`Descriptor::encode`] wrote.
    ///
    /// # Errors
    /// `InvalidArgument` says what is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let descriptor =
            Descriptor::decode(bytes).map_err(|error| Error::invalid(error.to_string()).during("import"))?;
        Ok(descriptor.into())
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Descriptor {
        &self.shared.descriptor
    }

    /// The engine that owns the region.
    pub fn address(&self) -> &Address {
        &self.shared.descriptor.address
    }

    /// Length of the region in bytes.
    pub fn nbytes(&self) -> u64 {
        self.shared.descriptor.nbytes
    }

    /// The bytes of `range`.
    ///
    /// # Errors
    /// `InvalidArgument` when they leave the region.
    pub fn slice(&self, range: Range<u64>) -> Result<RemoteSlice> {
        check_range(&range, self.nbytes(), "the peer's region", self.shared.descriptor.region)?;
        Ok(RemoteSlice { shared: Arc::clone(&self.shared), offset: range.start, nbytes: range.end - range.start })
    }
}

impl From<Descriptor> for Remote {
    fn from(descriptor: Descriptor) -> Self {
        Self { shared: Arc::new(RemoteShared { descriptor, route: OnceLock::new() }) }
    }
}

impl RemoteShared {
    /// How this engine reaches the region, once that is known and as long as its
    /// peer takes what it counts, or does not.
    #[inline]
    pub(crate) fn route(&self, inner: &Inner, is_counted: bool) -> Option<&Route> {
        self.route.get().filter(|route| route.engine == inner.serial && route.peer.takes(is_counted))
    }

    /// What is submitted to write ranges of `source` here.
    pub(crate) fn content(&self, source: &Arc<Memory>, extents: Extents) -> Content {
        let Descriptor { region, key, nbytes, device, .. } = self.descriptor;
        let is_on_gpu = device != Device::Host;
        Content::Write { source: Arc::clone(source), region, key, nbytes, is_on_gpu, extents }
    }

    /// The binding of that peer's link, if it was found before and stands.
    #[inline]
    pub(crate) fn binding(&self, peer: &Arc<Peer>, source: &Memory) -> Option<&Arc<Binding>> {
        self.route.get().filter(|route| Arc::ptr_eq(&route.peer, peer))?.binding(source)
    }

    /// Remembers how this engine reaches the region.
    pub(crate) fn find_route(&self, inner: &Inner, peer: &Arc<Peer>) {
        let reaches = |link: &&Arc<dyn Link>| self.descriptor.device == Device::Host || link.reaches_gpu_memory();
        if let (Some(link), None) = (peer.link().filter(reaches), self.route.get()) {
            let Descriptor { region, key, nbytes, .. } = self.descriptor;
            let binding = link.bind(region, key, nbytes);
            let route = Route { engine: inner.serial, peer: Arc::clone(peer), link: Arc::clone(link), binding };
            let _ = self.route.set(route);
        }
    }
}

/// A byte range of a peer's region.
#[derive(Debug, Clone)]
pub struct RemoteSlice {
    pub(crate) shared: Arc<RemoteShared>,
    pub(crate) offset: u64,
    pub(crate) nbytes: u64,
}

impl RemoteSlice {
    /// First byte, from the start of the region.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// The whole region.
    pub fn remote(&self) -> Remote {
        Remote { shared: Arc::clone(&self.shared) }
    }

    /// The bytes of `range`, counted from the slice's start.
    ///
    /// # Errors
    /// `InvalidArgument` when they leave the slice.
    pub fn slice(&self, range: Range<u64>) -> Result<Self> {
        check_range(&range, self.nbytes, "the peer's region", self.shared.descriptor.region)?;
        let (offset, nbytes) = (self.offset + range.start, range.end - range.start);
        Ok(Self { shared: Arc::clone(&self.shared), offset, nbytes })
    }
}

impl RemoteSlice {
    /// What is submitted to write ranges of `src` here.
    pub(crate) fn content(&self, src: &Slice, extents: Extents) -> Content {
        self.shared.content(&src.memory, extents)
    }
}

impl From<&Remote> for RemoteSlice {
    fn from(remote: &Remote) -> Self {
        Self { shared: Arc::clone(&remote.shared), offset: 0, nbytes: remote.nbytes() }
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route").field("transport", &self.link.transport()).finish_non_exhaustive()
    }
}

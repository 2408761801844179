//! Paths before their first use: connecting, and groups of peers.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_wire::Address;

use crate::submission::Content;
use crate::submit::Order;
use crate::transfer::{About, Transfer};
use crate::{Engine, Error, Result};

/// An ordered list of peers with prepared paths.
#[derive(Debug, Clone)]
pub struct PeerGroup {
    pub(crate) addresses: Arc<[Address]>,
}

impl PeerGroup {
    /// The peers, in the order given.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Whether the peer in that place is the one at that address; most list the targets in the order of the group.
    #[inline]
    pub(crate) fn has_at(&self, idx: usize, address: &Address) -> bool {
        self.addresses.get(idx).is_some_and(|member| member.engine == address.engine)
    }
}

impl Engine {
    /// Connects to every address; blocks at most the engine's timeout.
    ///
    /// # Errors
    /// As [`Engine::connect`]; `InvalidArgument` for duplicates.
    pub fn peer_group(&self, addresses: &[Address]) -> Result<PeerGroup> {
        let (group, transfers) = self.start_peer_group(addresses)?;
        transfers.iter().try_for_each(|transfer| transfer.wait(None))?;
        Ok(group)
    }

    /// Makes the path to a peer now; otherwise the first use does.
    ///
    /// # Errors
    /// `PeerLost`, `ConnectionBroken`, `Unsupported` when there is no path;
    /// `TransferTimeout`.
    pub fn connect(&self, address: &Address, timeout: Option<Duration>) -> Result<()> {
        self.start_connect(address, timeout)?.wait(None)
    }

    /// Begins to connect; the transfer is done when the path is there.
    ///
    /// # Errors
    /// As [`Engine::connect`].
    pub fn start_connect(&self, address: &Address, timeout: Option<Duration>) -> Result<Transfer> {
        const OPERATION: &str = "connect";
        self.inner.check_open_to(OPERATION)?;
        let mut about = About { operation: OPERATION, peer: None, region: None, nbytes: 0 };
        let peer = self.inner.peer_for(address, None, || about.clone())?;
        about.peer = Some(Arc::clone(&peer));
        let ticket = self.inner.begin_one(&peer, Order { timeout, is_probe: true, ..Order::default() })?;
        self.inner.submit(&peer, Content::Probe, None, false, &ticket);
        Ok(Transfer::pending(Arc::clone(&self.inner), about, ticket))
    }

    /// Begins to connect to every address; the group is prepared when the
    /// transfers are done.
    ///
    /// # Errors
    /// As [`Engine::peer_group`].
    pub fn start_peer_group(&self, addresses: &[Address]) -> Result<(PeerGroup, Vec<Transfer>)> {
        self.inner.check_open_to("peer_group")?;
        for (idx, address) in addresses.iter().enumerate() {
            if addresses[..idx].contains(address) {
                return Err(Error::invalid(format!("{address} is listed twice")).during("peer_group"));
            }
        }
        let others = addresses.iter().filter(|address| **address != self.inner.address);
        let transfers = others.map(|address| self.start_connect(address, None)).collect::<Result<_>>()?;
        Ok((PeerGroup { addresses: addresses.into() }, transfers))
    }

    /// Whether a submission would find room in the queue now.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.inner.has_room()
    }

    /// Waits for room in the queue; true when there is some, or the engine is
    /// closed.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        self.inner.wait(Some(timeout), || self.inner.has_room() || self.inner.is_closed())
    }
}

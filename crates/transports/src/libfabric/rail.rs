//! A rail: what both ends must know of each other.
//!
//! The address of a rail, little-endian, read only by this module:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | protocol of the provider (`fi_ep_attr.protocol`) |
//! | 4..8 | its version |
//! | 8..12 | format of the name (`fi_info.addr_format`) |
//! | 12..16 | dialect ([`super::Quirks`]) |
//! | 16..20 | tag: names this end in what arrives |
//! | 20..24 | 1: immediates arrive with eight bytes, so that the tag fits |
//! | 24..32 | base of the landing: a few bytes of memory, for immediates without a write |
//! | 32..40 | its key |
//! | 40.. | name of the endpoint |

use super::endpoint::MAX_NAME_BYTES;
use super::provider::{Arrivals, Provider};
use super::sys::{fi_addr_t, FI_SOCKADDR, FI_SOCKADDR_IB};
use crate::rdma::{NicError, RailIdx, RemoteMemory};

/// Our end of a rail.
pub(super) struct Rail {
    /// Number of its endpoint.
    pub(super) endpoint: u16,
    /// What the peer says to name this rail.
    pub(super) tag: u32,
    /// The other end, once it is known.
    pub(super) peer: Option<Peer>,
    pub(super) is_broken: bool,
}

/// The other end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    pub(super) address: fi_addr_t,
    pub(super) tag: u32,
    /// Whether immediates carry the tag.
    pub(super) is_tagged: bool,
    pub(super) landing: RemoteMemory,
}

impl Peer {
    /// What goes with a write: the immediate, and the tag where there is room.
    #[inline]
    pub(super) fn data(&self, imm: u32) -> u64 {
        u64::from(imm) | if self.is_tagged { u64::from(self.tag) << 32 } else { 0 }
    }
}

/// What one end tells the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RailAddress {
    wire: [u32; 4],
    pub(super) tag: u32,
    pub(super) is_tagged: bool,
    pub(super) landing: RemoteMemory,
    pub(super) name: Vec<u8>,
}

impl RailAddress {
    pub(super) fn new(provider: &Provider, tag: u32, landing: RemoteMemory, name: &[u8]) -> Self {
        let is_tagged = provider.arrivals == Arrivals::Tagged;
        Self { wire: wire(provider), tag, is_tagged, landing, name: name.to_vec() }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(NAME_AT + self.name.len());
        for word in self.wire.into_iter().chain([self.tag, u32::from(self.is_tagged)]) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.landing.base.to_le_bytes());
        bytes.extend_from_slice(&self.landing.key.to_le_bytes());
        bytes.extend_from_slice(&self.name);
        bytes
    }

    /// From a peer that ours, with `provider`, can talk to; its name is as long as
    /// `our_name` and, where names are addresses of sockets, of the same family: providers read
    /// as much of one as its family has.
    pub(super) fn decode(bytes: &[u8], provider: &Provider, our_name: &[u8]) -> Result<Self, NicError> {
        let malformed = || NicError::Peer(format!("{} bytes are no address of a libfabric endpoint", bytes.len()));
        let (fixed, name) = bytes.split_at_checked(NAME_AT).ok_or_else(malformed)?;
        let word = |at: usize| fixed[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let long = |at: usize| fixed[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (theirs, ours) = ([word(0), word(4), word(8), word(12)], wire(provider));
        if theirs != ours {
            return Err(NicError::Peer(format!(
                "its libfabric speaks another protocol than our provider {}: {theirs:?} instead of {ours:?}; use the same \
                 provider and version on both sides",
                provider.name
            )));
        }
        let is_of_socket = (FI_SOCKADDR..=FI_SOCKADDR_IB).contains(&ours[2]);
        let is_family_ours = !is_of_socket || name.first_chunk::<2>() == our_name.first_chunk();
        if name.len() != our_name.len() || name.len() > MAX_NAME_BYTES || !is_family_ours {
            return Err(malformed());
        }
        let landing = RemoteMemory { base: long(24), key: long(32) };
        Ok(Self { wire: theirs, tag: word(16), is_tagged: word(20) == 1, landing, name: name.to_vec() })
    }
}

/// A tag for a rail: its number, and random bits above it, so that what was meant
/// for a rail that is closed does not count for the next with its number.
pub(super) fn new_tag(rail: RailIdx) -> Result<u32, NicError> {
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| NicError::Device(error.to_string()))?;
    Ok(u32::from_le_bytes(random) << RAIL_BITS | rail)
}

/// The rail that a tag may be of.
#[inline]
pub(super) const fn rail_of(tag: u32) -> RailIdx {
    tag & ((1 << RAIL_BITS) - 1)
}

/// Rails of a NIC at most: eight to each of 1024 peers.
pub(super) const MAX_RAILS: u32 = 1 << RAIL_BITS;
const RAIL_BITS: u32 = 13;
const NAME_AT: usize = 40;

fn wire(provider: &Provider) -> [u32; 4] {
    // SAFETY: an entry has endpoint attributes for as long as it lives.
    let (info, attr) = unsafe {
        let info = &*provider.info().as_ptr();
        (info, &*info.ep_attr)
    };
    [attr.protocol, attr.protocol_version, info.addr_format, provider.quirks().dialect]
}

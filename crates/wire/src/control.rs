//! What two engines tell each other once they have met.
//!
//! postcard numbers the variants of an enum by their order: new ones go at the
//! end, with the wire version that brought them, and none is ever moved.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::EngineId;
use crate::codec::{decode_whole, encode_whole};
use crate::{Imm, NicLibrary, Rails, WireError};

/// A message on the control connection: reliable and in order for the life of
/// the session, replayed after a reconnect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// "I live"; `received` control messages of yours have arrived.
    Heartbeat {
        /// Highest sequence number that arrived without a gap.
        received: u64,
    },
    /// The owner takes a right back: stop writing with that key, drain, answer.
    /// What was given out later has another key, and stays.
    Revoke {
        /// Region at the sender of this message.
        region: u64,
        /// The key that is revoked.
        key: u64,
        /// Echoed by the answer.
        revoke: u64,
    },
    /// Nothing of ours will touch that region with that key any more.
    Revoked {
        /// Of the request.
        revoke: u64,
    },
    /// The sender has closed a counter early and would like its imm back.
    RetireImm {
        /// An imm handed out by the sender's engine.
        imm: Imm,
    },
    /// No write of ours with that imm is on its way any more.
    ImmRetired {
        /// Of the request.
        imm: Imm,
    },
    /// A counted operation failed: its count will never come.
    CountFailed {
        /// The imm of the operation.
        imm: Imm,
    },
    /// Too many arrivals that nobody opened a counter for.
    EarlyArrivalsFull {
        /// How many distinct imms are kept for one peer.
        limit: u32,
    },
    /// There is room for early arrivals again.
    EarlyArrivalsRoom,
    /// An orderly close: this incarnation ends, and writes into no memory of the
    /// receiver's process any more. Wire version 2.
    Goodbye,
    /// About the rails of a transport that both list. Wire version 2.
    Rails {
        /// Which transport.
        library: NicLibrary,
        /// What about them.
        message: Rails,
    },
}

impl Control {
    /// Longest encoded message.
    pub const MAX_ENCODED: usize = 1024;

    /// Serialises.
    pub fn encode(&self) -> Vec<u8> {
        encode_whole(self)
    }

    /// Reads what [`Control::encode`] wrote.
    ///
    /// # Errors
    /// [`WireError::Malformed`] for anything else, and for more than
    /// `MAX_ENCODED` bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        decode_whole("control message", bytes, Self::MAX_ENCODED)
    }

    /// First wire version that knows this message.
    #[inline]
    pub const fn since(&self) -> u16 {
        match self {
            Self::Goodbye | Self::Rails { .. } => 2,
            _ => 1,
        }
    }
}

/// A message on the Unix socket between two engines of one host; some carry
/// file descriptors beside their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Local {
    /// First message of the one who connects; carries its ring and doorbell.
    Join {
        /// Who connects.
        engine: EngineId,
        /// Given to it over the authenticated control connection.
        token: [u8; 16],
        /// Address of a probe word in its memory, and the word's content.
        probe: (u64, u64),
    },
    /// The answer; carries ring and doorbell of the one who listens.
    Joined {
        /// Address of a probe word in its memory, and the word's content.
        probe: (u64, u64),
        /// Whether it could write to the other's memory.
        foreign: bool,
    },
    /// Whether the one who connected can write to the other's memory.
    Probed {
        /// Result of the probe.
        foreign: bool,
    },
    /// "May I write into this region, and how?"
    Import {
        /// Echoed by the answer.
        request: u64,
        /// Region at the receiver of this message.
        region: u64,
        /// Key of that region.
        key: u64,
    },
    /// The answer; carries the memfd when `mapped`.
    Imported {
        /// Of the request.
        request: u64,
        /// How to reach the region's bytes, or why not.
        result: Result<Access, Refusal>,
    },
    /// "There is something in your ring": wakes a worker that sleeps.
    Kick,
}

impl Local {
    /// Longest encoded message.
    pub const MAX_ENCODED: usize = 256;

    /// Serialises.
    pub fn encode(&self) -> Vec<u8> {
        encode_whole(self)
    }

    /// Reads what [`Local::encode`] wrote.
    ///
    /// # Errors
    /// [`WireError::Malformed`] for anything else, and for more than
    /// `MAX_ENCODED` bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        decode_whole("local message", bytes, Self::MAX_ENCODED)
    }
}

/// How a peer on the same host reaches a region's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// A memfd that comes with the message, of this many bytes.
    Mapped {
        /// Length of the memfd.
        nbytes: u64,
    },
    /// The owner's virtual address, for process_vm_writev.
    Foreign {
        /// Where the region begins in its owner's memory.
        address: u64,
        /// Length of the region: a descriptor that claims another is refused.
        nbytes: u64,
    },
    /// Through the bounce ring: the owner copies.
    Bounce,
}

/// Why a target refused an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Error)]
#[repr(u8)]
pub enum Refusal {
    /// No such region: never existed or closed.
    #[error("the target has no such region (closed, or of another engine)")]
    NoRegion = 1,
    /// The key is not the region's.
    #[error("the key is not the region's")]
    BadKey = 2,
    /// Outside the region.
    #[error("the bytes lie outside the target's region")]
    OutOfBounds = 3,
    /// Taken back from this peer.
    #[error("the target revoked the region")]
    Revoked = 4,
    /// The region may not be written by peers.
    #[error("the target's region is read-only")]
    ReadOnly = 5,
    /// Too many early arrivals or unread messages.
    #[error("the target keeps no more early arrivals or messages of this peer")]
    Full = 6,
    /// The checksum differs.
    #[error("the checksum over the placed bytes differs")]
    Checksum = 7,
    /// The message is larger than the receiver takes.
    #[error("the message is larger than the receiver takes")]
    TooLarge = 8,
    /// The target is closing.
    #[error("the target's engine is closing")]
    Closing = 9,
    /// Its NICs do not take the memory.
    #[error("the target cannot register the region with its NICs (its log says why)")]
    NotRegistered = 10,
    /// The region is GPU memory, and the write came where the CPU would place it.
    #[error("the target's region lies on a GPU, which this transport does not reach")]
    OnGpu = 11,
}

impl Refusal {
    /// The refusal with that number.
    #[inline]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::NoRegion,
            2 => Self::BadKey,
            3 => Self::OutOfBounds,
            4 => Self::Revoked,
            5 => Self::ReadOnly,
            6 => Self::Full,
            7 => Self::Checksum,
            8 => Self::TooLarge,
            9 => Self::Closing,
            10 => Self::NotRegistered,
            11 => Self::OnGpu,
            _ => return None,
        })
    }

    /// The refusal's number on the wire.
    #[inline]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

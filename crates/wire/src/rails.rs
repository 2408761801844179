//! How two engines connect their NICs, and what they need to know of each
//! other's memory.
//!
//! ```text
//! caller                                  listener
//! Offer { nics }            ─────────►
//!                           ◄─────────    Offer { nics }
//! for each rail, and again after it broke:
//! Call { rail, attempt, address } ───►    makes and connects its end
//!                           ◄─────────    Answered { rail, attempt, Ok(address) }
//! Ready { rail, attempt }   ─────────►    may post from now on
//! ```
//!
//! Who loses its end of a rail, or cannot make it, says so with `Broken`; the
//! caller calls again. An attempt that a newer one has overtaken is not answered. Addresses
//! and keys are read by nobody but the library that made them.
//!
//! Sent only to peers that list the transport, so no older build sees them.

use serde::{Deserialize, Serialize};

use crate::Refusal;

/// The library that drives the NICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NicLibrary {
    /// libibverbs.
    Verbs,
    /// libfabric.
    Libfabric,
}

/// A message about the rails of one transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rails {
    /// The sender's NICs, as the speed of each in Gbit/s.
    Offer {
        /// One a NIC, at least one.
        nics: Vec<u32>,
    },
    /// "Connect this rail": the caller's end.
    Call {
        /// Which rail.
        rail: u8,
        /// Counts up at every try.
        attempt: u32,
        /// Of the caller's end.
        address: Vec<u8>,
    },
    /// The answer to [`Rails::Call`]: the listener's end, or why there is none.
    Answered {
        /// Of the call.
        rail: u8,
        /// Of the call.
        attempt: u32,
        /// Of the listener's end.
        result: Result<Vec<u8>, String>,
    },
    /// The caller's end is connected too.
    Ready {
        /// Of the call.
        rail: u8,
        /// Of the call.
        attempt: u32,
    },
    /// The sender's end broke, or could not be made.
    Broken {
        /// Which rail.
        rail: u8,
        /// Of the call that made it, or was to.
        attempt: u32,
    },
    /// The sender gives the transport up, before any rail has carried anything.
    End {
        /// For people.
        why: String,
    },
    /// "May I write into this region, and with which keys?"
    Bind {
        /// Echoed by the answer.
        request: u64,
        /// Region at the receiver of this message.
        region: u64,
        /// Key of that region.
        key: u64,
        /// Length that the descriptor claims.
        nbytes: u64,
    },
    /// The answer: base address and key for each NIC of the owner.
    Bound {
        /// Of the request.
        request: u64,
        /// In the order of the owner's offer.
        result: Result<Vec<(u64, u64)>, Refusal>,
    },
}

impl Rails {
    /// Longest reason of [`Rails::Answered`] and [`Rails::End`], so that the
    /// message fits.
    pub const MAX_REASON: usize = 512;

    /// A reason, cut to what fits.
    pub fn reason(why: &str) -> String {
        let mut end = why.len().min(Self::MAX_REASON);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        why[..end].to_owned()
    }
}

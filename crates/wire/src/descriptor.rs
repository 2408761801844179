//! What a peer needs to write into a region.
//!
//! ```text
//! 0   4  magic "AFDS"
//! 4   2  newest wire version that reads it, little endian
//! 6   2  oldest wire version that reads it
//! 8   4  CRC-32 of bytes 0 to 8 and 12 to the end
//! 12  .. postcard: address, region, key, nbytes, device
//! ```
//!
//! A descriptor travels without knowing who will read it. Two versions let a
//! build read what its neighbours wrote, the older and the newer.
//!
//! The key is 64 random bits: who does not hold the descriptor cannot guess
//! it, and the region's owner checks it before a byte is placed.

use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::codec::{decode_whole, encode_whole};
use crate::version::{agree, OLDEST_VERSION, VERSION};
use crate::WireError;

/// Where a region's bytes live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Device {
    /// Host memory.
    Host,
    /// A GPU, by its UUID.
    Cuda([u8; 16]),
}

/// A peer's region.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Descriptor {
    /// The engine that owns the region.
    pub address: Address,
    /// The region's number at its owner; never used twice.
    pub region: u64,
    /// Random; proves that the holder was given this descriptor.
    pub key: u64,
    /// Length of the region in bytes.
    pub nbytes: u64,
    /// Where the bytes live.
    pub device: Device,
}

impl Descriptor {
    /// Longest encoded descriptor.
    pub const MAX_ENCODED: usize = 1024;

    /// Serialises for any channel: a message, a file, an environment variable.
    pub fn encode(&self) -> Vec<u8> {
        let body = encode_whole(self);
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&OLDEST_VERSION.to_le_bytes());
        let crc = checksum(&bytes, &body);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads what [`Descriptor::encode`] wrote.
    ///
    /// # Errors
    /// [`WireError`] for anything that is not a whole descriptor of a version
    /// this build speaks.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "descriptor";
        if bytes.len() > Self::MAX_ENCODED {
            let why = format!("{} bytes, at most {}", bytes.len(), Self::MAX_ENCODED);
            return Err(WireError::malformed(WHAT, why));
        }
        if !bytes.starts_with(MAGIC) {
            return Err(WireError::magic("a descriptor", "AFDS", bytes));
        }
        let Some((header, body)) = bytes.split_at_checked(HEADER) else {
            return Err(WireError::malformed(WHAT, format!("cut off after {} bytes", bytes.len())));
        };
        agree(WHAT, u16::from_le_bytes([header[4], header[5]]), u16::from_le_bytes([header[6], header[7]]))?;
        let expected = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let given = checksum(&header[..CRC_AT], body);
        if given != expected {
            return Err(WireError::Checksum { what: WHAT, given, expected });
        }
        decode_whole(WHAT, body, Self::MAX_ENCODED)
    }
}

fn checksum(prefix: &[u8], body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(prefix);
    crc.update(body);
    crc.finalize()
}

const MAGIC: &[u8; 4] = b"AFDS";
const CRC_AT: usize = 8;
const HEADER: usize = 12;

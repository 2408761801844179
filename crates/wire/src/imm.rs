//! The immediate: what a receiver counts.
//!
//! On the wire it has 32 bits, for that is what every NIC carries:
//!
//! ```text
//! bits 0..30   the imm
//! bits 30..32  weight of this part of the operation, less one, in quarters
//! ```
//!
//! One operation counts once however many NICs carry it: its parts' weights
//! sum to four quarters.

use serde::{Deserialize, Serialize};

use crate::WireError;

/// A 30-bit immediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Imm(u32);

impl Imm {
    /// Number of immediates: 2^30.
    pub const COUNT: u32 = 1 << 30;
    /// The first that the engine hands out itself; those below are the user's.
    pub const FIRST_OF_ENGINE: u32 = 1 << 29;

    /// An immediate of any owner; `None` when it does not fit 30 bits.
    #[inline]
    pub const fn new(value: u32) -> Option<Self> {
        if value < Self::COUNT {
            Some(Self(value))
        } else {
            None
        }
    }

    /// The number.
    #[inline]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// Whether the engine hands it out (2^29 and above), not the user.
    #[inline]
    pub const fn is_of_engine(self) -> bool {
        self.0 >= Self::FIRST_OF_ENGINE
    }
}

impl TryFrom<u32> for Imm {
    type Error = WireError;

    fn try_from(value: u32) -> Result<Self, WireError> {
        Self::new(value).ok_or_else(|| WireError::malformed("imm", format!("{value} does not fit 30 bits")))
    }
}

impl From<Imm> for u32 {
    #[inline]
    fn from(imm: Imm) -> Self {
        imm.0
    }
}

/// An immediate and its weight, as a NIC carries them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireImm {
    /// The immediate.
    pub imm: Imm,
    /// Weight of this part: 1 to 4 quarters of a count.
    pub quarters: u8,
}

impl WireImm {
    /// The 32 bits. `quarters` is clamped to 1..=4.
    #[inline]
    pub const fn encode(self) -> u32 {
        let quarters = if self.quarters < 1 {
            1
        } else if self.quarters > 4 {
            4
        } else {
            self.quarters
        };
        (quarters as u32 - 1) << 30 | self.imm.0
    }

    /// Every 32-bit value is one.
    #[inline]
    pub const fn decode(bits: u32) -> Self {
        Self { imm: Imm(bits & (Imm::COUNT - 1)), quarters: (bits >> 30) as u8 + 1 }
    }
}

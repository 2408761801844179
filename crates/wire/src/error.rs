//! What can be wrong with bytes from outside.

use thiserror::Error;

/// Why bytes could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The first bytes are not those of this kind of thing.
    #[error("not {what}: expected it to start with {expected:?}, given \"{given}\"")]
    Magic {
        /// What was to be decoded.
        what: &'static str,
        /// The bytes it starts with.
        expected: &'static str,
        /// The first bytes given, escaped.
        given: String,
    },
    /// Another wire version.
    #[error("{what} has wire version {given}, this build speaks {oldest} to {newest}")]
    Version {
        /// What was to be decoded.
        what: &'static str,
        /// Version found.
        given: u16,
        /// Oldest version spoken here.
        oldest: u16,
        /// Newest version spoken here.
        newest: u16,
    },
    /// The checksum does not match: cut off, or changed on the way.
    #[error("{what} is damaged: checksum {given:#010x}, expected {expected:#010x}")]
    Checksum {
        /// What was to be decoded.
        what: &'static str,
        /// Checksum computed over the bytes given.
        given: u32,
        /// Checksum the bytes carry.
        expected: u32,
    },
    /// Malformed otherwise.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// What was to be decoded.
        what: &'static str,
        /// Why it is malformed.
        why: String,
    },
}

impl WireError {
    /// Something else: not `what`, which begins with `expected`.
    pub fn magic(what: &'static str, expected: &'static str, bytes: &[u8]) -> Self {
        let shown = &bytes[..bytes.len().min(MAX_SHOWN)];
        let rest = if shown.len() < bytes.len() { "..." } else { "" };
        Self::Magic { what, expected, given: format!("{}{rest}", shown.escape_ascii()) }
    }

    /// Shorthand for [`WireError::Malformed`].
    pub(crate) fn malformed(what: &'static str, why: impl ToString) -> Self {
        Self::Malformed { what, why: why.to_string() }
    }
}

// Enough to tell what else it is.
const MAX_SHOWN: usize = 16;

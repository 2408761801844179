//! Which wire versions this build speaks.
//!
//! Whatever starts a conversation carries a pair of versions: the newest and
//! the oldest that understand it. Two neighbouring versions always have one in
//! common; others are refused by name.

use crate::WireError;

/// Version of everything in this crate that this build speaks.
///
/// 1: the first. 2: adds [`Control::Goodbye`](crate::Control::Goodbye) and
/// [`Control::Rails`](crate::Control::Rails).
pub const VERSION: u16 = 2;

/// Oldest version that this build still speaks.
pub const OLDEST_VERSION: u16 = VERSION - 1;

/// The newest version that both this build and `what` speak.
pub(crate) fn agree(what: &'static str, newest: u16, oldest: u16) -> Result<u16, WireError> {
    let agreed = newest.min(VERSION);
    if agreed >= oldest && agreed >= OLDEST_VERSION {
        Ok(agreed)
    } else {
        Err(WireError::Version { what, given: newest, oldest: OLDEST_VERSION, newest: VERSION })
    }
}

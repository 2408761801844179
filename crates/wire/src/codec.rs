//! postcard, with this crate's errors.

use serde::{Deserialize, Serialize};

use crate::WireError;

/// Encodes any message of this crate.
pub(crate) fn encode_whole<T: Serialize>(value: &T) -> Vec<u8> {
    // Memory takes every byte, and no message holds what postcard refuses (a
    // sequence of unknown length), so the default is never seen. It would be
    // refused by every decoder, for each message has at least one byte.
    postcard::to_stdvec(value).unwrap_or_default()
}

/// Decodes all of `bytes`, which are at most `max`: a rest is an error.
pub(crate) fn decode_whole<'a, T: Deserialize<'a>>(
    what: &'static str,
    bytes: &'a [u8],
    max: usize,
) -> Result<T, WireError> {
    // What a message takes in memory is proportional to its bytes, so a bound
    // on these is a bound on that.
    if bytes.len() > max {
        return Err(WireError::malformed(what, format!("{} bytes, at most {max}", bytes.len())));
    }
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|error| match error {
        // postcard drops the text of our own refusals.
        postcard::Error::SerdeDeCustom => WireError::malformed(what, "a number or a list is larger than allowed"),
        error => WireError::malformed(what, error),
    })?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(WireError::malformed(what, format!("{} bytes too many", rest.len())))
    }
}

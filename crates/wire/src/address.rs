//! Where an engine is reached.
//!
//! Text form: `af://HOST:PORT[,HOST:PORT...]/ENGINE`, ENGINE being 32 hex
//! digits drawn at random when the engine starts. It names one *incarnation*:
//! a restarted process has another address although host and port may agree.
//!
//! Neither form carries the scope of a link-local IPv6 socket: it is a number of
//! one host's own interfaces and leads another host astray.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{de, Deserialize, Deserializer, Serialize};

use crate::WireError;

/// One life of one engine: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EngineId(pub [u8; 16]);

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EngineId({self})")
    }
}

impl FromStr for EngineId {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let digits = text.as_bytes();
        if digits.len() != 32 {
            return Err(WireError::malformed(
                "engine id",
                format!("{} characters, expected 32 hex digits", digits.len()),
            ));
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let high = hex_digit(pair[0])?;
            *byte = high << 4 | hex_digit(pair[1])?;
        }
        Ok(Self(id))
    }
}

/// Where an engine is reached: its listeners and its incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address {
    /// The engine's incarnation.
    pub engine: EngineId,
    /// Where its control listener is reached, best first; empty for an engine
    /// that lives in a simulation. At most [`Address::MAX_SOCKETS`]: more are
    /// refused by whoever decodes them.
    #[serde(deserialize_with = "decode_sockets")]
    pub sockets: Vec<SocketAddr>,
}

impl Address {
    /// Most listeners an address may name.
    pub const MAX_SOCKETS: usize = 16;
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        for (idx, socket) in self.sockets.iter().enumerate() {
            if idx > 0 {
                f.write_str(",")?;
            }
            write!(f, "{socket}")?;
        }
        write!(f, "/{}", self.engine)
    }
}

impl FromStr for Address {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        if text.len() > MAX_TEXT {
            return Err(WireError::malformed("address", format!("{} bytes of text, at most {MAX_TEXT}", text.len())));
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| WireError::magic("an address", SCHEME, text.as_bytes()))?;
        let (hosts, engine) =
            rest.rsplit_once('/').ok_or_else(|| WireError::malformed("address", "no '/' before the engine id"))?;
        let sockets = match hosts {
            "" => Vec::new(),
            hosts => hosts.split(',').map(parse_socket).collect::<Result<Vec<_>, _>>()?,
        };
        check_num_sockets(sockets.len()).map_err(|why| WireError::malformed("address", why))?;
        Ok(Self { engine: engine.parse()?, sockets })
    }
}

fn parse_socket(text: &str) -> Result<SocketAddr, WireError> {
    match text.parse() {
        Ok(SocketAddr::V6(socket)) if socket.scope_id() != 0 => Err(WireError::malformed(
            "address",
            format!("{text:?} has a scope, which only its own host understands; give an address without one"),
        )),
        Ok(socket) => Ok(socket),
        Err(_) => Err(WireError::malformed("address", format!("{text:?} is not HOST:PORT with a numeric host"))),
    }
}

fn decode_sockets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error> {
    let sockets = Vec::deserialize(deserializer)?;
    check_num_sockets(sockets.len()).map_err(de::Error::custom)?;
    Ok(sockets)
}

fn check_num_sockets(num_sockets: usize) -> Result<(), String> {
    if num_sockets > Address::MAX_SOCKETS {
        return Err(format!("{num_sockets} sockets, at most {}", Address::MAX_SOCKETS));
    }
    Ok(())
}

fn hex_digit(digit: u8) -> Result<u8, WireError> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
        .ok_or_else(|| WireError::malformed("engine id", format!("{:?} is no hex digit", char::from(digit))))
}

const SCHEME: &str = "af://";
// Room for MAX_SOCKETS of the longest sockets, 48 bytes with their comma.
const MAX_TEXT: usize = 1024;

//! Bytes between engines: encode and decode, nothing else.
//!
//! Everything that crosses a process boundary is defined here: how an engine
//! is reached ([`Address`]), what a peer needs to write into a region
//! ([`Descriptor`]), how two engines meet ([`handshake`]), what they tell each
//! other afterwards ([`Control`]), how payload is framed on a byte stream
//! ([`Frame`]), and the 32 bits of an immediate ([`WireImm`]).
//!
//! Every byte is taken as hostile: decoding never panics, allocates no more than
//! a small multiple of the input's own length (a claimed length allocates
//! nothing), and names what was wrong. What it cannot know is left to the
//! engine: whether a region, token, lane or sequence number is one it gave out.

mod address;
mod codec;
mod control;
mod descriptor;
mod error;
mod frame;
pub mod handshake;
mod imm;
mod rails;
mod version;

pub use address::{Address, EngineId};
pub use control::{Access, Control, Local, Refusal};
pub use descriptor::{Descriptor, Device};
pub use error::WireError;
pub use frame::{Frame, FrameKind, FLAG_LAST, FLAG_VERIFY};
pub use imm::{Imm, WireImm};
pub use rails::{NicLibrary, Rails};
pub use version::{OLDEST_VERSION, VERSION};

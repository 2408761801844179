//! Bytes between engines: encode and decode, nothing else.
//!
//! Everything that crosses a process boundary is defined here: how an engine
//! is reached ([`Address`]), what a peer needs to write into a region
//! ([`Descriptor`]), how two engines meet ([`handshake`]), what they tell each
//! other afterwards ([`Control`]), how payload is framed on a byte stream
//! ([`Frame`]), and the 32 bits of an immediate ([`WireImm`]).
//!
//! Every byte is taken as hostile: decoding never panics, never allocates more
//! than the input's own length, and names what was wrong.

mod address;
mod control;
mod descriptor;
mod error;
mod frame;
pub mod handshake;
mod imm;

pub use address::{Address, EngineId};
pub use control::{Access, Control, Local, Refusal};
pub use descriptor::{Descriptor, Device};
pub use error::WireError;
pub use frame::{Frame, FrameKind, FLAG_LAST, FLAG_VERIFY};
pub use imm::{Imm, WireImm};

/// Version of everything in this crate that this build speaks.
///
/// 1: the first. 2: adds [`Control::Goodbye`].
pub const VERSION: u16 = 2;

/// Oldest version that this build still speaks.
pub const OLDEST_VERSION: u16 = VERSION - 1;

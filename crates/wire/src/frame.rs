//! Frames on a byte stream between two engines.
//!
//! Header, 64 bytes, little endian; then `num_pages` page offsets of 8 bytes
//! each; then `nbytes` bytes of payload.
//!
//! ```text
//! 0   1  kind
//! 1   1  flags
//! 2   2  num_pages
//! 4   4  nbytes        payload after header and page table
//! 8   8  op            operation at the sender; control: sequence number
//! 16  8  region        at the receiver
//! 24  8  key           of that region
//! 32  8  offset        into that region (write)
//! 40  4  imm           with weight, see WireImm; valid with FLAG_IMM
//! 44  4  count         how often the operation counts
//! 48  2  num_parts     streams that carry the operation
//! 50  2  zero
//! 52  4  page_bytes    length of each page (pages)
//! 56  4  crc           CRC-32 of the payload; valid with FLAG_VERIFY
//! 60  4  magic         tells a stream that lost its place
//! ```
//!
//! The payload of `Ack` is a list of 16-byte records: op (8), refusal code or
//! zero (1), zero (7).
//!
//! A header that says anything not listed here (an unknown flag, a reserved
//! byte that is not zero) is refused: on a stream, what is read wrongly once is
//! read wrongly ever after.

use crate::control::{Control, Refusal};
use crate::{WireError, WireImm};

/// The last frame of this part of the operation: acknowledge and count.
pub const FLAG_LAST: u8 = 1;
/// The operation counts: `imm` and `count` are valid.
const FLAG_IMM: u8 = 2;
/// The payload's checksum is to be verified after placing it.
pub const FLAG_VERIFY: u8 = 4;
const KNOWN_FLAGS: u8 = FLAG_LAST | FLAG_IMM | FLAG_VERIFY;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`crate::Control`] message.
    Control = 1,
    /// One contiguous range of a region.
    Write = 2,
    /// Equal pages at listed offsets of a region.
    Pages = 3,
    /// A message for the receive queue.
    Message = 4,
    /// Ends of operations.
    Ack = 5,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// `FLAG_LAST`, `FLAG_VERIFY`.
    pub flags: u8,
    /// Entries of the page table.
    pub num_pages: u16,
    /// Bytes of payload.
    pub nbytes: u32,
    /// Operation at the sender; of a control message its sequence number.
    pub op: u64,
    /// Region at the receiver.
    pub region: u64,
    /// Key of that region.
    pub key: u64,
    /// Offset into that region.
    pub offset: u64,
    /// What the operation counts, and how often.
    pub imm: Option<(WireImm, u32)>,
    /// Streams that carry the operation.
    pub num_parts: u16,
    /// Bytes of each page.
    pub page_bytes: u32,
    /// CRC-32 of the payload.
    pub crc: u32,
}

impl Frame {
    /// Encoded length of the header.
    pub const HEADER: usize = 64;
    /// Most payload bytes in a frame; of a control message, see
    /// [`Control::MAX_ENCODED`].
    pub const MAX_PAYLOAD: usize = 1 << 20;
    /// Most pages in a frame: so that payload, table and the next header fit
    /// one scatter list of the kernel (IOV_MAX is 1024).
    pub const MAX_PAGES: usize = 1000;
    /// Bytes of one acknowledgement.
    pub const ACK_BYTES: usize = 16;

    /// A frame of one part with everything else zero.
    #[inline]
    pub const fn new(kind: FrameKind, op: u64, nbytes: u32) -> Self {
        Self {
            kind,
            flags: 0,
            num_pages: 0,
            nbytes,
            op,
            region: 0,
            key: 0,
            offset: 0,
            imm: None,
            num_parts: 1,
            page_bytes: 0,
            crc: 0,
        }
    }

    /// The 64 bytes.
    #[inline]
    pub fn encode(&self) -> [u8; Self::HEADER] {
        let mut bytes = [0; Self::HEADER];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags & !FLAG_IMM | if self.imm.is_some() { FLAG_IMM } else { 0 };
        let (imm, count) = self.imm.map_or((0, 0), |(imm, count)| (imm.encode(), count));
        bytes[2..4].copy_from_slice(&self.num_pages.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.nbytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.op.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.region.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.key.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..44].copy_from_slice(&imm.to_le_bytes());
        bytes[44..48].copy_from_slice(&count.to_le_bytes());
        bytes[48..50].copy_from_slice(&self.num_parts.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.page_bytes.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.crc.to_le_bytes());
        bytes[60..64].copy_from_slice(&MAGIC.to_le_bytes());
        bytes
    }

    /// Reads and checks a header: sizes are within the limits above and agree
    /// with one another, so that a receiver may trust them for its buffers.
    ///
    /// # Errors
    /// [`WireError::Malformed`]: the stream lost its place or the peer is
    /// hostile; it must be dropped.
    #[inline]
    pub fn decode(bytes: &[u8; Self::HEADER]) -> Result<Self, WireError> {
        if u32_at(bytes, 60) != MAGIC {
            return Err(WireError::malformed(WHAT, "no magic: the stream lost its place"));
        }
        let kind = match bytes[0] {
            1 => FrameKind::Control,
            2 => FrameKind::Write,
            3 => FrameKind::Pages,
            4 => FrameKind::Message,
            5 => FrameKind::Ack,
            kind => return Err(WireError::malformed(WHAT, format!("unknown kind {kind}"))),
        };
        let flags = bytes[1];
        if flags & !KNOWN_FLAGS != 0 || u16_at(bytes, 50) != 0 {
            return Err(WireError::malformed(WHAT, format!("unknown flags {flags:#04x} or reserved bytes in use")));
        }
        let imm = (flags & FLAG_IMM != 0).then(|| (WireImm::decode(u32_at(bytes, 40)), u32_at(bytes, 44)));
        let frame = Self {
            kind,
            flags: flags & !FLAG_IMM,
            num_pages: u16_at(bytes, 2),
            nbytes: u32_at(bytes, 4),
            op: u64_at(bytes, 8),
            region: u64_at(bytes, 16),
            key: u64_at(bytes, 24),
            offset: u64_at(bytes, 32),
            imm,
            num_parts: u16_at(bytes, 48),
            page_bytes: u32_at(bytes, 52),
            crc: u32_at(bytes, 56),
        };
        frame.check()?;
        Ok(frame)
    }

    /// Whether this is the last frame of its part.
    #[inline]
    pub const fn is_last(&self) -> bool {
        self.flags & FLAG_LAST != 0
    }

    /// Whether the payload's checksum is to be verified.
    #[inline]
    pub const fn is_verified(&self) -> bool {
        self.flags & FLAG_VERIFY != 0
    }

    /// One record of an `Ack` payload.
    #[inline]
    pub fn encode_ack(op: u64, result: Result<(), Refusal>) -> [u8; Self::ACK_BYTES] {
        let mut bytes = [0; Self::ACK_BYTES];
        bytes[..8].copy_from_slice(&op.to_le_bytes());
        bytes[8] = result.err().map_or(0, Refusal::code);
        bytes
    }

    /// Reads one record of an `Ack` payload.
    ///
    /// # Errors
    /// [`WireError::Malformed`] for an unknown refusal, or reserved bytes in use.
    #[inline]
    pub fn decode_ack(bytes: &[u8; Self::ACK_BYTES]) -> Result<(u64, Result<(), Refusal>), WireError> {
        let mut op = [0; 8];
        op.copy_from_slice(&bytes[..8]);
        if bytes[9..] != [0; 7] {
            return Err(WireError::malformed(WHAT, "reserved bytes of an acknowledgement in use"));
        }
        let result = match bytes[8] {
            0 => Ok(()),
            code => match Refusal::from_code(code) {
                Some(refusal) => Err(refusal),
                None => return Err(WireError::malformed(WHAT, format!("unknown refusal {code}"))),
            },
        };
        Ok((u64::from_le_bytes(op), result))
    }

    fn check(&self) -> Result<(), WireError> {
        let nbytes = self.nbytes as usize;
        let fail = |why: String| Err(WireError::malformed(WHAT, why));
        if nbytes > Self::MAX_PAYLOAD {
            return fail(format!("{nbytes} bytes of payload, at most {}", Self::MAX_PAYLOAD));
        }
        if self.num_parts == 0 || self.num_parts > 16 {
            return fail(format!("{} parts, expected 1 to 16", self.num_parts));
        }
        let pages = usize::from(self.num_pages);
        match self.kind {
            FrameKind::Pages => {
                if pages == 0 || pages > Self::MAX_PAGES {
                    return fail(format!("{pages} pages, expected 1 to {}", Self::MAX_PAGES));
                }
                if pages.checked_mul(self.page_bytes as usize) != Some(nbytes) {
                    return fail(format!("{pages} pages of {} bytes in {nbytes} bytes", self.page_bytes));
                }
            }
            FrameKind::Control if nbytes > Control::MAX_ENCODED => {
                return fail(format!("a control message of {nbytes} bytes, at most {}", Control::MAX_ENCODED));
            }
            FrameKind::Ack if !nbytes.is_multiple_of(Self::ACK_BYTES) => {
                return fail(format!("{nbytes} bytes of acknowledgements"));
            }
            _ if pages != 0 => return fail(format!("{pages} pages in a frame of {:?}", self.kind)),
            _ => {}
        }
        Ok(())
    }
}

const WHAT: &str = "frame";
const MAGIC: u32 = u32::from_le_bytes(*b"AFfr");

#[inline]
fn u16_at(bytes: &[u8; Frame::HEADER], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
fn u32_at(bytes: &[u8; Frame::HEADER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn u64_at(bytes: &[u8; Frame::HEADER], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

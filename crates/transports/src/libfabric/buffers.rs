//! Memory of the NIC's own, registered once: messages on their way, and a landing
//! for immediates without a write.
//!
//! A message has a header, little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | tag of the receiver's rail |
//! | 4..8 | an immediate, where `kind` says so |
//! | 8 | kind: 0 a message, 1 an immediate alone |
//! | 9..16 | 0 |

use std::cell::UnsafeCell;
use std::sync::Arc;

use super::domain::{FabricDomain, FabricMemory};
use crate::rdma::{Domain, NicError};

/// What a message brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Brought<'a> {
    /// A message.
    Message(&'a [u8]),
    /// The immediate of a write that has completed, or of none.
    Imm(u32),
}

/// Buffers of one length, in one registration.
pub(super) struct Buffers {
    memory: FabricMemory,
    bytes: Box<[UnsafeCell<u64>]>,
    buffer_bytes: usize,
}

// SAFETY: the library writes into the bytes, and we read them after it has said so; who has the NIC has them.
unsafe impl Send for Buffers {}

impl Buffers {
    /// `num` of `buffer_bytes`, a multiple of 8, for messages that are sent or received: no peer
    /// may write into them by itself.
    pub(super) fn new(domain: &Arc<FabricDomain>, num: usize, buffer_bytes: usize) -> Result<Self, NicError> {
        Self::registered(domain, num, buffer_bytes, false)
    }

    /// A landing of that length, which peers may write.
    pub(super) fn landing(domain: &Arc<FabricDomain>, nbytes: usize) -> Result<Self, NicError> {
        Self::registered(domain, 1, nbytes, true)
    }

    fn registered(
        domain: &Arc<FabricDomain>,
        num: usize,
        buffer_bytes: usize,
        writable: bool,
    ) -> Result<Self, NicError> {
        let bytes: Box<[UnsafeCell<u64>]> = (0..num * buffer_bytes / 8).map(|_| UnsafeCell::new(0)).collect();
        let address = bytes.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: the registration is dropped before the memory.
        let memory = unsafe { domain.register(address, (num * buffer_bytes) as u64, writable) }?;
        Ok(Self { memory, bytes, buffer_bytes })
    }

    pub(super) const fn memory(&self) -> &FabricMemory {
        &self.memory
    }

    /// One of them, for the library.
    pub(super) fn iovec(&self, idx: u32, nbytes: usize) -> libc::iovec {
        libc::iovec { iov_base: self.at(idx).cast(), iov_len: nbytes.min(self.buffer_bytes) }
    }

    /// Writes a message into one; its length with the header.
    pub(super) fn write(&mut self, idx: u32, tag: u32, brought: Brought<'_>) -> usize {
        let (imm, kind, message) = match brought {
            Brought::Message(message) => (0, 0, message),
            Brought::Imm(imm) => (imm, KIND_IMM, &[][..]),
        };
        let message = &message[..message.len().min(self.buffer_bytes - HEADER_BYTES)];
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&tag.to_le_bytes());
        header[4..8].copy_from_slice(&imm.to_le_bytes());
        header[8] = kind;
        // SAFETY: inside the buffer, which is longer than the header and which nothing uses now.
        unsafe {
            self.at(idx).copy_from_nonoverlapping(header.as_ptr(), HEADER_BYTES);
            self.at(idx).add(HEADER_BYTES).copy_from_nonoverlapping(message.as_ptr(), message.len());
        }
        HEADER_BYTES + message.len()
    }

    /// What arrived in one: a tag, and what it brings. `None` for what is no
    /// message of ours.
    pub(super) fn read(&self, idx: u32, nbytes: usize) -> Option<(u32, Brought<'_>)> {
        // SAFETY: inside the buffer; the receive has completed, so that nobody writes until it is posted again, after the
        // slice is gone.
        let bytes = unsafe { std::slice::from_raw_parts(self.at(idx), nbytes.min(self.buffer_bytes)) };
        let (header, message) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        match header[8] {
            0 => Some((word(0), Brought::Message(message))),
            KIND_IMM => Some((word(0), Brought::Imm(word(4)))),
            _ => None,
        }
    }

    /// Never frees the bytes: an endpoint that is not closed, or a NIC that knows them, may still use them.
    pub(super) fn keep_bytes(&mut self) {
        std::mem::forget(std::mem::take(&mut self.bytes));
    }

    fn at(&self, idx: u32) -> *mut u8 {
        let num_words = self.buffer_bytes / 8;
        // A pointer to all of it: one to the first word must not be used beyond that.
        self.bytes[idx as usize * num_words..][..num_words].as_ptr().cast::<u8>().cast_mut()
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        if !self.memory.end() {
            self.keep_bytes();
        }
    }
}

pub(super) const HEADER_BYTES: usize = 16;
const KIND_IMM: u8 = 1;

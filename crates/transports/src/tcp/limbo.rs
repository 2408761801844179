//! What was on streams that broke.
//!
//! Of a stream that breaks the systems on both sides may still hold bytes, and the peer reads and places them until it has
//! noticed. So what was sent on it has failed and not quiesced, until the peer reads no more of it. No message is needed to
//! know that: who calls for a stream has left the one before, and who is called leaves it before he answers. It has
//! quiesced once another stream stands in its place, or the peer is given up.

use std::sync::{Arc, Mutex};

use super::link::TcpLink;
use super::send::Part;
use crate::{lock, Failure};

/// What was on streams that broke, by the number of the stream.
#[derive(Debug, Default)]
pub(super) struct Limbo {
    sent: Mutex<[Vec<Sent>; TcpLink::MAX_STREAMS + 1]>,
}

/// A part, and why it failed.
type Sent = (Arc<Part>, Failure);

impl Limbo {
    /// A stream has broken: what was sent on it has failed, and is kept.
    pub(super) fn keep(&self, lane: u8, sent: Vec<Arc<Part>>, why: &Failure) {
        for part in &sent {
            part.shared.fail(why.clone());
            part.shared.note_loss();
        }
        if let Some(kept) = lock(&self.sent).get_mut(usize::from(lane)) {
            kept.extend(sent.into_iter().map(|part| (part, why.clone())));
        }
    }

    /// Another stream stands in its place: the peer reads no more of it.
    pub(super) fn release(&self, lane: usize) {
        let sent = lock(&self.sent).get_mut(lane).map(std::mem::take);
        sent.into_iter().flatten().for_each(|(part, why)| part.end(Err(why)));
    }

    /// The peer is given up.
    pub(super) fn release_all(&self) {
        (0..=TcpLink::MAX_STREAMS).for_each(|lane| self.release(lane));
    }
}

//! The queue of received messages.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};

use anyfabric_transports::{lock, PeerIdx};
use anyfabric_wire::{Address, Refusal};

use crate::stats::MessageStats;
use crate::waiters::{Tell, Waiter, Waiters};

/// A received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The bytes.
    pub data: Vec<u8>,
    /// The engine that sent it.
    pub source: Address,
}

/// Received messages that nobody has taken; bounded per peer, so that one
/// peer cannot crowd out another.
#[derive(Default)]
pub(crate) struct Messages {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(PeerIdx, Message)>,
    held: HashMap<PeerIdx, (usize, usize)>,
    waiters: Waiters,
    num_refused: u64,
    closed: bool,
}

impl Messages {
    pub(crate) fn push(&self, peer: PeerIdx, message: Message) -> Result<(), Refusal> {
        let waiters = {
            let mut state = self.lock();
            let held = state.held.entry(peer).or_default();
            if held.0 >= MAX_MESSAGES || held.1 + message.data.len() > MAX_BYTES {
                state.num_refused += 1;
                return Err(Refusal::Full);
            }
            *held = (held.0 + 1, held.1 + message.data.len());
            state.queue.push_back((peer, message));
            state.waiters.take_all()
        };
        waiters.into_iter().for_each(|tell| tell());
        Ok(())
    }

    pub(crate) fn take(&self) -> Option<Message> {
        let mut state = self.lock();
        let (peer, message) = state.queue.pop_front()?;
        if let Entry::Occupied(mut held) = state.held.entry(peer) {
            let (num_messages, nbytes) = *held.get();
            match num_messages {
                // Peers come and go.
                1 => drop(held.remove()),
                _ => *held.get_mut() = (num_messages - 1, nbytes - message.data.len()),
            }
        }
        Some(message)
    }

    /// Whether `take` would return something, or the engine is closed.
    pub(crate) fn is_ready(&self) -> bool {
        let state = self.lock();
        !state.queue.is_empty() || state.closed
    }

    pub(crate) fn stats(&self) -> MessageStats {
        let state = self.lock();
        MessageStats { queued: state.queue.len(), refused: state.num_refused }
    }

    /// Runs `on_ready` once, when `is_ready`; at once if it is.
    pub(crate) fn on_ready(&self, on_ready: Tell) -> Waiter {
        let mut state = self.lock();
        let waiter = state.waiters.add(0, on_ready);
        if state.queue.is_empty() && !state.closed {
            return waiter;
        }
        let own = state.waiters.remove(waiter);
        drop(state);
        if let Some(tell) = own {
            tell();
        }
        waiter
    }

    pub(crate) fn give_up(&self, waiter: Waiter) {
        let own = self.lock().waiters.remove(waiter);
        drop(own);
    }

    pub(crate) fn close(&self) {
        let waiters = {
            let mut state = self.lock();
            state.closed = true;
            state.waiters.take_all()
        };
        waiters.into_iter().for_each(|tell| tell());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Unread messages of one peer, and their bytes.
const MAX_MESSAGES: usize = 4096;
const MAX_BYTES: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_room_for_is_refused_and_counted() {
        let source: Address = "af://127.0.0.1:9/000102030405060708090a0b0c0d0e0f".parse().unwrap();
        let messages = Messages::default();
        let push = |peer| messages.push(peer, Message { data: vec![1], source: source.clone() });
        (0..MAX_MESSAGES).for_each(|_| push(1).unwrap());
        assert_eq!((push(1), push(1)), (Err(Refusal::Full), Err(Refusal::Full)));
        push(2).unwrap();
        let stats = messages.stats();
        assert_eq!((stats.queued, stats.refused), (MAX_MESSAGES + 1, 2));
        messages.take().unwrap();
        push(1).unwrap();
    }
}

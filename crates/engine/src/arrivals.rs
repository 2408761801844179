//! What links report, to whoever drives.

use anyfabric_transports::sys::Ready;
use anyfabric_transports::{Link, PeerIdx, Sink};
use anyfabric_wire::{Imm, Refusal};

use crate::counter::AtHand;
use crate::driver::{Driver, LOCAL_CHANNELS};
use crate::events::Event;
use crate::inner::Inner;
use crate::messages::Message;

/// Where links report what arrives.
pub(crate) struct Arrivals<'d> {
    pub(crate) inner: &'d Inner,
    pub(crate) at_hand: &'d AtHand,
}

impl Inner {
    /// A descriptor of a peer's link is ready.
    pub(crate) fn ready_link(&self, driver: &Driver, idx: u32, event: Ready) {
        let Some(peer) = driver.live_peer(idx).cloned().or_else(|| self.peer(idx)) else { return };
        let channel = (event.token & 0xff) as u8;
        let arrivals = Arrivals { inner: self, at_hand: &driver.at_hand };
        match peer.shm() {
            Some(shm) if channel >= LOCAL_CHANNELS => shm.ready(channel, event, &arrivals),
            _ => peer.base.ready(channel, event, &arrivals),
        }
    }
}

impl Sink for Arrivals<'_> {
    fn arrived(&self, peer: PeerIdx, imm: Imm, quarters: u64) -> std::result::Result<(), Refusal> {
        let result = self.inner.counters.add(self.at_hand, peer, imm, quarters);
        if result.is_err() {
            self.inner.push_event(Event::EarlyFull(peer));
        }
        result
    }

    fn invisible(&self, peer: PeerIdx, imm: Imm, why: &str) {
        let Self { inner, .. } = self;
        inner
            .log(40, format!("an arrival of imm {} is not counted, for its bytes are not visible: {why}", imm.value()));
        let name = inner.peer(peer).map_or_else(String::new, |peer| peer.address.to_string());
        if inner.counters.invisible(peer, &name, imm).is_err() {
            inner.push_event(Event::EarlyFull(peer));
        }
    }

    fn missed(&self, peer: PeerIdx, why: &str) {
        let Some(peer) = self.inner.peer(peer) else { return };
        self.inner.log(40, format!("counts of {} may lack arrivals: {why}", peer.address));
        self.inner.counters.missed(peer.idx, peer.address.engine, &peer.address.to_string());
    }

    fn message(&self, peer: PeerIdx, bytes: Vec<u8>) -> std::result::Result<(), Refusal> {
        if bytes.len() > self.inner.config.max_message_bytes as usize {
            return Err(Refusal::TooLarge);
        }
        let source = self.inner.peer(peer).ok_or(Refusal::Closing)?.address.clone();
        self.inner.messages.push(peer, Message { data: bytes, source })?;
        self.inner.doorbell.notify();
        Ok(())
    }

    fn control(&self, peer: PeerIdx, bytes: &[u8]) {
        self.inner.push_event(Event::Control(peer, bytes.to_vec()));
    }

    fn heard(&self, peer: PeerIdx) {
        if let Some(peer) = self.inner.peers.known().by_idx.get(&peer) {
            peer.heard(self.inner.clock.now_ns());
        }
    }

    fn broken(&self, peer: PeerIdx, channel: u8, why: &str) {
        self.inner.push_event(Event::Broken(peer, channel, why.to_owned()));
    }

    fn overrun(&self, peer: PeerIdx, why: &str) {
        self.inner.push_event(Event::Overrun(peer, why.to_owned()));
    }

    fn exited(&self, peer: PeerIdx) {
        self.inner.push_event(Event::Exited(peer));
    }
}

//! What an engine did since its start: with each peer, and over each NIC.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use anyfabric_transports::{Histogram, NicStats};
use serde::Serialize;

use crate::peer::Peer;
use crate::Engine;

/// What an engine did since its start.
#[derive(Debug, Clone, Serialize)]
pub struct EngineStats {
    /// By printed address.
    pub peers: BTreeMap<String, PeerUse>,
    /// Unread messages.
    pub messages: MessageStats,
}

/// The receive queue.
#[derive(Debug, Clone, Serialize)]
pub struct MessageStats {
    /// Messages that nobody has taken.
    pub queued: usize,
    /// Messages that were refused for want of room, and failed at their senders.
    pub refused: u64,
}

/// The operations with one peer: the same on every transport.
#[derive(Debug, Clone, Serialize)]
pub struct PeerUse {
    /// Name of the transport; `"none"` when there never was a path.
    pub transport: String,
    /// Payload bytes of the operations that ended well.
    pub bytes: u64,
    /// Operations that have ended, well or not: each call once, whatever carried
    /// it; a scatter or barrier once at each of its peers.
    pub operations: u64,
    /// Of those, the ones that ended in an error; of one with several peers at
    /// each of them, whichever made it fail.
    pub errors: u64,
    /// Times that a part waited for room.
    pub retries: u64,
    /// By NIC.
    pub nics: BTreeMap<String, NicUse>,
    /// From submission to end, of those that ended well.
    pub latency_us: LatencyStats,
}

/// What one NIC carried.
#[derive(Debug, Clone, Serialize)]
pub struct NicUse {
    /// Payload bytes, also of operations that failed.
    pub bytes: u64,
    /// Parts of operations: a small operation is one part, a large one may have
    /// a part on every NIC.
    pub parts: u64,
    /// Parts that failed.
    pub errors: u64,
    /// Times that a part waited for room.
    pub retries: u64,
    /// Of parts, from submission to end.
    pub latency_us: LatencyStats,
}

/// Latencies in microseconds; upper bounds of histogram buckets. Of writes that
/// the caller's thread carried out every sixteenth small one is timed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LatencyStats {
    /// Number of latencies.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 99 in 100 are not longer.
    pub p99: f64,
    /// 999 in 1000 are not longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Engine {
    /// What was done with every peer since the start.
    pub fn stats(&self) -> EngineStats {
        let peers = self.inner.peers();
        let peers = peers.iter().filter_map(|peer| Some((peer.address.to_string(), peer_use(peer)?))).collect();
        EngineStats { peers, messages: self.inner.messages.stats() }
    }
}

/// `None` of a peer that nothing was done with, and that there is no path to.
fn peer_use(peer: &Peer) -> Option<PeerUse> {
    let operations = &peer.operations;
    let (mut bytes, mut num_ended) = (operations.bytes.load(Relaxed), operations.num_ended());
    if peer.link().is_none() && num_ended == 0 {
        return None;
    }
    let mut nics = Vec::new();
    if let Some(link) = peer.link() {
        let stats = link.stats();
        bytes += stats.inline_bytes.load(Relaxed);
        num_ended += stats.inline_operations.load(Relaxed);
        let of_link = stats.nics().iter().enumerate();
        nics.extend(of_link.map(|(idx, nic)| (nic_name(link.transport(), idx), nic)));
        if matches!(link.transport(), "verbs" | "libfabric" | "shm") {
            // What the path does not carry, as checksums, goes over the link that every peer has.
            let base = peer.base.as_link();
            let others = base.stats().nics().iter().enumerate().filter(|(_, nic)| nic.parts.load(Relaxed) > 0);
            nics.extend(others.map(|(idx, nic)| (nic_name(base.transport(), idx), nic)));
        }
    }
    Some(PeerUse {
        transport: peer.link().map_or("none", |link| link.transport()).into(),
        bytes,
        operations: num_ended,
        errors: operations.errors.load(Relaxed),
        retries: nics.iter().map(|(_, nic)| nic.retries.load(Relaxed)).sum(),
        nics: nics.into_iter().map(|(name, nic)| (name, nic_use(nic))).collect(),
        latency_us: latency(&operations.latency),
    })
}

fn nic_name(transport: &str, idx: usize) -> String {
    match (transport, idx) {
        ("shm", _) => "memory".to_owned(),
        ("loopback", idx) => format!("nic{idx}"),
        ("verbs" | "libfabric", idx) => format!("rail{idx}"),
        (_, 0) => "control".to_owned(),
        (_, idx) => format!("stream{idx}"),
    }
}

fn nic_use(nic: &NicStats) -> NicUse {
    NicUse {
        bytes: nic.bytes.load(Relaxed),
        parts: nic.parts.load(Relaxed),
        errors: nic.errors.load(Relaxed),
        retries: nic.retries.load(Relaxed),
        latency_us: latency(&nic.latency),
    }
}

fn latency(histogram: &Histogram) -> LatencyStats {
    let us = |ns: u64| ns as f64 / 1e3;
    LatencyStats {
        count: histogram.count(),
        p50: us(histogram.quantile_ns(0.5)),
        p99: us(histogram.quantile_ns(0.99)),
        p999: us(histogram.quantile_ns(0.999)),
        max: us(histogram.max_ns()),
    }
}

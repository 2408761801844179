//! The peers that an engine knows: those that it may talk to, and the last of
//! those that it has lost or could not reach.
//!
//! A lost peer is remembered so that whoever asks learns why, and so that the
//! same incarnation stays lost. An engine that serves for weeks loses many: they
//! are not polled, do not count against the bound of peers, and the oldest that
//! can touch nothing of ours any more are forgotten. So it is with strangers:
//! peers that never answered.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyfabric_transports::tcp::TcpLink;
use anyfabric_transports::{Failure, Link, PeerIdx};
use anyfabric_wire::{Address, EngineId};
use arc_swap::{ArcSwap, Guard};
use foldhash::fast::RandomState;

use crate::base::Base;
use crate::inner::{lock, Inner};
use crate::peer::{Peer, Phase};

/// Every peer that is known.
#[derive(Default)]
pub(crate) struct PeerTable {
    /// Read on the way of operations and arrivals, so without a lock.
    known: ArcSwap<Known>,
    /// Who makes another list.
    change: Mutex<()>,
    /// Grows with every peer that comes or is lost.
    version: AtomicU64,
}

/// The peers as they are at one moment; changes make another list.
#[derive(Default, Clone)]
pub(crate) struct Known {
    /// A barrier looks for each of its peers. Names are theirs to choose, so the hash is keyed.
    by_engine: HashMap<EngineId, Arc<Peer>, RandomState>,
    /// The same, in the order in which they came, which is mostly that of a barrier.
    in_order: Vec<(EngineId, Arc<Peer>)>,
    pub(crate) by_idx: BTreeMap<PeerIdx, Arc<Peer>>,
    /// Of those, the lost ones, oldest first.
    lost: VecDeque<PeerIdx>,
    /// No number is used twice.
    next_idx: PeerIdx,
}

impl PeerTable {
    /// The list, for a moment.
    #[inline]
    pub(crate) fn known(&self) -> Guard<Arc<Known>> {
        self.known.load()
    }

    fn change<R>(&self, change: impl FnOnce(&mut Known) -> R) -> R {
        let _guard = lock(&self.change);
        let mut known = Known::clone(&self.known.load());
        let result = change(&mut known);
        known.list_in_order();
        self.known.store(Arc::new(known));
        result
    }

    fn note_change(&self) {
        // ORDERING: after the change; partner: `Inner::peers_version`. Who sees it late looks again.
        self.version.fetch_add(1, Ordering::Release);
    }
}

impl Known {
    #[inline]
    pub(crate) fn find(&self, engine: EngineId) -> Option<&Arc<Peer>> {
        self.by_engine.get(&engine)
    }

    /// As [`Known::find`]; `next` is the place of whoever came after the last that was found.
    #[inline]
    pub(crate) fn find_next(&self, engine: EngineId, next: &mut usize) -> Option<&Arc<Peer>> {
        if let Some((_, peer)) = self.in_order.get(*next).filter(|(known, _)| *known == engine) {
            *next += 1;
            return Some(peer);
        }
        let peer = self.find(engine)?;
        *next = self.in_order.partition_point(|(_, other)| other.idx <= peer.idx);
        Some(peer)
    }

    fn list_in_order(&mut self) {
        let Self { by_engine, by_idx, in_order, .. } = self;
        let is_listed = |peer: &&Arc<Peer>| by_engine.get(&peer.address.engine).is_some_and(|it| it.idx == peer.idx);
        in_order.clear();
        in_order.extend(by_idx.values().filter(is_listed).map(|peer| (peer.address.engine, Arc::clone(peer))));
    }

    /// Those that are not lost, in the order of their numbers.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_idx.values().filter(|peer| peer.lost().is_none())
    }

    pub(crate) fn num_live(&self) -> usize {
        self.by_idx.len() - self.lost.len()
    }

    /// Those that were never met, oldest first.
    fn strangers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.live().filter(|peer| is_stranger(peer))
    }

    fn remove(&mut self, idx: PeerIdx) -> Option<Arc<Peer>> {
        let peer = self.by_idx.remove(&idx)?;
        if self.by_engine.get(&peer.address.engine).is_some_and(|listed| listed.idx == idx) {
            self.by_engine.remove(&peer.address.engine);
        }
        Some(peer)
    }
}

impl Inner {
    /// All of them, in the order in which they came.
    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.known().by_idx.values().cloned().collect()
    }

    /// Those that are not lost, in the order of their numbers.
    pub(crate) fn live_peers(&self) -> Vec<Arc<Peer>> {
        self.peers.known().live().cloned().collect()
    }

    /// Those that count against the bound: met, or being met.
    pub(crate) fn num_met_peers(&self) -> usize {
        self.peers.known().live().filter(|peer| !is_stranger(peer)).count()
    }

    /// Another number once [`Inner::live_peers`] may be others.
    #[inline]
    pub(crate) fn peers_version(&self) -> u64 {
        // ORDERING: see `note_change`.
        self.peers.version.load(Ordering::Acquire)
    }

    pub(crate) fn peer(&self, idx: PeerIdx) -> Option<Arc<Peer>> {
        self.peers.known().by_idx.get(&idx).cloned()
    }

    pub(crate) fn find_peer(&self, engine: EngineId) -> Option<Arc<Peer>> {
        self.peers.known().by_engine.get(&engine).cloned()
    }

    /// The peer at that address, known or new.
    pub(crate) fn peer_at(&self, address: &Address) -> Arc<Peer> {
        if let Some(peer) = self.find_peer(address.engine) {
            return peer;
        }
        let peer = self.peers.change(|known| {
            let Known { by_engine, by_idx, next_idx, .. } = known;
            let peer = by_engine.entry(address.engine).or_insert_with(|| {
                let idx = *next_idx;
                *next_idx += 1;
                let (streams, limit) = (self.config.tcp_streams, self.config.max_message_bytes);
                let regions = Arc::clone(&self.regions);
                let base = match &self.simulated {
                    Some(endpoint) => Base::Simulated(endpoint.link(idx, address.engine, regions)),
                    None => Base::Tcp(Arc::new(TcpLink::new(idx, regions, limit, streams, self.clock.clone()))),
                };
                let office = Arc::clone(&self.office);
                let peer = Arc::new(Peer::new(idx, address.clone(), base, self.clock.now_ns(), office));
                by_idx.insert(idx, Arc::clone(&peer));
                peer
            });
            Arc::clone(peer)
        });
        self.peers.note_change();
        peer
    }

    /// The next who asks for that engine meets it like a new one.
    pub(crate) fn unlist(&self, engine: EngineId) {
        self.peers.change(|known| known.by_engine.remove(&engine));
    }

    /// A peer was lost. Forgets the oldest such, when there are many.
    pub(crate) fn note_lost(&self, peer: &Peer) {
        let mut forgotten = Vec::new();
        self.peers.change(|known| {
            known.lost.push_back(peer.idx);
            while known.lost.len() > MAX_LOST {
                let Known { by_idx, lost, .. } = known;
                // One that may still write is kept, for its exit must be noticed.
                let is_out = |idx: &PeerIdx| by_idx.get(idx).is_none_or(|peer| peer.links().all(Link::is_quiet));
                let Some(idx) = lost.iter().position(is_out).and_then(|at| lost.remove(at)) else { break };
                forgotten.extend(known.remove(idx));
            }
        });
        self.peers.note_change();
        for peer in &forgotten {
            // What it was to be told nobody can tell it any more.
            self.office.losses.take(peer.idx);
            self.counters.early(|early| early.forget(peer.idx));
        }
        // Unmapping its rings takes a while; not under the lock.
        drop(forgotten);
    }

    /// Another peer could not be reached. Forgets the oldest such, when there are
    /// many: somebody who tries addresses where nobody answers must not fill the
    /// list.
    pub(crate) fn forget_strangers(&self) {
        if self.peers.known().strangers().count() <= MAX_STRANGERS {
            return;
        }
        let forgotten: Vec<_> = self.peers.change(|known| {
            let strangers: Vec<_> = known.strangers().cloned().collect();
            let regions = self.regions.all();
            let is_out = |peer: &&Arc<Peer>| !regions.iter().any(|region| region.is_revoked_for(peer.idx));
            let num_more = strangers.len().saturating_sub(MAX_STRANGERS);
            let oldest = strangers.iter().filter(|peer| peer.is_clear()).filter(is_out).take(num_more);
            oldest.filter_map(|peer| known.remove(peer.idx)).collect()
        });
        for peer in &forgotten {
            // Whoever found it in the list a moment ago is not left waiting.
            let why = Failure::ConnectionBroken("nobody answered at its address".into());
            peer.set_lost(why.clone());
            peer.fail_waiting(&why);
            self.office.losses.take(peer.idx);
        }
        self.peers.note_change();
    }
}

/// Whether the two have never met, and nobody is about to change that.
fn is_stranger(peer: &Peer) -> bool {
    let state = peer.state();
    state.phase == Phase::Idle && state.session.is_none()
}

/// Lost peers that are remembered.
const MAX_LOST: usize = 256;
/// Peers that could not be reached and are remembered, for those who ask why.
const MAX_STRANGERS: usize = 256;

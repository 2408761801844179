//! Taking memory back: fencing is awaited, never assumed.
//!
//! A stream is fenced by its reader: from [`Link::withhold`] on, not one byte
//! of it lands. A peer that mapped the memory, or knows its address, is asked
//! to stop and to say when it has; until it has said so, or its process has
//! exited, the bytes are quarantined.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyfabric_transports::rdma::RailPath;
use anyfabric_transports::sys::{is_readable_within, Fd};
use anyfabric_transports::{try_lock, Backing, Link, PeerIdx, Region};
use anyfabric_wire::Control;

use crate::inner::{lock, nanos, Inner};
use crate::peer::Peer;

/// Revocations that peers have not acknowledged.
#[derive(Default)]
pub(crate) struct Revokes {
    next: AtomicU64,
    asked: Mutex<HashMap<u64, Asked>>,
    /// Closed, and still within reach of a writer.
    quarantine: Mutex<Vec<Arc<Region>>>,
    /// What tells of the end of peers that may write beyond the end of this engine.
    writers: Mutex<HashMap<PeerIdx, Arc<Fd>>>,
}

/// Memory that its engine left behind, and the processes that may write into it.
struct Orphan {
    region: Arc<Region>,
    writers: Vec<Arc<Fd>>,
}

/// How long the answers of peers are waited for.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    pub(crate) timeout: Duration,
    /// Asked again and again: false, and nothing more is done.
    pub(crate) goes_on: &'a dyn Fn() -> bool,
}

/// What a peer was asked to let go of.
struct Asked {
    peer: PeerIdx,
    region: Arc<Region>,
    key: u64,
}

impl Revokes {
    pub(crate) fn acknowledged(&self, inner: &Inner, peer: &Peer, revoke: u64) {
        let asked = {
            let mut asked = lock(&self.asked);
            match asked.get(&revoke) {
                Some(found) if found.peer == peer.idx => asked.remove(&revoke),
                _ => None,
            }
        };
        if let Some(Asked { peer, region, key }) = asked {
            region.let_go_by(peer, key);
            self.settle(inner);
        }
    }

    /// A lost peer acknowledges nothing any more; only its exit releases.
    pub(crate) fn peer_lost(&self, inner: &Inner, peer: &Peer) {
        lock(&self.asked).retain(|_, asked| asked.peer != peer.idx);
        inner.doorbell.notify();
    }

    /// Keeps what tells of a peer's end, when the engine ends before it.
    pub(crate) fn keep_watch(&self, peer: PeerIdx, process: Fd) {
        lock(&self.writers).insert(peer, Arc::new(process));
    }

    /// The engine is gone, and with it whoever would have listened to its peers.
    pub(crate) fn leave_behind(&self) {
        let writers = lock(&self.writers);
        let lent = std::mem::take(&mut *lock(&self.quarantine)).into_iter().filter(|region| is_lent(region));
        let orphans = lent.map(|region| {
            let writers: Vec<_> = region.granted_to().iter().filter_map(|peer| writers.get(peer).cloned()).collect();
            Orphan { region, writers }
        });
        let orphans: Vec<_> = orphans.filter(|orphan| !orphan.writers.is_empty()).collect();
        // In a forked child somebody who is not there may hold it.
        if !orphans.is_empty() {
            lock(&ORPHANS).extend(orphans);
        }
        release_orphans();
    }

    pub(crate) fn quarantined(&self) -> Vec<Arc<Region>> {
        lock(&self.quarantine).clone()
    }

    /// Lets go of what nobody can touch any more.
    pub(crate) fn settle(&self, inner: &Inner) {
        let before = {
            let mut quarantine = lock(&self.quarantine);
            if quarantine.is_empty() {
                drop(quarantine);
                inner.doorbell.notify();
                return;
            }
            let (kept, free): (Vec<_>, Vec<_>) =
                std::mem::take(&mut *quarantine).into_iter().partition(|region| inner.is_quarantined(region));
            *quarantine = kept;
            free
        };
        // Dropped outside of the lock: an owner may be anything.
        drop(before);
        inner.doorbell.notify();
    }
}

impl Inner {
    /// Fences peers out of a region; true when none of them can touch it any
    /// more. `peer`: one, or `None` for all.
    pub(crate) fn fence(&self, region: &Arc<Region>, peer: Option<&Arc<Peer>>, patience: Patience<'_>) -> bool {
        if peer.is_none() {
            region.revoke_for_all();
        }
        let peers = peer.map_or_else(|| self.peers(), |peer| vec![Arc::clone(peer)]);
        for peer in &peers {
            let keys = region.revoke(peer.idx);
            // Every link is told, also after one that depends on the peer's word.
            let fenced = peer.links().fold(true, |fenced, link| link.withhold(region) & fenced);
            if peer.lost().is_some() {
                if peer.links().all(Link::is_quiet) {
                    region.released_by(peer.idx);
                }
            } else if !fenced && peer.has_session() {
                // Only who can write without us is asked, once for each key; others find themselves refused.
                for key in keys {
                    self.ask_back(peer, region, key);
                }
            }
        }
        let is_out = || {
            let owed = region.owed_by();
            !peers.iter().any(|peer| owed.contains(&peer.idx))
        };
        // After the engine's end nobody listens for an answer.
        let is_over = self.wait_patiently(patience, || is_out() || self.presence.is_stopped());
        // Nobody expected an answer at once.
        if is_over && !is_out() && !patience.timeout.is_zero() {
            peers.iter().for_each(|peer| self.expel(region, peer));
        }
        is_out()
    }

    /// False when the caller would not go on.
    fn wait_patiently(&self, patience: Patience<'_>, done: impl Fn() -> bool) -> bool {
        let until_ns = self.clock.now_ns().saturating_add(nanos(patience.timeout));
        loop {
            let left = Duration::from_nanos(until_ns.saturating_sub(self.clock.now_ns()));
            if self.wait(Some(left.min(LOOK_UP)), &done) || left <= LOOK_UP {
                return true;
            }
            if !(patience.goes_on)() {
                return false;
            }
        }
    }

    /// A peer has not answered: acts alone, where our own NICs let it write.
    fn expel(&self, region: &Region, peer: &Peer) {
        let is_in_use = |path: &&Arc<dyn RailPath>| {
            peer.link().is_some_and(|link| std::ptr::addr_eq(Arc::as_ptr(path), Arc::as_ptr(link)))
        };
        let path = peer.all_rails().find(is_in_use);
        if let (Some(path), true) = (path, region.owed_by().contains(&peer.idx)) {
            let told = format!("{} did not let go of region {}", peer.address, region.id);
            if path.expel() {
                region.released_by(peer.idx);
                self.log(30, format!("{told}: its rails were stopped"));
            } else {
                self.log(40, format!("{told}, and a NIC does not stop a rail of it"));
            }
        }
    }

    fn ask_back(&self, peer: &Peer, region: &Arc<Region>, key: u64) {
        // ORDERING: a number of its own, no more.
        let revoke = self.revokes.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.revokes.asked).insert(revoke, Asked { peer: peer.idx, region: Arc::clone(region), key });
        peer.base.send_control(Control::Revoke { region: region.id, key, revoke }.encode());
    }

    /// The engine ends: asks whoever writes into memory that goes back to its owner, and writes there himself, to stop.
    pub(crate) fn ask_writers_out(&self, peers: &[Arc<Peer>], timeout: Duration) {
        let mut asked = Vec::new();
        for region in self.regions.all().into_iter().filter(|region| is_lent(region)) {
            let writers = region.granted_to();
            for peer in peers.iter().filter(|peer| peer.shm().is_some() && writers.contains(&peer.idx)) {
                for key in region.revoke(peer.idx) {
                    self.ask_back(peer, &region, key);
                }
                asked.push((Arc::clone(&region), peer));
            }
        }
        let is_out = |(region, peer): &(Arc<Region>, &Arc<Peer>)| {
            peer.lost().is_some() || !region.granted_to().contains(&peer.idx)
        };
        self.wait(Some(timeout), || asked.iter().all(is_out));
    }

    /// Closes a region for good. Bytes that a writer might still touch are
    /// kept, and listed as quarantined, until it has exited or answered. Whoever
    /// closes it once more waits as the first does.
    pub(crate) fn close_region(&self, region: &Arc<Region>, patience: Patience<'_>) {
        let is_first = region.close();
        if is_first {
            self.regions.remove(region.id);
        } else if patience.timeout.is_zero() || self.presence.is_stopped() {
            // An engine that ends fences everybody, or sets the bytes aside.
            return;
        }
        if !self.fence(region, None, patience) && is_first {
            // Without a timeout nobody expected an answer: it comes in a moment.
            self.set_aside(Arc::clone(region), if patience.timeout.is_zero() { 10 } else { 30 });
        }
    }

    pub(crate) fn set_aside(&self, region: Arc<Region>, level: u8) {
        self.log(level, format!("region {} is quarantined: a writer has not let go of it", region.id));
        lock(&self.revokes.quarantine).push(region);
    }
}

/// Whether the memory goes back to its owner with the region, at addresses that a process of this host may write to.
/// What the engine allocated is unmapped here, and stays where others map it; NICs are told to forget the rest.
pub(crate) fn is_lent(region: &Region) -> bool {
    matches!(region.backing(), Backing::Foreign { .. })
}

/// Frees the memory of engines of the past that nobody can write into any more.
pub(crate) fn release_orphans() {
    // As in `leave_behind`.
    let Some(mut orphans) = try_lock(&ORPHANS) else { return };
    let has_exited = |process: &Arc<Fd>| is_readable_within(process, Duration::ZERO);
    let (free, kept): (Vec<_>, Vec<_>) =
        std::mem::take(&mut *orphans).into_iter().partition(|orphan| orphan.writers.iter().all(has_exited));
    *orphans = kept;
    drop(orphans);
    // Outside of the lock: an owner may be anything.
    free.into_iter().for_each(|orphan| drop(orphan.region));
}

/// Longest wait between two questions whether the caller goes on.
const LOOK_UP: Duration = Duration::from_millis(100);
/// Of all engines of this process; looked at when another one comes or goes.
static ORPHANS: Mutex<Vec<Orphan>> = Mutex::new(Vec::new());

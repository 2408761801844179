//! Whom an operation is for: whose parts have not ended, and what the statistics of each peer say of its end.
//!
//! Lists are used again and again: what an operation before had of the same peer in the same place stays, so that
//! naming the same peers anew costs a comparison each.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use crate::{OperationStats, PeerIdx};

/// Whom an operation is for.
#[derive(Debug, Default)]
pub struct Recipients {
    /// In the order in which they were named, a peer for each of its targets; from `num` on those of operations before.
    list: Vec<Recipient>,
    num: usize,
    /// So many, from the first on, are known to come in the order of the peers.
    num_in_order: usize,
    /// Each peer once, in the order of the peers; empty where the list is that.
    awaited: Vec<Awaited>,
}

#[derive(Debug)]
struct Recipient {
    peer: PeerIdx,
    /// That have not ended, where the list is awaited as it is.
    parts: AtomicU32,
    nbytes: u64,
    stats: Arc<OperationStats>,
}

#[derive(Debug)]
struct Awaited {
    peer: PeerIdx,
    /// That have not ended.
    parts: AtomicU32,
    nbytes: u64,
    /// Where it is in the list.
    at: usize,
}

impl Recipients {
    /// Names one more target: so many bytes for that peer, whose statistics these are.
    #[inline]
    pub fn add(&mut self, peer: PeerIdx, stats: &Arc<OperationStats>, nbytes: u64) {
        if !self.add_again(stats, nbytes) {
            self.name(peer, stats, nbytes);
            self.num += 1;
        }
    }

    /// As [`Recipients::add`], if that peer was in the same place before; false otherwise.
    #[inline]
    pub fn add_again(&mut self, stats: &Arc<OperationStats>, nbytes: u64) -> bool {
        match self.list.get_mut(self.num) {
            Some(known) if Arc::ptr_eq(&known.stats, stats) => {
                known.nbytes = nbytes;
                *known.parts.get_mut() = 1;
                self.num += 1;
                true
            }
            _ => false,
        }
    }

    /// One who was not in that place before.
    #[inline(never)]
    fn name(&mut self, peer: PeerIdx, stats: &Arc<OperationStats>, nbytes: u64) {
        self.num_in_order = self.num_in_order.min(self.num);
        let recipient = Recipient { peer, parts: AtomicU32::new(1), nbytes, stats: Arc::clone(stats) };
        match self.list.get_mut(self.num) {
            Some(other) => *other = recipient,
            None => self.list.push(recipient),
        }
    }

    /// Names nobody.
    #[inline]
    pub fn clear(&mut self) {
        self.num = 0;
        self.awaited.clear();
    }

    /// Number of targets.
    pub const fn num_targets(&self) -> usize {
        self.num
    }

    /// Their peers, in the order in which they were named.
    pub fn peers(&self) -> impl Iterator<Item = PeerIdx> + '_ {
        self.list[..self.num].iter().map(|recipient| recipient.peer)
    }

    /// The peer, where there is but one.
    pub fn only(&self) -> Option<PeerIdx> {
        let mut peers = self.peers();
        let first = peers.next()?;
        peers.all(|other| other == first).then_some(first)
    }

    /// All are named: notes what is awaited of whom, before any part is submitted.
    pub(crate) fn await_parts(&mut self) {
        let Self { list, num, num_in_order, awaited } = self;
        awaited.clear();
        if *num <= *num_in_order {
            return;
        }
        if list[..*num].is_sorted_by(|recipient, next| recipient.peer < next.peer) {
            *num_in_order = *num;
            return;
        }
        let of = |(at, recipient): (usize, &Recipient)| {
            let Recipient { peer, nbytes, .. } = *recipient;
            Awaited { peer, parts: AtomicU32::new(1), nbytes, at }
        };
        awaited.extend(list[..*num].iter().enumerate().map(of));
        awaited.sort_unstable_by_key(|awaited| awaited.peer);
        awaited.dedup_by(|more, first| {
            let is_same = more.peer == first.peer;
            if is_same {
                *first.parts.get_mut() += 1;
                first.nbytes = first.nbytes.saturating_add(more.nbytes);
            }
            is_same
        });
    }

    /// A part for that peer has ended.
    #[inline]
    pub(crate) fn part_ended(&self, peer: PeerIdx) {
        let list = &self.list[..self.num];
        let parts = if self.awaited.is_empty() {
            // Of one nobody asks whose parts are missing.
            let at = (list.len() > 1).then(|| list.binary_search_by_key(&peer, |recipient| recipient.peer).ok());
            at.flatten().map(|at| &list[at].parts)
        } else {
            let at = self.awaited.binary_search_by_key(&peer, |awaited| awaited.peer);
            at.ok().map(|at| &self.awaited[at].parts)
        };
        // ORDERING: for people.
        parts.map(|parts| parts.fetch_sub(1, Ordering::Relaxed));
    }

    /// Of several: whose parts have not ended.
    pub(crate) fn unfinished(&self) -> Vec<PeerIdx> {
        // ORDERING: for people.
        let is_unfinished = |parts: &AtomicU32| parts.load(Ordering::Relaxed) > 0;
        if !self.awaited.is_empty() {
            let unfinished = self.awaited.iter().filter(|awaited| is_unfinished(&awaited.parts));
            return unfinished.map(|awaited| awaited.peer).collect();
        }
        let several = if self.num > 1 { &self.list[..self.num] } else { &[] };
        several.iter().filter(|recipient| is_unfinished(&recipient.parts)).map(|recipient| recipient.peer).collect()
    }

    /// Peers, where there are several targets.
    pub(crate) const fn num_awaited(&self) -> usize {
        match (self.awaited.len(), self.num) {
            (0, 0 | 1) => 0,
            (0, num) => num,
            (num, _) => num,
        }
    }

    /// The operation ends well after so long: once in the statistics of each peer.
    #[inline]
    pub(crate) fn note_done(&self, ns: u64) {
        self.each(|stats, nbytes| stats.done(nbytes, ns));
    }

    /// The operation has failed: for every peer, whichever made it fail.
    #[cold]
    pub(crate) fn note_failed(&self) {
        self.each(|stats, _| stats.failed());
    }

    /// Each peer once: its statistics, and its bytes.
    #[inline]
    fn each(&self, note: impl Fn(&OperationStats, u64)) {
        let list = &self.list[..self.num];
        if self.awaited.is_empty() {
            list.iter().for_each(|recipient| note(&recipient.stats, recipient.nbytes));
        } else {
            self.awaited.iter().for_each(|awaited| note(&list[awaited.at].stats, awaited.nbytes));
        }
    }
}

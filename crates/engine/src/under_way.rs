//! Operations under way: how many there may be, and who looks after them.
//!
//! ```text
//! submitter ── submitted ──▶ driver: deadlines, imms ──▶ spare ── submitter
//! ```
//!
//! A submitter leaves what it begins in a bounded ring before any of it is
//! posted; whoever drives takes it out, fails what is over its deadline, and
//! gives the entry of what has quiesced back to be used again. So an operation
//! takes no lock, and allocates nothing once there are as many entries as are
//! under way at a time. Two looks at what is under way for each operation that
//! comes keep the list short.

use std::sync::Arc;

use anyfabric_plan::{Extents, PageList, PageLists};
use anyfabric_transports::{PeerIdx, Recipients, Terms, Ticket, TicketOffice};
use anyfabric_wire::Imm;
use crossbeam_queue::ArrayQueue;

/// An operation under way.
#[derive(Default)]
pub(crate) struct Entry {
    ticket: Option<Arc<Ticket>>,
    pub(crate) imm: Option<Imm>,
    /// Until there is a ticket, which has them then.
    pub(crate) recipients: Recipients,
    lists: Option<Arc<PageLists>>,
    /// It has quiesced, and somebody still has the ticket; so it was at the last
    /// tick too.
    is_kept: bool,
}

/// Between those who submit and whoever drives.
pub(crate) struct Rings {
    submitted: ArrayQueue<Entry>,
    spare: ArrayQueue<Entry>,
}

/// What whoever drives looks after.
#[derive(Default)]
pub(crate) struct UnderWay {
    entries: Vec<Entry>,
    next: usize,
}

impl Default for Rings {
    fn default() -> Self {
        Self { submitted: ArrayQueue::new(MAX_SUBMITTED), spare: ArrayQueue::new(MAX_SUBMITTED) }
    }
}

impl Rings {
    /// An entry to fill in.
    #[inline]
    pub(crate) fn draft(&self) -> Entry {
        self.spare.pop().unwrap_or_default()
    }

    /// An entry that was not needed.
    pub(crate) fn give_back(&self, mut entry: Entry) {
        entry.recipients.clear();
        if let Some(lists) = entry.lists.as_mut().and_then(Arc::get_mut) {
            // What they name is the user's.
            *lists = PageLists::default();
        }
        // There are enough of them.
        let _ = self.spare.push(entry);
    }

    /// The operation begins; given back when there is no room just now.
    #[inline]
    pub(crate) fn submit(&self, entry: Entry) -> Result<(), Entry> {
        self.submitted.push(entry)
    }
}

impl Entry {
    /// The ticket of a new operation that has entered the office; a used one, if this entry has one that nobody
    /// else has.
    pub(crate) fn issue(&mut self, office: &Arc<TicketOffice>, terms: Terms) -> Arc<Ticket> {
        self.is_kept = false;
        let mut ticket = match self.ticket.take() {
            Some(mut ticket) => {
                if let Some(own) = Arc::get_mut(&mut ticket) {
                    own.renew(terms);
                    ticket
                } else {
                    Arc::new(Ticket::new(Arc::clone(office), terms))
                }
            }
            None => Arc::new(Ticket::new(Arc::clone(office), terms)),
        };
        if let Some(own) = Arc::get_mut(&mut ticket) {
            own.set_recipients(&mut self.recipients);
            own.count();
        }
        self.ticket = Some(Arc::clone(&ticket));
        ticket
    }

    /// The ranges of pages; of memory that this entry has, if nobody else has it.
    pub(crate) fn extents(&mut self, src: PageList, dst: PageList) -> Extents {
        let mut lists = self.lists.take().unwrap_or_default();
        match Arc::get_mut(&mut lists) {
            Some(own) => *own = PageLists { src, dst },
            None => lists = Arc::new(PageLists { src, dst }),
        }
        self.lists = Some(Arc::clone(&lists));
        lists.into()
    }

    /// Looks after a ticket that there is already, and that its user may have too.
    pub(crate) fn set_ticket(&mut self, ticket: &Arc<Ticket>) {
        ticket.count_shared();
        self.is_kept = false;
        self.ticket = Some(Arc::clone(ticket));
    }

    pub(crate) fn deadline_ns(&self) -> u64 {
        self.ticket.as_ref().map_or(u64::MAX, |ticket| ticket.deadline_ns())
    }

    /// Whether a part of it is for that peer.
    pub(crate) fn is_for(&self, peer: PeerIdx) -> bool {
        self.ticket.as_ref().is_some_and(|ticket| ticket.recipients().peers().any(|it| it == peer))
    }

    fn has_quiesced(&self) -> bool {
        self.ticket.as_ref().is_none_or(|ticket| ticket.has_quiesced())
    }

    /// Whether nobody else has the ticket.
    fn is_free(&mut self) -> bool {
        self.ticket.as_mut().is_none_or(|ticket| Arc::get_mut(ticket).is_some())
    }
}

impl UnderWay {
    /// Takes what was submitted; every turn. Returns the first deadline among it.
    #[inline]
    pub(crate) fn take(&mut self, rings: &Rings) -> u64 {
        let mut first_ns = u64::MAX;
        while !rings.submitted.is_empty() {
            let Some(entry) = rings.submitted.pop() else { break };
            (0..LOOKS).for_each(|_| self.look(rings));
            first_ns = first_ns.min(entry.deadline_ns());
            self.entries.push(entry);
        }
        first_ns
    }

    /// Gives the next entry back, if it can be used again.
    fn look(&mut self, rings: &Rings) {
        if self.next >= self.entries.len() {
            self.next = 0;
        }
        let Some(entry) = self.entries.get_mut(self.next) else { return };
        if entry.has_quiesced() && entry.is_free() {
            rings.give_back(self.entries.swap_remove(self.next));
        } else {
            self.next += 1;
        }
    }

    /// Forgets what has quiesced; true when something has not.
    pub(crate) fn sweep(&mut self, rings: &Rings) -> bool {
        self.take(rings);
        let mut is_busy = false;
        for idx in (0..self.entries.len()).rev() {
            let entry = &mut self.entries[idx];
            if !entry.has_quiesced() {
                is_busy = true;
            } else if entry.is_free() {
                rings.give_back(self.entries.swap_remove(idx));
            } else if std::mem::replace(&mut entry.is_kept, true) {
                // Whoever has the ticket keeps it; that need not be for long, but may.
                self.entries.swap_remove(idx);
            }
        }
        is_busy
    }

    /// What has not quiesced.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<Ticket>, &Entry)> {
        let under_way = |entry: &&Entry| !entry.has_quiesced();
        self.entries.iter().filter(under_way).filter_map(|entry| Some((entry.ticket.as_ref()?, entry)))
    }
}

/// Operations that nobody has taken under his wing yet, and entries kept for later
/// ones: as many as the default of `queue_depth`.
const MAX_SUBMITTED: usize = 1024;
/// Entries looked at for each that comes: with one the list would only not grow.
const LOOKS: usize = 2;

#[cfg(test)]
mod tests {
    use anyfabric_transports::{Clock, Doorbell};

    use super::*;

    fn office() -> Arc<TicketOffice> {
        Arc::new(TicketOffice::new(Arc::new(Doorbell::private().unwrap()), Clock::Real))
    }

    fn begin(rings: &Rings, office: &Arc<TicketOffice>) -> Arc<Ticket> {
        let mut entry = rings.draft();
        let terms = Terms { num_parts: 1, ..Terms::default() };
        assert!(office.enter(usize::MAX));
        let ticket = entry.issue(office, terms);
        assert!(rings.submit(entry).is_ok());
        ticket
    }

    #[test]
    fn what_has_quiesced_is_used_again_unless_somebody_has_it() {
        let (rings, office, mut under_way) = (Rings::default(), office(), UnderWay::default());
        let first = begin(&rings, &office);
        under_way.take(&rings);
        assert_eq!((office.num_under_way(), office.num_pending(), under_way.iter().count()), (1, 1, 1));
        first.part_ended(Ok(()));
        assert_eq!((office.num_under_way(), office.num_pending(), under_way.iter().count()), (0, 0, 0));
        let name = Arc::as_ptr(&first);
        // We still have it.
        assert!(!under_way.sweep(&rings));
        let second = begin(&rings, &office);
        assert_ne!(Arc::as_ptr(&second), name);
        drop(first);
        assert!(under_way.sweep(&rings));
        let third = begin(&rings, &office);
        assert_eq!(Arc::as_ptr(&third), name);
        assert!(!third.has_ended());
    }

    #[test]
    fn tickets_that_users_keep_are_forgotten() {
        let (rings, office, mut under_way) = (Rings::default(), office(), UnderWay::default());
        let kept: Vec<_> = (0..100).map(|_| begin(&rings, &office)).collect();
        kept.iter().for_each(|ticket| ticket.part_ended(Ok(())));
        (0..2).for_each(|_| assert!(!under_way.sweep(&rings)));
        assert!(under_way.entries.is_empty());
        assert!(kept.iter().all(|ticket| Arc::strong_count(ticket) == 1));
    }

    #[test]
    fn the_list_does_not_grow_with_what_has_ended() {
        let (rings, office, mut under_way) = (Rings::default(), office(), UnderWay::default());
        let long = begin(&rings, &office);
        for _ in 0..1000 {
            begin(&rings, &office).part_ended(Ok(()));
            under_way.take(&rings);
        }
        assert!(under_way.entries.len() <= 4, "{}", under_way.entries.len());
        assert!(!long.has_ended());
    }
}

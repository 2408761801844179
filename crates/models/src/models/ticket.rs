//! An operation ends once, and whoever hears of it may touch what it touched.

use std::time::Duration;

use loom::thread;

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::Arc;
use crate::sys::Mapping;
use crate::{Clock, Doorbell, Failure, Region, Terms, Ticket, TicketOffice, TicketState};

/// Who waits for the end sleeps no longer than to it, and sees what every part
/// has written.
pub fn end_shows_all_parts() {
    let (office, bell) = office();
    let (ticket, placed) = (issue(&office, 2, None), Arc::new([Region::default(), Region::default()]));
    let parts = [0, 1].map(|part: usize| {
        let (ticket, placed) = (Arc::clone(&ticket), Arc::clone(&placed));
        thread::spawn(move || {
            placed[part].write(1);
            ticket.part_ended(Ok(()));
        })
    });
    while ticket.state() != TicketState::Done {
        bell.sleep(Duration::MAX, || ticket.has_ended(), || 0);
    }
    assert_eq!(placed.iter().map(Region::read).sum::<u64>(), 2);
    parts.into_iter().for_each(|part| part.join().expect("a thread of the model"));
}

/// What has quiesced is touched by nobody.
pub fn quiesced_is_untouched() {
    untouched(Ticket::has_quiesced, false);
}

/// Nor is what has ended well, whether or not somebody wanted to hear of it.
pub fn ended_is_untouched() {
    untouched(Ticket::has_ended, false);
    untouched(Ticket::has_ended, true);
}

fn untouched(once: fn(&Ticket) -> bool, heard: bool) {
    let (office, _) = office();
    let (ticket, region) = (issue(&office, 1, None), Arc::new(Region::default()));
    if heard {
        ticket.on_end(Box::new(|| ()));
    }
    let part = thread::spawn({
        let (ticket, region) = (Arc::clone(&ticket), Arc::clone(&region));
        move || {
            region.write(1);
            ticket.part_ended(Ok(()));
        }
    });
    if once(&ticket) {
        region.write(2);
    }
    part.join().expect("a thread of the model");
}

/// The source is let go of once, after every part has read it.
pub fn source_outlives_all_parts() {
    let (office, _) = office();
    let source = Arc::new(Region::default());
    let ticket = issue(&office, 2, Some(Arc::clone(&source)));
    let parts = [0, 1].map(|_| {
        let (ticket, source) = (Arc::clone(&ticket), Arc::as_ptr(&source) as usize);
        thread::spawn(move || {
            // SAFETY: the ticket keeps it alive until the parts have ended; loom checks that.
            unsafe { &*(source as *const Region) }.read();
            ticket.part_ended(Ok(()));
        })
    });
    drop(source);
    parts.into_iter().for_each(|part| part.join().expect("a thread of the model"));
    assert!(ticket.has_quiesced());
}

/// A failure that crosses the last part's end: one of them is the end, told once,
/// and the operation is under way no more.
pub fn one_end_is_told() {
    let (office, _) = office();
    let (ticket, told) = (issue(&office, 1, None), Arc::new(AtomicU32::new(0)));
    let part = thread::spawn({
        let ticket = Arc::clone(&ticket);
        move || ticket.part_ended(Ok(()))
    });
    let failing = thread::spawn({
        let ticket = Arc::clone(&ticket);
        move || ticket.fail(Failure::Cancelled)
    });
    ticket.on_end(Box::new({
        let told = Arc::clone(&told);
        move || {
            told.fetch_add(1, Ordering::Relaxed);
        }
    }));
    part.join().expect("a thread of the model");
    failing.join().expect("a thread of the model");
    assert_eq!(told.load(Ordering::Relaxed), 1);
    assert!(matches!(ticket.state(), TicketState::Done | TicketState::Failed(Failure::Cancelled)));
    assert_eq!((office.num_pending(), office.num_under_way()), (0, 0));
}

/// An operation that is counted while it is cancelled leaves what it entered.
pub fn counted_while_cancelled() {
    let (office, _) = office();
    let ticket = Arc::new(Ticket::new(Arc::clone(&office), terms(1, None)));
    let failing = thread::spawn({
        let ticket = Arc::clone(&ticket);
        move || ticket.fail(Failure::Cancelled)
    });
    ticket.count_shared();
    ticket.part_ended(Ok(()));
    failing.join().expect("a thread of the model");
    assert_eq!((office.num_pending(), office.num_under_way()), (0, 0));
}

/// A ticket that everybody else has let go of is new for the next operation.
pub fn used_again() {
    let (office, _) = office();
    let mut ticket = issue(&office, 1, None);
    let part = thread::spawn({
        let ticket = Arc::clone(&ticket);
        move || ticket.part_ended(Ok(()))
    });
    if let Some(own) = Arc::get_mut(&mut ticket) {
        assert!(office.enter(1), "the first has quiesced");
        own.renew(terms(1, None));
        own.count();
        assert!(!ticket.has_ended());
        ticket.part_ended(Ok(()));
    }
    part.join().expect("a thread of the model");
    assert_eq!((ticket.state(), office.num_under_way()), (TicketState::Done, 0));
}

fn office() -> (Arc<TicketOffice>, Arc<Doorbell>) {
    let bell = Arc::new(Doorbell::new(Mapping::of_doorbell()));
    (Arc::new(TicketOffice::new(Arc::clone(&bell), Clock::Virtual(Default::default()))), bell)
}

fn terms(num_parts: u32, source: Option<Arc<Region>>) -> Terms {
    Terms { num_parts, source, ..Terms::default() }
}

fn issue(office: &Arc<TicketOffice>, num_parts: u32, source: Option<Arc<Region>>) -> Arc<Ticket> {
    assert!(office.enter(usize::MAX));
    let mut ticket = Ticket::new(Arc::clone(office), terms(num_parts, source));
    ticket.count();
    Arc::new(ticket)
}

//! Tickets: one end, however many threads bring it about.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use anyfabric_transports::{
    Clock, Doorbell, Failure, OperationStats, Recipients, Terms, Ticket, TicketOffice, TicketState,
};

fn office() -> Arc<TicketOffice> {
    Arc::new(TicketOffice::new(Arc::new(Doorbell::private().unwrap()), Clock::Real))
}

fn ticket(office: &Arc<TicketOffice>, num_parts: u32) -> Ticket {
    let terms = Terms { num_parts, ..Terms::default() };
    Ticket::new(Arc::clone(office), terms)
}

fn counts(office: &TicketOffice) -> (usize, usize) {
    (office.num_pending(), office.num_under_way())
}

#[test]
fn what_has_failed_is_under_way_until_it_has_quiesced() {
    let office = office();
    let mut ticket = ticket(&office, 2);
    assert!(office.enter(1) && !office.enter(1));
    ticket.count();
    assert_eq!(counts(&office), (1, 1));
    ticket.part_ended(Ok(()));
    ticket.fail(Failure::Cancelled);
    ticket.fail(Failure::Closed);
    assert_eq!((ticket.state(), counts(&office)), (TicketState::Failed(Failure::Cancelled), (0, 1)));
    ticket.part_ended(Err(Failure::Closed));
    assert_eq!((ticket.state(), counts(&office)), (TicketState::Failed(Failure::Cancelled), (0, 0)));
}

#[test]
fn no_more_enter_than_may() {
    const LIMIT: usize = 3;
    let (office, inside) = (office(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    if office.enter(LIMIT) {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < LIMIT);
                        let mut ticket = ticket(&office, 1);
                        ticket.count();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        ticket.part_ended(Ok(()));
                    }
                }
            });
        }
    });
    assert_eq!(counts(&office), (0, 0));
}

/// A trigger fires, and its user cancels it this very moment.
#[test]
fn one_that_is_cancelled_while_it_is_counted_is_counted_once() {
    for _ in 0..2000 {
        let office = office();
        let ticket = ticket(&office, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| ticket.fail(Failure::Cancelled));
            ticket.count_shared();
        });
        assert_eq!(counts(&office), (0, 1));
        ticket.part_ended(Err(Failure::Cancelled));
        assert_eq!(counts(&office), (0, 0));
    }
}

/// It fails, ends well, and somebody wants to hear of it, all at a time: there is one end, and it is heard once.
#[test]
fn there_is_one_end_and_who_wants_to_hear_of_it_does() {
    for _ in 0..2000 {
        let office = office();
        let mut ticket = ticket(&office, 1);
        assert!(office.enter(1));
        ticket.count();
        let heard = Arc::new(AtomicUsize::new(0));
        let hears = Arc::clone(&heard);
        std::thread::scope(|scope| {
            scope.spawn(|| ticket.fail(Failure::Cancelled));
            scope.spawn(|| ticket.part_ended(Ok(())));
            ticket.on_end(Box::new(move || _ = hears.fetch_add(1, Ordering::SeqCst)));
        });
        assert_eq!(heard.load(Ordering::SeqCst), 1);
        assert!(matches!(ticket.state(), TicketState::Done | TicketState::Failed(Failure::Cancelled)));
        assert!(ticket.culprit().is_none() && ticket.has_quiesced());
        assert_eq!(counts(&office), (0, 0));
    }
}

/// Whoever wins: an operation that is cancelled as its last part ends is once in the statistics, as what it became.
#[test]
fn statistics_say_what_became_of_it() {
    const ROUNDS: u64 = 5_000;
    let (office, stats) = (office(), [(); 2].map(|()| Arc::<OperationStats>::default()));
    let tickets: Vec<Ticket> = (0..ROUNDS)
        .map(|_| {
            let (mut ticket, mut recipients) = (ticket(&office, 2), Recipients::default());
            (0..2).for_each(|peer| recipients.add(peer, &stats[peer as usize], 8));
            ticket.set_recipients(&mut recipients);
            ticket.part_ended_at(1, Ok(()));
            ticket
        })
        .collect();
    let (begun, mut num_failed) = (AtomicUsize::new(0), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (idx, ticket) in tickets.iter().enumerate() {
                while begun.load(Ordering::Acquire) <= idx {
                    std::thread::yield_now();
                }
                ticket.fail(Failure::Cancelled);
            }
        });
        for (idx, ticket) in tickets.iter().enumerate() {
            begun.store(idx + 1, Ordering::Release);
            // Sometimes the one is quicker, sometimes the other.
            (0..idx % 64).for_each(|_| std::hint::spin_loop());
            if idx % 64 == 63 {
                std::thread::yield_now();
            }
            ticket.part_ended_at(0, Ok(()));
            num_failed += u64::from(ticket.state() != TicketState::Done);
            let ended: Vec<_> =
                stats.iter().map(|stats| (stats.num_ended(), stats.errors.load(Ordering::Relaxed))).collect();
            assert_eq!(ended, [(idx as u64 + 1, num_failed); 2], "whoever sees the end finds it in the statistics");
        }
    });
    println!("{num_failed} of {ROUNDS} failed");
    for stats in &stats {
        let (errors, bytes) = (stats.errors.load(Ordering::Relaxed), stats.bytes.load(Ordering::Relaxed));
        assert_eq!((errors, bytes), (num_failed, 8 * (ROUNDS - num_failed)));
        assert_eq!(stats.latency.count(), ROUNDS - num_failed);
    }
}

/// Tickets and their lists are used again, for operations with other peers, in another order, and several at one.
#[test]
fn lists_of_peers_are_used_again() {
    let stats = [(); 4].map(|()| Arc::<OperationStats>::default());
    let (office, mut recipients) = (office(), Recipients::default());
    let mut ticket = ticket(&office, 1);
    let orders: [&[u32]; 9] =
        [&[0, 1, 2], &[0, 1], &[0, 1, 2], &[2, 1, 0], &[2, 1, 0], &[2], &[2, 1], &[0, 3, 3, 1], &[0, 1, 2, 3]];
    // Twice each list of the ticket's two goes round.
    for order in orders.iter().flat_map(|order| [order; 2]) {
        ticket.renew(Terms { num_parts: order.len() as u32, ..Terms::default() });
        order.iter().for_each(|peer| recipients.add(*peer, &stats[*peer as usize], 1));
        ticket.set_recipients(&mut recipients);
        let before: Vec<u64> = stats.iter().map(|stats| stats.num_ended()).collect();
        ticket.part_ended_at(order[0], Ok(()));
        ticket.fail(Failure::Cancelled);
        let mut missing = order[1..].to_vec();
        missing.sort_unstable();
        missing.dedup();
        assert_eq!(ticket.unfinished().0, missing, "of {order:?}");
        let ended = stats.iter().zip(before).map(|(stats, before)| stats.num_ended() - before);
        assert!((0..).zip(ended).all(|(peer, num)| num == u64::from(order.contains(&peer))), "each once: {order:?}");
        order[1..].iter().for_each(|peer| ticket.part_ended_at(*peer, Ok(())));
        assert!(ticket.has_quiesced());
    }
}

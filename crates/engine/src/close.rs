//! The end of an engine: what is under way is waited for, the rest fails.

use std::time::Duration;

use anyfabric_transports::{Failure, Link};
use anyfabric_wire::Control;

use crate::arrivals::Arrivals;
use crate::driver::Driver;
use crate::events::Event;
use crate::inner::Inner;
use crate::peer::Peer;
use crate::revoke::is_lent;

impl Inner {
    /// The end of an engine, once nothing new is taken.
    pub(crate) fn finish(&self, timeout: Duration) {
        self.watching.stop();
        self.wait(Some(timeout), || self.office.num_pending() == 0);
        // Whoever drives has the list, and may go on driving until something on it ends.
        self.push_event(Event::Closing);
        self.wake();
        self.wait(Some(LAST_TURN), || self.presence.has_turned_last());
        let peers = self.live_peers();
        // Who sent what was taken here shall hear so: a NIC that is closed drops what it has not sent.
        self.wait(Some(LAST_TURN), || !peers.iter().flat_map(|peer| peer.links()).any(Link::owes_answers));
        self.ask_writers_out(&peers, LAST_TURN);
        for peer in peers {
            // First: what finds the link closed is told why.
            peer.set_lost(Failure::Closed);
            let has_let_go = self.let_go_of(&peer);
            if peer.base.has_control() {
                for imm in self.office.losses.take(peer.idx) {
                    peer.base.send_control(Control::CountFailed { imm }.encode());
                }
                let speaks = peer.state().session.as_ref().is_some_and(|session| session.version >= 2);
                if speaks && has_let_go {
                    peer.base.send_control(Control::Goodbye.encode());
                }
            }
        }
        self.presence.stop();
        self.wake_fd.notify();
        self.presence.wake_worker();
        for peer in self.peers() {
            peer.set_lost(Failure::Closed);
            for link in peer.links() {
                link.close(&Failure::Closed);
            }
            peer.fail_waiting(&Failure::Closed);
            let process = peer.shm().and_then(|shm| shm.give_back());
            if peer.links().all(Link::is_quiet) {
                self.gone(&peer);
            } else if let Some(process) = process {
                self.revokes.keep_watch(peer.idx, process);
            }
        }
        for region in self.regions.all() {
            region.close();
            self.regions.remove(region.id);
            if is_lent(&region) && self.is_quarantined(&region) {
                self.set_aside(region, 30);
            }
        }
        self.counters.close_all();
        self.messages.close();
        self.doorbell.notify();
        if let Some(endpoint) = &self.simulated {
            endpoint.leave();
        }
    }

    /// Ends what is under way, for there was time enough. Acknowledgements that were
    /// to ride along with something go out alone, before the goodbye: peers would
    /// take what they are owed for lost.
    pub(crate) fn turn_last(&self, driver: &mut Driver) {
        driver.under_way.sweep(&self.rings);
        driver.under_way.iter().for_each(|(ticket, _)| ticket.fail(Failure::Closed));
        for peer in self.peers() {
            for link in peer.links() {
                link.poll(&Arrivals { inner: self, at_hand: &driver.at_hand });
            }
        }
        self.presence.set_turned_last();
        self.doorbell.notify();
    }

    /// Gives back what only a living engine answers: whoever calls from now on is refused and not left waiting.
    pub(crate) fn stop_listening(&self) {
        for _ in 0..STOP_TRIES {
            if let Some(mut driver) = self.try_driver() {
                driver.listeners = None;
                driver.meets.clear();
                driver.joins.clear();
                return;
            }
            // A waiting thread still has it and is about to notice the end; unless it is we who call from under it.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops writing into the memory of a process of this host, for good; true
    /// when nothing of ours can touch it any more.
    fn let_go_of(&self, peer: &Peer) -> bool {
        peer.shm().is_none_or(|shm| {
            shm.close(&Failure::Closed);
            self.wait(Some(LAST_COPY), || shm.has_let_go())
        })
    }
}

/// Longest time that whoever drives, or answers that are on their way, are waited for.
const LAST_TURN: Duration = Duration::from_secs(1);
/// Milliseconds that a closing engine waits for the driver.
const STOP_TRIES: usize = 200;
/// Longest time that a thread which copies into a peer's memory is waited for.
const LAST_COPY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anyfabric_transports::loopback::{Fabric, Simulation};
    use anyfabric_transports::{Terms, Ticket, TicketState};

    use super::*;
    use crate::submit::Order;
    use crate::{Code, Config, Engine};

    /// An operation's first look found the engine open; it is submitted when the end has come and gone.
    #[test]
    fn what_the_end_did_not_see_is_told_that_the_engine_is_closed() {
        let simulation = Simulation::new(1, Fabric::default());
        let engine = || Engine::simulated(&simulation, Config::default(), &[100]).unwrap();
        let (one, other) = (engine(), engine());
        one.connect(other.address(), None).unwrap();
        let peer = one.inner.peer_at(other.address());
        one.close(Duration::ZERO);
        let refused = one.inner.begin_one(&peer, Order::default());
        assert_eq!(refused.unwrap_err().code, Code::Closed);
        let terms = Terms { num_parts: 1, deadline_ns: u64::MAX, ..Terms::default() };
        let fired = Arc::new(Ticket::new(Arc::clone(&one.inner.office), terms));
        one.inner.track(&fired, None);
        assert_eq!(fired.state(), TicketState::Failed(Failure::Closed));
        fired.part_ended(Ok(()));
        assert_eq!(one.inner.office.num_under_way(), 0, "something is left under way");
        let counter = one.inner.counters.open(None, Vec::new(), |_| String::new());
        assert!(counter.is_err_and(|error| error.code == Code::Closed));
    }
}

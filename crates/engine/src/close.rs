//! The end of an engine: what is under way is waited for, the rest fails.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::{Failure, Link, Ticket};
use anyfabric_wire::Control;

use crate::inner::{lock, Inner};
use crate::peer::Peer;

impl Inner {
    /// The end of an engine, once nothing new is taken.
    pub(crate) fn finish(&self, timeout: Duration) {
        self.watching.stop();
        let is_idle = || {
            self.sweep();
            lock(&self.under_way).iter().all(|entry| entry.ticket.has_ended())
        };
        self.wait(Some(timeout), is_idle);
        let left: Vec<Arc<Ticket>> = lock(&self.under_way).iter().map(|entry| Arc::clone(&entry.ticket)).collect();
        for ticket in left {
            ticket.fail(Failure::Closed);
        }
        // Before the goodbye, or peers would take what they are owed for lost.
        self.send_last();
        for peer in self.live_peers() {
            let has_let_go = self.let_go_of(&peer);
            if peer.base.has_control() {
                for imm in peer.losses.take() {
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
            if let Some(shm) = peer.shm() {
                shm.give_back();
            }
        }
        for region in self.regions.all() {
            region.close();
            self.regions.remove(region.id);
        }
        self.counters.close_all();
        self.messages.close();
        self.doorbell.notify();
        if let Some(endpoint) = &self.simulated {
            endpoint.leave();
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

    /// Ends the turn of whoever drives; acknowledgements that were to ride along
    /// with something go out alone.
    fn send_last(&self) {
        let _driver = lock(&self.driver);
        for peer in self.peers() {
            for link in peer.links() {
                link.poll(self);
            }
        }
    }
}

/// Longest time that a thread which copies into a peer's memory is waited for.
const LAST_COPY: Duration = Duration::from_secs(1);

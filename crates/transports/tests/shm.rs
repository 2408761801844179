//! The link between two processes of a host, without the other one.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use anyfabric_transports::shm::ring::{Entry, Producer, ENTRIES};
use anyfabric_transports::shm::{ring_memory, LocalChannel, ShmLink, ShmOptions};
use anyfabric_transports::sys::{pid_fd, Fd, Ready};
use anyfabric_transports::{lock, Doorbell, Link, PeerIdx, Sink};
use anyfabric_wire::{Imm, Refusal, WireImm};

/// Somebody has the ring of a peer that is gone, and announces an arrival for each that is taken.
struct Restless {
    producer: Mutex<Producer>,
    num_taken: Mutex<u32>,
}

impl Restless {
    fn push(&self) -> bool {
        let imm = WireImm { imm: Imm::new(1).unwrap(), quarters: 4 };
        lock(&self.producer).push(&Entry::Arrival { imm, count: 1 })
    }
}

impl Sink for Restless {
    fn arrived(&self, _: PeerIdx, _: Imm, _: u64) -> Result<(), Refusal> {
        self.push();
        let mut num_taken = lock(&self.num_taken);
        *num_taken += 1;
        assert!(*num_taken < 100 * ENTRIES, "there is no end to it");
        Ok(())
    }
}

/// What it published before its end still counts, and no more than its ring holds: the driver has others to look after.
#[test]
fn a_peer_that_is_gone_is_read_to_its_end_and_no_further() {
    for channel in [ShmLink::LOCAL, ShmLink::PROCESS] {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let ((_, outgoing), (_, incoming)) = (ring_memory().unwrap(), ring_memory().unwrap());
        let restless =
            Restless { producer: Mutex::new(Producer::new(Arc::clone(&incoming))), num_taken: Mutex::new(0) };
        let link = ShmLink::new(ShmOptions {
            peer: 1,
            pid: std::process::id(),
            pid_fd: pid_fd(std::process::id()).unwrap(),
            channel: LocalChannel::new(Fd::new(OwnedFd::from(ours))),
            outgoing,
            incoming,
            doorbell: Doorbell::private().unwrap(),
            regions: Arc::default(),
            isolate: false,
            writes_foreign: false,
            peer_writes_foreign: None,
        });
        while restless.push() {}
        drop(theirs);
        link.ready(channel, Ready { token: 0, readable: true, writable: false }, &restless);
        assert!(*lock(&restless.num_taken) >= ENTRIES, "some of what came before the end is lost");
    }
}

//! Rails between two processes, over the `tcp` provider.

use std::time::Instant;

use anyfabric_plan::Extent;
use anyfabric_transports::rdma::{Batch, Fault, Marks, Nic};

use crate::peer::{Peer, REGION_BYTES};
use crate::support::{library, tcp_nic, Region, Seen, LONG};

mod writes_are_placed_and_counted {
    #[test]
    fn system() {
        super::writes_are_placed_and_counted("system");
    }
    #[test]
    fn wheel() {
        super::writes_are_placed_and_counted("wheel");
    }
}

mod a_killed_peer_is_noticed_and_every_batch_ends {
    #[test]
    fn system() {
        super::a_killed_peer_is_noticed_and_every_batch_ends("system");
    }
    #[test]
    fn wheel() {
        super::a_killed_peer_is_noticed_and_every_batch_ends("wheel");
    }
}

fn writes_are_placed_and_counted(name: &str) {
    let Some(library) = library(name) else { return };
    let (mut nic, mut peer, mut seen) = (tcp_nic(library, "127.0.0.1"), Peer::start(name), Seen::default());
    let source = Region::new(&nic, REGION_BYTES, 9);
    let rail = nic.open().unwrap();
    peer.connect(&nic.address(rail));
    nic.connect(rail, &peer.address).unwrap();
    let page = REGION_BYTES as u64 / 64;
    let pages: Vec<Extent> = (0..64).map(|idx| Extent { src: idx * page, dst: idx * page, nbytes: page }).collect();
    let (mut posted, end) = (0, Instant::now() + LONG);
    while posted < pages.len() {
        let (target, writes) = (peer.target, &pages[posted..]);
        posted += nic
            .post(rail, &Batch { source: &source.memory, target, writes, marks: Marks::Each(5), token: posted as u32 })
            .unwrap();
        nic.poll(&mut seen);
        assert!(Instant::now() < end, "posted {posted}");
    }
    while peer.num_arrived(5) < 64 {
        nic.poll(&mut seen);
        assert!(Instant::now() < end, "{} immediates, {seen:?}", peer.num_arrived(5));
    }
    assert_eq!(peer.num_bytes(9), REGION_BYTES);
    assert_eq!(peer.num_arrived(5), 64);
    assert!(seen.broken.is_empty() && seen.completed.iter().all(|(_, _, result)| result.is_ok()), "{seen:?}");
}

fn a_killed_peer_is_noticed_and_every_batch_ends(name: &str) {
    let Some(library) = library(name) else { return };
    let (mut nic, mut peer, mut seen) = (tcp_nic(library, "127.0.0.1"), Peer::start(name), Seen::default());
    let source = Region::new(&nic, REGION_BYTES, 9);
    let rail = nic.open().unwrap();
    peer.connect(&nic.address(rail));
    nic.connect(rail, &peer.address).unwrap();
    let write = [Extent { src: 0, dst: 0, nbytes: 4096 }];
    let (mut posted, end) = (0_u32, Instant::now() + LONG);
    while seen.broken.is_empty() {
        if seen.completed.len() > 100 {
            peer.kill();
        }
        let (target, token) = (peer.target, posted);
        match nic.post(rail, &Batch { source: &source.memory, target, writes: &write, marks: Marks::Each(1), token }) {
            Ok(count) => posted += count as u32,
            Err(fault) => assert_ne!(fault, Fault::Refused),
        }
        nic.poll(&mut seen);
        assert!(Instant::now() < end, "nothing was noticed; {posted} posted");
    }
    while nic.poll(&mut seen) {}
    assert_eq!(seen.completed.len(), posted as usize, "a batch ends exactly once");
    assert!(seen.completed.iter().any(|(_, _, result)| result.is_err()));
    assert_eq!(seen.broken.len(), 1);
    // The NIC goes on.
    nic.close(rail);
    let mut next = Peer::start(name);
    let rail = nic.open().unwrap();
    next.connect(&nic.address(rail));
    nic.connect(rail, &next.address).unwrap();
    while !nic.signal(rail, 7, u32::MAX).unwrap() {
        nic.poll(&mut seen);
    }
    while next.num_arrived(7) == 0 {
        nic.poll(&mut seen);
        assert!(Instant::now() < end + LONG, "nothing arrived at the next peer");
    }
}

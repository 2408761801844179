//! Rails between two NICs of one process, over the `tcp` provider.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use anyfabric_plan::Extent;
use anyfabric_transports::libfabric::sys::version;
use anyfabric_transports::libfabric::{FabricDomain, FabricNic, FabricSettings, Library};
use anyfabric_transports::rdma::{Batch, Domain, Fault, Marks, Nic, NicError, RemoteMemory};

use crate::support::{nic_of, on_every_library, tcp_nic, Pair, Region, Seen, LONG};

on_every_library! {
    a_write_arrives_and_is_counted_after_its_bytes,
    pages_are_each_counted,
    an_immediate_and_a_message_need_no_memory,
    two_rails_are_told_apart,
    a_bad_key_breaks_the_rail_and_another_one_works,
    a_write_past_the_end_breaks_the_rail,
    a_fenced_rail_brings_nothing_more,
    a_silent_peer_breaks_the_rail,
    an_address_of_garbage_is_refused,
    an_event_comes_with_the_next_arrival,
    who_calls_an_endpoint_that_is_closed_harms_nobody,
}

fn pair(library: &'static Library) -> Pair {
    Pair::new(tcp_nic(library, "127.0.0.1"), tcp_nic(library, "127.0.0.2"))
}

fn a_write_arrives_and_is_counted_after_its_bytes(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, MIB, 7), Region::new(&pair.there, MIB, 0));
    for (token, nbytes) in [1, 4096, 65_536, MIB as u64].into_iter().enumerate() {
        let write = Extent { src: MIB as u64 - nbytes, dst: 0, nbytes };
        pair.write((&from, &to), &[write], Marks::Last(100 + token as u32), token as u32);
        pair.until("the immediate", |pair| pair.seen_there.arrived.len() == token + 1);
        assert_eq!(pair.seen_there.arrived[token], (pair.back, 100 + token as u32));
        assert!((0..nbytes as usize).all(|idx| to.at(idx) == 7), "{nbytes} bytes came after their immediate");
        pair.until("the completion", |pair| pair.seen.result(token as u32).is_some());
        assert_eq!(pair.seen.result(token as u32), Some(Ok(())));
    }
}

fn pages_are_each_counted(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, MIB, 3), Region::new(&pair.there, MIB, 0));
    let pages: Vec<Extent> =
        (0..256).map(|page| Extent { src: page * 1024, dst: (255 - page) * 4096, nbytes: 1024 }).collect();
    for (token, pages) in pages.chunks(32).enumerate() {
        pair.write((&from, &to), pages, Marks::Each(9), token as u32);
    }
    pair.until("every page", |pair| pair.seen_there.arrived.len() == 256);
    pair.until("every batch", |pair| (0..8).all(|token| pair.seen.result(token) == Some(Ok(()))));
    assert!((0..256).all(|page| to.at(page * 4096) == 3 && to.at(page * 4096 + 1023) == 3));
    assert!(pair.seen_there.arrived.iter().all(|arrived| *arrived == (pair.back, 9)));
}

fn an_immediate_and_a_message_need_no_memory(library: &'static Library) {
    let mut pair = pair(library);
    let mut signalled = false;
    let longest = vec![5; pair.here.about().max_message_bytes];
    let mut sent = 0;
    while !signalled || sent < 2 {
        signalled |= !signalled && pair.here.signal(pair.rail, u32::MAX, 1).unwrap();
        let message = if sent == 0 { &longest[..] } else { b"" };
        if sent < 2 && pair.here.send(pair.rail, message, 2 + sent).unwrap() {
            sent += 1;
        }
        pair.poll();
    }
    pair.until("all of them", |pair| pair.seen_there.messages.len() == 2 && pair.seen_there.arrived.len() == 1);
    assert_eq!(pair.seen_there.arrived, [(pair.back, u32::MAX)]);
    // Nothing is ordered, but these two are told apart by their lengths.
    for message in [longest, Vec::new()] {
        assert!(pair.seen_there.messages.contains(&(pair.back, message)));
    }
    pair.until("the completions", |pair| pair.seen.completed.len() == 3);
    assert!(pair.seen.completed.iter().all(|(_, _, result)| result.is_ok()));
    let too_long = vec![0; pair.here.about().max_message_bytes + 1];
    assert!(matches!(pair.here.send(pair.rail, &too_long, 9), Err(Fault::Local(_))));
}

fn two_rails_are_told_apart(library: &'static Library) {
    let mut pair = pair(library);
    let (first, first_back) = (pair.rail, pair.back);
    pair.connect();
    for (rail, imm) in [(first, 1), (pair.rail, 2)] {
        while !pair.here.signal(rail, imm, imm).unwrap() {
            pair.poll();
        }
    }
    pair.until("both", |pair| pair.seen_there.arrived.len() == 2);
    assert!(pair.seen_there.arrived.contains(&(first_back, 1)));
    assert!(pair.seen_there.arrived.contains(&(pair.back, 2)));
    assert_ne!(first_back, pair.back);
}

fn a_bad_key_breaks_the_rail_and_another_one_works(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, 65_536, 7), Region::new(&pair.there, 65_536, 0));
    let write = Extent { src: 0, dst: 0, nbytes: 64 };
    pair.write((&from, &to), &[write], Marks::Last(1), 1);
    pair.until("a good write", |pair| pair.seen.result(1).is_some());
    let good = FabricDomain::remote(&to.memory);
    let target = RemoteMemory { key: good.key ^ 1, ..good };
    let batch = Batch { source: &from.memory, target, writes: &[write], marks: Marks::Last(2), token: 2 };
    assert_eq!(pair.here.post(pair.rail, &batch), Ok(1));
    pair.until("an error", |pair| pair.seen.result(2).is_some() && !pair.seen.broken.is_empty());
    assert!(pair.seen.result(2).unwrap().is_err());
    assert_eq!(pair.seen_there.arrived.len(), 1, "a write with a bad key was counted");
    assert_eq!(pair.here.post(pair.rail, &batch), Err(Fault::Flushed));
    assert_eq!(pair.here.room(pair.rail), 0);
    pair.here.close(pair.rail);
    pair.there.close(pair.back);
    pair.connect();
    pair.write((&from, &to), &[write], Marks::Last(3), 3);
    pair.until("a write on the new rail", |pair| pair.seen.result(3) == Some(Ok(())));
    pair.until("its immediate", |pair| pair.seen_there.arrived.contains(&(pair.back, 3)));
}

fn a_write_past_the_end_breaks_the_rail(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, 65_536, 7), Region::new(&pair.there, 65_536, 0));
    pair.write((&from, &to), &[Extent { src: 0, dst: 65_536 - 32, nbytes: 64 }], Marks::Last(1), 1);
    pair.until("an error", |pair| pair.seen.result(1).is_some());
    assert!(pair.seen.result(1).unwrap().is_err());
    assert!((0..65_536).all(|idx| to.at(idx) == 0) && pair.seen_there.arrived.is_empty());
}

fn a_fenced_rail_brings_nothing_more(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, 16 * MIB, 7), Region::new(&pair.there, 16 * MIB, 0));
    let writes: Vec<Extent> =
        (0..64).map(|idx| Extent { src: 0, dst: idx * (MIB as u64 / 4), nbytes: MIB as u64 / 4 }).collect();
    pair.write((&from, &to), &writes[..1], Marks::None, 0);
    pair.until("the connection", |pair| pair.seen.result(0).is_some());
    for (token, write) in writes.iter().enumerate() {
        pair.write((&from, &to), &[*write], Marks::Each(1), 1 + token as u32);
        if token == 32 {
            break;
        }
    }
    pair.there.fence(pair.back);
    let before = to.bytes.iter().filter(|byte| **byte != 0).count();
    let landed = pair.seen_there.arrived.len();
    pair.until("the end of every write", |pair| (1..34).all(|token| pair.seen.result(token).is_some()));
    let after = (0..to.bytes.len()).filter(|idx| to.at(*idx) != 0).count();
    assert_eq!(before, after, "bytes landed after the fence");
    assert_eq!(pair.seen_there.arrived.len(), landed, "an immediate arrived after the fence");
    assert!(pair.seen_there.broken.is_empty(), "a fence reports no breakage to who asked for it");
}

fn a_silent_peer_breaks_the_rail(library: &'static Library) {
    let mut pair = pair(library);
    let (from, to) = (Region::new(&pair.here, MIB, 7), Region::new(&pair.there, MIB, 0));
    let write = Extent { src: 0, dst: 0, nbytes: MIB as u64 };
    pair.write((&from, &to), &[write], Marks::Last(1), 1);
    pair.until("the first write", |pair| pair.seen.result(1).is_some());
    let target = FabricDomain::remote(&to.memory);
    let batch = Batch { source: &from.memory, target, writes: &[write], marks: Marks::Last(2), token: 2 };
    assert_eq!(pair.here.post(pair.rail, &batch), Ok(1));
    // The other end is not polled, as if its process were stopped.
    let end = std::time::Instant::now() + crate::support::LONG;
    while pair.seen.broken.is_empty() {
        pair.here.poll(&mut pair.seen);
        assert!(std::time::Instant::now() < end, "nothing was noticed");
    }
    assert_eq!(pair.seen.broken, [(pair.rail, Fault::Unanswered)]);
    assert!(pair.seen.result(2).unwrap().is_err());
}

fn an_address_of_garbage_is_refused(library: &'static Library) {
    let mut nic = tcp_nic(library, "127.0.0.1");
    let rail = nic.open().unwrap();
    let good = nic.address(rail);
    assert!(good.len() <= anyfabric_transports::rdma::MAX_ADDRESS_BYTES);
    let mut other = good.clone();
    other[0] ^= 0xff;
    for bad in [&[][..], &[0; 39], &[0xff; 256], &good[..good.len() - 1], &other] {
        assert!(matches!(nic.connect(rail, bad), Err(NicError::Peer(_))), "{bad:?} was taken");
    }
    nic.connect(rail, &good).unwrap();
}

fn an_event_comes_with_the_next_arrival(library: &'static Library) {
    let mut pair = pair(library);
    let fd = pair.there.event_fd().expect("the tcp provider has a descriptor");
    // Connected, and quiet.
    while !pair.here.signal(pair.rail, 1, 1).unwrap() {
        pair.poll();
    }
    pair.until("the first", |pair| pair.seen.result(1).is_some() && pair.seen_there.arrived.len() == 1);
    while !pair.there.arm() {
        pair.poll();
    }
    while !pair.here.signal(pair.rail, 2, 2).unwrap() {
        pair.here.poll(&mut pair.seen);
    }
    let end = std::time::Instant::now() + crate::support::LONG;
    loop {
        pair.here.poll(&mut pair.seen);
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry that lives through the call.
        if unsafe { libc::poll(&raw mut poll, 1, 1) } == 1 {
            break;
        }
        assert!(std::time::Instant::now() < end, "no event");
    }
    pair.until("the second", |pair| pair.seen_there.arrived.len() == 2);
}

/// An endpoint is closed while somebody's connection to it has been accepted and has said nothing; then it speaks.
fn who_calls_an_endpoint_that_is_closed_harms_nobody(library: &'static Library) {
    // The provider that is "tcp" by itself, and not under another.
    let provider = if library.version() < version(1, 18) { "net" } else { "tcp" };
    let nic = || nic_of(library, provider, Some("127.0.0.1"), &FabricSettings::default());
    let said = first_words(&mut nic());
    let mut pair = Pair::new(nic(), nic());
    for _ in 0..5 {
        let rail = pair.there.open().unwrap();
        let mut caller = TcpStream::connect(("127.0.0.1", port_in(&pair.there.address(rail)))).unwrap();
        (0..100).for_each(|_| pair.poll());
        pair.there.close(rail);
        // Other bytes where the endpoint was.
        let others: Vec<Vec<u8>> = (0..64).map(|idx| vec![0x41; 16 + 16 * idx]).collect();
        // Refused, if it is known by now that nobody listens.
        let _ = caller.write_all(&said);
        (0..100).for_each(|_| pair.poll());
        drop(others);
    }
    while !pair.here.signal(pair.rail, 7, 1).unwrap() {
        pair.poll();
    }
    pair.until("the others go on", |pair| pair.seen_there.arrived == [(pair.back, 7)]);
}

/// What an endpoint says to the one that it calls.
fn first_words(nic: &mut FabricNic) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let rail = nic.open().unwrap();
    let mut address = nic.address(rail);
    address[PORT_AT..PORT_AT + 2].copy_from_slice(&listener.local_addr().unwrap().port().to_be_bytes());
    nic.connect(rail, &address).unwrap();
    let (end, mut seen) = (Instant::now() + LONG, Seen::default());
    let mut called = None;
    loop {
        let _ = nic.signal(rail, 1, 1);
        nic.poll(&mut seen);
        called = called.or_else(|| Some(listener.accept().ok()?.0));
        let mut words = [0; 4096];
        match called.as_ref().map(|mut stream| {
            stream.set_nonblocking(true).unwrap();
            stream.read(&mut words)
        }) {
            Some(Ok(nbytes)) if nbytes > 0 => return words[..nbytes].to_vec(),
            _ => assert!(Instant::now() < end, "it does not call"),
        }
    }
}

fn port_in(address: &[u8]) -> u16 {
    u16::from_be_bytes([address[PORT_AT], address[PORT_AT + 1]])
}

/// Where an address of a rail has the port: in its `sockaddr_in`.
const PORT_AT: usize = 42;
const MIB: usize = 1 << 20;

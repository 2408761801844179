//! Semantics 4, 8, 9, 10 and 11: how transfers end, what is refused, what is
//! survived.

use std::time::Duration;

use anyfabric_engine::transports::loopback::Fault;
use anyfabric_engine::{Code, Config, Engine, QueueFull, Region, Remote, WriteOptions};

use crate::world::{code, config, for_seeds, id, ms, outcome, peek, poke, remote, World};

#[test]
fn a_deadline_ends_the_transfer_and_a_wait_only_the_waiting() {
    for_seeds(60, |world| {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        writer.connect(owner.address(), None).unwrap();
        world.inject(&Fault::Stop(id(&owner)));
        // A message is answered by the engine, which is stopped.
        let send = writer.send(owner.address(), vec![1; 100], Some(ms(700))).unwrap();
        let began_ns = world.simulation.now_ns();
        assert_eq!(code(send.wait(Some(ms(100)))), Code::WaitTimeout);
        assert_eq!(outcome(&send), None);
        assert_eq!(code(send.wait(None)), Code::TransferTimeout);
        let took_ms = (world.simulation.now_ns() - began_ns) / 1_000_000;
        assert!((700..=800).contains(&took_ms), "{took_ms} ms");
        assert!(!send.is_quiesced(), "it may yet arrive");
        world.inject(&Fault::Continue(id(&owner)));
        send.wait_quiesced(Some(Duration::from_secs(1))).unwrap();
        let (src, dst) = (source.slice(0..NBYTES).unwrap(), remote(&target).slice(0..NBYTES).unwrap());
        let write = writer.write(&src, &dst, WriteOptions::default()).unwrap();
        write.cancel();
        assert!(matches!(outcome(&write), Some(Err(Code::Cancelled)) | Some(Ok(()))));
        write.wait_quiesced(Some(Duration::from_secs(1))).unwrap();
    });
}

#[test]
fn a_full_queue_waits_or_raises() {
    for_seeds(30, |world| {
        for (queue_full, expected) in [(QueueFull::Raise, Some(Code::QueueFull)), (QueueFull::Block, None)] {
            let config = Config { queue_depth: 4, queue_full, ..config() };
            let writer = Engine::simulated(&world.simulation, config, &[100]).unwrap();
            let owner = world.engine();
            let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
            let (src, dst) = (source.slice(0..100).unwrap(), remote(&target).slice(0..100).unwrap());
            let write = || writer.write(&src, &dst, WriteOptions::default());
            let first: Vec<_> = (0..4).map(|_| write().unwrap()).collect();
            assert_eq!(write().err().map(|error| error.code), expected);
            first.iter().for_each(|transfer| transfer.wait(None).unwrap());
        }
    });
}

#[test]
fn every_length_and_offset_works() {
    for_seeds(60, |world| {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        let into = remote(&target);
        for nbytes in [0, 1, 3, 4095, 4096, 4097, 12_345, NBYTES] {
            let (src, at) = (world.random.below(NBYTES - nbytes + 1), world.random.below(NBYTES - nbytes + 1));
            let before = peek(&target, 0, NBYTES).to_vec();
            let (from, to) = (source.slice(src..src + nbytes).unwrap(), into.slice(at..at + nbytes).unwrap());
            writer.write(&from, &to, WriteOptions::default()).unwrap().wait(None).unwrap();
            let (found, end) = (peek(&target, 0, NBYTES), (at + nbytes) as usize);
            assert!(found[at as usize..end] == *peek(&source, src, nbytes));
            assert!(found[..at as usize] == before[..at as usize] && found[end..] == before[end..]);
        }
    });
}

#[test]
fn offsets_beyond_four_gigabytes_work() {
    let mut world = World::new(1, |_| anyfabric_engine::transports::loopback::Fabric::default());
    let (writer, owner) = (world.engine(), world.engine());
    let source = world.region(&writer, NBYTES);
    let nbytes: u64 = 9 << 30;
    // SAFETY: a mapping of its own that only takes the pages that are touched; it is never unmapped.
    let memory = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), nbytes as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: as above.
    let target = unsafe { owner.register(memory.cast(), nbytes, true, Box::new(())) }.unwrap();
    let at = (5 << 30) + 12_345;
    let to = remote(&target).slice(at..at + NBYTES).unwrap();
    writer.write(&source.slice(0..NBYTES).unwrap(), &to, WriteOptions::default()).unwrap().wait(None).unwrap();
    assert!(peek(&target, at, NBYTES) == peek(&source, 0, NBYTES));
}

#[test]
fn bounds_and_rights_are_checked_at_both_ends() {
    for_seeds(100, |world| {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        assert_eq!(code(source.slice(1..NBYTES + 1)), Code::InvalidArgument);
        assert_eq!(code(remote(&target).slice(NBYTES..NBYTES + 1)), Code::InvalidArgument);
        let before = peek(&target, 0, NBYTES).to_vec();
        let descriptor = target.descriptor().unwrap();
        let mut forged = vec![descriptor.clone(); 3];
        forged[0].key ^= 1 << world.random.below(64);
        forged[1].region += 1 + world.random.below(100);
        forged[2].nbytes *= 2;
        for (idx, forged) in forged.into_iter().enumerate() {
            // Of the one that is too long, bytes that are not there.
            let at = if idx == 2 { NBYTES } else { 0 };
            let to = Remote::from(forged).slice(at..at + 100).unwrap();
            let from = source.slice(0..100).unwrap();
            let transfer = writer.write(&from, &to, WriteOptions::counted(1)).unwrap();
            assert_eq!(code(transfer.wait(None)), Code::Refused, "forgery {idx}");
        }
        assert!(peek(&target, 0, NBYTES) == before, "a forged descriptor wrote");
        // A refusal fails that transfer alone.
        let (from, to) = (source.slice(0..100).unwrap(), remote(&target).slice(0..100).unwrap());
        writer.write(&from, &to, WriteOptions::default()).unwrap().wait(None).unwrap();
        target.close(ms(100));
        let transfer = writer.write(&from, &to, WriteOptions::default()).unwrap();
        assert_eq!(code(transfer.wait(None)), Code::Refused);
        assert_eq!(code(writer.import(b"garbage")), Code::InvalidArgument);
    });
}

#[test]
fn a_checksum_finds_a_flipped_bit() {
    for_seeds(60, |world| {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        let counter = owner.counter(Some(4), &[]).unwrap();
        writer.connect(owner.address(), None).unwrap();
        let nbytes = world.random.between(1, NBYTES);
        let (from, to) = (source.slice(0..nbytes).unwrap(), remote(&target).slice(0..nbytes).unwrap());
        let verified = WriteOptions { imm: Some(4), verify: true, timeout: None };
        writer.write(&from, &to, verified).unwrap().wait(None).unwrap();
        counter.wait(1, Some(ms(100))).unwrap();
        world.inject(&Fault::Corrupt(1));
        assert_eq!(code(writer.write(&from, &to, verified).unwrap().wait(None)), Code::Refused);
        assert_eq!(code(counter.wait(2, Some(ms(500)))), Code::TransferFailed);
    });
}

#[test]
fn garbage_on_the_control_connection_loses_that_peer_alone() {
    for_seeds(60, |world| {
        let (engine, good, evil) = (world.engine(), world.engine(), world.engine());
        let (region, target) = (world.region(&good, NBYTES), world.region(&engine, NBYTES));
        evil.connect(engine.address(), None).unwrap();
        let garbage: Vec<u8> = (0..world.random.between(1, 60)).map(|_| world.random.draw() as u8 | 0x80).collect();
        world.simulation.say(id(&evil), id(&engine), garbage);
        world.run(ms(200));
        assert_eq!(engine.path(evil.address()).state, "lost");
        let (from, to) = (region.slice(0..10).unwrap(), remote(&target).slice(0..10).unwrap());
        good.write(&from, &to, WriteOptions::default()).unwrap().wait(None).unwrap();
    });
}

#[test]
fn the_source_may_be_reused_when_the_transfer_is_done() {
    for_seeds(60, |world| {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        let (from, to) = (source.slice(0..NBYTES).unwrap(), remote(&target).slice(0..NBYTES).unwrap());
        let expected = peek(&source, 0, NBYTES).to_vec();
        writer.write(&from, &to, WriteOptions::default()).unwrap().wait(None).unwrap();
        poke(&source, 0, &[0; NBYTES as usize]);
        world.run(ms(500));
        assert!(peek(&target, 0, NBYTES) == expected);
    });
}

#[test]
fn messages_come_once_and_are_bounded() {
    for_seeds(30, |world| {
        let (sender, receiver) = (world.engine(), world.engine());
        let too_long = vec![0; sender_limit() + 1];
        assert_eq!(code(sender.send(receiver.address(), too_long, None)), Code::InvalidArgument);
        let transfers: Vec<_> =
            (0..50_u8).map(|byte| sender.send(receiver.address(), vec![byte; 9], None).unwrap()).collect();
        let mut came: Vec<u8> =
            (0..50).map(|_| receiver.receive(Some(Duration::from_secs(1))).unwrap().data[0]).collect();
        came.sort_unstable();
        assert_eq!(came, (0..50).collect::<Vec<u8>>());
        assert_eq!(code(receiver.receive(Some(ms(500)))), Code::WaitTimeout);
        transfers.iter().for_each(|transfer| transfer.wait(None).unwrap());
    });
}

#[test]
fn a_child_of_fork_is_told_so() {
    let world = World::new(0, |_| anyfabric_engine::transports::loopback::Fabric::default());
    let engine = world.engine_with(&[100]);
    let region: Region = engine.allocate(10).unwrap();
    // SAFETY: the child only asks, and leaves without running any destructor.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let forked = |error: Option<Code>| error == Some(Code::EngineForked);
        let all = forked(engine.allocate(1).err().map(|error| error.code))
            && forked(engine.counter(None, &[]).err().map(|error| error.code))
            && forked(region.descriptor().err().map(|error| error.code));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!all)) };
    }
    let mut status = -1;
    // SAFETY: our own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child could use the engine");
    engine.allocate(1).unwrap();
}

fn sender_limit() -> usize {
    config().max_message_bytes as usize
}

const NBYTES: u64 = 40_000;

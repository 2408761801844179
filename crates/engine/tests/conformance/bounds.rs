//! Semantic 8: bounds and rights are checked before anything is posted, and again at the receiver.

use std::time::Duration;

use anyfabric_engine::{Code, Engine, PageList, Remote, ScatterTarget, WriteOptions};
use anyfabric_wire::{Descriptor, Frame, FrameKind, Refusal};

use crate::ask::{How, Memory};
use crate::fabric::{new_region, on_every_fabric, on_fabrics, random, Fabric, SHM_FOREIGN};
use crate::harness::{assert_code, fill, Pair, LONG};
use crate::intruder::Intruder;
use crate::pattern;

on_every_fabric!(checked_before_posting, crafted_descriptors_are_refused, garbage_is_no_descriptor, read_only_stays);
on_fabrics! { [checked_at_the_receiver] [shm SHM, tcp_2 TCP_2] }
on_fabrics! { [memory_cannot_be_resized] [shm SHM] }
on_fabrics! { [isolation_is_kept] [shm SHM_FOREIGN] }

fn checked_before_posting(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    pair.peer.fill(&pair.there, (0, 4096), 1);
    let (engine, region, remote) = (&pair.engine, &pair.region, &pair.remote);
    // Backwards on purpose.
    #[allow(clippy::reversed_empty_ranges, reason = "what a user might pass")]
    for range in [0..4097, 4097..4097, 10..5, u64::MAX..u64::MAX, 0..u64::MAX] {
        assert_code(region.slice(range.clone()), Code::InvalidArgument);
        assert_code(remote.slice(range.clone()), Code::InvalidArgument);
        assert_code(region.slice(0..4096).unwrap().slice(range.clone()), Code::InvalidArgument);
        assert_code(remote.slice(0..4096).unwrap().slice(range), Code::InvalidArgument);
    }
    let (src, dst) = (region.slice(0..100).unwrap(), remote.slice(0..99).unwrap());
    assert_code(engine.write(&src, &dst, WriteOptions::default()), Code::InvalidArgument);
    // Pages outside, and offsets that overflow.
    let good = || PageList::new(vec![0, 1].into(), 8, 8, 0);
    for bad in [
        PageList::new(vec![0, 512].into(), 8, 8, 0),
        PageList::new(vec![0, u32::MAX].into(), 8, u64::MAX, 0),
        PageList::new(vec![0, 1].into(), 8, 8, u64::MAX - 7),
        PageList::new(vec![0, 1].into(), u64::MAX, 8, 0),
        PageList::new(vec![0].into(), 8, 8, 0),
        PageList::new(vec![0, 1].into(), 16, 8, 0),
    ] {
        let write = |src, dst| engine.write_pages((region, src), (remote, dst), WriteOptions::default());
        assert_code(write(bad.clone(), good()), Code::InvalidArgument);
        assert_code(write(good(), bad), Code::InvalidArgument);
    }
    for (src_offset, dst_offset, nbytes) in [(0, 4000, 97), (4000, 0, 97), (u64::MAX, 0, 2), (0, 1, u64::MAX)] {
        let targets = [ScatterTarget { remote: remote.clone(), src_offset, dst_offset, nbytes }];
        assert_code(engine.scatter(region, &targets, None, WriteOptions::default()), Code::InvalidArgument);
    }
    // A region of another engine, a closed one, our own as the target.
    let other = Engine::new(fabric.settings(1).config()).unwrap();
    let foreign = fabric.region(&other, 4096);
    let dst = remote.slice(0..8).unwrap();
    assert_code(engine.write(&foreign.slice(0..8).unwrap(), &dst, WriteOptions::default()), Code::InvalidArgument);
    let closed = fabric.region(engine, 4096);
    let slice = closed.slice(0..8).unwrap();
    closed.close(LONG);
    assert_code(engine.write(&slice, &dst, WriteOptions::default()), Code::Closed);
    let own: Remote = region.descriptor().unwrap().into();
    let (src, own) = (region.slice(0..8).unwrap(), own.slice(0..8).unwrap());
    assert_code(engine.write(&src, &own, WriteOptions::default()), Code::InvalidArgument);
    assert_code(engine.send(&pair.peer.address, vec![0; (1 << 16) + 1], None), Code::InvalidArgument);
    assert_code(engine.peer_group(&[pair.peer.address.clone(), pair.peer.address.clone()]), Code::InvalidArgument);
    assert_eq!(pair.peer.mismatch(&pair.there, (0, 4096), 1, 0), None, "something was written");
}

/// Descriptors that lie, by somebody who holds a right one.
fn crafted_descriptors_are_refused(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let guard = pair.peer.region(1 << 20, fabric.memory);
    pair.peer.fill(&pair.there, (0, 1 << 20), 1);
    pair.peer.fill(&guard, (0, 1 << 20), 2);
    let counter = pair.peer.open(1, &[]);
    let right = pair.remote.descriptor().clone();
    let crafted = [
        ("key", Descriptor { key: right.key.wrapping_add(1), ..right.clone() }),
        ("key of none", Descriptor { key: 0, ..right.clone() }),
        ("another region", Descriptor { region: right.region + 1, ..right.clone() }),
        ("no region", Descriptor { region: 1 << 40, ..right.clone() }),
        ("region 0", Descriptor { region: 0, ..right.clone() }),
        ("longer", Descriptor { nbytes: (1 << 20) + 1, ..right.clone() }),
        ("endless", Descriptor { nbytes: u64::MAX, ..right.clone() }),
    ];
    for (what, descriptor) in crafted {
        let remote: Remote = descriptor.into();
        let lies_about_length = remote.nbytes() != 1 << 20;
        for nbytes in [1, 100, 300_000] {
            let end = remote.nbytes();
            let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), remote.slice(end - nbytes..end).unwrap());
            let options = WriteOptions { imm: Some(1), timeout: Some(LONG), ..WriteOptions::default() };
            let written = pair.engine.write(&src, &dst, options).and_then(|transfer| transfer.wait(None));
            match written {
                Err(error) => assert_eq!(error.code, Code::Refused, "{what}, {nbytes} bytes: {error}"),
                Ok(()) => panic!("{what}: {nbytes} bytes were written"),
            }
            // Who holds the key may write inside; outside the guard tells.
            if !lies_about_length {
                assert_eq!(pair.peer.mismatch(&pair.there, (0, 1 << 20), 1, 0), None, "{what}: written");
            }
        }
    }
    assert_eq!(pair.peer.mismatch(&guard, (0, 1 << 20), 2, 0), None, "another region was written");
    assert_eq!(pair.peer.value(counter), 0);
    // The right one still works.
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
}

fn garbage_is_no_descriptor(fabric: &Fabric) {
    let mut random = random();
    let pair = Pair::new(fabric, 64);
    let right = pair.there.descriptor.clone();
    assert!(pair.engine.import(&right).is_ok());
    for len in 0..right.len() {
        assert_code(pair.engine.import(&right[..len]), Code::InvalidArgument);
    }
    for bit in 0..right.len() * 8 {
        let mut wrong = right.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert_code(pair.engine.import(&wrong), Code::InvalidArgument);
    }
    for _ in 0..500 {
        let nbytes = random.below(2000) as usize;
        assert_code(pair.engine.import(&random.bytes(nbytes)), Code::InvalidArgument);
    }
    // Of another version, with a right checksum: refused by name.
    let mut future = right;
    future[4..8].copy_from_slice(&[200, 0, 199, 0]);
    let mut covered = future[..8].to_vec();
    covered.extend(&future[12..]);
    let crc = crc32(&covered).to_le_bytes();
    future[8..12].copy_from_slice(&crc);
    let error = assert_code(pair.engine.import(&future), Code::InvalidArgument);
    assert!(error.message.contains("200") || error.message.contains("version"), "{error}");
}

fn read_only_stays(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let read_only = new_region(&pair.engine, 4096, Memory::ReadOnly);
    assert_code(read_only.descriptor(), Code::Unsupported);
    assert!(!read_only.is_writable());
    fill(&read_only, 4);
    // It may be a source.
    let (src, dst) = (read_only.slice(0..4096).unwrap(), pair.remote.slice(0..4096).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    assert_eq!(pair.peer.mismatch(&pair.there, (0, 4096), 4, 0), None);
    // And no guess makes it a target.
    let guessed = Descriptor { region: read_only.id(), ..pair.region.descriptor().unwrap() };
    let (region, how) = (pair.there.idx, How { timeout: Some(LONG), ..How::default() });
    let to = guessed.encode();
    let written = pair.peer.ask(crate::ask::Ask::Write { region, at: 0, nbytes: 64, to, to_at: 0, how });
    if let crate::ask::Answer::Id(transfer) = written {
        let fault = pair.peer.wait(transfer).unwrap_err();
        assert_eq!(fault.code, Code::Refused.as_str(), "{}", fault.message);
    }
    assert_eq!(pattern::mismatch(crate::harness::bytes(&read_only), 4, 0), None);
}

/// Somebody who checks nothing: the receiver does.
fn checked_at_the_receiver(fabric: &Fabric) {
    let mut random = random();
    let mut pair = Pair::new(fabric, 1 << 16);
    pair.peer.fill(&pair.there, (0, 1 << 16), 1);
    let right = pair.remote.descriptor().clone();
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    let payload = random.bytes(256);
    let mut op = 0;
    let mut frame = |region, key, offset| {
        op += 1;
        Frame { region, key, offset, ..Frame::new(FrameKind::Write, op, 0) }
    };
    let (region, key) = (right.region, right.key);
    let outside = Some(Err(Refusal::OutOfBounds));
    for (what, frame, expected) in [
        ("wrong key", frame(region, key ^ 1, 0), Some(Err(Refusal::BadKey))),
        ("no key", frame(region, 0, 0), Some(Err(Refusal::BadKey))),
        ("no region", frame(region + 99, key, 0), Some(Err(Refusal::NoRegion))),
        ("past the end", frame(region, key, (1 << 16) - 255), outside),
        ("far past the end", frame(region, key, 1 << 40), outside),
        ("wrapping around", frame(region, key, u64::MAX - 100), outside),
    ] {
        assert_eq!(intruder.write(frame, &payload), expected, "{what}");
    }
    // Pages, the last of them outside: none may land.
    for last in [1 << 16, (1 << 16) - 63, u64::MAX - 3] {
        op += 1;
        let pages = Frame {
            kind: FrameKind::Pages,
            num_pages: 4,
            page_bytes: 64,
            region,
            key,
            ..Frame::new(FrameKind::Pages, op, 256)
        };
        let pages = Frame { flags: anyfabric_wire::FLAG_LAST, ..pages };
        let mut table: Vec<u8> = [0_u64, 64, 128, last].iter().flat_map(|offset| offset.to_le_bytes()).collect();
        table.extend(&payload);
        intruder.send(&pages, &table).unwrap();
        assert_eq!(intruder.ack(op), outside, "a page at {last}");
    }
    assert_eq!(pair.peer.mismatch(&pair.there, (0, 1 << 16), 1, 0), None, "something landed");
    // The control: what is right does land.
    let good = Frame { region, key, offset: 0, ..Frame::new(FrameKind::Write, op + 1, 0) };
    assert_eq!(intruder.write(good, &payload), Some(Ok(())));
    assert_eq!(pair.peer.read(&pair.there, 0, 256), payload);
    // And no longer once it is revoked.
    let revoke = crate::ask::Ask::Revoke { region: pair.there.idx, timeout: Duration::from_secs(1) };
    assert_eq!(pair.peer.ask(revoke), crate::ask::Answer::Done);
    let late = Frame { op: op + 2, ..good };
    assert_eq!(intruder.write(late, &[7; 256]), Some(Err(Refusal::Revoked)));
    assert_eq!(pair.peer.read(&pair.there, 0, 256), payload);
}

/// Whoever was handed a memfd could make its owner fault, if it could be cut.
fn memory_cannot_be_resized(fabric: &Fabric) {
    use std::os::fd::AsRawFd;
    let mut pair = Pair::connected(fabric, 1 << 20);
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    let mut seen = std::collections::HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", pair.peer.pid())).unwrap().filter_map(Result::ok) {
        let link = std::fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
        if !link.starts_with("/memfd:anyfabric") {
            continue;
        }
        seen.insert(link.clone());
        let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.path()).unwrap();
        let len = file.metadata().unwrap().len();
        for resized in [0, 1, len / 2, len + 4096] {
            let error = file.set_len(resized).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{link} to {resized} bytes");
        }
        // SAFETY: asks for seals on our own descriptor of a memfd.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert_eq!(sealed, -1, "{link} takes more seals");
        // SAFETY: as above; a hole would not fault, but it would take memory back.
        let allocated = file.metadata().unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&allocated) * 512 >= len, "{link} is not allocated whole");
    }
    assert!(seen.iter().any(|link| link.contains("region")), "{seen:?}");
    assert!(pair.peer.lives());
}

/// One side that isolates itself is enough: neither writes into the other's foreign memory.
fn isolation_is_kept(fabric: &Fabric) {
    for isolates in [(true, false), (false, true), (false, false)] {
        let (mut here, mut there) = (fabric.settings(1), fabric.settings(1));
        (here.isolate, there.isolate) = isolates;
        let mut peer = crate::harness::Peer::start(&there);
        let engine = Engine::new(here.config()).unwrap();
        let region = SHM_FOREIGN.region(&engine, 1 << 20);
        let theirs = peer.region(1 << 20, Memory::Foreign);
        fill(&region, 1);
        let (src, dst) = (region.slice(0..1 << 20).unwrap(), theirs.remote().slice(0..1 << 20).unwrap());
        engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
        assert_eq!(peer.mismatch(&theirs, (0, 1 << 20), 1, 0), None);
        peer.fill(&theirs, (0, 1 << 20), 2);
        let transfer = peer.write(&theirs, (0, 1 << 20), &region, 0, How::default()).unwrap();
        peer.wait(transfer).unwrap();
        assert_eq!(pattern::mismatch(crate::harness::bytes(&region), 2, 0), None);
        // Whoever was granted the address is listed with the region.
        let granted = engine.info().regions[0].granted;
        assert!(granted == 0 || isolates == (false, false), "granted although {isolates:?} isolate");
        let manner = engine.info().peers[0].foreign_memory.clone();
        let expected = if isolates == (false, false) { "process_vm_writev" } else { "bounce" };
        assert_eq!(manner.as_deref(), Some(expected), "when {isolates:?} isolate");
    }
}

/// CRC-32 (IEEE), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

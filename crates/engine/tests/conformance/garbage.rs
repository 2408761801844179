//! Semantic 9: bad input never kills a process, and never keeps others out.
//!
//! The victim is a peer process; after every assault it must still do its work for an engine that behaves.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyfabric_engine::transports::shm::ring::{self, Entry, Producer};
use anyfabric_engine::transports::sys::{connect_local, memfd};
use anyfabric_engine::{Code, Engine, WriteOptions, WIRE_VERSION};
use anyfabric_wire::handshake::{Answer, Purpose, Verdict, Welcome, ANSWER_BYTES, CALL_BYTES};
use anyfabric_wire::{Control, Frame, FrameKind, Imm, Refusal, WireImm, OLDEST_VERSION};

use crate::fabric::{on_every_fabric, on_fabrics, random, Fabric};
use crate::harness::{assert_code, eventually, fill, Pair, Peer, LONG};
use crate::intruder::{call, dial, reset_on_close, wait_for_end, Intro, Intruder, Knock};

on_every_fabric!(scanned_and_flooded, silent_connections_keep_nobody_out, wrong_secret);
on_fabrics! {
    [other_versions, hostile_frames, hostile_control, hostile_streams, mutated_frames, crowded_by_one]
    [shm SHM, tcp_2 TCP_2]
}
on_fabrics! { [hostile_ring, hostile_socket, silent_joins_keep_nobody_out] [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED] }

/// The victim still works, for whom it knows and for whom it meets now.
fn still_works(pair: &mut Pair, fabric: &Fabric) {
    assert!(pair.peer.lives(), "the victim died");
    let (src, dst) = (pair.region.slice(0..64).unwrap(), pair.remote.slice(0..64).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    pair.engine.send(&pair.peer.address, b"alive?".to_vec(), None).unwrap().wait(Some(LONG)).unwrap();
    // An intruder's messages may come first.
    while pair.peer.receive().unwrap() != b"alive?" {}
    let newcomer = Engine::new(fabric.settings(1).config()).unwrap();
    newcomer.connect(&pair.peer.address, Some(LONG)).unwrap();
}

fn victim(fabric: &Fabric) -> Pair {
    let pair = Pair::connected(fabric, 1 << 16);
    fill(&pair.region, 1);
    pair
}

fn scanned_and_flooded(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    for round in 0..100 {
        let mut stream = dial(&pair.peer.address);
        let nbytes = random.below(3000) as usize;
        let _ = match round % 5 {
            // A port scanner.
            0 => Ok(()),
            1 => stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            2 => stream.write_all(&random.bytes(nbytes)),
            // The right beginning, then noise.
            3 => stream.write_all(b"ANYF").and_then(|()| stream.write_all(&random.bytes(nbytes))),
            _ => {
                let call = call(&mut random, &Intro::default());
                stream.write_all(&call.encode()).and_then(|()| stream.write_all(&random.bytes(nbytes)))
            }
        };
        if round % 2 == 0 {
            reset_on_close(&stream);
        }
    }
    // Noise is not waited for: the connection ends at once, and not after the five seconds for which silence is kept. A
    // busy machine may take as long, but not again and again.
    let ends_at_once = || {
        let mut stream = dial(&pair.peer.address);
        let began = Instant::now();
        stream.write_all(&[0xff; 4]).unwrap();
        wait_for_end(&mut stream);
        began.elapsed() < Duration::from_secs(5)
    };
    assert!((0..5).any(|_| ends_at_once()), "noise is kept as long as silence");
    // A body longer than any, announced under a proof.
    let mut stream = dial(&pair.peer.address);
    stream.write_all(&call(&mut random, &Intro::default()).encode()).unwrap();
    stream.write_all(&[0xff; 36]).unwrap();
    wait_for_end(&mut stream);
    still_works(&mut pair, fabric);
}

fn silent_connections_keep_nobody_out(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let mut silent: Vec<_> = (0..300).map(|_| dial(&pair.peer.address)).collect();
    // Some have begun and stopped, some have gone half away.
    for (idx, stream) in silent.iter_mut().enumerate() {
        let begun = call(&mut random, &Intro::default()).encode();
        match idx % 4 {
            0 => drop(stream.write_all(&begun[..idx % CALL_BYTES])),
            1 => drop(stream.write_all(&begun)),
            2 => drop(stream.shutdown(Shutdown::Write)),
            _ => {}
        }
    }
    // One that sends a byte now and then.
    let mut loris = dial(&pair.peer.address);
    let began = Instant::now();
    for byte in call(&mut random, &Intro::default()).encode() {
        let _ = loris.write_all(&[byte]);
        if began.elapsed() < Duration::from_millis(500) {
            still_works(&mut pair, fabric);
        }
    }
    still_works(&mut pair, fabric);
    // Their time is bounded: none is kept.
    for stream in &mut silent {
        wait_for_end(stream);
    }
    wait_for_end(&mut loris);
}

fn wrong_secret(fabric: &Fabric) {
    let mut random = random();
    let mut settings = fabric.there();
    settings.secret = Some(b"right".to_vec());
    let mut peer = Peer::start(&settings);
    let there = peer.region(64, fabric.memory);
    for secret in [None, Some(b"wrong".to_vec()), Some(b"righ".to_vec())] {
        let mut settings = fabric.here();
        settings.secret = secret;
        let engine = Engine::new(settings.config()).unwrap();
        let error = assert_code(engine.connect(&peer.address, Some(LONG)), Code::ConnectionBroken);
        assert!(error.message.contains("secret"), "{error}");
        // Nor does the secret come out in what is said.
        assert!(!error.message.contains("right") && !format!("{:?}", settings.config()).contains("right"));
    }
    // One that does not care about the listener's proof is not let in either.
    for secret in [&b""[..], b"wrong"] {
        let intro = Intro { secret, ..Intro::default() };
        assert!(Intruder::try_meet(&peer.address, &mut random, &intro).is_err());
    }
    settings.streams = fabric.streams.0;
    let engine = Engine::new(settings.config()).unwrap();
    let region = fabric.region(&engine, 64);
    let (src, dst) = (region.slice(0..64).unwrap(), there.remote().slice(0..64).unwrap());
    engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    let intro = Intro { secret: b"right", ..Intro::default() };
    assert!(Intruder::try_meet(&peer.address, &mut random, &intro).is_ok(), "the control");
}

fn other_versions(fabric: &Fabric) {
    use std::io::Read;
    let mut random = random();
    let mut pair = victim(fabric);
    let (newest, oldest) = (WIRE_VERSION, OLDEST_VERSION);
    for versions in [(newest + 1, newest + 1), (oldest - 1, 0), (u16::MAX, u16::MAX), (0, 0), (1000, 500)] {
        let intro = Intro { versions: Some(versions), ..Intro::default() };
        let mut stream = dial(&pair.peer.address);
        stream.write_all(&call(&mut random, &intro).encode()).unwrap();
        let mut bytes = [0; ANSWER_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        let answer = Answer::decode(&bytes).unwrap();
        assert_eq!(answer.verdict, Verdict::Version, "{versions:?}");
        // Refused by name: the answer says what is spoken here.
        assert_eq!((answer.version, answer.oldest), (newest, oldest));
        wait_for_end(&mut stream);
    }
    // The neighbours on both sides are welcome.
    for versions in [(newest, newest), (newest + 1, newest), (oldest, oldest), (u16::MAX, 0)] {
        let intro = Intro { versions: Some(versions), ..Intro::default() };
        let met = Intruder::try_meet(&pair.peer.address, &mut random, &intro);
        assert!(met.is_ok(), "{versions:?}: {:?}", met.err());
    }
    still_works(&mut pair, fabric);
}

fn hostile_frames(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let right = pair.remote.descriptor().clone();
    let (region, key) = (right.region, right.key);
    // Acknowledgements of what was never sent.
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    let acks: Vec<u8> = (0..1000).flat_map(|op| Frame::encode_ack(op, Err(Refusal::BadKey))).collect();
    intruder.send(&Frame::new(FrameKind::Ack, 0, acks.len() as u32), &acks).unwrap();
    // Parts of writes that never become whole: more than are kept.
    for op in 0..6000 {
        let part = Frame {
            region,
            key,
            num_parts: 4,
            flags: anyfabric_wire::FLAG_LAST,
            ..Frame::new(FrameKind::Write, op, 8)
        };
        intruder.send(&part, &[1; 8]).unwrap();
    }
    assert_eq!(intruder.ack(5999), Some(Ok(())));
    // Counts of any weight.
    let imm = Some((WireImm { imm: Imm::new(77).unwrap(), quarters: 1 }, u32::MAX));
    for op in 7000..7100 {
        assert!(intruder.write(Frame { region, key, imm, ..Frame::new(FrameKind::Write, op, 0) }, &[]).is_some());
    }
    // A message larger than is taken.
    let large = vec![0; (1 << 16) + 1];
    let message = Frame::new(FrameKind::Message, 8000, 0);
    assert_eq!(intruder.write(message, &large), Some(Err(Refusal::TooLarge)));
    // Refused frames without an end: bounded, then dropped.
    for op in 10_000..14_000 {
        let refused = Frame { region, key: key ^ 1, ..Frame::new(FrameKind::Write, op, 8) };
        if intruder.send(&refused, &[0; 8]).is_err() {
            break;
        }
    }
    wait_for_end(&mut intruder.stream);
    // Cut off in the middle of a payload.
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    let half = Frame { region, key, ..Frame::new(FrameKind::Write, 1, 60_000) };
    intruder.send(&half, &[7; 30_000]).unwrap();
    drop(intruder);
    // Noise where a header should be.
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    let _ = intruder.stream.write_all(&random.bytes(1000));
    wait_for_end(&mut intruder.stream);
    still_works(&mut pair, fabric);
}

fn hostile_control(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let counter = pair.peer.open(3, &[pair.engine.address()]);
    let imm = |value| Imm::new(value).unwrap();
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    for message in [
        Control::Heartbeat { received: u64::MAX },
        Control::Revoke { region: u64::MAX, key: 1, revoke: 1 },
        Control::Revoked { revoke: 0 },
        Control::Revoked { revoke: u64::MAX },
        Control::RetireImm { imm: imm(3) },
        Control::ImmRetired { imm: imm(Imm::COUNT - 1) },
        Control::EarlyArrivalsFull { limit: 0 },
        Control::EarlyArrivalsRoom,
        Control::CountFailed { imm: imm(99) },
    ] {
        intruder.control(&message).unwrap();
    }
    // More losses than are kept.
    for value in 1000..6000 {
        intruder.control(&Control::CountFailed { imm: imm(value) }).unwrap();
    }
    intruder.control(&Control::Goodbye).unwrap();
    wait_for_end(&mut intruder.stream);
    // Messages out of order, and one that is none.
    for (sequence, bytes) in [(5, Control::Goodbye.encode()), (1, vec![0xff; 64]), (1, vec![])] {
        let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
        intruder.send(&Frame::new(FrameKind::Control, sequence, bytes.len() as u32), &bytes).unwrap();
        wait_for_end(&mut intruder.stream);
    }
    // What it said about others' business has changed nothing.
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::counted(3)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 1).unwrap();
    still_works(&mut pair, fabric);
}

/// Streams with numbers that no stream has: at the poller they would name the Unix socket, or the process.
fn hostile_streams(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let intro = Intro { transport: fabric.transport, ..Intro::default() };
    let intruder = Intruder::try_meet(&pair.peer.address, &mut random, &intro).unwrap();
    for (lane_idx, is_one) in [(1, true), (4, true), (0, false), (5, false), (64, false), (65, false), (255, false)] {
        let mut knock = Knock::new(&pair.peer.address, &mut random, &intro).unwrap();
        knock.hello.address.engine = intruder.engine;
        knock.hello.purpose = Purpose::Lane { token: intruder.accepted.token, lane_idx };
        let is_welcome = matches!(knock.introduce().unwrap(), Welcome::Accepted(_));
        assert_eq!(is_welcome, is_one, "stream {lane_idx}");
    }
    still_works(&mut pair, fabric);
}

/// Right frames with some bits wrong.
fn mutated_frames(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let guard = pair.peer.region(1 << 16, fabric.memory);
    pair.peer.fill(&guard, (0, 1 << 16), 4);
    let right = pair.remote.descriptor().clone();
    for round in 0..150 {
        let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
        let imm = Some((WireImm { imm: Imm::new(random.below(50) as u32).unwrap(), quarters: 4 }, 1));
        let mut bytes = Vec::new();
        for op in 0..8 {
            let nbytes = random.below(300) as u32;
            let kind =
                [FrameKind::Write, FrameKind::Message, FrameKind::Control, FrameKind::Ack][random.below(4) as usize];
            let frame = Frame {
                flags: anyfabric_wire::FLAG_LAST,
                region: right.region,
                key: right.key,
                offset: random.below(1 << 15),
                imm,
                ..Frame::new(kind, op, nbytes)
            };
            bytes.extend(frame.encode());
            bytes.extend(random.bytes(nbytes as usize));
        }
        for _ in 0..1 + round % 6 {
            let bit = random.below(bytes.len() as u64 * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let _ = intruder.stream.write_all(&bytes);
        let _ = intruder.stream.shutdown(Shutdown::Write);
    }
    still_works(&mut pair, fabric);
    assert_eq!(pair.peer.mismatch(&guard, (0, 1 << 16), 4, 0), None, "another region was written");
}

/// Early arrivals and unread messages are bounded for each peer: one cannot crowd out another.
fn crowded_by_one(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let mut intruder = Intruder::meet(&pair.peer.address, &mut random);
    let mut full = None;
    for op in 0..10_000 {
        let imm = Some((WireImm { imm: Imm::new(100_000 + op).unwrap(), quarters: 4 }, 1));
        let signal = Frame { imm, ..Frame::new(FrameKind::Write, op.into(), 0) };
        if intruder.write(signal, &[]) == Some(Err(Refusal::Full)) {
            full = Some(op);
            break;
        }
    }
    assert!(full.is_some(), "10000 early arrivals were kept");
    // Whoever waits for one that was not kept is told.
    let lost = pair.peer.open(100_000 + full.unwrap(), &[]);
    let fault = pair.peer.wait_count(lost, 1).unwrap_err();
    assert_eq!(fault.code, Code::TransferFailed.as_str(), "{}", fault.message);
    let mut full = None;
    for op in 20_000..40_000 {
        if intruder.write(Frame::new(FrameKind::Message, op, 0), &[1; 100]) == Some(Err(Refusal::Full)) {
            full = Some(op);
            break;
        }
    }
    assert!(full.is_some(), "20000 messages were kept");
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::counted(5)).unwrap().wait(Some(LONG)).unwrap();
    let counter = pair.peer.open(5, &[]);
    pair.peer.wait_count(counter, 1).unwrap();
    pair.engine.send(&pair.peer.address, b"me too".to_vec(), None).unwrap().wait(Some(LONG)).unwrap();
    while pair.peer.receive().unwrap() != b"me too" {}
    // Who goes on and on is given up.
    for value in 200_000..400_000 {
        if intruder.control(&Control::CountFailed { imm: Imm::new(value).unwrap() }).is_err() {
            break;
        }
    }
    wait_for_end(&mut intruder.stream);
    still_works(&mut pair, fabric);
}

/// Ring indices and entries written by a peer are untrusted.
fn hostile_ring(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let guard = pair.peer.region(1 << 16, fabric.memory);
    pair.peer.fill(&guard, (0, 1 << 16), 4);
    let right = pair.remote.descriptor().clone();
    let intro = Intro { transport: "shm", ..Intro::default() };
    let address = pair.peer.address.clone();
    let meet = |random: &mut _| {
        let intruder = Intruder::try_meet(&address, random, &intro).expect("a session");
        let rings = intruder.join(&address).expect("a join");
        (intruder, rings)
    };
    // Entries that make sense and lie.
    let (mut intruder, rings) = meet(&mut random);
    let mut producer = Producer::new(std::sync::Arc::clone(&rings.ours));
    let (region, key) = (right.region, right.key);
    let bounce = |key, offset, start, nbytes| Entry::Bounce { op: 1, region, key, offset, start, nbytes };
    for entry in [
        Entry::Arrival { imm: WireImm { imm: Imm::new(50).unwrap(), quarters: 4 }, count: u32::MAX },
        Entry::Message { op: 1, start: u32::MAX, nbytes: 1 },
        Entry::Message { op: 2, start: 0, nbytes: u32::MAX },
        Entry::Message { op: 3, start: ring::AREA as u32 - 1, nbytes: 2 },
        bounce(key, 0, u32::MAX, 8),
        bounce(key, 0, 8, u32::MAX),
        bounce(key, u64::MAX, 0, 8),
        bounce(key, (1 << 16) - 4, 0, 8),
        bounce(key ^ 1, 0, 0, 8),
        Entry::Bounce { op: 2, region: u64::MAX, key, offset: 0, start: 0, nbytes: 8 },
        Entry::BounceEnd { op: 1, imm: None },
        Entry::BounceEnd { op: 99, imm: None },
        Entry::Answer { op: 12_345, result: Ok(()) },
        Entry::Answer { op: 0, result: Err(Refusal::Full) },
    ] {
        assert!(producer.push(&entry));
        rings.kick();
    }
    eventually("the entries are taken", || !producer_waits(&rings.ours, 14));
    assert!(pair.peer.lives());
    drop((producer, rings));
    let _ = intruder.control(&Control::Goodbye);
    // Noise in the whole ring, with stamps that are right.
    for round in 0..10_u64 {
        let (intruder, rings) = meet(&mut random);
        for turn in 0..ring::ENTRIES {
            let mut entry = random.bytes(64);
            entry[..4].copy_from_slice(&(turn + 1).to_le_bytes());
            if round % 2 == 0 {
                // A kind that exists.
                entry[4..8].copy_from_slice(&(1 + random.below(6) as u32).to_le_bytes());
            }
            // SAFETY: inside the ring's mapping; races on it are the point.
            unsafe {
                let at = rings.ours.as_ptr().add(4096 + turn as usize * 64);
                std::ptr::copy_nonoverlapping(entry.as_ptr(), at, entry.len());
            }
        }
        // The victim's own ring to us, its head above all, is ours to scribble over.
        let noise = random.bytes(8192);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(noise.as_ptr(), rings.theirs.as_ptr(), noise.len()) };
        rings.kick();
        std::thread::sleep(Duration::from_millis(5));
        rings.kick();
        assert!(pair.peer.lives());
        drop((intruder, rings));
    }
    assert_eq!(pair.peer.mismatch(&guard, (0, 1 << 16), 4, 0), None, "another region was written");
    still_works(&mut pair, fabric);
}

/// More of them than may meet at a time.
fn silent_joins_keep_nobody_out(fabric: &Fabric) {
    let mut pair = victim(fabric);
    let name = format!("anyfabric/{}", pair.peer.address.engine);
    let mut silent = Vec::new();
    eventually("300 have connected", || {
        silent.extend(connect_local(&name).ok());
        silent.len() == 300
    });
    still_works(&mut pair, fabric);
}

/// Whether the consumer has yet to take the `num`-th entry.
fn producer_waits(ring: &anyfabric_engine::transports::sys::Mapping, num: u32) -> bool {
    // SAFETY: the first word of the ring, which the consumer writes.
    let head = unsafe { ring.as_ptr().cast::<u32>().read_volatile() };
    head < num
}

/// The Unix socket: wrong descriptors, wrong tokens, noise.
fn hostile_socket(fabric: &Fabric) {
    let mut random = random();
    let mut pair = victim(fabric);
    let intro = Intro { transport: "shm", ..Intro::default() };
    let small = memfd(c"small", 4096).unwrap();
    let pipe = {
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors, which are ours.
        unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            use std::os::fd::FromRawFd;
            pipe.map(|fd| anyfabric_engine::transports::sys::Fd::new(std::os::fd::OwnedFd::from_raw_fd(fd)))
        }
    };
    // SAFETY: a new descriptor of memory that may shrink.
    let unsealed = unsafe {
        use std::os::fd::FromRawFd;
        let fd = libc::memfd_create(c"unsealed".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0 && libc::ftruncate(fd, ring::BYTES as i64) == 0);
        anyfabric_engine::transports::sys::Fd::new(std::os::fd::OwnedFd::from_raw_fd(fd))
    };
    let (good, _) = anyfabric_engine::transports::shm::ring_memory().unwrap();
    let lists: [&[&anyfabric_engine::transports::sys::Fd]; 6] =
        [&[], &[&good], &[&small, &small], &[&pipe[0], &pipe[1]], &[&unsealed, &unsealed], &[&good, &pipe[0]]];
    for fds in lists {
        let intruder = Intruder::try_meet(&pair.peer.address, &mut random, &intro).unwrap();
        let _channel = intruder.join_with(&pair.peer.address, fds).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    // A token that nobody gave out, and noise.
    let mut intruder = Intruder::try_meet(&pair.peer.address, &mut random, &intro).unwrap();
    intruder.accepted.token[0] ^= 1;
    assert!(intruder.join(&pair.peer.address).is_err());
    for _ in 0..20 {
        let name = format!("anyfabric/{}", pair.peer.address.engine);
        let socket = connect_local(&name).unwrap();
        let nbytes = random.below(400) as usize;
        let _ = anyfabric_engine::transports::sys::send_with_fds(&socket, &random.bytes(nbytes), &[]);
    }
    // After joining: noise, and answers that nobody waits for.
    let intruder = Intruder::try_meet(&pair.peer.address, &mut random, &intro).unwrap();
    let rings = intruder.join(&pair.peer.address).unwrap();
    let access = anyfabric_wire::Access::Mapped { nbytes: u64::MAX };
    let _ = rings.channel.send(&anyfabric_wire::Local::Imported { request: 77, result: Ok(access) }, None);
    let import = anyfabric_wire::Local::Import { request: 1, region: pair.remote.descriptor().region, key: 1 };
    rings.channel.send(&import, None).unwrap();
    let noise = random.bytes(64);
    let _ = anyfabric_engine::transports::sys::send_with_fds(rings.channel.socket(), &noise, &[]);
    still_works(&mut pair, fabric);
}

//! Semantic 9: what waits for a peer that sends and never reads is bounded, and whoever leaves more unread is given up.
//!
//! Here the victim is the test's own engine: it says why.

use std::sync::Arc;
use std::time::Instant;

use anyfabric_engine::transports::shm::ring::{Entry, Producer};
use anyfabric_engine::{Code, Engine, WriteOptions};
use anyfabric_wire::{Control, Frame, FrameKind, Imm, FLAG_LAST};

use crate::fabric::{on_fabrics, random, Fabric};
use crate::harness::{assert_code, eventually, wait_for_streams, LONG};
use crate::intruder::{Intro, Intruder, Rings};

on_fabrics! { [acknowledgements, control_messages, confirmed_and_unread] [tcp_2 TCP_2] }
on_fabrics! { [answers] [shm SHM] }
on_fabrics! { [both_at_full_speed] [shm SHM, shm_isolated SHM_ISOLATED, tcp_1 TCP_1, tcp_4 TCP_4] }

/// Empty writes, each of which is acknowledged.
fn acknowledgements(fabric: &Fabric) {
    let (engine, mut intruder) = victim(fabric);
    let write = |op| Frame { flags: FLAG_LAST, ..Frame::new(FrameKind::Write, op, 0) }.encode();
    flood(&mut intruder, |op, bytes| bytes.extend(write(op)));
    assert_given_up(&engine, &intruder, "acknowledgements");
}

/// Questions, each of which is answered.
fn control_messages(fabric: &Fabric) {
    let (engine, mut intruder) = victim(fabric);
    flood(&mut intruder, |number, bytes| control(number + 1, &asks(number), bytes));
    assert_given_up(&engine, &intruder, "control messages");
}

/// The same of one that confirms what it has never read.
fn confirmed_and_unread(fabric: &Fabric) {
    let (engine, mut intruder) = victim(fabric);
    flood(&mut intruder, |number, bytes| {
        let lies = Control::Heartbeat { received: u64::MAX };
        let message = if number % 16 == 0 { lies } else { asks(number) };
        control(number + 1, &message, bytes);
    });
    assert_given_up(&engine, &intruder, "control messages");
}

/// Messages over the ring, each of which is answered.
fn answers(fabric: &Fabric) {
    let (engine, mut intruder) = victim(fabric);
    let rings = intruder.join(engine.address()).expect("a join");
    let producer = &mut Producer::new(Arc::clone(&rings.ours));
    let began = Instant::now();
    for op in 0..MOST {
        if !push(producer, &Entry::Message { op, start: 0, nbytes: 0 }, &rings, began) {
            break;
        }
        if op % 1024 == 0 {
            // Somebody who is heard.
            let _ = intruder.control(&Control::Heartbeat { received: 0 });
        }
    }
    assert_given_up(&engine, &intruder, "answers");
}

/// Two that write to each other as fast as they can, each with far more under way than sockets and rings hold, neither
/// wait for each other nor give each other up.
fn both_at_full_speed(fabric: &Fabric) {
    let engines = [(); 2].map(|()| {
        let mut settings = fabric.here();
        settings.queue_depth = UNDER_WAY;
        Engine::new(settings.config()).expect("an engine")
    });
    let regions = engines.each_ref().map(|engine| fabric.region(engine, NBYTES));
    engines[0].connect(engines[1].address(), Some(LONG)).expect("a path");
    wait_for_streams(&engines[0], engines[1].address(), fabric);
    let run = |from: usize| {
        let (engine, there) = (&engines[from], &engines[1 - from]);
        let remote = engine.import(&regions[1 - from].descriptor().expect("a descriptor").encode()).expect("a region");
        let transfers: Vec<_> = (0..UNDER_WAY as u64)
            .map(|idx| match idx % 8 {
                // Now and then something that fills a socket.
                0 => {
                    let (src, dst) = (regions[from].slice(0..NBYTES), remote.slice(0..NBYTES));
                    let how = WriteOptions { timeout: Some(LONG), ..WriteOptions::default() };
                    engine.write(&src.expect("a slice"), &dst.expect("a slice"), how)
                }
                1 => engine.send(there.address(), Vec::new(), Some(LONG)),
                _ => engine.barrier(&[there.address().clone()], 1 + (idx % 4) as u32, Some(LONG)),
            })
            .collect();
        for transfer in transfers {
            transfer.expect("submitted").wait(Some(LONG)).expect("done");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(0));
        scope.spawn(|| run(1));
    });
}

/// An engine, and somebody that it knows.
fn victim(fabric: &Fabric) -> (Engine, Intruder) {
    let engine = Engine::new(fabric.here().config()).expect("an engine");
    let intro = Intro { transport: fabric.transport, ..Intro::default() };
    let intruder = Intruder::try_meet(engine.address(), &mut random(), &intro).expect("a session");
    (engine, intruder)
}

/// Sends, and reads nothing, until the connection ends.
fn flood(intruder: &mut Intruder, mut next: impl FnMut(u64, &mut Vec<u8>)) {
    use std::io::Write;
    let mut bytes = Vec::new();
    for number in 0..MOST {
        next(number, &mut bytes);
        if bytes.len() > 64 << 10 {
            if intruder.stream.write_all(&bytes).is_err() {
                return;
            }
            bytes.clear();
        }
    }
    panic!("{MOST} were answered, and no answer was read");
}

fn asks(number: u64) -> Control {
    Control::RetireImm { imm: Imm::new((number % 1000) as u32).expect("below 2^30") }
}

fn control(sequence: u64, message: &Control, bytes: &mut Vec<u8>) {
    let message = message.encode();
    bytes.extend(Frame::new(FrameKind::Control, sequence, message.len() as u32).encode());
    bytes.extend(message);
}

/// False when nobody takes it any more.
fn push(producer: &mut Producer, entry: &Entry, rings: &Rings, began: Instant) -> bool {
    loop {
        if producer.is_fenced() {
            return false;
        }
        if producer.push(entry) {
            return true;
        }
        assert!(began.elapsed() < LONG, "the ring is read no further");
        rings.kick();
        std::thread::yield_now();
    }
}

/// Whoever counts on it is told what it did.
#[track_caller]
fn assert_given_up(engine: &Engine, intruder: &Intruder, what: &str) {
    let said = format!("more {what} wait for it than are kept");
    let mut log = Vec::new();
    eventually("it is given up", || {
        log.extend(engine.take_log());
        log.iter().any(|(_, line)| line.contains("lost") && line.contains(&said))
    });
    let peer = anyfabric_engine::Address { engine: intruder.engine, sockets: Vec::new() };
    let error = assert_code(
        engine.barrier(&[peer], 1, Some(LONG)).and_then(|transfer| transfer.wait(Some(LONG))),
        Code::PeerLost,
    );
    assert!(error.to_string().contains(&said), "{error}");
}

const MOST: u64 = 8 << 20;
const UNDER_WAY: usize = 20_000;
const NBYTES: u64 = 64 << 10;

//! Semantic 5: a dead peer is noticed in bounded time, for good; a stopped one finds itself fenced; a restarted one
//! is another.

use std::time::{Duration, Instant};

use anyfabric_engine::{Address, Code, Engine, EngineId, WriteOptions};

use crate::ask::{Answer, Ask, How, Settings};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, eventually, fill, Pair, Peer, LONG};
use crate::pattern;

on_every_fabric!(
    killed_while_idle,
    killed_as_receiver,
    killed_as_writer,
    its_end_is_told_in_words,
    what_was_counted_stays,
    stopped_is_lost_and_fenced,
    stopped_before_it_answers_is_lost,
    restarted_is_another,
    closed_says_goodbye,
    nobody_there,
);

/// Short, and longer than a busy machine keeps a thread waiting.
fn short_heartbeats(settings: &mut Settings) {
    (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(100), 20);
}

/// So rare that whatever is noticed within [`SOON`] is noticed in another way.
fn long_heartbeats(settings: &mut Settings) {
    (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_secs(10), 5);
}

/// On the same host a death is noticed at once; the bound leaves room for a machine that is busy with everything else.
const SOON: Duration = Duration::from_secs(30);

fn killed_while_idle(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 4096, long_heartbeats);
    pair.connect(fabric);
    let sources = [pair.peer.address.clone()];
    let (fails, counts) = (pair.engine.counter(Some(1), &sources).unwrap(), pair.engine.counter(Some(2), &[]).unwrap());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| fails.wait(1, Some(LONG)));
        std::thread::sleep(Duration::from_millis(50));
        pair.peer.kill();
        let died = Instant::now();
        let error = assert_code(waiter.join().unwrap(), Code::PeerLost);
        assert!(died.elapsed() < SOON, "noticed only after {:?}", died.elapsed());
        assert_eq!(error.context.peer, Some(sources[0].to_string()));
    });
    assert_code(counts.wait(1, Some(Duration::from_millis(10))), Code::WaitTimeout);
    // Later submits fail at once.
    let began = Instant::now();
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    assert_code(pair.engine.write(&src, &dst, WriteOptions::default()), Code::PeerLost);
    assert_code(pair.engine.send(&sources[0], vec![1], None), Code::PeerLost);
    assert_code(pair.engine.connect(&sources[0], None), Code::PeerLost);
    assert_code(pair.engine.barrier(&sources, 3, None), Code::PeerLost);
    assert!(began.elapsed() < SOON);
    assert_eq!(pair.engine.path(&sources[0]).state, "lost");
    let late = pair.engine.counter(Some(4), &sources).unwrap();
    assert_code(late.wait(1, Some(LONG)), Code::PeerLost);
}

fn killed_as_receiver(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 32 << 20, long_heartbeats);
    pair.connect(fabric);
    fill(&pair.region, 1);
    let (src, dst) = (pair.region.slice(0..32 << 20).unwrap(), pair.remote.slice(0..32 << 20).unwrap());
    let mut transfers: Vec<_> =
        (0..30).map(|_| pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap()).collect();
    transfers[0].wait(Some(LONG)).unwrap();
    pair.peer.kill();
    let died = Instant::now();
    let mut failed = 0;
    for transfer in &mut transfers {
        if let Err(error) = transfer.wait(Some(LONG)) {
            // A stream may be seen to break before the control connection says why.
            // A NIC may see the memory of a process that ends go before its queue pairs: a key that is no more.
            let is_key = fabric.transport == "verbs" && error.code == Code::Refused;
            assert!(is_key || matches!(error.code, Code::PeerLost | Code::ConnectionBroken), "{error}");
            failed += 1;
        }
        transfer.wait_quiesced(Some(LONG)).unwrap();
    }
    assert!(died.elapsed() < SOON, "ended only after {:?}", died.elapsed());
    println!("{failed} of 30 transfers failed");
    eventually("the peer is lost", || pair.engine.path(&pair.peer.address).state == "lost");
    assert_code(pair.engine.write(&src, &dst, WriteOptions::default()), Code::PeerLost);
    assert_eq!(pattern::mismatch(pair.bytes(), 1, 0), None, "the source");
}

fn killed_as_writer(fabric: &Fabric) {
    const BYTES: u64 = 16 << 20;
    let mut pair = Pair::connected(fabric, BYTES);
    pair.peer.fill(&pair.there, (0, BYTES), 1);
    fill(&pair.region, 2);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    let to = pair.region.descriptor().unwrap().encode();
    let (region, nbytes, to_at) = (pair.there.idx, BYTES - 8192, 4096);
    pair.peer.ask(Ask::Hammer { region, nbytes, to, to_at, imm: Some(1), num_threads: 1 });
    counter.wait(3, Some(LONG)).unwrap();
    pair.peer.kill();
    let error = assert_code(counter.wait(u64::MAX, Some(LONG)), Code::PeerLost);
    assert_eq!(error.context.peer, Some(pair.peer.address.to_string()));
    // What was counted is whole: every round wrote the same. Around it nothing was touched.
    let bytes = pair.bytes();
    assert_eq!(pattern::mismatch(&bytes[4096..(BYTES - 4096) as usize], 1, 0), None);
    assert_eq!(pattern::mismatch(&bytes[..4096], 2, 0), None, "before");
    assert_eq!(pattern::mismatch(&bytes[(BYTES - 4096) as usize..], 2, BYTES - 4096), None, "after");
    // Its exit ends every claim on the memory.
    eventually("nothing is quarantined", || pair.engine.info().quarantine.is_empty());
    pair.region.close(LONG);
    assert!(pair.engine.info().quarantine.is_empty());
}

/// Whatever notices first: the process's descriptor, its Unix socket, a stream, or that nobody listens any more.
fn its_end_is_told_in_words(fabric: &Fabric) {
    let why = if fabric.transport == "shm" { "its process has exited" } else { "its engine has ended" };
    // Often, for it is chance who notices first; less often under emulation.
    for _ in 0..if fabric.transport == "verbs" { 3 } else { 8 } {
        let mut pair = Pair::connected(fabric, 1 << 20);
        let address = pair.peer.address.to_string();
        let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
        let (src, dst) = (pair.region.slice(0..100_000).unwrap(), pair.remote.slice(0..100_000).unwrap());
        let write = || pair.engine.write(&src, &dst, WriteOptions::default());
        write().unwrap().wait(Some(LONG)).unwrap();
        pair.peer.kill();
        let error = assert_code(counter.wait(1, Some(LONG)), Code::PeerLost);
        for part in [why, &address, "imm 1"] {
            assert!(error.message.contains(part), "{part:?} is missing in {:?}", error.message);
        }
        let error = assert_code(write(), Code::PeerLost);
        let region = format!("region {}", pair.region.id());
        for part in ["write", "the peer is lost", why, "100000 bytes", &region, &address, "over ", fabric.transport] {
            assert!(error.message.contains(part), "{part:?} is missing in {:?}", error.message);
        }
        let context = &error.context;
        assert_eq!(
            (context.operation, context.nbytes, context.path),
            (Some("write"), Some(100_000), Some(fabric.transport))
        );
        assert_eq!((context.peer.as_deref(), context.region), (Some(&*address), Some(pair.region.id())));
        assert!(
            pair.engine.path(&pair.peer.address).reason.contains(why),
            "{:?}",
            pair.engine.path(&pair.peer.address)
        );
    }
}

fn what_was_counted_stays(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    pair.peer.fill(&pair.there, (0, 1 << 20), 1);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    let transfer = pair.peer.write(&pair.there, (0, 1 << 20), &pair.region, 0, How::counted(1)).unwrap();
    pair.peer.wait(transfer).unwrap();
    pair.peer.kill();
    eventually("the peer is lost", || pair.engine.path(&pair.peer.address).state == "lost");
    counter.wait(1, Some(LONG)).unwrap();
    assert_eq!(pattern::mismatch(pair.bytes(), 1, 0), None);
    assert_code(counter.wait(2, Some(LONG)), Code::PeerLost);
}

fn stopped_is_lost_and_fenced(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 1 << 20, short_heartbeats);
    pair.connect(fabric);
    pair.peer.fill(&pair.there, (0, 1 << 20), 1);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    let transfer = pair.peer.write(&pair.there, (0, 1 << 20), &pair.region, 0, How::counted(1)).unwrap();
    pair.peer.wait(transfer).unwrap();
    counter.wait(1, Some(LONG)).unwrap();
    pair.peer.stop();
    let stopped = Instant::now();
    assert_code(counter.wait(2, Some(LONG)), Code::PeerLost);
    let took = stopped.elapsed();
    assert!(took > Duration::from_secs(1), "lost after {took:?} of silence");
    assert!(took < SOON, "lost only after {took:?} of silence");
    fill(&pair.region, 3);
    pair.peer.go_on();
    // It finds itself fenced: nothing of it is counted, and what it writes fails.
    let how = How { timeout: Some(LONG), ..How::counted(1) };
    eventually("the peer finds itself fenced", || {
        let written = pair.peer.write(&pair.there, (0, 64), &pair.region, 0, how);
        let written = written.and_then(|transfer| pair.peer.wait(transfer));
        written.is_err_and(|fault| fault.code == Code::PeerLost.as_str())
    });
    assert_eq!(counter.value(), 1, "counted after the loss");
    if !fabric.writer_places() {
        assert_eq!(pattern::mismatch(pair.bytes(), 3, 0), None, "placed after the loss");
    }
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    assert_code(pair.engine.write(&src, &dst, WriteOptions::default()), Code::PeerLost);
}

/// A first write to a region waits for its owner's answer: no longer than for any sign of the owner's life.
fn stopped_before_it_answers_is_lost(fabric: &Fabric) {
    let pair = Pair::with(fabric, 1 << 20, short_heartbeats);
    pair.connect(fabric);
    pair.peer.stop();
    let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(1) };
    let (src, dst) = (pair.region.slice(0..1 << 20).unwrap(), pair.remote.slice(0..1 << 20).unwrap());
    let write = pair.engine.write(&src, &dst, options).unwrap();
    assert_code(write.wait(Some(SOON)), Code::PeerLost);
    write.wait_quiesced(Some(SOON)).unwrap();
    pair.peer.go_on();
}

fn restarted_is_another(fabric: &Fabric) {
    let engine = Engine::new(fabric.here().config()).unwrap();
    let region = fabric.region(&engine, 4096);
    let mut settings = fabric.there();
    let mut first = Peer::start(&settings);
    let old = first.region(4096, fabric.memory).remote();
    engine.connect(&first.address, Some(LONG)).unwrap();
    // The next one lives at the same port.
    settings.listen = first.address.sockets[0].to_string();
    first.kill();
    let mut second = Peer::bare();
    let mut started = None;
    eventually("the port is free again", || match second.ask(Ask::Start(settings.clone())) {
        Answer::Text(address) => {
            started = Some(address.parse::<Address>().unwrap());
            true
        }
        _ => false,
    });
    second.address = started.unwrap();
    assert_ne!(second.address, first.address);
    // What is under way when a connection breaks may fail before it is known that nobody is there any more.
    eventually("the first is lost", || engine.path(&first.address).state == "lost");
    let there = second.region(4096, fabric.memory);
    let write = |to: &anyfabric_engine::Remote| {
        let options = WriteOptions { imm: Some(1), timeout: Some(LONG), ..WriteOptions::default() };
        engine.write(&region.slice(0..64).unwrap(), &to.slice(0..64).unwrap(), options)?.wait(None)
    };
    assert_code(write(&old), Code::PeerLost);
    let counter = second.open(1, &[]);
    write(&there.remote()).unwrap();
    second.wait_count(counter, 1).unwrap();
    // Somebody who never met the first is told as well.
    let third = Engine::new(fabric.here().config()).unwrap();
    eventually("who never met the first is told that it is lost", || {
        // A handshake has a deadline of its own, which a busy machine may miss.
        third.connect(&first.address, Some(LONG)).is_err_and(|error| error.code == Code::PeerLost)
    });
    assert_code(write(&old), Code::PeerLost);
}

fn closed_says_goodbye(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 4096, long_heartbeats);
    pair.connect(fabric);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    let transfer = pair.peer.write(&pair.there, (0, 4096), &pair.region, 0, How::counted(1)).unwrap();
    pair.peer.wait(transfer).unwrap();
    counter.wait(1, Some(LONG)).unwrap();
    pair.peer.ask(Ask::CloseEngine { engine: 0, timeout: LONG });
    let began = Instant::now();
    assert_code(counter.wait(2, Some(LONG)), Code::PeerLost);
    let log = pair.engine.take_log();
    assert!(began.elapsed() < SOON, "noticed after {:?}: {log:#?}", began.elapsed());
    let is_told = |(level, line): &(u8, String)| *level == 20 && line.ends_with("it has closed its engine");
    assert!(log.iter().any(is_told), "an orderly end is told as one: {log:#?}");
    // It let go of what it could write into, although its process lives.
    pair.region.revoke(None, LONG).unwrap();
    pair.region.close(LONG);
    assert!(pair.engine.info().quarantine.is_empty());
    assert!(pair.peer.lives());
}

fn nobody_there(fabric: &Fabric) {
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address { engine: EngineId([7; 16]), sockets: vec![listener.local_addr().unwrap()] };
    drop(listener);
    let began = Instant::now();
    // On this host nobody else can have its port: that incarnation has ended.
    assert_code(engine.connect(&address, Some(LONG)), Code::PeerLost);
    assert!(began.elapsed() < SOON);
    let nowhere = Address { engine: EngineId([8; 16]), sockets: vec![] };
    assert!(engine.connect(&nowhere, Some(LONG)).is_err());
}

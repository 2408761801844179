//! Ends: `close()` with transfers in flight, twice, from two threads; and what waits is woken.

use std::time::{Duration, Instant};

use anyfabric_engine::{Code, WriteOptions};

use crate::ask::{Answer, Ask};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, fill, Pair, LONG};

on_every_fabric!(
    closed_in_flight,
    close_waits_for_what_is_under_way,
    closed_after_a_message,
    closed_from_everywhere,
    dropped_in_flight
);

fn closed_in_flight(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4 << 20);
    // To a region that a stopped peer has not been asked for: nothing can go well.
    let fresh = pair.peer.region(4 << 20, fabric.memory);
    pair.peer.stop();
    let (src, dst) = (pair.region.slice(0..4 << 20).unwrap(), fresh.remote().slice(0..4 << 20).unwrap());
    let transfers: Vec<_> = (0..10).map(|_| pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap()).collect();
    let counter = pair.engine.counter(Some(1), &[]).unwrap();
    std::thread::scope(|scope| {
        let count = scope.spawn(|| counter.wait(1, Some(LONG)));
        let receive = scope.spawn(|| pair.engine.receive(Some(LONG)));
        let wait = scope.spawn(|| transfers[9].wait(Some(LONG)));
        std::thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        pair.engine.close(Duration::from_millis(100));
        assert!(began.elapsed() < LONG, "closed after {:?}", began.elapsed());
        assert_code(count.join().unwrap(), Code::Closed);
        assert_code(receive.join().unwrap(), Code::Closed);
        assert_code(wait.join().unwrap(), Code::Closed);
    });
    for transfer in &transfers {
        assert_code(transfer.wait(Some(Duration::ZERO)), Code::Closed);
        transfer.wait_quiesced(Some(LONG)).unwrap();
    }
    pair.engine.close(LONG);
    assert!(pair.engine.is_closed());
    assert_code(pair.engine.write(&src, &dst, WriteOptions::default()), Code::Closed);
    assert_code(pair.engine.allocate(64), Code::Closed);
    assert_code(pair.engine.counter(None, &[]), Code::Closed);
    assert_code(pair.engine.try_receive(), Code::Closed);
    assert_code(pair.region.descriptor(), Code::Closed);
    pair.region.close(LONG);
    counter.close();
    pair.peer.go_on();
    assert!(pair.peer.lives());
}

/// What was taken was sent well, although whoever took it closes at once.
fn closed_after_a_message(fabric: &Fabric) {
    for round in 0..4 {
        let mut pair = Pair::connected(fabric, 64);
        let to = pair.engine.address().to_string();
        let Answer::Id(transfer) = pair.peer.ask(Ask::Send { engine: 0, to, bytes: vec![round; 8] }) else {
            panic!("round {round}: not sent");
        };
        assert_eq!(pair.engine.receive(Some(LONG)).unwrap().data, [round; 8]);
        pair.engine.close(LONG);
        pair.peer.wait(transfer).unwrap_or_else(|fault| panic!("round {round}: {fault:?}"));
    }
}

fn close_waits_for_what_is_under_way(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 16 << 20);
    fill(&pair.region, 1);
    let counter = pair.peer.open(1, &[]);
    let (src, dst) = (pair.region.slice(0..16 << 20).unwrap(), pair.remote.slice(0..16 << 20).unwrap());
    let transfers: Vec<_> = (0..4).map(|_| pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap()).collect();
    pair.engine.close(LONG);
    for transfer in &transfers {
        transfer.wait(Some(Duration::ZERO)).unwrap();
    }
    pair.peer.wait_count(counter, 4).unwrap();
    assert_eq!(pair.peer.mismatch(&pair.there, (0, 16 << 20), 1, 0), None);
}

fn closed_from_everywhere(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let (src, dst) = (pair.region.slice(0..1 << 20).unwrap(), pair.remote.slice(0..1 << 20).unwrap());
    std::thread::scope(|scope| {
        // Threads that go on submitting until they are told.
        for _ in 0..3 {
            scope.spawn(|| loop {
                match pair.engine.write(&src, &dst, WriteOptions::counted(1)).and_then(|transfer| transfer.wait(None)) {
                    Ok(()) => {}
                    Err(error) => {
                        assert_eq!(error.code, Code::Closed, "{error}");
                        return;
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..4 {
            scope.spawn(|| {
                pair.engine.close(Duration::from_secs(1));
                assert!(pair.engine.is_closed());
            });
        }
    });
    assert!(pair.peer.lives());
}

fn dropped_in_flight(fabric: &Fabric) {
    let pair = Pair::connected(fabric, 16 << 20);
    let Pair { engine, region, mut peer, there, remote } = pair;
    let (src, dst) = (region.slice(0..16 << 20).unwrap(), remote.slice(0..16 << 20).unwrap());
    let transfer = engine.write(&src, &dst, WriteOptions::default()).unwrap();
    drop((engine, region, src));
    if let Err(error) = transfer.wait(Some(LONG)) {
        assert_eq!(error.code, Code::Closed, "{error}");
    }
    // The peer has noticed and goes on.
    assert!(peer.lives());
    assert_eq!(peer.read(&there, 0, 8).len(), 8);
}

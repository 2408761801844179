//! Semantic 6: a dead NIC is not a dead peer. The streams of a tcp peer are its NICs; they run through a cable here
//! that the test cuts.

use std::time::Duration;

use anyfabric_engine::{Code, WriteOptions};

use crate::ask::{How, Settings};
use crate::cabled::Cabled;
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{assert_code, eventually, fill, slot_imm, wait_for_streams, went_well, LONG};

on_fabrics! { [cut_stream_returns, cut_under_load, lost_way_is_noticed] [tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4] }
on_every_fabric!(cut_control_is_restored, unplugged_is_lost, stays_away);

fn cut_stream_returns(fabric: &Fabric) {
    let mut cabled = Cabled::new(fabric, 4 << 20, |_| {});
    cabled.wait_for_streams(fabric);
    fill(&cabled.pair.region, 1);
    let counter = cabled.pair.peer.open(1, &[]);
    cabled.write(4 << 20, 1).unwrap();
    for round in 1..=3 {
        let num_before = cabled.proxy.num_connections();
        // Never the control connection, which was the first.
        cabled.proxy.cut(num_before - 1);
        // Transfers in flight on it fail; what comes after goes well at once, or over what stands.
        eventually("later writes go well", || cabled.write(4 << 20, 2).is_ok());
        cabled.pair.peer.wait_count(counter, round).unwrap();
        eventually("the stream is made again", || cabled.proxy.num_connections() > num_before);
        eventually("the path is ready again", || cabled.state() == "ready");
        cabled.write(4 << 20, 1).unwrap();
    }
    cabled.pair.peer.wait_count(counter, 4).unwrap();
    assert_eq!(cabled.pair.peer.mismatch(&cabled.pair.there, (0, 4 << 20), 1, 0), None);
    assert_eq!(cabled.pair.peer.value(counter), 4);
}

/// A stream is cut while writes are under way: each ends well, counted and with every byte there, or fails; the count
/// is never more than what was submitted and never less than what was done.
fn cut_under_load(fabric: &Fabric) {
    const SLOT: u64 = 1 << 20;
    let mut cabled = Cabled::new(fabric, 64 * SLOT, |_| {});
    cabled.wait_for_streams(fabric);
    fill(&cabled.pair.region, 2);
    let mut done = Vec::new();
    for round in 0..4 {
        let transfers: Vec<_> = (0..16)
            .map(|idx| {
                let slot = round * 16 + idx;
                let range = slot * SLOT..(slot + 1) * SLOT;
                let (src, dst) = (cabled.pair.region.slice(range.clone()), cabled.remote.slice(range));
                let options = WriteOptions::counted(slot_imm(slot));
                (slot, cabled.pair.engine.write(&src.unwrap(), &dst.unwrap(), options).unwrap())
            })
            .collect();
        if round % 2 == 0 {
            cabled.proxy.cut(cabled.proxy.num_connections() - 1);
        }
        done.extend(went_well(transfers));
        eventually("later writes go well", || cabled.write(SLOT, 1).is_ok());
    }
    println!("{} of 64 writes went well", done.len());
    cabled.pair.check_slots((64, SLOT), 2, &done);
}

/// Nothing of what is sent over one stream arrives, and nobody says so: what is under way there fails long before its
/// deadline, and the stream is made again.
fn lost_way_is_noticed(fabric: &Fabric) {
    let cabled = Cabled::new(fabric, 4 << 20, short_heartbeats);
    wait_for_streams(&cabled.pair.engine, &cabled.proxy.address, fabric);
    let num_before = cabled.proxy.num_connections();
    cabled.proxy.lose_what_comes(num_before - 1);
    assert_code(cabled.write(4 << 20, 1), Code::ConnectionBroken);
    eventually("the stream is made again", || cabled.proxy.num_connections() > num_before);
    eventually("later writes go well", || cabled.write(4 << 20, 2).is_ok());
    eventually("the path is ready again", || cabled.state() == "ready");
}

fn cut_control_is_restored(fabric: &Fabric) {
    let mut cabled = Cabled::new(fabric, 1 << 20, |_| {});
    let counter = cabled.pair.peer.open(1, &[]);
    let back = cabled.pair.engine.counter(Some(2), std::slice::from_ref(&cabled.pair.peer.address)).unwrap();
    for round in 1..=3 {
        cabled.write(100_000, 1).unwrap();
        cabled.pair.peer.wait_count(counter, round).unwrap();
        let num_before = cabled.proxy.num_connections();
        let control = if round == 1 { 0 } else { num_before - 1 };
        cabled.proxy.cut(control);
        eventually("the connection is made again", || cabled.proxy.num_connections() > num_before);
        eventually("the path is ready again", || cabled.state() == "ready");
        let pair = &mut cabled.pair;
        let transfer = pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(2)).unwrap();
        pair.peer.wait(transfer).unwrap();
        back.wait(round, Some(LONG)).unwrap();
        // What the control connection carries still works: a revocation and its answer.
        cabled.pair.region.revoke(None, LONG).unwrap();
    }
}

/// Short, and longer than a busy machine keeps a thread waiting.
fn short_heartbeats(settings: &mut Settings) {
    (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(100), 15);
}

fn unplugged_is_lost(fabric: &Fabric) {
    let mut cabled = Cabled::new(fabric, 4096, short_heartbeats);
    let counter = cabled.pair.engine.counter(Some(2), std::slice::from_ref(&cabled.pair.peer.address)).unwrap();
    cabled.write(64, 1).unwrap();
    cabled.proxy.silence();
    assert_code(counter.wait(1, Some(LONG)), Code::PeerLost);
    assert_code(cabled.write(64, 1), Code::PeerLost);
    assert_eq!(cabled.state(), "lost");
    let fault = cabled.pair.peer.open(3, &[cabled.pair.engine.address()]);
    let fault = cabled.pair.peer.wait_count(fault, 1).unwrap_err();
    assert_eq!(fault.code, Code::PeerLost.as_str(), "{}", fault.message);
}

/// The control connection breaks and cannot be restored: lost within the heartbeats, not before.
fn stays_away(fabric: &Fabric) {
    let cabled = Cabled::new(fabric, 4096, short_heartbeats);
    let counter = cabled.pair.engine.counter(Some(2), std::slice::from_ref(&cabled.pair.peer.address)).unwrap();
    cabled.proxy.refuse(true);
    let broke = std::time::Instant::now();
    cabled.proxy.cut(0);
    assert_code(counter.wait(1, Some(LONG)), Code::PeerLost);
    assert!(broke.elapsed() > Duration::from_secs(1), "given up after {:?}", broke.elapsed());
}

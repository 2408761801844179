//! Semantic 4: of what has quiesced no byte moves any more, also of what was given up halfway.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyfabric_engine::{Code, Engine, Region, Remote, Transfer, WriteOptions};
use anyfabric_wire::{Descriptor, Device, Frame, FrameKind, Refusal};

use crate::ask::Settings;
use crate::fabric::{on_fabrics, Fabric};
use crate::harness::{assert_code, assert_fault, Pair, LONG};
use crate::meeting::Callee;

on_fabrics! { [waits_for_what_is_in_the_ring] [shm_isolated SHM_ISOLATED] }
on_fabrics! { [waits_for_what_is_in_the_stream, waits_for_what_is_in_a_stream_that_broke] [tcp_1 TCP_1] }

/// More than any ring or socket holds.
const BYTES: u64 = 64 << 20;
/// What the test calls its memory.
const REGION: u64 = 7;

/// With peers that say nothing.
fn patient(settings: &mut Settings) {
    settings.heartbeats_lost = 100;
}

fn options() -> WriteOptions {
    WriteOptions { timeout: Some(Duration::from_millis(300)), ..WriteOptions::counted(5) }
}

/// What a stopped peer has in its ring it will place when it goes on.
fn waits_for_what_is_in_the_ring(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, BYTES, patient);
    pair.connect(fabric);
    let write = |nbytes, options| {
        let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
        pair.engine.write(&src, &dst, options).unwrap()
    };
    write(8, WriteOptions::default()).wait(Some(LONG)).unwrap();
    pair.peer.stop();
    let transfer = write(BYTES, options());
    assert_code(transfer.wait(None), Code::TransferTimeout);
    assert_code(transfer.wait_quiesced(Some(Duration::from_millis(300))), Code::WaitTimeout);
    pair.peer.go_on();
    transfer.wait_quiesced(Some(LONG)).unwrap();
    // Who counts on it is told, once, and the next one goes well.
    let counter = pair.peer.open(5, &[]);
    assert_fault(pair.peer.wait_count(counter, 1), Code::TransferFailed);
    assert_eq!(pair.peer.value(counter), 0);
    write(BYTES, WriteOptions::default()).wait(Some(LONG)).unwrap();
}

/// What is on its way to a peer that does not read will be placed when it does: it is told where the operation ends.
fn waits_for_what_is_in_the_stream(fabric: &Fabric) {
    let (writer, mut lane) = Writer::new(fabric);
    let transfer = writer.write(BYTES, options());
    assert_code(transfer.wait(None), Code::TransferTimeout);
    let last = std::iter::repeat_with(|| frame(&mut lane)).find(Frame::is_last).unwrap();
    assert_eq!((last.kind, last.nbytes, last.imm), (FrameKind::Write, 0, None));
    assert_ne!(last.region, REGION, "it must be refused, so that nobody counts it");
    assert!(!transfer.is_quiesced());
    let answer = Frame::encode_ack(last.op, Err(Refusal::NoRegion));
    lane.write_all(&Frame::new(FrameKind::Ack, 0, answer.len() as u32).encode()).unwrap();
    lane.write_all(&answer).unwrap();
    transfer.wait_quiesced(Some(LONG)).unwrap();
    assert_eq!(transfer.error().unwrap().code, Code::TransferTimeout);
}

/// What was sent on a stream that broke may be read as long as the peer has not noticed: it has once it has accepted
/// another in its place.
fn waits_for_what_is_in_a_stream_that_broke(fabric: &Fabric) {
    let (writer, mut lane) = Writer::new(fabric);
    let options = || WriteOptions { timeout: Some(LONG), ..WriteOptions::default() };
    // One of which all is sent, and one of which that can never be.
    let transfers = [writer.write(1 << 20, options()), writer.write(BYTES, options())];
    while !frame(&mut lane).is_last() {}
    frame(&mut lane);
    lane.shutdown(std::net::Shutdown::Both).unwrap();
    for transfer in &transfers {
        assert_code(transfer.wait(Some(LONG)), Code::ConnectionBroken);
        assert!(!transfer.is_quiesced(), "what is in the stream may yet be read");
        assert_code(transfer.wait_quiesced(Some(Duration::from_millis(100))), Code::WaitTimeout);
    }
    let _lane = writer.callee.lane();
    for transfer in &transfers {
        transfer.wait_quiesced(Some(LONG)).unwrap();
    }
}

/// An engine that writes to this test, over a stream that is read here.
struct Writer {
    engine: Engine,
    source: Region,
    remote: Remote,
    callee: Callee,
    _control: TcpStream,
}

impl Writer {
    fn new(fabric: &Fabric) -> (Self, TcpStream) {
        let mut settings = fabric.settings(1);
        patient(&mut settings);
        let engine = Engine::new(settings.config()).unwrap();
        let mut callee = Callee::new();
        let address = callee.address();
        let connect = engine.start_connect(&address, Some(LONG)).unwrap();
        let control = callee.session().welcome(&callee).unwrap();
        connect.wait(Some(LONG)).unwrap();
        let lane = callee.lane();
        lane.set_read_timeout(Some(LONG)).unwrap();
        let there = Descriptor { address, region: REGION, key: 9, nbytes: BYTES, device: Device::Host };
        let source = fabric.region(&engine, BYTES);
        (Self { engine, source, remote: Remote::from(there), callee, _control: control }, lane)
    }

    fn write(&self, nbytes: u64, options: WriteOptions) -> Transfer {
        let (src, dst) = (self.source.slice(0..nbytes).unwrap(), self.remote.slice(0..nbytes).unwrap());
        self.engine.write(&src, &dst, options).unwrap()
    }
}

/// The next frame; its payload is read and dropped.
fn frame(stream: &mut TcpStream) -> Frame {
    let mut header = [0; Frame::HEADER];
    stream.read_exact(&mut header).unwrap();
    let frame = Frame::decode(&header).unwrap();
    let mut payload = vec![0; frame.nbytes as usize];
    stream.read_exact(&mut payload).unwrap();
    frame
}

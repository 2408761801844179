//! Semantic 9, wire versions: a neighbour of the previous version works, and is told nothing that it does not know.

use std::io::Read;

use anyfabric_engine::Code;
use anyfabric_wire::{Control, Frame, FrameKind, Imm, WireImm, OLDEST_VERSION};

use crate::ask::Ask;
use crate::fabric::{on_fabrics, random, Fabric};
use crate::harness::{assert_fault, Pair, LONG};
use crate::intruder::{Intro, Intruder};

on_fabrics! { [previous_version_is_served] [shm SHM, tcp_2 TCP_2] }

/// Both versions hold the same session; only the newer hears what only it knows.
fn previous_version_is_served(fabric: &Fabric) {
    let mut random = random();
    for version in OLDEST_VERSION..=anyfabric_engine::WIRE_VERSION {
        let mut pair = Pair::connected(fabric, 4096);
        let intro = Intro { versions: Some((version, version)), ..Intro::default() };
        let mut neighbour = Intruder::try_meet(&pair.peer.address, &mut random, &intro).unwrap();
        let right = pair.remote.descriptor();
        let imm = Some((WireImm { imm: Imm::new(7).unwrap(), quarters: 4 }, 1));
        let frame = |op| Frame {
            region: right.region,
            key: right.key,
            offset: 100,
            imm,
            ..Frame::new(FrameKind::Write, op, 8)
        };
        assert_eq!(neighbour.write(frame(1), &[9; 8]), Some(Ok(())));
        let counter = pair.peer.open(7, &[]);
        pair.peer.wait_count(counter, 1).unwrap();
        assert_eq!(pair.peer.read(&pair.there, 100, 8), [9; 8]);
        // What it may say: a count that will never come.
        neighbour.control(&Control::CountFailed { imm: Imm::new(8).unwrap() }).unwrap();
        let lost = pair.peer.open(8, &[]);
        assert_fault(pair.peer.wait_count(lost, 1), Code::TransferFailed);
        pair.peer.ask(Ask::CloseEngine { engine: 0, timeout: LONG });
        let heard = controls(&mut neighbour);
        assert!(heard.iter().all(|message| message.since() <= version), "version {version} was sent {heard:?}");
        assert_eq!(heard.contains(&Control::Goodbye), version >= Control::Goodbye.since(), "{heard:?}");
    }
}

/// Every control message that comes until the engine closes the connection.
fn controls(neighbour: &mut Intruder) -> Vec<Control> {
    let mut heard = Vec::new();
    let mut header = [0; Frame::HEADER];
    while neighbour.stream.read_exact(&mut header).is_ok() {
        let frame = Frame::decode(&header).expect("a frame of the engine's");
        let mut body = vec![0; frame.nbytes as usize];
        neighbour.stream.read_exact(&mut body).expect("its payload");
        if frame.kind == FrameKind::Control {
            heard.push(Control::decode(&body).expect("a message of the engine's"));
        }
    }
    heard
}

//! Semantic 10, its checksum: a bit that turns on the way between two processes is noticed, on every fabric.

use anyfabric_engine::{Code, PageList, Transfer, WriteOptions};

use crate::ask::{Answer, Ask, How};
use crate::cabled::Cabled;
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, assert_fault, eventually, LONG};
use crate::proxy::MARK;

on_every_fabric!(turned_bit_is_noticed);

const BYTES: u64 = 2 << 20;

/// A verified write to the peer.
fn write(cabled: &Cabled, nbytes: u64, imm: u32) -> Transfer {
    let (src, dst) = (cabled.pair.region.slice(0..nbytes).unwrap(), cabled.remote.slice(0..nbytes).unwrap());
    let options = WriteOptions { verify: true, timeout: Some(LONG), ..WriteOptions::counted(imm) };
    cabled.pair.engine.write(&src, &dst, options).unwrap()
}

fn turned_bit_is_noticed(fabric: &Fabric) {
    let mut cabled = Cabled::new(fabric, BYTES, |_| {});
    if fabric.is_tcp() {
        cabled.wait_for_streams(fabric);
    }
    cabled.pair.bytes().fill(MARK);
    let pages = |cabled: &Cabled, imm| {
        let list = PageList::new((0..500).collect::<Vec<u32>>().into(), 4096, 4096, 0);
        let (src, dst) = ((&cabled.pair.region, list.clone()), (&cabled.remote, list));
        let options = WriteOptions { verify: true, timeout: Some(LONG), ..WriteOptions::counted(imm) };
        cabled.pair.engine.write_pages(src, dst, options).unwrap()
    };
    cabled.proxy.corrupt(true);
    let small = write(&cabled, 5000, 1);
    let large = write(&cabled, BYTES, 2);
    let paged = pages(&cabled, 3);
    for (imm, transfer) in [(1, small), (2, large), (3, paged)] {
        let error = assert_code(transfer.wait(None), Code::Refused);
        assert!(error.message.contains("checksum"), "{error}");
        transfer.wait_quiesced(Some(LONG)).unwrap();
        // Whoever counts on it is told, and counts nothing.
        let counter = cabled.pair.peer.open(imm, &[]);
        assert_fault(cabled.pair.peer.wait_count(counter, 1), Code::TransferFailed);
        assert_eq!(cabled.pair.peer.value(counter), 0);
    }
    assert!(cabled.proxy.num_corrupted() >= 3, "{} bits were turned", cabled.proxy.num_corrupted());
    // From the peer, too.
    let how = How { verify: true, timeout: Some(LONG), ..How::default() };
    cabled.proxy.corrupt(false);
    write(&cabled, BYTES, 4).wait(None).unwrap();
    cabled.proxy.corrupt(true);
    let pair = &mut cabled.pair;
    let transfer = pair.peer.write(&pair.there, (0, BYTES), &pair.region, 0, how).unwrap();
    assert_fault(pair.peer.wait(transfer), Code::Refused);
    // Our bytes are what came. They are the source again, once nothing comes any more.
    eventually("it has quiesced", || {
        matches!(pair.peer.ask(Ask::State { transfer }), Answer::State { quiesced: true, .. })
    });
    assert!(pair.bytes().contains(&(MARK ^ 0x10)));
    pair.bytes().fill(MARK);
    // What nobody asked to verify is what the wire made of it: a checksum is the only thing that would have told.
    if fabric.is_tcp() {
        let before = cabled.proxy.num_corrupted();
        cabled.write(BYTES, 5).unwrap();
        assert!(cabled.proxy.num_corrupted() > before);
        let placed = cabled.pair.peer.read(&cabled.pair.there, 0, BYTES);
        assert!(placed.contains(&(MARK ^ 0x10)), "the control: nothing was corrupted");
    }
    // The streams have not lost their place: all goes well when the wire does.
    cabled.proxy.corrupt(false);
    for (imm, nbytes) in [(6, 5000), (7, BYTES)] {
        write(&cabled, nbytes, imm).wait(None).unwrap();
        let counter = cabled.pair.peer.open(imm, &[]);
        cabled.pair.peer.wait_count(counter, 1).unwrap();
    }
    pages(&cabled, 8).wait(None).unwrap();
    assert!(cabled.pair.peer.read(&cabled.pair.there, 0, BYTES).iter().all(|byte| *byte == MARK));
}

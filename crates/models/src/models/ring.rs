//! Who sees an entry of a ring sees all of it, and what it announces.

use anyfabric_wire::{Imm, WireImm};
use loom::thread;

use crate::ring::{Consumer, Entry, Producer, AREA};
use crate::sync::Arc;
use crate::sys::Mapping;
use crate::Region;

/// Entries come whole and in order, each after the bytes that it counts.
pub fn entries_come_whole() {
    let (mut producer, mut consumer) = ring();
    let imm = WireImm::decode(Imm::new(7).expect("below 2^30").value());
    let entries = [Entry::Arrival { imm, count: 3 }, Entry::BounceEnd { op: u64::MAX, imm: Some((imm, 2)) }];
    let regions = Arc::new([Region::default(), Region::default()]);
    let writer = thread::spawn({
        let regions = Arc::clone(&regions);
        move || {
            for (entry, region) in entries.iter().zip(regions.iter()) {
                region.write(1);
                assert!(producer.push(entry));
            }
        }
    });
    for (entry, region) in entries.iter().zip(regions.iter()) {
        let Some(popped) = consumer.pop() else { break };
        assert_eq!((popped.as_ref(), region.read()), (Ok(entry), 1));
    }
    writer.join().expect("a thread of the model");
}

/// Payload is overwritten only once it was read.
pub fn payload_is_kept_until_read() {
    let (mut producer, mut consumer) = ring();
    let area = Arc::new(Region::default());
    let message = |op| Entry::Message { op, start: 0, nbytes: AREA as u32 };
    assert!(producer.reserve(AREA).is_some() && producer.push(&message(1)));
    let writer = thread::spawn({
        let area = Arc::clone(&area);
        move || {
            if producer.reserve(AREA).is_some() {
                area.write(2);
                assert!(producer.push(&message(2)));
            }
        }
    });
    assert_eq!((consumer.pop(), area.read()), (Some(Ok(message(1))), 0));
    consumer.publish_head(true);
    writer.join().expect("a thread of the model");
}

fn ring() -> (Producer, Consumer) {
    let (header, entries) = ([0, 64, 128].map(|at| (at, 1)), [0, 1, 2].map(|turn| (4096 + 64 * turn, 16)));
    let memory = Arc::new(Mapping::of(header.into_iter().chain(entries)));
    (Producer::new(Arc::clone(&memory)), Consumer::new(memory))
}

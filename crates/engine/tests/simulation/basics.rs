//! One write, counted once.

use anyfabric_engine::WriteOptions;

use crate::world::{for_seeds, ms, peek, remote};

#[test]
fn a_write_lands_whole_and_counts_once() {
    for_seeds(200, |world| {
        let (writer, reader) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&reader, NBYTES));
        let counter = reader.counter(Some(7), &[writer.address().clone()]).unwrap();
        let (src, dst) = (source.slice(0..NBYTES).unwrap(), remote(&target).slice(0..NBYTES).unwrap());
        let transfer = writer.write(&src, &dst, WriteOptions::counted(7)).unwrap();
        counter.wait(1, Some(ms(1000))).unwrap();
        assert!(peek(&source, 0, NBYTES) == peek(&target, 0, NBYTES), "counted before the bytes were placed");
        transfer.wait(None).unwrap();
        world.run(ms(100));
        assert_eq!(counter.value(), 1);
    });
}

const NBYTES: u64 = 64 << 10;

//! One write, counted once.

use anyfabric_engine::transports::loopback::Fabric;
use anyfabric_engine::{Remote, WriteOptions};

use crate::world::{engine, fill, for_seeds, ms, peek, random_nics, simulate, Teller};

#[test]
fn a_write_lands_whole_and_counts_once() {
    for_seeds(200, |seed| {
        let (simulation, mut random) = simulate(seed, Fabric::random);
        let _teller = Teller(simulation.clone());
        let (writer, reader) =
            (engine(&simulation, &random_nics(&mut random)), engine(&simulation, &random_nics(&mut random)));
        let (source, target) = (writer.allocate(64 << 10).unwrap(), reader.allocate(64 << 10).unwrap());
        fill(&source, &mut random);
        let remote = Remote::from(target.descriptor().unwrap());
        let counter = reader.counter(Some(7), &[writer.address().clone()]).unwrap();
        let transfer = writer
            .write(&source.slice(0..64 << 10).unwrap(), &remote.slice(0..64 << 10).unwrap(), WriteOptions::counted(7))
            .unwrap();
        counter.wait(1, Some(ms(1000))).unwrap();
        assert_eq!(peek(&source, 0, 64 << 10), peek(&target, 0, 64 << 10), "counted before the bytes were placed");
        transfer.wait(None).unwrap();
        simulation.run_for(ms(100));
        assert_eq!(counter.value(), 1);
    });
}

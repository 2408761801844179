//! Semantics 1, 2, 3 and 12: what is counted, when, and for how long it is kept.

use std::time::Duration;

use anyfabric_engine::transports::loopback::Fault;
use anyfabric_engine::{Code, Counter, Engine, Region, Transfer, WriteOptions};

use crate::world::{code, for_seeds, id, ms, peek, remote, World};

#[test]
fn nothing_is_ordered_and_everything_is_counted() {
    let overtakings = std::cell::Cell::new(0);
    for_seeds(60, |world| {
        let pair = Pair::new(world);
        let counters: Vec<_> = (0..10).map(|imm| pair.reader.counter(Some(imm), &[]).unwrap()).collect();
        let _transfers: Vec<_> = (0..10).map(|imm| pair.write(100, Some(imm)).unwrap()).collect();
        while counters.iter().any(|counter| counter.value() == 0) {
            world.simulation.step();
            let later_came = counters.windows(2).any(|two| two[0].value() < two[1].value());
            overtakings.set(overtakings.get() + u32::from(later_came));
        }
    });
    assert!(overtakings.get() > 0, "the fabric keeps an order that no fabric promises");
}

#[test]
fn a_lost_part_fails_its_counter_and_completes_no_other() {
    for_seeds(150, |world| {
        let (writer, reader) = (world.engine_with(&[100, 100, 100, 100]), world.engine());
        let other = world.engine_with(&[100, 100]);
        let pair = Pair::between(world, writer, reader);
        let of_other = world.region(&other, NBYTES);
        let counter = pair.reader.counter(Some(3), &[]).unwrap();
        let mut transfers: Vec<Transfer> = (0..6).map(|_| pair.write(NBYTES, Some(3)).unwrap()).collect();
        let (src, dst) = (of_other.slice(0..NBYTES).unwrap(), remote(&pair.target).slice(0..NBYTES).unwrap());
        transfers.push(other.write(&src, &dst, WriteOptions::counted(3)).unwrap());
        world.some_steps(60);
        world.inject(&Fault::Nic { engine: id(&pair.writer), nic_idx: 1, up: false });
        world.inject(&Fault::Nic { engine: id(&other), nic_idx: 0, up: false });
        let mut done = 0;
        for transfer in &transfers {
            done += u64::from(transfer.wait(None).is_ok());
        }
        // What arrived whole is counted although its acknowledgement was lost; never more.
        world.run(ms(500));
        assert!(counter.value() >= done);
        if done < transfers.len() as u64 && counter.value() < transfers.len() as u64 {
            assert_eq!(code(counter.wait(transfers.len() as u64, Some(ms(500)))), Code::TransferFailed);
        }
    });
}

#[test]
fn quarters_of_different_writers_do_not_make_a_count() {
    for_seeds(100, |world| {
        let reader = world.engine();
        let target = world.region(&reader, 4 * NBYTES);
        let counter = reader.counter(Some(3), &[]).unwrap();
        let into = remote(&target);
        let writers: Vec<_> = (0..4_u64)
            .map(|idx| {
                let writer = world.engine_with(&[100, 100, 200]);
                let source = world.region(&writer, NBYTES);
                writer.connect(reader.address(), None).unwrap();
                (writer, source, idx * NBYTES)
            })
            .collect();
        for (writer, source, at) in &writers {
            let (src, dst) = (source.slice(0..NBYTES).unwrap(), into.slice(*at..at + NBYTES).unwrap());
            writer.write(&src, &dst, WriteOptions::counted(3)).unwrap();
        }
        while counter.value() < 4 {
            let placed = writers.iter().filter(|(_, source, at)| peek(source, 0, NBYTES) == peek(&target, *at, NBYTES));
            assert!(counter.value() <= placed.count() as u64);
            world.simulation.step();
        }
    });
}

/// At most four NICs serve one operation; where there are more, on either side, all take turns.
#[test]
fn more_nics_than_serve_an_operation_count_the_same() {
    for_seeds(10, |world| {
        for (here, there) in [(8, 1), (8, 3), (1, 8), (3, 8), (8, 4), (8, 8)] {
            let (writer, reader) = (world.engine_with(&vec![100; here]), world.engine_with(&vec![100; there]));
            let pair = Pair::between(world, writer, reader);
            let counter = pair.reader.counter(Some(3), &[]).unwrap();
            for n in 1..=24_u64 {
                let nbytes = *world.random.pick(&[0, 1, 5000, NBYTES]);
                pair.write(nbytes, Some(3)).unwrap().wait(None).unwrap();
                counter.wait(n, Some(Duration::from_secs(1))).unwrap();
                assert_eq!(counter.value(), n, "{here} NICs to {there}");
                assert_eq!(peek(&pair.source, 0, nbytes), peek(&pair.target, 0, nbytes), "{here} NICs to {there}");
            }
            let stats = pair.writer.stats();
            let used = &stats.peers[&pair.reader.address().to_string()];
            assert_eq!(used.operations, 24);
            let num_used = used.nics.values().filter(|nic| nic.parts > 0).count();
            assert_eq!(num_used, here, "of {here} NICs to {there}: {used:?}");
        }
        // Nothing comes late.
        world.run(ms(1_000));
    });
}

#[test]
fn early_arrivals_are_kept_to_a_bound() {
    for_seeds(3, |world| {
        let pair = Pair::new(world);
        let bound = pair.reader.info().limits["early_imms_per_peer"] as u32;
        let mut refused = None;
        for imm in 0..bound + 100 {
            match pair.write(0, Some(imm)) {
                Ok(transfer) => transfer.wait(None).unwrap(),
                Err(error) => {
                    refused = Some((imm, error.code));
                    break;
                }
            }
            if imm >= bound {
                world.run(ms(100));
            }
        }
        let (at, why) = refused.unwrap();
        assert_eq!(why, Code::ResourceExhausted);
        assert!(at > bound && at < bound + 50, "refused at {at}");
        // What was kept is counted; room is made, and the peer hears of it.
        for imm in 0..bound {
            let counter = pair.reader.counter(Some(imm), &[]).unwrap();
            counter.wait(1, Some(ms(0))).unwrap();
        }
        world.run(ms(1_000));
        pair.write(0, Some(7)).unwrap().wait(None).unwrap();
    });
}

#[test]
fn a_fresh_imm_is_never_one_that_may_still_arrive() {
    for_seeds(60, |world| {
        let pair = Pair::new(world);
        let mut given = Vec::new();
        for _ in 0..20 {
            let counter = pair.reader.counter(None, &[pair.writer.address().clone()]).unwrap();
            assert!(counter.imm().is_of_engine());
            assert!(!given.contains(&counter.imm()), "handed out twice");
            assert_eq!(counter.value(), 0, "a late arrival of another request was counted");
            given.push(counter.imm());
            let late = pair.write(3_000, Some(counter.imm().value())).unwrap();
            world.some_steps(10);
            drop(late);
        }
        let counter = pair.reader.counter(None, &[]).unwrap();
        world.run(ms(1_000));
        assert_eq!(counter.value(), 0);
    });
}

#[test]
fn a_counter_runs_its_callback_and_reaches_its_number() {
    for_seeds(60, |world| {
        let pair = Pair::new(world);
        let counter = pair.reader.counter(Some(5), &[]).unwrap();
        assert_eq!(code(pair.reader.counter(Some(5), &[])), Code::InvalidArgument);
        let (tell, told) = std::sync::mpsc::channel();
        counter.on_settled(3, Box::new(move || tell.send(()).unwrap()));
        for n in 1..=3_u64 {
            assert!(told.try_recv().is_err());
            pair.write(9_000, Some(5)).unwrap().wait(None).unwrap();
            counter.wait(n, Some(Duration::from_secs(1))).unwrap();
        }
        told.try_recv().unwrap();
    });
}

#[test]
fn who_gives_up_is_not_told_and_kept_no_longer() {
    for_seeds(20, |world| {
        let pair = Pair::new(world);
        let counter = pair.reader.counter(Some(5), &[]).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let waiters: Vec<_> = [1, 2, 1, 2]
            .into_iter()
            .zip(0..)
            .map(|(n, who)| {
                let tell = tell.clone();
                counter.on_settled(n, Box::new(move || tell.send(who).unwrap()))
            })
            .collect();
        counter.give_up(waiters[0]);
        counter.give_up(waiters[3]);
        pair.write(9_000, Some(5)).unwrap().wait(None).unwrap();
        counter.wait(1, Some(Duration::from_secs(1))).unwrap();
        // Was told, so this changes nothing.
        counter.give_up(waiters[2]);
        pair.write(9_000, Some(5)).unwrap().wait(None).unwrap();
        counter.wait(2, Some(Duration::from_secs(1))).unwrap();
        drop(tell);
        assert_eq!(told.iter().collect::<Vec<_>>(), [2, 1]);
    });
}

#[test]
fn a_barrier_counts_once_a_participant() {
    for_seeds(60, |world| {
        let engines: Vec<Engine> = (0..world.random.between(2, 5)).map(|_| world.engine()).collect();
        let all: Vec<_> = engines.iter().map(|engine| engine.address().clone()).collect();
        let counters: Vec<_> = engines.iter().map(|engine| engine.counter(Some(9), &all).unwrap()).collect();
        for round in 1..=3_u64 {
            let barriers: Vec<_> = engines.iter().map(|engine| engine.barrier(&all, 9, None).unwrap()).collect();
            for (barrier, counter) in barriers.iter().zip(&counters) {
                barrier.wait(None).unwrap();
                counter.wait(round * (engines.len() as u64 - 1), Some(Duration::from_secs(1))).unwrap();
            }
            world.run(ms(200));
            assert!(counters.iter().all(|counter| counter.value() == round * (engines.len() as u64 - 1)));
        }
    });
}

#[test]
fn a_barrier_reaches_whom_it_lists_in_any_order() {
    for_seeds(60, |world| {
        let here = world.engine();
        let others: Vec<Engine> = (0..world.random.between(2, 6)).map(|_| world.engine()).collect();
        let counters: Vec<_> = others.iter().map(|engine| engine.counter(Some(9), &[]).unwrap()).collect();
        let mut due = vec![0; others.len()];
        for _ in 0..8 {
            let num_listed = world.random.between(1, 8);
            let listed: Vec<_> =
                (0..num_listed).map(|_| world.random.between(0, others.len() as u64 - 1) as usize).collect();
            let addresses: Vec<_> = listed.iter().map(|idx| others[*idx].address().clone()).collect();
            here.barrier(&addresses, 9, None).unwrap().wait(None).unwrap();
            listed.iter().for_each(|idx| due[*idx] += 1);
        }
        world.run(ms(200));
        assert_eq!(counters.iter().map(Counter::value).collect::<Vec<_>>(), due);
    });
}

struct Pair {
    writer: Engine,
    reader: Engine,
    source: Region,
    target: Region,
}

impl Pair {
    fn new(world: &mut World) -> Self {
        let (writer, reader) = (world.engine(), world.engine());
        Self::between(world, writer, reader)
    }

    fn between(world: &mut World, writer: Engine, reader: Engine) -> Self {
        let (source, target) = (world.region(&writer, NBYTES), world.region(&reader, NBYTES));
        Self { writer, reader, source, target }
    }

    fn write(&self, nbytes: u64, imm: Option<u32>) -> anyfabric_engine::Result<Transfer> {
        let (src, dst) = (self.source.slice(0..nbytes).unwrap(), remote(&self.target).slice(0..nbytes).unwrap());
        self.writer.write(&src, &dst, WriteOptions { imm, ..WriteOptions::default() })
    }
}

const NBYTES: u64 = 40_000;

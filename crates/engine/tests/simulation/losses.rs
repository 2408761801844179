//! Semantics 5 and 6: dead peers, dead NICs, broken connections.

use std::time::Duration;

use anyfabric_engine::transports::loopback::{Fabric, Fault};
use anyfabric_engine::{Code, Config, Engine, Region, WriteOptions};

use crate::world::{code, config, for_seeds, id, ms, outcome, remote, World, NOTICED};

#[test]
fn a_dead_peer_is_noticed_in_time_and_nobody_else_is_lost() {
    for_seeds(100, |world| {
        let (engine, dead, other) = (world.engine(), world.engine(), world.engine());
        let region = world.region(&engine, NBYTES);
        let (of_dead, of_other) = (world.region(&dead, NBYTES), world.region(&other, NBYTES));
        let counter = engine.counter(Some(1), &[dead.address().clone()]).unwrap();
        let unconcerned = engine.counter(Some(2), &[other.address().clone()]).unwrap();
        engine.connect(dead.address(), None).unwrap();
        engine.connect(other.address(), None).unwrap();
        world.run_up_to(ms(3_000));
        let transfers: Vec<_> = (0..5).map(|_| write(world, &engine, &region, &of_dead)).collect();
        world.some_steps(30);
        let is_exit = world.random.one_in(2);
        world.inject(&if is_exit { Fault::Exit(id(&dead)) } else { Fault::Kill(id(&dead)) });
        let died_ns = world.simulation.now_ns();
        let latest_ns = died_ns + NOTICED.as_nanos() as u64;
        assert_eq!(code(counter.wait(1, Some(Duration::from_secs(60)))), Code::PeerLost);
        assert!(world.simulation.now_ns() <= latest_ns, "noticed {} ns late", world.simulation.now_ns() - latest_ns);
        for transfer in &transfers {
            let expected = [Some(Ok(())), Some(Err(Code::PeerLost)), Some(Err(Code::TransferTimeout)), BROKEN];
            assert!(expected.contains(&outcome(transfer)), "{transfer:?}: {:?}", outcome(transfer));
            assert!(transfer.is_quiesced());
        }
        let (src, dst) = (region.slice(0..1).unwrap(), remote(&of_dead).slice(0..1).unwrap());
        assert_eq!(code(engine.write(&src, &dst, WriteOptions::default())), Code::PeerLost);
        assert_eq!(code(engine.connect(dead.address(), None)), Code::PeerLost);
        write(world, &engine, &region, &of_other).wait(None).unwrap();
        assert_eq!(code(unconcerned.wait(1, Some(ms(0)))), Code::WaitTimeout);
        // Its successor is another incarnation, and is met like anybody.
        let successor = world.engine();
        let of_successor = world.region(&successor, NBYTES);
        write(world, &engine, &region, &of_successor).wait(None).unwrap();
    });
}

#[test]
fn loss_is_final_a_stopped_peer_that_goes_on_is_fenced() {
    for_seeds(60, |world| {
        let (engine, sleeper) = (world.engine(), world.engine());
        let (region, target) = (world.region(&sleeper, NBYTES), world.region(&engine, NBYTES));
        sleeper.connect(engine.address(), None).unwrap();
        write(world, &sleeper, &region, &target).wait(None).unwrap();
        let under_way: Vec<_> = (0..5).map(|_| write(world, &sleeper, &region, &target)).collect();
        world.inject(&Fault::Stop(id(&sleeper)));
        world.run(NOTICED);
        assert_eq!(engine.path(sleeper.address()).state, "lost");
        let before = crate::world::peek(&target, 0, NBYTES).to_vec();
        world.inject(&Fault::Continue(id(&sleeper)));
        let late = write(world, &sleeper, &region, &target);
        world.run(Duration::from_secs(5));
        assert_eq!(sleeper.path(engine.address()).state, "lost");
        assert!(matches!(outcome(&late), Some(Err(_))), "{:?}", outcome(&late));
        assert!(under_way.iter().all(|transfer| outcome(transfer).is_some() && transfer.is_quiesced()));
        assert!(crate::world::peek(&target, 0, NBYTES) == before, "a fenced peer wrote");
        assert_eq!(code(engine.connect(sleeper.address(), None)), Code::PeerLost);
    });
}

/// Neither knows how often the other beats: who needs to hear more often asks for it.
#[test]
fn nobody_is_lost_whose_heartbeats_are_rarer() {
    for_seeds(40, |world| {
        let mut engine = |_| {
            let heartbeat = ms(*world.random.pick(&[100, 200, 300, 1_000, 10_000]));
            let heartbeats_lost = *world.random.pick(&[2, 3, 5]);
            Engine::simulated(&world.simulation, Config { heartbeat, heartbeats_lost, ..config() }, &[100]).unwrap()
        };
        let engines: Vec<_> = (0..3).map(&mut engine).collect();
        for (idx, engine) in engines.iter().enumerate() {
            engines[idx + 1..].iter().for_each(|other| engine.connect(other.address(), None).unwrap());
        }
        world.run(Duration::from_secs(60));
        for (engine, other) in engines.iter().zip(engines.iter().cycle().skip(1)) {
            assert_eq!(engine.path(other.address()).state, "ready");
        }
    });
}

#[test]
fn a_short_stop_loses_nobody() {
    for_seeds(60, |world| {
        let (engine, sleeper) = (world.engine(), world.engine());
        let (region, target) = (world.region(&engine, NBYTES), world.region(&sleeper, NBYTES));
        engine.connect(sleeper.address(), None).unwrap();
        world.inject(&Fault::Stop(id(&sleeper)));
        let transfer = write(world, &engine, &region, &target);
        world.run_up_to(ms(1_500));
        world.inject(&Fault::Continue(id(&sleeper)));
        transfer.wait(None).unwrap();
        write(world, &sleeper, &target, &region).wait(None).unwrap();
    });
}

#[test]
fn a_broken_control_connection_is_restored_and_loses_nothing() {
    for_seeds(100, |world| {
        let (one, other) = (world.engine(), world.engine());
        let (of_one, of_other) = (world.region(&one, NBYTES), world.region(&other, NBYTES));
        one.connect(other.address(), None).unwrap();
        for _ in 0..5 {
            world.inject(&Fault::Cut(id(&one), id(&other)));
            let there = write(world, &one, &of_one, &of_other);
            let back = write(world, &other, &of_other, &of_one);
            world.some_steps(20);
            there.wait(None).unwrap();
            back.wait(None).unwrap();
            world.run_up_to(ms(400));
        }
        world.run(Duration::from_secs(5));
        assert_eq!(
            (one.path(other.address()).state, other.path(one.address()).state),
            ("ready".into(), "ready".into())
        );
    });
}

#[test]
fn a_connection_that_breaks_in_the_handshake_loses_nobody() {
    for_seeds(150, |world| {
        let (one, other) = (world.engine(), world.engine());
        let (of_one, of_other) = (world.region(&one, NBYTES), world.region(&other, NBYTES));
        let first = write(world, &one, &of_one, &of_other);
        for _ in 0..world.random.between(1, 3) {
            world.some_steps(4);
            world.inject(&Fault::Cut(id(&one), id(&other)));
        }
        world.run(Duration::from_secs(10));
        assert!([Some(Ok(())), BROKEN, Some(Err(Code::TransferTimeout))].contains(&outcome(&first)));
        write(world, &one, &of_one, &of_other).wait(None).unwrap();
        write(world, &other, &of_other, &of_one).wait(None).unwrap();
    });
}

#[test]
fn calls_that_cross_become_one_session() {
    for_seeds(150, |world| {
        let engines: Vec<Engine> = (0..world.random.between(2, 5)).map(|_| world.engine()).collect();
        let regions: Vec<Region> = engines.iter().map(|engine| world.region(engine, NBYTES)).collect();
        let mut transfers = Vec::new();
        for (from, engine) in engines.iter().enumerate() {
            for to in (0..engines.len()).filter(|to| *to != from) {
                transfers.push(write(world, engine, &regions[from], &regions[to]));
                world.some_steps(4);
            }
        }
        for transfer in transfers {
            transfer.wait(None).unwrap();
        }
    });
}

#[test]
fn a_dead_nic_is_not_a_dead_peer() {
    for_seeds(100, |world| {
        let num_nics = *world.random.pick(&[2, 3, 4, 8]);
        let (engine, peer) = (world.engine_with(&vec![100; num_nics]), world.engine());
        let (region, target) = (world.region(&engine, NBYTES), world.region(&peer, NBYTES));
        engine.connect(peer.address(), None).unwrap();
        let under_way: Vec<_> = (0..8).map(|_| write(world, &engine, &region, &target)).collect();
        world.some_steps(40);
        let nic_idx = world.random.below(num_nics as u64) as usize;
        let set = |world: &World, up| world.inject(&Fault::Nic { engine: id(&engine), nic_idx, up });
        set(world, false);
        assert_eq!(engine.path(peer.address()).state, "degraded");
        for _ in 0..8 {
            write(world, &engine, &region, &target).wait(None).unwrap();
        }
        for transfer in under_way {
            let _ = transfer.wait(None);
            assert!([Some(Ok(())), BROKEN].contains(&outcome(&transfer)));
        }
        set(world, true);
        assert_eq!(engine.path(peer.address()).state, "ready");
        for nic_idx in 0..num_nics {
            world.inject(&Fault::Nic { engine: id(&engine), nic_idx, up: false });
        }
        let failed = write(world, &engine, &region, &target);
        assert_eq!(code(failed.wait(None)), Code::ConnectionBroken);
        set(world, true);
        write(world, &engine, &region, &target).wait(None).unwrap();
    });
}

#[test]
fn a_closing_engine_says_goodbye() {
    for_seeds(60, |world| {
        let (engine, leaver) = (world.engine(), world.engine());
        let counter = engine.counter(None, &[leaver.address().clone()]).unwrap();
        let region = world.region(&leaver, NBYTES);
        let target = world.region(&engine, NBYTES);
        let transfer = write(world, &leaver, &region, &target);
        leaver.close(Duration::from_secs(1));
        assert_eq!(outcome(&transfer), Some(Ok(())), "close waits for what is under way");
        let closed_ns = world.simulation.now_ns();
        assert_eq!(code(counter.wait(1, None)), Code::PeerLost);
        assert!(world.simulation.now_ns() - closed_ns < 1_000_000_000, "noticed late");
        leaver.close(Duration::ZERO);
        assert_eq!(code(leaver.allocate(1)), Code::Closed);
    });
}

/// An engine that serves for weeks: it goes on to take newcomers, and remembers the last of the lost.
#[test]
fn more_peers_come_and_go_than_may_be_there_at_once() {
    let world = World::new(0, |_| Fabric::default());
    let engine = world.engine_with(&[100]);
    let counter = engine.counter(None, &[]).unwrap();
    let mut first = None;
    for count in 1..=4200 {
        let guest = world.engine_with(&[100]);
        guest.barrier(&[engine.address().clone()], counter.imm().value(), None).unwrap().wait(None).unwrap();
        counter.wait(count, None).unwrap();
        guest.close(Duration::from_secs(1));
        first.get_or_insert_with(|| guest.address().clone());
    }
    world.run(NOTICED);
    let peers = engine.info().peers;
    assert!((1..1000).contains(&peers.len()), "{} peers are listed, all of them lost", peers.len());
    assert!(peers.iter().all(|peer| peer.state == "lost"));
    assert_eq!(engine.path(&first.unwrap()).state, "new", "long forgotten");
}

#[test]
fn nobody_is_lost_while_control_messages_are_slow() {
    // As slow as they may be: a heartbeat of a second, and three to miss.
    let world = World::new(0, |_| Fabric { control_ns: (900_000_000, 1_000_000_000), ..Fabric::default() });
    let (one, other) = (world.engine_with(&[100]), world.engine_with(&[100]));
    one.connect(other.address(), Some(Duration::from_secs(10))).unwrap_or(());
    world.run(Duration::from_secs(30));
    one.connect(other.address(), Some(Duration::from_secs(10))).unwrap();
    world.run(Duration::from_secs(30));
    assert_eq!(one.path(other.address()).state, "ready");
}

fn write(world: &mut World, engine: &Engine, source: &Region, target: &Region) -> anyfabric_engine::Transfer {
    let nbytes = world.random.between(0, NBYTES);
    let (src, dst) = (source.slice(0..nbytes).unwrap(), remote(target).slice(0..nbytes).unwrap());
    engine.write(&src, &dst, WriteOptions::default()).unwrap()
}

const NBYTES: u64 = 20_000;
const BROKEN: Option<Result<(), Code>> = Some(Err(Code::ConnectionBroken));

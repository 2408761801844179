//! Semantic 7: fencing is awaited, never assumed.

use std::time::Duration;

use anyfabric_engine::transports::loopback::Fault;
use anyfabric_engine::{Code, Engine, Region, Remote, Transfer, WriteOptions};

use crate::world::{code, for_seeds, id, ms, outcome, peek, poke, remote, World, NOTICED};

#[test]
fn what_revoke_returned_is_not_touched_again() {
    for_seeds(150, |world| {
        let mut pair = Pair::new(world);
        pair.flood(world, 20);
        world.some_steps(60);
        pair.target.revoke(None, Duration::from_secs(1)).unwrap();
        pair.reuse();
        pair.flood(world, 5);
        world.run(ms(3_000));
        pair.check_untouched();
        assert!(pair.transfers.iter().all(|transfer| outcome(transfer).is_some() && transfer.is_quiesced()));
        // A descriptor made after the revocation works.
        pair.remote = remote(&pair.target);
        pair.write(world).wait(None).unwrap();
    });
}

#[test]
fn a_new_descriptor_neither_hides_the_writes_of_the_old_one_nor_goes_with_it() {
    for_seeds(150, |world| {
        let mut pair = Pair::new(world);
        pair.flood(world, 20);
        world.some_steps(40);
        // The writer has the new descriptor before it hears of the revocation.
        let _ = pair.target.revoke(None, ms(0));
        let old = std::mem::replace(&mut pair.remote, remote(&pair.target));
        let write = pair.write(world);
        assert!(pair.target.wait_fenced(None, Duration::from_secs(1)));
        write.wait(None).unwrap();
        pair.reuse();
        world.run(ms(500));
        pair.check_untouched();
        pair.target.revoke(None, Duration::from_secs(1)).unwrap();
        pair.reuse();
        pair.remote = old;
        pair.flood(world, 2);
        world.run(ms(3_000));
        pair.check_untouched();
    });
}

#[test]
fn a_stopped_writer_is_waited_for_and_its_bytes_are_quarantined() {
    for_seeds(150, |world| {
        let mut pair = Pair::new(world);
        pair.flood(world, 10);
        world.some_steps(60);
        let writer = id(&pair.writer);
        world.inject(&Fault::Stop(writer));
        let revoked = pair.target.revoke(None, ms(500));
        if let Err(error) = revoked {
            assert_eq!(error.code, Code::WaitTimeout);
            let quarantine = pair.owner.info().quarantine;
            assert!(quarantine.iter().any(|entry| entry.region == pair.target.id()), "not listed: {quarantine:?}");
            if world.random.one_in(2) {
                // It goes on, and lets go.
                world.inject(&Fault::Continue(writer));
                assert!(pair.target.wait_fenced(None, Duration::from_secs(1)));
            } else {
                // It does not, and is given up: our NICs take nothing of it any more.
                assert!(pair.target.wait_fenced(None, NOTICED));
            }
        }
        assert!(pair.owner.info().quarantine.is_empty());
        pair.reuse();
        world.inject(&Fault::Continue(writer));
        pair.flood(world, 3);
        world.run(ms(8_000));
        pair.check_untouched();
    });
}

#[test]
fn a_closed_region_is_kept_until_its_writer_lets_go() {
    for_seeds(100, |world| {
        let mut pair = Pair::new(world);
        let mut memory = vec![0_u8; NBYTES as usize].into_boxed_slice();
        let (held, holder) = std::sync::mpsc::channel::<()>();
        // SAFETY: `memory` outlives the engine, which is dropped at the end of this test.
        let region = unsafe { pair.owner.register(memory.as_mut_ptr(), NBYTES, true, Box::new(held)) }.unwrap();
        let is_held = || holder.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty);
        pair.remote = remote(&region);
        pair.flood(world, 10);
        world.some_steps(60);
        world.inject(&Fault::Stop(id(&pair.writer)));
        region.close(ms(10));
        let listed = pair.owner.info().quarantine.iter().any(|entry| entry.region == region.id());
        drop(region);
        assert_eq!(is_held(), listed, "memory that is quarantined is kept, and other memory is not");
        world.run(NOTICED);
        assert!(!is_held(), "the writer was given up");
        assert!(pair.owner.info().quarantine.is_empty());
        drop(pair);
    });
}

#[test]
fn a_revocation_survives_a_broken_control_connection() {
    for_seeds(100, |world| {
        let mut pair = Pair::new(world);
        pair.flood(world, 10);
        world.some_steps(60);
        world.inject(&Fault::Cut(id(&pair.writer), id(&pair.owner)));
        world.some_steps(10);
        pair.target.revoke(Some(pair.writer.address()), Duration::from_secs(2)).unwrap();
        pair.reuse();
        world.run(ms(3_000));
        pair.check_untouched();
        assert_eq!(pair.owner.path(pair.writer.address()).state, "ready");
    });
}

/// One writer, and one owner of the memory that it writes to.
struct Pair {
    writer: Engine,
    owner: Engine,
    source: Region,
    target: Region,
    remote: Remote,
    transfers: Vec<Transfer>,
}

impl Pair {
    fn new(world: &mut World) -> Self {
        let (writer, owner) = (world.engine(), world.engine());
        let (source, target) = (world.region(&writer, NBYTES), world.region(&owner, NBYTES));
        let remote = remote(&target);
        writer.connect(owner.address(), None).unwrap();
        owner.connect(writer.address(), None).unwrap();
        Self { writer, owner, source, target, remote, transfers: Vec::new() }
    }

    fn write(&self, world: &mut World) -> Transfer {
        let nbytes = world.random.between(1, NBYTES);
        let (src, at) = (world.random.below(NBYTES - nbytes + 1), world.random.below(NBYTES - nbytes + 1));
        let options = WriteOptions { imm: world.random.one_in(2).then_some(9), ..WriteOptions::default() };
        let (src, dst) = (self.source.slice(src..src + nbytes), self.remote.slice(at..at + nbytes));
        self.writer.write(&src.unwrap(), &dst.unwrap(), options).unwrap()
    }

    fn flood(&mut self, world: &mut World, num_writes: u64) {
        for _ in 0..num_writes {
            if self.writer.path(self.owner.address()).state == "lost" {
                let (src, dst) = (self.source.slice(0..1).unwrap(), self.remote.slice(0..1).unwrap());
                assert_eq!(code(self.writer.write(&src, &dst, WriteOptions::default())), Code::PeerLost);
                return;
            }
            let transfer = self.write(world);
            self.transfers.push(transfer);
        }
    }

    fn reuse(&self) {
        poke(&self.target, 0, &[0xa5; NBYTES as usize]);
    }

    fn check_untouched(&self) {
        let found = peek(&self.target, 0, NBYTES);
        assert!(found.iter().all(|byte| *byte == 0xa5), "bytes changed behind a fence");
    }
}

const NBYTES: u64 = 20_000;

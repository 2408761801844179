//! What every simulated test needs: seeds, engines, memory to compare.

use std::time::Duration;

use anyfabric_engine::transports::loopback::{Fabric, Fault, Random, Simulation};
use anyfabric_engine::{Code, Config, Engine, EngineId, Error, Region, Remote, Result, Transfer};

/// Runs a test for many seeds; names the one that fails, and tells its story
/// when it is asked for alone.
pub(crate) fn for_seeds(cases: u64, test: impl Fn(&mut World)) {
    crate::seeds::for_seeds(cases, |seed, is_alone| {
        let mut world = World::new(seed, Fabric::random);
        if is_alone {
            world.simulation.keep_story();
        }
        test(&mut world);
    });
}

/// A simulation, and a source of numbers for the test itself. Tells the story
/// of the simulation, if it was kept, when the test panics.
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) simulation: Simulation,
    pub(crate) random: Random,
}

impl World {
    pub(crate) fn new(seed: u64, fabric: impl FnOnce(&mut Random) -> Fabric) -> Self {
        let mut random = Random::new(seed ^ 0x5eed);
        let simulation = Simulation::new(seed, fabric(&mut random));
        Self { seed, simulation, random }
    }

    /// An engine with 1, 2, 3, 4 or 8 NICs, not all alike.
    pub(crate) fn engine(&mut self) -> Engine {
        let num_nics = *self.random.pick(&[1, 2, 3, 4, 8]);
        let nics: Vec<u32> = (0..num_nics).map(|_| *self.random.pick(&[100, 100, 200, 400])).collect();
        self.engine_with(&nics)
    }

    pub(crate) fn engine_with(&self, nics: &[u32]) -> Engine {
        Engine::simulated(&self.simulation, config(), nics).unwrap()
    }

    /// A region of random bytes.
    pub(crate) fn region(&mut self, engine: &Engine, nbytes: u64) -> Region {
        let region = engine.allocate(nbytes).unwrap();
        let mut bytes = vec![0; nbytes as usize];
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.random.draw().to_le_bytes()));
        poke(&region, 0, &bytes);
        region
    }

    pub(crate) fn run(&self, time: Duration) {
        self.simulation.run_for(time);
    }

    pub(crate) fn run_up_to(&mut self, time: Duration) {
        let time = Duration::from_nanos(self.random.below(time.as_nanos() as u64));
        self.run(time);
    }

    /// A few events, fewer than `end`.
    pub(crate) fn some_steps(&mut self, end: u64) {
        for _ in 0..self.random.below(end) {
            self.simulation.step();
        }
    }

    pub(crate) fn inject(&self, fault: &Fault) {
        self.simulation.inject(fault);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in self.simulation.story() {
                eprintln!("{line}");
            }
        }
    }
}

/// Deadlines are shorter than the time to notice a loss, so that both happen.
pub(crate) fn config() -> Config {
    Config { timeout: Duration::from_secs(2), ..Config::default() }
}

pub(crate) fn id(engine: &Engine) -> EngineId {
    engine.address().engine
}

pub(crate) fn remote(region: &Region) -> Remote {
    Remote::from(region.descriptor().unwrap())
}

pub(crate) fn peek(region: &Region, at: u64, nbytes: u64) -> &[u8] {
    assert!(at + nbytes <= region.nbytes());
    // SAFETY: inside the region; nobody else runs while the test does.
    unsafe { std::slice::from_raw_parts(region.as_ptr().add(at as usize), nbytes as usize) }
}

pub(crate) fn poke(region: &Region, at: u64, bytes: &[u8]) {
    assert!(at + bytes.len() as u64 <= region.nbytes());
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.as_ptr().add(at as usize), bytes.len()) };
}

pub(crate) fn code<T>(result: Result<T>) -> Code {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(Error { code, .. }) => code,
    }
}

/// Ended well, ended with that error, or not ended.
pub(crate) fn outcome(transfer: &Transfer) -> Option<std::result::Result<(), Code>> {
    transfer.is_done().then(|| transfer.error().map_or(Ok(()), |error| Err(error.code)))
}

pub(crate) const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// By then a dead peer has been noticed: three heartbeats without a word, and
/// the tick that looks.
pub(crate) const NOTICED: Duration = Duration::from_millis(3_300);

//! What every simulated test needs: seeds, engines, memory to compare.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use anyfabric_engine::transports::loopback::{Fabric, Random, Simulation};
use anyfabric_engine::{Config, Engine, Region};

/// Runs a test for many seeds; names the one that fails, and tells its story
/// when it is asked for alone.
pub(crate) fn for_seeds(cases: u64, test: impl Fn(u64)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("ANYFABRIC_SEED") {
        return test(seed);
    }
    for seed in 0..number("ANYFABRIC_CASES").unwrap_or(cases) {
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| test(seed))) {
            eprintln!("seed {seed} fails; ANYFABRIC_SEED={seed} runs it alone and tells its story");
            std::panic::resume_unwind(panic);
        }
    }
}

/// A simulation and a source of numbers for the test itself.
pub(crate) fn simulate(seed: u64, fabric: impl FnOnce(&mut Random) -> Fabric) -> (Simulation, Random) {
    let mut random = Random::new(seed ^ 0x5eed);
    let simulation = Simulation::new(seed, fabric(&mut random));
    if std::env::var("ANYFABRIC_SEED").is_ok() {
        simulation.keep_story();
    }
    (simulation, random)
}

/// Tells the story of a simulation when the test panics.
pub(crate) struct Teller(pub(crate) Simulation);

impl Drop for Teller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in self.0.story() {
                eprintln!("{line}");
            }
        }
    }
}

pub(crate) fn config() -> Config {
    Config { timeout: Duration::from_secs(2), ..Config::default() }
}

/// Speeds of 1, 2, 3, 4 or 8 NICs, not all alike.
pub(crate) fn random_nics(random: &mut Random) -> Vec<u32> {
    let num_nics = *random.pick(&[1, 2, 3, 4, 8]);
    (0..num_nics).map(|_| *random.pick(&[100, 100, 200, 400])).collect()
}

pub(crate) fn engine(simulation: &Simulation, nics: &[u32]) -> Engine {
    Engine::simulated(simulation, config(), nics).unwrap()
}

/// Fills a region with bytes that differ from place to place.
pub(crate) fn fill(region: &Region, random: &mut Random) {
    for at in 0..region.nbytes() {
        poke(region, at, random.draw() as u8);
    }
}

pub(crate) fn peek(region: &Region, at: u64, nbytes: u64) -> Vec<u8> {
    assert!(at + nbytes <= region.nbytes());
    // SAFETY: inside the region; nobody else runs while the test does.
    unsafe { std::slice::from_raw_parts(region.as_ptr().add(at as usize), nbytes as usize) }.to_vec()
}

pub(crate) fn poke(region: &Region, at: u64, byte: u8) {
    assert!(at < region.nbytes());
    // SAFETY: as above.
    unsafe { *region.as_ptr().add(at as usize) = byte };
}

pub(crate) const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

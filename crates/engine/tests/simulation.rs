//! The semantics of the engine, in a simulation: every order, split and fault
//! that a fabric may produce, from a seed.
//!
//! Every test runs over many seeds and prints the one that fails.
//! `ANYFABRIC_SEED` runs that one alone and tells its story, `ANYFABRIC_CASES`
//! sets how many there are (200 is what CI runs).

// The helpers of a test may unwrap as it may.
#![allow(clippy::unwrap_used)]

#[path = "simulation/chaos.rs"]
mod chaos;
#[path = "simulation/checks.rs"]
mod checks;
#[path = "simulation/counts.rs"]
mod counts;
#[path = "simulation/fences.rs"]
mod fences;
#[path = "simulation/losses.rs"]
mod losses;
#[path = "simulation/mutants.rs"]
mod mutants;
#[path = "../../transports/tests/common/seeds.rs"]
mod seeds;
#[path = "simulation/transfers.rs"]
mod transfers;
#[path = "simulation/world.rs"]
mod world;

//! The semantics of the engine, in a simulation: every order, split and fault
//! that a fabric may produce, from a seed.
//!
//! Every test runs over many seeds and prints the one that fails.
//! `ANYFABRIC_SEED` runs that one alone and tells its story, `ANYFABRIC_CASES`
//! sets how many there are.

// The helpers of a test may unwrap as it may.
#![allow(clippy::unwrap_used)]

#[path = "simulation/world.rs"]
mod world;

#[path = "simulation/basics.rs"]
mod basics;

#[path = "simulation/chaos.rs"]
mod chaos;

#[path = "simulation/fences.rs"]
mod fences;

//! The libfabric transport, over the `tcp` provider of every library that is
//! there, and over a fake one.
//!
//! Where a library is missing its tests print why they were skipped. Debian's
//! package is `libfabric1`; the wheel `mpich`, a requirement of the tests, brings a
//! newer one.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../common/allocations.rs"]
mod allocations;
mod choice;
#[path = "../../../cuda/tests/fake/mod.rs"]
mod cuda;
mod endings;
mod fake;
mod faked;
mod gpu;
mod layout;
#[path = "../common/locked.rs"]
mod locked;
mod memory;
mod peer;
mod processes;
mod rails;
mod support;

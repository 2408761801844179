//! Scatters and barriers over libraries without hardware: what becomes of their legs when something fails half-way.

// What the tests of the NICs share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

#[path = "../../../transports/tests/libfabric/fake.rs"]
mod fake;
#[path = "../../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../../transports/tests/libfabric/support.rs"]
mod support;

mod libfabric;
mod star;
mod verbs;

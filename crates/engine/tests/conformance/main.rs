//! The twelve semantics, on every transport, between real processes.
//!
//! A test starts its peers by executing this binary again ([`peer`]); it holds one engine itself and tells the peers
//! what to do with theirs ([`harness`]). Every case is a function over a [`fabric::Fabric`], and `on_every_fabric`
//! makes a test of it for each. With the feature `mutants` the suite also proves itself: see `mutants.rs`.
//!
//! `cargo test -p anyfabric-engine --test conformance`; one case on one fabric: `... -- counts::page_counts_once::tcp_2`.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

mod alias;
mod ask;
mod cabled;
mod fabric;
mod forbid;
mod harness;
mod intruder;
mod pattern;
mod peer;
mod proxy;
#[path = "../../../transports/tests/common/seeds.rs"]
mod seeds;

mod barrier;
mod bounds;
mod closing;
mod corrupted;
mod counts;
mod death;
mod early;
mod ending;
mod fencing;
mod fork;
mod garbage;
mod idle;
mod latency;
mod limits;
mod links;
mod meeting;
mod midst;
#[cfg(feature = "mutants")]
mod mutants;
mod neighbours;
mod nic;
mod sizes;
mod storm;
mod strangers;
mod tumult;
mod unread;
mod visibility;
mod watching;
mod withdrawn;

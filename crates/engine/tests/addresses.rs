//! An engine may be reached at several addresses: each is tried, and what failed is told by the one that says most.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyfabric_engine::{Address, Code, Config, Engine};

const LONG: Duration = Duration::from_secs(20);

/// One that cannot be called, and one where nobody listens, hide none that serves.
#[test]
fn every_address_is_tried() {
    let there = engine("");
    let theirs = there.address().sockets[0];
    for before in [vec![NOWHERE], vec![free()], vec![NOWHERE, free(), NOWHERE]] {
        let sockets = before.into_iter().chain([theirs]);
        engine("").connect(&at(sockets, &there), Some(LONG)).unwrap();
    }
}

#[test]
fn what_an_engine_has_said_is_told() {
    let there = engine("secret");
    let theirs = there.address().sockets[0];
    for sockets in [vec![theirs, free()], vec![free(), theirs, NOWHERE], vec![NOWHERE, theirs]] {
        let error = engine("").connect(&at(sockets.into_iter(), &there), Some(LONG)).unwrap_err();
        assert_eq!(error.code, Code::ConnectionBroken);
        assert!(error.to_string().contains("one side has a cluster secret and the other has none"), "{error}");
    }
    let error = engine("").connect(&at([free(), NOWHERE].into_iter(), &there), Some(LONG)).unwrap_err();
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

/// Whoever opens an engine on each of two machines meets this first.
#[test]
fn a_loopback_address_of_another_host_is_told_as_that() {
    let error = engine("").connect(&at([free()].into_iter(), &engine("")), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::PeerLost);
    assert!(error.to_string().contains("opened with `listen`"), "{error}");
}

fn engine(secret: &str) -> Engine {
    let config = Config {
        transports: vec!["tcp".into()],
        secret: (!secret.is_empty()).then(|| secret.into()),
        ..Config::default()
    };
    Engine::new(config).unwrap()
}

/// The address of an engine, reached in another way.
fn at(sockets: impl Iterator<Item = SocketAddr>, of: &Engine) -> Address {
    Address { sockets: sockets.collect(), ..of.address().clone() }
}

/// Nobody listens there.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The system refuses at once to call it.
const NOWHERE: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::BROADCAST, 9));

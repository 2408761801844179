//! An engine may be reached at several addresses: each is tried, and what failed is told by the one that says most.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyfabric_engine::{Address, Code, Config, Engine, WriteOptions};

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

/// Hosts have addresses in common, those of loopback and of bridges, and often ports: another engine at one of them says
/// nothing of the one that is called, for streams neither.
#[test]
fn another_engine_at_one_address_hides_nothing() {
    let (there, other) = (engine(""), engine(""));
    let [theirs, others] = [&there, &other].map(|engine| engine.address().sockets[0]);
    wait_for_streams(&engine(""), &there, &[others, theirs]);
    // Nobody can tell where that one is; but where only others are, it is no more.
    let error = engine("").connect(&at([others, NOWHERE].into_iter(), &there), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::ConnectionBroken, "{error}");
    let error = engine("").connect(&at([others, others].into_iter(), &there), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::PeerLost, "{error}");
    assert!(error.to_string().contains("another engine lives at its address now"), "{error}");
}

/// An address where nobody says anything costs a handshake's patience once, and not for each stream.
#[test]
fn streams_are_called_where_the_peer_has_answered() {
    let (here, there) = (engine(""), engine(""));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let sockets = [silent.local_addr().unwrap(), there.address().sockets[0]];
    here.connect(&at(sockets.into_iter(), &there), Some(LONG)).unwrap();
    let began = Instant::now();
    wait_for_streams(&here, &there, &sockets);
    assert!(began.elapsed() < Duration::from_secs(4), "after {:?}", began.elapsed());
}

/// Whoever opens an engine on each of two machines meets this first.
#[test]
fn a_loopback_address_of_another_host_is_told_as_that() {
    let error = engine("").connect(&at([free()].into_iter(), &engine("")), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::PeerLost);
    assert!(error.to_string().contains("opened with `listen`"), "{error}");
}

/// Writes until every stream to a peer at those addresses stands.
fn wait_for_streams(here: &Engine, there: &Engine, sockets: &[SocketAddr]) {
    let theirs = there.allocate(8 << 20).unwrap();
    let mut descriptor = theirs.descriptor().unwrap();
    descriptor.address = at(sockets.iter().copied(), there);
    let (source, remote) = (here.allocate(8 << 20).unwrap(), here.import(&descriptor.encode()).unwrap());
    let until = Instant::now() + LONG;
    while here.path(there.address()).nics != ["2 streams"] {
        here.write(&(&source).into(), &(&remote).into(), WriteOptions::default()).unwrap().wait(None).unwrap();
        assert!(Instant::now() < until, "it has {:?}", here.path(there.address()).nics);
    }
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

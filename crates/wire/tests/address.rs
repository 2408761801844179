//! Addresses as text, and what is refused of them in both forms.

mod common;

use anyfabric_wire::{Address, Descriptor, EngineId, WireError};
use common::samples;

const ENGINE: &str = "00112233445566778899aabbccddeeff";

fn parse(hosts: &str) -> Result<Address, WireError> {
    format!("af://{hosts}/{ENGINE}").parse()
}

fn why(text: &str) -> String {
    text.parse::<Address>().expect_err(text).to_string()
}

#[test]
fn hosts_of_every_kind() {
    let sockets = |hosts: &str| parse(hosts).map(|address| address.sockets.iter().map(ToString::to_string).collect());
    let expected = |of: &[&str]| Ok(of.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(sockets("10.0.0.1:4791"), expected(&["10.0.0.1:4791"]));
    assert_eq!(sockets("[fd00::1]:4791"), expected(&["[fd00::1]:4791"]));
    assert_eq!(sockets("[::ffff:10.0.0.1]:1"), expected(&["[::ffff:10.0.0.1]:1"]));
    assert_eq!(sockets("10.0.0.1:1,[::1]:2,10.0.0.2:65535"), expected(&["10.0.0.1:1", "[::1]:2", "10.0.0.2:65535"]));
    assert_eq!(sockets(""), expected(&[]));
    assert_eq!(parse("").unwrap().engine.to_string(), ENGINE);
    assert_eq!(parse("").unwrap().to_string(), format!("af:///{ENGINE}"));
    assert_eq!(format!("{:?}", parse("").unwrap().engine), format!("EngineId({ENGINE})"));
}

#[test]
fn garbage_is_refused_and_named() {
    let full = format!("af://10.0.0.1:1/{ENGINE}");
    for scheme in ["", "AF://", "af:/", "http://", " af://"] {
        let text = full.replace("af://", scheme);
        let error = text.parse::<Address>().unwrap_err().to_string();
        let given: String = text.chars().take(16).collect();
        assert_eq!(error, format!("not an address: expected it to start with \"af://\", given \"{given}...\""));
    }
    for hosts in [
        "localhost:1",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:65536",
        "10.0.0.1:-1",
        "10.0.0.256:1",
        "::1:1",
        "[::1]",
        ",",
        "10.0.0.1:1,",
        ",10.0.0.1:1",
        "10.0.0.1:1,,10.0.0.2:1",
        "10.0.0.1:1 ",
        "10.0.0.1:1;10.0.0.2:1",
        "a/b",
        "\u{1f980}",
    ] {
        let error = parse(hosts).expect_err(hosts).to_string();
        assert!(error.contains("is not HOST:PORT with a numeric host"), "{hosts}: {error}");
    }
    assert_eq!(why("af://"), "malformed address: no '/' before the engine id");
    assert_eq!(why("af:///"), "malformed engine id: 0 characters, expected 32 hex digits");
    assert_eq!(why(&full[..full.len() - 1]), "malformed engine id: 31 characters, expected 32 hex digits");
    assert_eq!(why(&format!("{full}\n")), "malformed engine id: 33 characters, expected 32 hex digits");
    assert_eq!(why(&full.replace("ff", "fg")), "malformed engine id: 'g' is no hex digit");
    assert!("+f".repeat(16).parse::<EngineId>().is_err());
    // 32 bytes, but not of ASCII.
    assert!("\u{e9}".repeat(16).parse::<EngineId>().is_err());
}

#[test]
fn a_scope_is_refused_because_only_its_host_understands_it() {
    assert!(parse("[fe80::1]:1").is_ok());
    let error = parse("[fe80::1%2]:1").unwrap_err().to_string();
    assert!(error.contains("has a scope, which only its own host understands"), "{error}");
}

#[test]
fn too_many_sockets_are_refused_in_every_form() {
    let with = |num_sockets| Address {
        sockets: vec!["[2001:db8:1111:2222:3333:4444:5555:6666]:65535".parse().unwrap(); num_sockets],
        ..samples::address()
    };
    let (most, more) = (with(Address::MAX_SOCKETS), with(Address::MAX_SOCKETS + 1));
    assert_eq!(most.to_string().parse::<Address>().unwrap(), most);
    assert!(why(&more.to_string()).contains("17 sockets, at most 16"));
    let descriptor = |address| Descriptor { address, ..samples::descriptors().remove(0) };
    assert_eq!(Descriptor::decode(&descriptor(most.clone()).encode()).unwrap().address, most);
    let error = Descriptor::decode(&descriptor(more).encode()).unwrap_err().to_string();
    assert_eq!(error, "malformed descriptor: a number or a list is larger than allowed");
}

#[test]
fn text_without_end_is_refused_unread() {
    let text = format!("af://{}/{ENGINE}", "10.0.0.1:1,".repeat(1 << 20));
    let error = why(&text);
    assert!(error.contains("bytes of text, at most 1024") && error.len() < 200, "{error}");
}

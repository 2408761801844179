//! The formats, pinned: `golden/version_2.txt` holds one of everything as this
//! version writes it, `golden/version_1.txt` what an older build wrote. Lines are
//! added with new messages; one that changes means another version, and a file of
//! its own.

mod common;

use anyfabric_wire::handshake::{Answer, Call, Hello, Seal, Side, Verdict, Welcome, SEAL_BYTES};
use anyfabric_wire::{Address, Control, Descriptor, Frame, Local, Refusal, WireError, OLDEST_VERSION, VERSION};
use common::{hex, samples};

const VERSION_1: &str = include_str!("golden/version_1.txt");
const VERSION_2: &str = include_str!("golden/version_2.txt");

#[test]
fn this_build_writes_version_2() {
    let written: Vec<_> = everything().iter().map(|(name, bytes)| format!("{name} {}", hex(bytes))).collect();
    let pinned: Vec<_> = VERSION_2.lines().collect();
    let differing: Vec<_> = written.iter().filter(|line| !pinned.contains(&line.as_str())).cloned().collect();
    assert!(differing.is_empty(), "the format changed; now:\n{}", differing.join("\n"));
    assert_eq!(written.len(), pinned.len());
}

#[test]
fn version_2_is_read() {
    let all = |prefix| all_of(VERSION_2, prefix);
    let seal = samples::seal();
    let sealed = |bytes: &Vec<u8>| -> ([u8; SEAL_BYTES], Vec<u8>) {
        let (header, body) = bytes.split_at(SEAL_BYTES);
        let header = header.try_into().unwrap();
        assert_eq!(Seal::body_bytes(&header), Ok(body.len()));
        (header, body.to_vec())
    };
    let open_hello = |bytes: Vec<u8>| {
        let (header, body) = sealed(&bytes);
        seal.open::<Hello>(Side::Caller, &header, &body).unwrap().unwrap()
    };
    let open_welcome = |bytes: Vec<u8>| {
        let (header, body) = sealed(&bytes);
        seal.open::<Welcome>(Side::Listener, &header, &body).unwrap().unwrap()
    };

    let descriptors: Vec<_> = all("descriptor").iter().map(|bytes| Descriptor::decode(bytes).unwrap()).collect();
    assert_eq!(descriptors, samples::descriptors());
    let controls: Vec<_> = all("control").iter().map(|bytes| Control::decode(bytes).unwrap()).collect();
    assert_eq!(controls, samples::controls());
    let locals: Vec<_> = all("local").iter().map(|bytes| Local::decode(bytes).unwrap()).collect();
    assert_eq!(locals, samples::locals());
    let frames: Vec<_> =
        all("frame").into_iter().map(|bytes| Frame::decode(&bytes.try_into().unwrap()).unwrap()).collect();
    assert_eq!(frames, samples::frames());
    let answers: Vec<_> =
        all("answer").into_iter().map(|bytes| Answer::decode(&bytes.try_into().unwrap()).unwrap()).collect();
    assert_eq!(answers, samples::answers());
    let calls: Vec<_> =
        all("call").into_iter().map(|bytes| Call::decode(&bytes.try_into().unwrap()).unwrap()).collect();
    assert_eq!(calls, [samples::call()]);
    assert_eq!(all("hello").into_iter().map(open_hello).collect::<Vec<_>>(), samples::hellos());
    assert_eq!(all("welcome").into_iter().map(open_welcome).collect::<Vec<_>>(), samples::welcomes());
    let acks: Vec<_> =
        all("ack").into_iter().map(|bytes| Frame::decode_ack(&bytes.try_into().unwrap()).unwrap()).collect();
    assert_eq!(acks[0], (0x0011_2233_4455_6677, Ok(())));
    for (idx, ack) in acks.iter().enumerate().skip(1) {
        assert_eq!(*ack, (7, Err(Refusal::from_code(idx as u8).unwrap())));
    }
    assert_eq!(acks.len(), 12);
    let text = String::from_utf8(all("address").remove(0)).unwrap();
    assert_eq!(text, "af://192.0.2.7:4791,[2001:db8::ff00:42:8329]:65535/101112131415161718191a1b1c1d1e1f");
    assert_eq!(text.parse::<Address>().unwrap(), samples::address());
}

#[test]
fn version_1_is_still_read() {
    assert_eq!(Descriptor::decode(&all_of(VERSION_1, "descriptor")[0]).unwrap(), samples::descriptors()[0]);
    let call = Call::decode(&all_of(VERSION_1, "call").remove(0).try_into().unwrap()).unwrap();
    assert_eq!((call.versions, call.agree()), ((1, 0), Ok(1)));
    let answer = Answer::decode(&all_of(VERSION_1, "answer").remove(0).try_into().unwrap()).unwrap();
    assert_eq!(answer.agreed(), Ok(1));
}

#[test]
fn goodbye_and_rails_are_newer_than_version_1() {
    for control in samples::controls() {
        assert_eq!(control.since(), if matches!(control, Control::Goodbye | Control::Rails { .. }) { 2 } else { 1 });
    }
}

#[test]
fn neighbouring_versions_interoperate_and_others_are_refused_by_name() {
    assert_eq!((VERSION, OLDEST_VERSION), (2, 1), "another version wants another golden file");
    let descriptor = samples::descriptors().remove(0);
    let restamped = |newest: u16, oldest: u16| {
        let mut bytes = descriptor.encode();
        bytes[4..6].copy_from_slice(&newest.to_le_bytes());
        bytes[6..8].copy_from_slice(&oldest.to_le_bytes());
        samples::repair_checksum(&mut bytes);
        Descriptor::decode(&bytes)
    };
    let agree = |newest, oldest| Call { versions: (newest, oldest), ..samples::call() }.agree();
    for (newest, oldest, agreed) in [(1, 0, 1), (2, 1, 2), (3, 2, 2), (9, 1, 2), (2, 2, 2), (1, 1, 1)] {
        assert_eq!(restamped(newest, oldest).as_ref(), Ok(&descriptor), "{newest} to {oldest}");
        assert_eq!(agree(newest, oldest), Ok(agreed));
    }
    for (newest, oldest) in [(0, 0), (4, 3), (u16::MAX, u16::MAX - 1), (1, 2), (u16::MAX, 3)] {
        let refused = |what| WireError::Version { what, given: newest, oldest: 1, newest: 2 };
        assert_eq!(restamped(newest, oldest), Err(refused("descriptor")));
        assert_eq!(agree(newest, oldest), Err(refused("the peer")));
    }
    assert_eq!(agree(4, 3).unwrap_err().to_string(), "the peer has wire version 4, this build speaks 1 to 2");
    // The version is read before the checksum, whose place another version may have moved.
    let mut other = descriptor.encode();
    other[4..8].copy_from_slice(&[4, 0, 3, 0]);
    assert!(matches!(Descriptor::decode(&other), Err(WireError::Version { given: 4, .. })));
}

#[test]
fn a_caller_refuses_a_version_it_did_not_offer() {
    let answer = |verdict, version| Answer { verdict, version, ..samples::answers().remove(0) }.agreed();
    assert_eq!(answer(Verdict::Ok, 1), Ok(1));
    assert_eq!(answer(Verdict::Ok, 2), Ok(2));
    for (verdict, version) in [(Verdict::Ok, 0), (Verdict::Ok, 3), (Verdict::Version, 2), (Verdict::Version, 7)] {
        assert!(matches!(answer(verdict, version), Err(WireError::Version { given, .. }) if given == version));
    }
}

/// One of everything, named, as this build writes it.
fn everything() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut add = |name: &str, encoded: Vec<Vec<u8>>| {
        all.extend(encoded.into_iter().enumerate().map(|(idx, bytes)| (format!("{name}_{idx}"), bytes)));
    };
    let seal = samples::seal();
    let refusals = (1..=11).map(|code| Refusal::from_code(code).expect("1 to 11 are refusals"));
    let acks = std::iter::once(Frame::encode_ack(0x0011_2233_4455_6677, Ok(())))
        .chain(refusals.map(|refusal| Frame::encode_ack(7, Err(refusal))));
    add("address", vec![samples::address().to_string().into_bytes()]);
    add("descriptor", samples::descriptors().iter().map(Descriptor::encode).collect());
    add("call", vec![samples::call().encode().to_vec()]);
    add("answer", samples::answers().iter().map(|answer| answer.encode().to_vec()).collect());
    add("hello", samples::hellos().iter().map(|hello| seal.seal(Side::Caller, hello)).collect());
    add("welcome", samples::welcomes().iter().map(|welcome| seal.seal(Side::Listener, welcome)).collect());
    add("control", samples::controls().iter().map(Control::encode).collect());
    add("local", samples::locals().iter().map(Local::encode).collect());
    add("frame", samples::frames().iter().map(|frame| frame.encode().to_vec()).collect());
    add("ack", acks.map(|ack| ack.to_vec()).collect());
    all
}

/// The bytes of every line of `golden` whose name is `prefix` and a number.
fn all_of(golden: &str, prefix: &str) -> Vec<Vec<u8>> {
    let lines = golden.lines().filter_map(|line| line.strip_prefix(prefix)?.strip_prefix('_')?.split_once(' '));
    let found: Vec<_> = lines.map(|(_, digits)| unhex(digits)).collect();
    assert!(!found.is_empty(), "no {prefix} in the golden file");
    found
}

fn unhex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal")).collect()
}

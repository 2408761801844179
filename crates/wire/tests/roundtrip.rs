//! What is encoded is decoded; what is cut, lengthened or random is refused or
//! decoded, and never panics.

mod common;

use anyfabric_wire::handshake::{
    Answer, Call, Hello, Seal, Side, Verdict, Welcome, ANSWER_BYTES, CALL_BYTES, SEAL_BYTES,
};
use anyfabric_wire::{Address, Control, Descriptor, EngineId, Frame, Local, WireImm};
use common::*;
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(config(512))]

    #[test]
    fn descriptors(descriptor in any_descriptor()) {
        let bytes = descriptor.encode();
        prop_assert!(bytes.len() <= Descriptor::MAX_ENCODED);
        prop_assert_eq!(Descriptor::decode(&bytes), Ok(descriptor));
    }

    #[test]
    fn controls(control in any_control()) {
        prop_assert_eq!(Control::decode(&control.encode()), Ok(control));
    }

    #[test]
    fn locals(local in any_local()) {
        let bytes = local.encode();
        prop_assert!(bytes.len() <= Local::MAX_ENCODED);
        prop_assert_eq!(Local::decode(&bytes), Ok(local));
    }

    #[test]
    fn frames(frame in any_frame()) {
        prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
    }

    #[test]
    fn acks(op: u64, result in proptest::result::maybe_ok(Just(()), any_refusal())) {
        prop_assert_eq!(Frame::decode_ack(&Frame::encode_ack(op, result)), Ok((op, result)));
    }

    #[test]
    fn immediates(bits: u32) {
        let imm = WireImm::decode(bits);
        prop_assert!((1..=4).contains(&imm.quarters));
        prop_assert_eq!(imm.encode(), bits);
    }

    #[test]
    fn calls(secret: bool, versions: (u16, u16), nonce in any_nonce()) {
        let call = Call { versions, secret, nonce };
        prop_assert_eq!(Call::decode(&call.encode()), Ok(call));
    }

    #[test]
    fn answers(verdict in 0..4, version: u16, oldest: u16, nonce in any_nonce(), proof in any_nonce()) {
        let verdict = [Verdict::Ok, Verdict::Version, Verdict::Secret, Verdict::Busy][verdict as usize];
        let answer = Answer { verdict, version, oldest, nonce, proof };
        prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
    }

    #[test]
    fn hellos(hello in any_hello()) {
        let sealed = samples::seal().seal(Side::Caller, &hello);
        prop_assert_eq!(open(Side::Caller, &sealed), Some(hello));
    }

    #[test]
    fn welcomes(welcome in any_welcome()) {
        let sealed = samples::seal().seal(Side::Listener, &welcome);
        prop_assert_eq!(open(Side::Listener, &sealed), Some(welcome));
    }

    #[test]
    fn addresses_as_text(address in any_address()) {
        prop_assert_eq!(address.to_string().parse(), Ok(address));
    }

    #[test]
    fn engine_ids_as_text(engine in any_engine()) {
        prop_assert_eq!(engine.to_string().parse(), Ok(engine));
        prop_assert_eq!(engine.to_string().to_uppercase().parse(), Ok(engine));
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..300), text in ".{0,80}") {
        let _ = Descriptor::decode(&bytes);
        let _ = Control::decode(&bytes);
        let _ = Local::decode(&bytes);
        let _ = text.parse::<Address>();
        let _ = format!("af://{text}").parse::<Address>();
        let _ = text.parse::<EngineId>();
        let mut padded = bytes;
        padded.resize(300, 0);
        let _ = Frame::decode(padded[..Frame::HEADER].try_into().unwrap());
        let _ = Frame::decode_ack(padded[..Frame::ACK_BYTES].try_into().unwrap());
        let _ = Call::decode(padded[..CALL_BYTES].try_into().unwrap()).and_then(|call| call.agree());
        let _ = Answer::decode(padded[..ANSWER_BYTES].try_into().unwrap()).and_then(|answer| answer.agreed());
        let header = padded[..SEAL_BYTES].try_into().unwrap();
        let _ = Seal::body_bytes(header);
        prop_assert_eq!(samples::seal().open::<Hello>(Side::Caller, header, &padded), Ok(None));
        prop_assert_eq!(samples::seal().open::<Welcome>(Side::Listener, header, &padded), Ok(None));
    }

    /// Behind every door that random bytes do not pass.
    #[test]
    fn random_bodies_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        let mut descriptor = [b"AFDS\x02\0\x01\0\0\0\0\0", &bytes[..]].concat();
        samples::repair_checksum(&mut descriptor);
        let _ = Descriptor::decode(&descriptor);
        let sealed = samples::seal().seal(Side::Caller, &samples::Raw(&bytes));
        let header = sealed[..SEAL_BYTES].try_into().unwrap();
        let _ = samples::seal().open::<Hello>(Side::Caller, header, &sealed[SEAL_BYTES..]);
        let sealed = samples::seal().seal(Side::Listener, &samples::Raw(&bytes));
        let header = sealed[..SEAL_BYTES].try_into().unwrap();
        let _ = samples::seal().open::<Welcome>(Side::Listener, header, &sealed[SEAL_BYTES..]);
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn every_flipped_bit_of_a_descriptor_is_refused(descriptor in any_descriptor()) {
        let mut bytes = descriptor.encode();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Descriptor::decode(&bytes).is_err(), "bit {} of {}", bit, hex(&bytes));
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

proptest! {
    // Each case is hundreds of proofs.
    #![proptest_config(config(16))]

    #[test]
    fn prefixes_and_rests_are_refused(
        descriptor in any_descriptor(),
        control in any_control(),
        local in any_local(),
        hello in any_hello(),
    ) {
        refuses_prefixes_and_rests(&descriptor.encode(), |bytes| Descriptor::decode(bytes).is_err());
        refuses_prefixes_and_rests(&control.encode(), |bytes| Control::decode(bytes).is_err());
        refuses_prefixes_and_rests(&local.encode(), |bytes| Local::decode(bytes).is_err());
        // Sealed again, so that the parser sees them and not only the proof.
        let body = samples::seal().seal(Side::Caller, &hello).split_off(SEAL_BYTES);
        for len in 0..body.len() {
            let sealed = samples::seal().seal(Side::Caller, &samples::Raw(&body[..len]));
            let header = sealed[..SEAL_BYTES].try_into().unwrap();
            prop_assert!(samples::seal().open::<Hello>(Side::Caller, header, &sealed[SEAL_BYTES..]).is_err());
        }
    }

    #[test]
    fn every_flipped_bit_of_a_sealed_body_is_refused(hello in any_hello()) {
        let mut sealed = samples::seal().seal(Side::Caller, &hello);
        // The length before the proof is not proven: it only says how much to read.
        for bit in 4 * 8..sealed.len() * 8 {
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(open::<Hello>(Side::Caller, &sealed), None);
            sealed[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

fn refuses_prefixes_and_rests(bytes: &[u8], is_refused: impl Fn(&[u8]) -> bool) {
    for len in 0..bytes.len() {
        assert!(is_refused(&bytes[..len]), "{len} bytes of {}", hex(bytes));
    }
    assert!(is_refused(&[bytes, &[0]].concat()), "{} and a zero", hex(bytes));
}

/// Opens a whole sealed body.
fn open<T: for<'a> serde::Deserialize<'a>>(side: Side, sealed: &[u8]) -> Option<T> {
    let (header, body) = sealed.split_at(SEAL_BYTES);
    let header = header.try_into().ok()?;
    assert_eq!(Seal::body_bytes(header), Ok(body.len()));
    samples::seal().open(side, header, body).expect("proven, so whole")
}

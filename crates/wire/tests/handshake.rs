//! Proofs: only who holds the secret and heard this very conversation passes.

mod common;

use anyfabric_wire::handshake::{
    Answer, Call, Hello, Seal, Side, Welcome, ANSWER_BYTES, CALL_BYTES, MAX_BODY, SEAL_BYTES,
};
use anyfabric_wire::WireError;
use common::samples;

fn open(seal: &Seal, side: Side, sealed: &[u8]) -> Result<Option<Hello>, WireError> {
    let (header, body) = sealed.split_at(SEAL_BYTES);
    seal.open(side, header.try_into().expect("a header's length"), body)
}

/// Seals of conversations that differ from `samples::seal` in one thing.
fn others() -> Vec<(&'static str, Seal)> {
    let call = samples::call();
    let answer_nonce: [u8; 32] = samples::counted(0x60);
    let mut nonce = call.nonce;
    nonce[31] ^= 1;
    let mut other_answer_nonce = answer_nonce;
    other_answer_nonce[0] ^= 0x80;
    let secret = b"open sesame";
    vec![
        ("secret", Seal::new(b"open sesamf", &call, 2, &answer_nonce)),
        ("no secret", Seal::new(b"", &call, 2, &answer_nonce)),
        ("a longer secret", Seal::new(&secret.repeat(100), &call, 2, &answer_nonce)),
        ("caller's nonce", Seal::new(secret, &Call { nonce, ..call.clone() }, 2, &answer_nonce)),
        ("listener's nonce", Seal::new(secret, &call, 2, &other_answer_nonce)),
        ("nonces exchanged", Seal::new(secret, &Call { nonce: answer_nonce, ..call.clone() }, 2, &call.nonce)),
        ("version agreed", Seal::new(secret, &call, 1, &answer_nonce)),
        ("newest version offered", Seal::new(secret, &Call { versions: (3, 1), ..call.clone() }, 2, &answer_nonce)),
        ("oldest version offered", Seal::new(secret, &Call { versions: (2, 2), ..call.clone() }, 2, &answer_nonce)),
    ]
}

#[test]
fn equal_conversations_agree() {
    let (caller, listener) = (samples::seal(), samples::seal());
    assert!(caller.check_proof(&listener.proof()));
    for hello in samples::hellos() {
        assert_eq!(open(&listener, Side::Caller, &caller.seal(Side::Caller, &hello)), Ok(Some(hello)));
    }
    // Without a secret the same holds: the proofs then bind the messages only.
    let open_to_all = Seal::new(b"", &samples::call(), 2, &[7; 32]);
    assert!(open_to_all.check_proof(&open_to_all.clone().proof()));
}

#[test]
fn whatever_differs_is_noticed() {
    let seal = samples::seal();
    let hello = samples::hellos().remove(0);
    let sealed = seal.seal(Side::Caller, &hello);
    for (what, other) in others() {
        assert!(!seal.check_proof(&other.proof()), "{what}");
        assert!(!other.check_proof(&seal.proof()), "{what}");
        assert_eq!(open(&other, Side::Caller, &sealed), Ok(None), "{what}");
        assert_eq!(open(&seal, Side::Caller, &other.seal(Side::Caller, &hello)), Ok(None), "{what}");
    }
    let mut proof = seal.proof();
    for bit in 0..256 {
        proof[bit / 8] ^= 1 << (bit % 8);
        assert!(!seal.check_proof(&proof), "bit {bit}");
        proof[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn nothing_can_be_reflected() {
    let seal = samples::seal();
    let hello = samples::hellos().remove(0);
    assert_eq!(open(&seal, Side::Listener, &seal.seal(Side::Caller, &hello)), Ok(None));
    assert_eq!(open(&seal, Side::Caller, &seal.seal(Side::Listener, &hello)), Ok(None));
    // The listener's proof does not serve as the proof of an empty body.
    for side in [Side::Caller, Side::Listener] {
        let mut header = [0; SEAL_BYTES];
        header[4..].copy_from_slice(&seal.proof());
        assert_eq!(open(&seal, side, &header), Ok(None));
        assert!(!seal.check_proof(&seal.seal(side, &())[4..].try_into().unwrap()));
    }
}

#[test]
fn what_is_proven_is_still_parsed_with_suspicion() {
    let seal = samples::seal();
    let hello = samples::hellos().remove(0);
    let mut crowded = hello.clone();
    crowded.address.sockets = vec!["10.0.0.1:1".parse().unwrap(); 17];
    assert!(open(&seal, Side::Caller, &seal.seal(Side::Caller, &crowded)).is_err());
    let sealed = seal.seal(Side::Caller, &crowded.address);
    assert!(open(&seal, Side::Caller, &sealed).is_err());
    let sealed = seal.seal(Side::Caller, &(hello, 0_u8));
    let error = open(&seal, Side::Caller, &sealed).unwrap_err().to_string();
    assert_eq!(error, "malformed hello: 1 bytes too many");
    let sealed = seal.seal(Side::Listener, &samples::Raw(&[9]));
    let (header, body) = sealed.split_at(SEAL_BYTES);
    assert!(seal.open::<Welcome>(Side::Listener, header.try_into().unwrap(), body).is_err());
}

#[test]
fn a_body_has_a_bound() {
    let header = |nbytes: u32| -> [u8; SEAL_BYTES] {
        let mut header = [0; SEAL_BYTES];
        header[..4].copy_from_slice(&nbytes.to_le_bytes());
        header
    };
    assert_eq!(Seal::body_bytes(&header(0)), Ok(0));
    assert_eq!(Seal::body_bytes(&header(MAX_BODY as u32)), Ok(MAX_BODY));
    for nbytes in [MAX_BODY as u32 + 1, u32::MAX] {
        assert!(matches!(Seal::body_bytes(&header(nbytes)), Err(WireError::Malformed { .. })));
    }
    let seal = samples::seal();
    let sealed = seal.seal(Side::Caller, &samples::Raw(&[0; MAX_BODY + 1]));
    let error = open(&seal, Side::Caller, &sealed).unwrap_err().to_string();
    assert_eq!(error, "malformed hello: 4097 bytes, at most 4096");
}

#[test]
fn strangers_are_named() {
    assert_eq!(
        Call::decode(b"GET / HTTP/1.1\r\nHost: 10.0.0.1:4791\r\nAccept: */*").unwrap_err().to_string(),
        "not a call of an engine: expected it to start with \"ANYF\", given \"GET / HTTP/1.1\\r\\n...\""
    );
    assert!(matches!(Answer::decode(&[0; ANSWER_BYTES]), Err(WireError::Magic { .. })));
    let mut answer = samples::answers()[0].encode();
    answer[8] = 4;
    assert_eq!(Answer::decode(&answer).unwrap_err().to_string(), "malformed answer: unknown verdict 4");
    // What a later version may put where this one writes zeros is not looked at.
    let mut call = samples::call().encode();
    call[9..16].fill(0xff);
    assert_eq!(Call::decode(&call).unwrap(), samples::call());
    assert_eq!(call.len(), CALL_BYTES);
}

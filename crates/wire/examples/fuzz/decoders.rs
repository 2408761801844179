//! Every decoder, what it takes, and what must hold of what it accepts.

use anyfabric_wire::handshake::{
    Answer, Call, Hello, Seal, Side, Welcome, ANSWER_BYTES, CALL_BYTES, MAX_BODY, SEAL_BYTES,
};
use anyfabric_wire::{Address, Control, Descriptor, EngineId, Frame, Local};
use serde::Serialize;

use crate::harness::metered;
use crate::samples;

/// What a decoder made of an input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepted,
    Refused,
}

/// Everything that reads bytes of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoder {
    Descriptor,
    Control,
    Local,
    Frame,
    Ack,
    Call,
    Answer,
    Body,
    Hello,
    Welcome,
    Address,
    EngineId,
}

impl Decoder {
    pub(crate) const ALL: [Self; 12] = [
        Self::Descriptor,
        Self::Control,
        Self::Local,
        Self::Frame,
        Self::Ack,
        Self::Call,
        Self::Answer,
        Self::Body,
        Self::Hello,
        Self::Welcome,
        Self::Address,
        Self::EngineId,
    ];

    /// Decodes, and checks that what was accepted survives its own encoding.
    /// Panics are failures and left to the caller.
    pub(crate) fn decode(self, input: &[u8]) -> Verdict {
        match self {
            Self::Descriptor => again(
                input,
                |bytes| Descriptor::decode(bytes).ok().inspect(|it| check_address(&it.address)),
                Descriptor::encode,
            ),
            Self::Control => again(input, |bytes| Control::decode(bytes).ok(), Control::encode),
            Self::Local => again(input, |bytes| Local::decode(bytes).ok(), Local::encode),
            Self::Frame => again(
                input,
                |bytes| Frame::decode(bytes.try_into().ok()?).ok().inspect(check_frame),
                |f| f.encode().to_vec(),
            ),
            Self::Ack => again(
                input,
                |bytes| Frame::decode_ack(bytes.try_into().ok()?).ok(),
                |(op, result)| Frame::encode_ack(*op, *result).to_vec(),
            ),
            Self::Call => again(
                input,
                |bytes| Call::decode(bytes.try_into().ok()?).ok().inspect(|call| drop(call.agree())),
                |call| call.encode().to_vec(),
            ),
            Self::Answer => again(
                input,
                |bytes| Answer::decode(bytes.try_into().ok()?).ok().inspect(|answer| drop(answer.agreed())),
                |answer| answer.encode().to_vec(),
            ),
            Self::Body => match input.try_into().ok().and_then(|header| Seal::body_bytes(header).ok()) {
                Some(0..=MAX_BODY) => Verdict::Accepted,
                Some(nbytes) => panic!("accepted a body of {nbytes} bytes"),
                None => Verdict::Refused,
            },
            Self::Hello => again(
                input,
                |body| open::<Hello>(Side::Caller, body).inspect(|hello| check_address(&hello.address)),
                body_of,
            ),
            Self::Welcome => again(
                input,
                |body| {
                    open::<Welcome>(Side::Listener, body).inspect(|welcome| match welcome {
                        Welcome::Accepted(accepted) => check_address(&accepted.address),
                        Welcome::Rejected(_) => {}
                    })
                },
                body_of,
            ),
            Self::Address => again(
                input,
                |text| std::str::from_utf8(text).ok()?.parse::<Address>().ok().inspect(check_address),
                |address| address.to_string().into(),
            ),
            Self::EngineId => again(
                input,
                |text| std::str::from_utf8(text).ok()?.parse::<EngineId>().ok(),
                |engine| engine.to_string().into(),
            ),
        }
    }

    /// The length that its inputs have, where the type demands one.
    pub(crate) const fn exact_bytes(self) -> Option<usize> {
        match self {
            Self::Frame => Some(Frame::HEADER),
            Self::Ack => Some(Frame::ACK_BYTES),
            Self::Call => Some(CALL_BYTES),
            Self::Answer => Some(ANSWER_BYTES),
            Self::Body => Some(SEAL_BYTES),
            _ => None,
        }
    }

    /// Restores what would have most mutants refused at the door.
    pub(crate) fn repair(self, input: &mut [u8]) {
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = input.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        match self {
            Self::Descriptor => {
                put(0, b"AFDS\x02\0\x01\0");
                samples::repair_checksum(input);
            }
            Self::Frame => {
                put(50, &[0, 0]);
                put(60, b"AFfr");
            }
            Self::Ack => put(9, &[0; 7]),
            Self::Call | Self::Answer => put(0, b"ANYF"),
            Self::Body => put(2, &[0, 0]),
            Self::Address => put(0, b"af://"),
            Self::Control | Self::Local | Self::Hello | Self::Welcome | Self::EngineId => {}
        }
    }
}

/// Decodes; what was accepted must equal what its own encoding decodes to.
pub(crate) fn again<T: PartialEq + std::fmt::Debug>(
    input: &[u8],
    decode: impl Fn(&[u8]) -> Option<T>,
    encode: impl Fn(&T) -> Vec<u8>,
) -> Verdict {
    let Some(value) = metered(input.len(), || decode(input)) else { return Verdict::Refused };
    let back = decode(&encode(&value));
    assert!(back.as_ref() == Some(&value), "gave {value:?}, which came back as {back:?}");
    Verdict::Accepted
}

fn check_address(address: &Address) {
    assert!(address.sockets.len() <= Address::MAX_SOCKETS, "accepted {} sockets", address.sockets.len());
}

/// What a receiver sizes its buffers and scatter lists by.
fn check_frame(frame: &Frame) {
    let (num_pages, nbytes) = (usize::from(frame.num_pages), frame.nbytes as usize);
    assert!(nbytes <= Frame::MAX_PAYLOAD && num_pages <= Frame::MAX_PAGES, "accepted {frame:?}");
    assert!(num_pages == 0 || num_pages * frame.page_bytes as usize == nbytes, "accepted {frame:?}");
    assert!(frame.num_parts > 0 && frame.imm.is_none_or(|(imm, _)| (1..=4).contains(&imm.quarters)));
}

/// Opens `body` as a peer that holds the secret would have sealed it.
fn open<T: for<'a> serde::Deserialize<'a>>(side: Side, body: &[u8]) -> Option<T> {
    let seal = samples::seal();
    let sealed = seal.seal(side, &samples::Raw(body));
    let (header, body) = sealed.split_at(SEAL_BYTES);
    let header = header.try_into().ok()?;
    Seal::body_bytes(header).ok()?;
    let opened: Option<T> = seal.open(side, header, body).ok()?;
    assert!(opened.is_some(), "a proof made with the secret was refused");
    opened
}

pub(crate) fn body_of<T: Serialize>(body: &T) -> Vec<u8> {
    samples::seal().seal(Side::Caller, body).split_off(SEAL_BYTES)
}

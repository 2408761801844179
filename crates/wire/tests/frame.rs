//! Frame headers: the limits that a receiver sizes its buffers by.

mod common;

use anyfabric_wire::{Control, Frame, FrameKind, Imm, Local, Refusal, WireImm, FLAG_LAST, FLAG_VERIFY};
use common::samples;

/// `frame` as a peer that checks nothing would send it.
fn is_accepted(frame: Frame) -> bool {
    Frame::decode(&frame.encode()).is_ok()
}

fn sized(kind: FrameKind, nbytes: u32) -> Frame {
    Frame::new(kind, 0, nbytes)
}

fn pages(num_pages: u16, page_bytes: u32, nbytes: u32) -> Frame {
    Frame { num_pages, page_bytes, ..sized(FrameKind::Pages, nbytes) }
}

#[test]
fn payloads_have_a_bound() {
    const MAX: u32 = Frame::MAX_PAYLOAD as u32;
    for kind in [FrameKind::Write, FrameKind::Message, FrameKind::Ack] {
        assert!(is_accepted(sized(kind, 0)));
        assert!(is_accepted(sized(kind, MAX)));
        assert!(!is_accepted(sized(kind, MAX + 16)));
        assert!(!is_accepted(sized(kind, u32::MAX)));
    }
    assert!(is_accepted(sized(FrameKind::Control, Control::MAX_ENCODED as u32)));
    assert!(!is_accepted(sized(FrameKind::Control, Control::MAX_ENCODED as u32 + 1)));
    for nbytes in 1..16 {
        assert!(!is_accepted(sized(FrameKind::Ack, nbytes)));
    }
}

#[test]
fn page_tables_agree_with_their_payload() {
    assert!(is_accepted(pages(1, 0, 0)));
    assert!(is_accepted(pages(1000, 1048, 1_048_000)));
    assert!(!is_accepted(pages(1001, 1, 1001)));
    assert!(!is_accepted(pages(0, 0, 0)));
    assert!(!is_accepted(pages(2, 512, 1023)));
    assert!(!is_accepted(pages(2, 512, 1025)));
    // 2 times 2^31 is 0 in 32 bits.
    assert!(!is_accepted(pages(2, 1 << 31, 0)));
    assert!(!is_accepted(pages(u16::MAX, u32::MAX, u32::MAX)));
    for kind in [FrameKind::Control, FrameKind::Write, FrameKind::Message, FrameKind::Ack] {
        assert!(!is_accepted(Frame { num_pages: 1, ..sized(kind, 0) }));
    }
}

#[test]
fn parts_are_1_to_16() {
    for (num_parts, accepted) in [(0, false), (1, true), (16, true), (17, false), (u16::MAX, false)] {
        assert_eq!(is_accepted(Frame { num_parts, ..sized(FrameKind::Write, 8) }), accepted, "{num_parts}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let good = samples::frames()[1].encode();
    let with = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        Frame::decode(&bytes)
    };
    for kind in [0, 6, 255] {
        assert!(with(0, kind).unwrap_err().to_string().contains(&format!("unknown kind {kind}")));
    }
    for flags in [8, 0x10, 0x80, 0xff] {
        assert!(with(1, flags).is_err());
    }
    for at in [50, 51] {
        assert!(with(at, 1).is_err());
    }
    for at in 60..64 {
        assert_eq!(with(at, 0).unwrap_err().to_string(), "malformed frame: no magic: the stream lost its place");
    }
    let ack = Frame::encode_ack(1, Err(Refusal::Full));
    for at in 9..16 {
        let mut bytes = ack;
        bytes[at] = 1;
        assert!(Frame::decode_ack(&bytes).is_err());
    }
    for code in 12..=255 {
        let mut bytes = ack;
        bytes[8] = code;
        assert!(Frame::decode_ack(&bytes).is_err());
        assert_eq!(Refusal::from_code(code), None);
    }
}

#[test]
fn flags_are_what_they_say() {
    let frame = |flags| Frame { flags, ..sized(FrameKind::Write, 8) };
    assert!(frame(FLAG_LAST).is_last() && !frame(FLAG_LAST).is_verified());
    assert!(frame(FLAG_VERIFY).is_verified() && !frame(FLAG_VERIFY).is_last());
    // The bit beside them belongs to the imm: setting it makes nothing count.
    let flags = !(FLAG_LAST | FLAG_VERIFY) & 7;
    assert_eq!(Frame::decode(&frame(flags).encode()).unwrap(), frame(0));
}

#[test]
fn an_immediate_has_30_bits_and_1_to_4_quarters() {
    assert_eq!(Imm::new(Imm::COUNT), None);
    assert_eq!(Imm::new(u32::MAX), None);
    assert!(Imm::try_from(Imm::COUNT).is_err());
    assert_eq!(samples::imm(Imm::COUNT - 1).value(), Imm::COUNT - 1);
    assert!(!samples::imm(Imm::FIRST_OF_ENGINE - 1).is_of_engine());
    assert!(samples::imm(Imm::FIRST_OF_ENGINE).is_of_engine());
    for (quarters, bits) in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (255, 3)] {
        let imm = samples::imm(Imm::COUNT - 1);
        assert_eq!(WireImm { imm, quarters }.encode(), bits << 30 | (Imm::COUNT - 1));
    }
}

#[test]
fn messages_have_a_bound() {
    let longest = Control::Revoke { region: u64::MAX, key: u64::MAX, revoke: u64::MAX };
    assert_eq!(Control::decode(&longest.encode()).unwrap(), longest);
    assert!(Control::decode(&[0; Control::MAX_ENCODED + 1]).unwrap_err().to_string().contains("at most 1024"));
    assert!(Local::decode(&[0; Local::MAX_ENCODED + 1]).unwrap_err().to_string().contains("at most 256"));
    // An imm of 31 bits inside a message.
    assert!(Control::decode(b"\x05\x80\x80\x80\x80\x04").is_err());
}

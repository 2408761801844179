//! What the tests of this crate share: samples, and strategies for the rest.

// Every test is a program of its own and uses a part.
#![allow(dead_code)]

pub(crate) mod samples;

use std::net::SocketAddr;

use anyfabric_wire::handshake::{Accepted, Hello, Host, Purpose, Rejection, Resume, Welcome};
use anyfabric_wire::{
    Access, Address, Control, Descriptor, Device, EngineId, Frame, FrameKind, Imm, Local, NicLibrary, Rails, Refusal,
    WireImm, FLAG_LAST, FLAG_VERIFY,
};
use proptest::array::{uniform16, uniform32};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// `cases` random inputs, or as many as PROPTEST_CASES says. A failure prints
/// its seed and keeps it beside the test; PROPTEST_RNG_SEED repeats a run.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(cases);
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases, failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::default() }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn any_imm() -> impl Strategy<Value = Imm> {
    (0..Imm::COUNT).prop_map(samples::imm)
}

pub(crate) fn any_engine() -> impl Strategy<Value = EngineId> {
    any::<[u8; 16]>().prop_map(EngineId)
}

pub(crate) fn any_socket() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![any::<([u8; 4], u16)>().prop_map(SocketAddr::from), any::<([u8; 16], u16)>().prop_map(SocketAddr::from),]
}

pub(crate) fn any_address() -> impl Strategy<Value = Address> {
    (any_engine(), vec(any_socket(), 0..=Address::MAX_SOCKETS))
        .prop_map(|(engine, sockets)| Address { engine, sockets })
}

pub(crate) fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let device = prop_oneof![Just(Device::Host), uniform16(any::<u8>()).prop_map(Device::Cuda)];
    (any_address(), any::<u64>(), any::<u64>(), any::<u64>(), device)
        .prop_map(|(address, region, key, nbytes, device)| Descriptor { address, region, key, nbytes, device })
}

pub(crate) fn any_refusal() -> impl Strategy<Value = Refusal> {
    (1_u8..=11).prop_map(|code| Refusal::from_code(code).expect("1 to 11 are refusals"))
}

pub(crate) fn any_control() -> impl Strategy<Value = Control> {
    prop_oneof![
        any::<u64>().prop_map(|received| Control::Heartbeat { received }),
        any::<(u64, u64, u64)>().prop_map(|(region, key, revoke)| Control::Revoke { region, key, revoke }),
        any::<u64>().prop_map(|revoke| Control::Revoked { revoke }),
        any_imm().prop_map(|imm| Control::RetireImm { imm }),
        any_imm().prop_map(|imm| Control::ImmRetired { imm }),
        any_imm().prop_map(|imm| Control::CountFailed { imm }),
        any::<u32>().prop_map(|limit| Control::EarlyArrivalsFull { limit }),
        Just(Control::EarlyArrivalsRoom),
        Just(Control::Goodbye),
        (any_library(), any_rails()).prop_map(|(library, message)| Control::Rails { library, message }),
    ]
}

fn any_library() -> impl Strategy<Value = NicLibrary> {
    prop_oneof![Just(NicLibrary::Verbs), Just(NicLibrary::Libfabric)]
}

fn any_rails() -> impl Strategy<Value = Rails> {
    let address = || vec(any::<u8>(), 0..256);
    let why = || ".{0,128}";
    let keys = vec(any::<(u64, u64)>(), 0..5);
    prop_oneof![
        vec(any::<u32>(), 0..9).prop_map(|nics| Rails::Offer { nics }),
        (any::<u8>(), any::<u32>(), address()).prop_map(|(rail, attempt, address)| Rails::Call {
            rail,
            attempt,
            address
        }),
        (any::<u8>(), any::<u32>(), prop_oneof![address().prop_map(Ok), why().prop_map(Err)])
            .prop_map(|(rail, attempt, result)| Rails::Answered { rail, attempt, result }),
        any::<(u8, u32)>().prop_map(|(rail, attempt)| Rails::Ready { rail, attempt }),
        any::<(u8, u32)>().prop_map(|(rail, attempt)| Rails::Broken { rail, attempt }),
        why().prop_map(|why| Rails::End { why }),
        any::<(u64, u64, u64, u64)>().prop_map(|(request, region, key, nbytes)| Rails::Bind {
            request,
            region,
            key,
            nbytes
        }),
        (any::<u64>(), prop_oneof![keys.prop_map(Ok), any_refusal().prop_map(Err)])
            .prop_map(|(request, result)| Rails::Bound { request, result }),
    ]
}

pub(crate) fn any_local() -> impl Strategy<Value = Local> {
    let access = prop_oneof![
        any::<u64>().prop_map(|nbytes| Access::Mapped { nbytes }),
        (any::<u64>(), any::<u64>()).prop_map(|(address, nbytes)| Access::Foreign { address, nbytes }),
        Just(Access::Bounce),
    ];
    prop_oneof![
        (any_engine(), any::<[u8; 16]>(), any::<(u64, u64)>()).prop_map(|(engine, token, probe)| Local::Join {
            engine,
            token,
            probe
        }),
        (any::<(u64, u64)>(), any::<bool>()).prop_map(|(probe, foreign)| Local::Joined { probe, foreign }),
        any::<bool>().prop_map(|foreign| Local::Probed { foreign }),
        any::<(u64, u64, u64)>().prop_map(|(request, region, key)| Local::Import { request, region, key }),
        (any::<u64>(), proptest::result::maybe_ok(access, any_refusal()))
            .prop_map(|(request, result)| Local::Imported { request, result }),
        Just(Local::Kick),
    ]
}

/// Any header that a peer may send.
pub(crate) fn any_frame() -> impl Strategy<Value = Frame> {
    let sizes = prop_oneof![
        (0..=Control::MAX_ENCODED as u32).prop_map(|nbytes| (FrameKind::Control, 0, 0, nbytes)),
        (0..=Frame::MAX_PAYLOAD as u32).prop_map(|nbytes| (FrameKind::Write, 0, 0, nbytes)),
        (0..=Frame::MAX_PAYLOAD as u32).prop_map(|nbytes| (FrameKind::Message, 0, 0, nbytes)),
        (0..=(Frame::MAX_PAYLOAD / Frame::ACK_BYTES) as u32).prop_map(|acks| (FrameKind::Ack, 0, 0, acks * 16)),
        (1..=Frame::MAX_PAGES as u16).prop_flat_map(|num_pages| {
            (0..=Frame::MAX_PAYLOAD as u32 / u32::from(num_pages)).prop_map(move |page_bytes| {
                (FrameKind::Pages, num_pages, page_bytes, u32::from(num_pages) * page_bytes)
            })
        }),
    ];
    let imm = option::of((any_imm(), 1_u8..=4, any::<u32>()))
        .prop_map(|imm| imm.map(|(imm, quarters, count)| (WireImm { imm, quarters }, count)));
    let flags = prop_oneof![Just(0), Just(FLAG_LAST), Just(FLAG_VERIFY), Just(FLAG_LAST | FLAG_VERIFY)];
    (sizes, imm, flags, any::<(u64, u64, u64, u64, u32)>(), 1_u16..=16).prop_map(
        |((kind, num_pages, page_bytes, nbytes), imm, flags, (op, region, key, offset, crc), num_parts)| Frame {
            flags,
            num_pages,
            region,
            key,
            offset,
            imm,
            num_parts,
            page_bytes,
            crc,
            ..Frame::new(kind, op, nbytes)
        },
    )
}

fn any_host() -> impl Strategy<Value = Host> {
    (any::<[u8; 16]>(), any::<u32>(), ".{0,32}").prop_map(|(boot_id, pid, name)| Host { boot_id, pid, name })
}

pub(crate) fn any_hello() -> impl Strategy<Value = Hello> {
    let resume = option::of(any::<([u8; 16], u64)>().prop_map(|(token, received)| Resume { token, received }));
    let purpose = prop_oneof![
        (any_engine(), resume).prop_map(|(callee, resume)| Purpose::Session { callee, resume }),
        any::<([u8; 16], u8)>().prop_map(|(token, lane_idx)| Purpose::Lane { token, lane_idx }),
    ];
    (any_address(), purpose, any_host(), vec("[a-z]{1,9}", 0..7), any::<u32>()).prop_map(
        |(address, purpose, host, transports, max_message_bytes)| Hello {
            address,
            purpose,
            host,
            transports,
            max_message_bytes,
        },
    )
}

pub(crate) fn any_welcome() -> impl Strategy<Value = Welcome> {
    let accepted = (any_address(), any_host(), vec("[a-z]{1,9}", 0..7), any::<(u32, [u8; 16], u64)>()).prop_map(
        |(address, host, transports, (max_message_bytes, token, received))| {
            Welcome::Accepted(Box::new(Accepted { address, host, transports, max_message_bytes, token, received }))
        },
    );
    let rejected = prop_oneof![
        Just(Rejection::OtherIncarnation),
        Just(Rejection::Fenced),
        Just(Rejection::Crossed),
        Just(Rejection::NoSession),
        Just(Rejection::Busy),
        Just(Rejection::Closing),
    ];
    prop_oneof![accepted, rejected.prop_map(Welcome::Rejected)]
}

pub(crate) fn any_nonce() -> impl Strategy<Value = [u8; 32]> {
    uniform32(any::<u8>())
}

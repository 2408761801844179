//! One of everything that crosses the wire: what the golden bytes pin, and what
//! the fuzzer mutates.

use anyfabric_wire::handshake::{
    Accepted, Answer, Call, Hello, Host, Purpose, Rejection, Resume, Seal, Verdict, Welcome,
};
use anyfabric_wire::{
    Access, Address, Control, Descriptor, Device, EngineId, Frame, FrameKind, Imm, Local, NicLibrary, Rails, Refusal,
    WireImm, FLAG_LAST, FLAG_VERIFY,
};
use serde::ser::{Serialize, SerializeTuple, Serializer};

/// 0, 1, 2, ... from `first`.
pub(crate) fn counted<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|idx| first.wrapping_add(idx as u8))
}

/// `value` below 2^30.
pub(crate) fn imm(value: u32) -> Imm {
    Imm::new(value).expect("below 2^30")
}

/// One IPv4 and one IPv6 socket.
pub(crate) fn address() -> Address {
    Address {
        engine: EngineId(counted(0x10)),
        sockets: vec!["192.0.2.7:4791".parse().expect("IPv4"), "[2001:db8::ff00:42:8329]:65535".parse().expect("IPv6")],
    }
}

/// One of each device.
pub(crate) fn descriptors() -> Vec<Descriptor> {
    let host =
        Descriptor { address: address(), region: 3, key: 0x0123_4567_89ab_cdef, nbytes: 1 << 32, device: Device::Host };
    let simulated = Address { engine: EngineId([0xff; 16]), sockets: Vec::new() };
    let cuda = Descriptor {
        address: simulated,
        region: u64::MAX,
        key: u64::MAX,
        nbytes: u64::MAX,
        device: Device::Cuda(counted(0xa0)),
    };
    vec![host, cuda]
}

/// One of each message, in the order of their numbers.
pub(crate) fn controls() -> Vec<Control> {
    vec![
        Control::Heartbeat { received: 300 },
        Control::Revoke { region: 3, key: 0x0123_4567_89ab_cdef, revoke: 1 },
        Control::Revoked { revoke: 1 },
        Control::RetireImm { imm: imm(Imm::FIRST_OF_ENGINE) },
        Control::ImmRetired { imm: imm(Imm::FIRST_OF_ENGINE) },
        Control::CountFailed { imm: imm(7) },
        Control::EarlyArrivalsFull { limit: 65536 },
        Control::EarlyArrivalsRoom,
        Control::Goodbye,
    ]
    .into_iter()
    .chain(rails().into_iter().map(|message| Control::Rails { library: NicLibrary::Verbs, message }))
    .chain([Control::Rails { library: NicLibrary::Libfabric, message: Rails::End { why: "no NIC is up".into() } }])
    .collect()
}

/// One of each message, in the order of their numbers.
fn rails() -> Vec<Rails> {
    vec![
        Rails::Offer { nics: vec![400, 200] },
        Rails::Call { rail: 1, attempt: 300, address: counted::<38>(0x50).to_vec() },
        Rails::Answered { rail: 1, attempt: 300, result: Ok(counted::<38>(0x70).to_vec()) },
        Rails::Answered { rail: 3, attempt: 1, result: Err("mlx5_0: no active port".into()) },
        Rails::Ready { rail: 1, attempt: 300 },
        Rails::Broken { rail: 1, attempt: 300 },
        Rails::End { why: "no rail could be made".into() },
        Rails::Bind { request: 7, region: 3, key: 0x0123_4567_89ab_cdef, nbytes: 1 << 40 },
        Rails::Bound { request: 7, result: Ok(vec![(0x7fff_0000_1000, 0x1234), (0, u64::MAX)]) },
        Rails::Bound { request: 8, result: Err(Refusal::Revoked) },
    ]
}

/// One of each message, in the order of their numbers.
pub(crate) fn locals() -> Vec<Local> {
    vec![
        Local::Join { engine: EngineId(counted(0x10)), token: counted(0x20), probe: (0x7fff_0000_1000, 42) },
        Local::Joined { probe: (0x7fff_0000_2000, 43), foreign: true },
        Local::Probed { foreign: false },
        Local::Import { request: 1, region: 3, key: 0x0123_4567_89ab_cdef },
        Local::Imported { request: 1, result: Ok(Access::Mapped { nbytes: 1 << 32 }) },
        Local::Imported { request: 2, result: Ok(Access::Foreign { address: 0x7fff_0000_0000, nbytes: 1 << 20 }) },
        Local::Imported { request: 3, result: Ok(Access::Bounce) },
        Local::Imported { request: 4, result: Err(Refusal::Closing) },
        Local::Kick,
    ]
}

/// One of each kind.
pub(crate) fn frames() -> Vec<Frame> {
    let write = Frame {
        flags: FLAG_LAST | FLAG_VERIFY,
        region: 3,
        key: 0x0123_4567_89ab_cdef,
        offset: 1 << 33,
        imm: Some((WireImm { imm: imm(7), quarters: 2 }, 1)),
        num_parts: 2,
        crc: 0xdead_beef,
        ..Frame::new(FrameKind::Write, 0x0011_2233_4455_6677, 1 << 20)
    };
    let pages = Frame {
        num_pages: 1000,
        page_bytes: 1024,
        imm: Some((WireImm { imm: imm(Imm::COUNT - 1), quarters: 4 }, 1000)),
        ..Frame::new(FrameKind::Pages, 2, 1_024_000)
    };
    vec![
        Frame::new(FrameKind::Control, 1, 1024),
        write,
        pages,
        Frame { flags: FLAG_LAST, ..Frame::new(FrameKind::Message, 3, 0) },
        Frame::new(FrameKind::Ack, 0, 48),
    ]
}

/// A caller that has a secret.
pub(crate) fn call() -> Call {
    Call::new(true, counted(0x40))
}

/// The seal of that caller's connection.
pub(crate) fn seal() -> Seal {
    Seal::new(b"open sesame", &call(), 2, &counted(0x60))
}

/// The listener's answer to that caller, and a refusal.
pub(crate) fn answers() -> Vec<Answer> {
    let answer = Answer { verdict: Verdict::Ok, version: 2, oldest: 1, nonce: counted(0x60), proof: seal().proof() };
    vec![answer.clone(), Answer { verdict: Verdict::Secret, nonce: [0; 32], proof: [0; 32], ..answer }]
}

fn host() -> Host {
    Host { boot_id: counted(0x80), pid: 4711, name: "node-1".into() }
}

/// One of each purpose.
pub(crate) fn hellos() -> Vec<Hello> {
    let hello = |purpose| Hello {
        address: address(),
        purpose,
        host: host(),
        transports: vec!["shm".into(), "tcp".into()],
        max_message_bytes: 1 << 20,
    };
    let callee = EngineId(counted(0x30));
    vec![
        hello(Purpose::Session { callee, resume: None }),
        hello(Purpose::Session { callee, resume: Some(Resume { token: counted(0x20), received: 300 }) }),
        hello(Purpose::Lane { token: counted(0x20), lane_idx: 1 }),
    ]
}

/// One of each outcome, in the order of their numbers.
pub(crate) fn welcomes() -> Vec<Welcome> {
    let accepted = Accepted {
        address: address(),
        host: host(),
        transports: vec!["tcp".into()],
        max_message_bytes: 1 << 20,
        token: counted(0x20),
        received: 300,
    };
    let rejections = [
        Rejection::OtherIncarnation,
        Rejection::Fenced,
        Rejection::Crossed,
        Rejection::NoSession,
        Rejection::Busy,
        Rejection::Closing,
    ];
    std::iter::once(Welcome::Accepted(Box::new(accepted))).chain(rejections.map(Welcome::Rejected)).collect()
}

/// Bytes that serialise as themselves (a tuple has no length before it), so
/// that a seal can be put on anything.
pub(crate) struct Raw<'a>(pub(crate) &'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(self.0.len())?;
        self.0.iter().try_for_each(|byte| tuple.serialize_element(byte))?;
        tuple.end()
    }
}

/// Gives a descriptor the checksum that its other bytes ask for.
pub(crate) fn repair_checksum(descriptor: &mut [u8]) {
    if let Some((header, body)) = descriptor.split_at_mut_checked(12) {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..8]);
        crc.update(body);
        header[8..].copy_from_slice(&crc.finalize().to_le_bytes());
    }
}

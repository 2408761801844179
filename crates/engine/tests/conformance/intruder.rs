//! Somebody who speaks the wire protocol and means no good: raw connections, byte by byte.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_engine::transports::shm::{ring_memory, LocalChannel};
use anyfabric_engine::transports::sys::{connect_local, memfd, send_with_fds, Fd, Mapping};
use anyfabric_engine::transports::Doorbell;
use anyfabric_engine::{Address, EngineId};
use anyfabric_transports::loopback::Random;
use anyfabric_wire::handshake::{
    Accepted, Answer, Call, Hello, Host, Purpose, Seal, Side, Welcome, ANSWER_BYTES, SEAL_BYTES,
};
use anyfabric_wire::{Control, Frame, FrameKind, Local, Refusal, FLAG_LAST};

use crate::harness::LONG;

/// A session with an engine, made by hand.
pub(crate) struct Intruder {
    pub(crate) stream: TcpStream,
    pub(crate) engine: EngineId,
    pub(crate) accepted: Accepted,
    sequence: u64,
}

/// How the intruder introduces itself.
pub(crate) struct Intro<'a> {
    pub(crate) secret: &'a [u8],
    /// Newest and oldest wire version.
    pub(crate) versions: Option<(u16, u16)>,
    pub(crate) transport: &'a str,
}

impl Default for Intro<'_> {
    fn default() -> Self {
        Self { secret: b"", versions: None, transport: "tcp" }
    }
}

/// A connection to the engine's listener.
pub(crate) fn dial(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.sockets[0]).expect("a connection");
    stream.set_nodelay(true).expect("an option");
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    stream.set_write_timeout(Some(LONG)).expect("a timeout");
    stream
}

/// Waits until the engine has closed the connection.
pub(crate) fn wait_for_end(stream: &mut TcpStream) {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("the engine keeps the connection")
            }
            Err(_) => return,
        }
    }
}

impl Intruder {
    pub(crate) fn meet(address: &Address, random: &mut Random) -> Self {
        Self::try_meet(address, random, &Intro::default()).expect("a session")
    }

    /// # Errors
    /// What the engine made of it.
    pub(crate) fn try_meet(address: &Address, random: &mut Random, intro: &Intro<'_>) -> io::Result<Self> {
        let mut knock = Knock::new(address, random, intro)?;
        let engine = knock.hello.address.engine;
        match knock.introduce()? {
            Welcome::Accepted(accepted) => Ok(Self { stream: knock.stream, engine, accepted: *accepted, sequence: 0 }),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    pub(crate) fn send(&mut self, frame: &Frame, payload: &[u8]) -> io::Result<()> {
        self.stream.write_all(&frame.encode())?;
        self.stream.write_all(payload)
    }

    /// A write of one frame, and what the engine makes of it; `None` when it drops the connection instead.
    pub(crate) fn write(&mut self, frame: Frame, payload: &[u8]) -> Option<Result<(), Refusal>> {
        let frame = Frame { flags: FLAG_LAST, nbytes: payload.len() as u32, ..frame };
        self.send(&frame, payload).ok()?;
        self.ack(frame.op)
    }

    pub(crate) fn control(&mut self, message: &Control) -> io::Result<()> {
        self.sequence += 1;
        send_control(&mut self.stream, self.sequence, message)
    }

    /// The acknowledgement of an operation; what else comes is skipped.
    pub(crate) fn ack(&mut self, op: u64) -> Option<Result<(), Refusal>> {
        loop {
            let mut header = [0; Frame::HEADER];
            self.stream.read_exact(&mut header).ok()?;
            let frame = Frame::decode(&header).expect("a frame of the engine's");
            let mut body = vec![0; frame.nbytes as usize];
            self.stream.read_exact(&mut body).ok()?;
            if frame.kind == FrameKind::Ack {
                for record in body.as_chunks::<{ Frame::ACK_BYTES }>().0 {
                    let (acknowledged, result) = Frame::decode_ack(record).expect("an acknowledgement");
                    if acknowledged == op {
                        return Some(result);
                    }
                }
            }
        }
    }

    /// The Unix socket and rings of a same-host session; `ring` and `doorbell` are ours.
    pub(crate) fn join(&self, address: &Address) -> io::Result<Rings> {
        let (ring_fd, ring) = ring_memory()?;
        let doorbell = memfd(c"doorbell", Doorbell::BYTES)?;
        let channel = self.join_with(address, &[&ring_fd, &doorbell])?;
        let until = std::time::Instant::now() + LONG;
        loop {
            match channel.receive()? {
                Some((Local::Joined { .. }, fds)) => {
                    let theirs = Mapping::shared(&fds[0], ring.len(), false)?;
                    channel.send(&Local::Probed { foreign: false }, None)?;
                    return Ok(Rings { channel, ours: ring, theirs: Arc::new(theirs) });
                }
                Some(other) => return Err(io::Error::other(format!("{other:?}"))),
                None if std::time::Instant::now() > until => return Err(io::ErrorKind::TimedOut.into()),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// The same with descriptors of one's choice.
    pub(crate) fn join_with(&self, address: &Address, fds: &[&Fd]) -> io::Result<LocalChannel> {
        let socket = connect_local(&format!("anyfabric/{}", address.engine))?;
        let join = Local::Join { engine: self.engine, token: self.accepted.token, probe: (0, 0) };
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        send_with_fds(&socket, &join.encode(), &fds)?;
        Ok(LocalChannel::new(socket))
    }
}

/// A message on a control connection, the `sequence`-th.
///
/// # Errors
/// The connection's.
pub(crate) fn send_control(stream: &mut TcpStream, sequence: u64, message: &Control) -> io::Result<()> {
    let bytes = message.encode();
    stream.write_all(&Frame::new(FrameKind::Control, sequence, bytes.len() as u32).encode())?;
    stream.write_all(&bytes)
}

/// Somebody who has called and not said yet who he is.
pub(crate) struct Knock {
    pub(crate) stream: TcpStream,
    pub(crate) seal: Seal,
    pub(crate) hello: Hello,
}

impl Knock {
    /// # Errors
    /// What the engine made of it.
    pub(crate) fn new(address: &Address, random: &mut Random, intro: &Intro<'_>) -> io::Result<Self> {
        let (stream, call) = dial_and_call(address, random, intro)?;
        Self::answered(stream, &call, address, random, intro)
    }

    /// After a call that was sent before.
    ///
    /// # Errors
    /// What the engine made of it.
    pub(crate) fn answered(
        mut stream: TcpStream,
        call: &Call,
        address: &Address,
        random: &mut Random,
        intro: &Intro<'_>,
    ) -> io::Result<Self> {
        let mut bytes = [0; ANSWER_BYTES];
        stream.read_exact(&mut bytes)?;
        let answer = Answer::decode(&bytes).map_err(io::Error::other)?;
        let version = answer.agreed().map_err(io::Error::other)?;
        let seal = Seal::new(intro.secret, call, version, &answer.nonce);
        let mut engine = EngineId([0; 16]);
        engine.0.copy_from_slice(&random.bytes(16));
        let hello = Hello {
            address: Address { engine, sockets: vec![] },
            purpose: Purpose::Session { callee: address.engine, resume: None },
            host: this_host(),
            transports: vec![intro.transport.into()],
            max_message_bytes: 1 << 16,
        };
        Ok(Self { stream, seal, hello })
    }

    /// Introduces himself.
    ///
    /// # Errors
    /// The connection's; or no answer under the right proof.
    pub(crate) fn introduce(&mut self) -> io::Result<Welcome> {
        let Self { stream, seal, hello } = self;
        stream.write_all(&seal.seal(Side::Caller, hello))?;
        let mut header = [0; SEAL_BYTES];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; Seal::body_bytes(&header).map_err(io::Error::other)?];
        stream.read_exact(&mut body)?;
        let welcome = seal.open(Side::Listener, &header, &body).map_err(io::Error::other)?;
        welcome.ok_or_else(|| io::Error::other("the proof is wrong"))
    }

    /// Introduces himself, and is gone before anybody can answer.
    pub(crate) fn introduce_and_vanish(mut self) -> io::Result<()> {
        self.stream.write_all(&self.seal.seal(Side::Caller, &self.hello))?;
        reset_on_close(&self.stream);
        Ok(())
    }
}

/// When the stream is closed its other end is reset, and not only told of an end.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let (value, len) = ((&raw const linger).cast(), size_of::<libc::linger>() as libc::socklen_t);
    // SAFETY: an option of our own socket.
    unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
}

/// What a joined intruder holds.
pub(crate) struct Rings {
    pub(crate) channel: LocalChannel,
    pub(crate) ours: Arc<Mapping>,
    pub(crate) theirs: Arc<Mapping>,
}

impl Rings {
    /// Makes the engine look at the ring.
    pub(crate) fn kick(&self) {
        self.channel.kick();
    }
}

/// A connection on which the first bytes were sent, and nothing was read.
///
/// # Errors
/// The connection's.
pub(crate) fn dial_and_call(
    address: &Address,
    random: &mut Random,
    intro: &Intro<'_>,
) -> io::Result<(TcpStream, Call)> {
    let (mut stream, call) = (dial(address), call(random, intro));
    stream.write_all(&call.encode())?;
    Ok((stream, call))
}

/// The first 48 bytes of a connection.
pub(crate) fn call(random: &mut Random, intro: &Intro<'_>) -> Call {
    let mut nonce = [0; 32];
    nonce.copy_from_slice(&random.bytes(32));
    let call = Call::new(!intro.secret.is_empty(), nonce);
    Call { versions: intro.versions.unwrap_or(call.versions), ..call }
}

pub(crate) fn this_host() -> Host {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    let mut boot_id = [0; 16];
    for (byte, pair) in boot_id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    Host { boot_id, pid: 1, name: "intruder".into() }
}

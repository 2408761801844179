//! Handshakes on TCP connections, one step at a time and never blocking.
//!
//! A [`Meet`] owns a connection until both sides have introduced themselves;
//! then the engine decides what becomes of it. Every handshake has a deadline,
//! reads no byte more than its next part has, and costs a listener nothing but
//! a descriptor and a few hundred bytes: that is all that a port scanner, a
//! slow-loris or a half-open connection can take.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use anyfabric_transports::sys::Fd;
use anyfabric_wire::handshake::{
    Answer, Call, Hello, Seal, Side, Verdict, Welcome, ANSWER_BYTES, CALL_BYTES, SEAL_BYTES,
};
use anyfabric_wire::{WireError, OLDEST_VERSION, VERSION};
use socket2::{Domain, SockRef, Socket, Type};

use crate::peer::Peer;

/// A connection whose ends do not know each other yet.
pub(crate) struct Meet {
    /// A child of a fork closes it, also in the middle of a handshake.
    stream: Fd,
    secret: Arc<[u8]>,
    stage: Stage,
    buffer: Vec<u8>,
    wanted: usize,
    pub(crate) deadline_ns: u64,
    /// What the call is for; `None` on the listening side.
    pub(crate) call: Option<Calling>,
}

/// A call that we made.
pub(crate) struct Calling {
    pub(crate) peer: Arc<Peer>,
    pub(crate) hello: Hello,
    /// Where.
    pub(crate) to: Option<SocketAddr>,
    /// Further addresses to try.
    pub(crate) others: Vec<SocketAddr>,
    /// What came of those before.
    pub(crate) failed: Option<MeetError>,
}

enum Stage {
    Connecting(Call),
    AwaitAnswer(Call),
    AwaitWelcome(Seal, u16),
    AwaitWelcomeBody(Seal, u16, [u8; SEAL_BYTES]),
    AwaitCall,
    AwaitHello(Seal, u16),
    AwaitHelloBody(Seal, u16, [u8; SEAL_BYTES]),
    Over,
}

/// What a step came to.
pub(crate) enum Progress {
    /// Nothing yet.
    Waiting,
    /// The caller has introduced itself; [`Meet::welcome`] answers.
    Introduced(Hello, u16),
    /// The listener has answered.
    Welcomed(Welcome, u16),
}

/// Why a handshake ended.
#[derive(Debug)]
pub(crate) enum MeetError {
    /// The connection broke or could not be made.
    Io(io::Error),
    /// The other side speaks something else.
    Wire(WireError),
    /// No common secret.
    Secret(&'static str),
    /// The listener has no room.
    Busy,
    /// It is another engine. Hosts have addresses that others have too: those of loopback and of bridges.
    Stranger,
}

impl MeetError {
    /// Nobody said anything for as long as a handshake may take.
    pub(crate) fn silence() -> Self {
        Self::Io(io::Error::new(io::ErrorKind::TimedOut, "no answer to the handshake"))
    }

    /// Whether the other side may yet answer: it is busy, stopped, or out of reach.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::TimedOut)
    }

    /// Of several addresses that failed the one that says most of the engine, of those that say as much the first.
    pub(crate) fn after(self, before: Option<Self>) -> Self {
        match before {
            Some(before) if before.weight() >= self.weight() => before,
            _ => self,
        }
    }

    /// The engine has spoken; it may yet speak; it is not there; nobody can tell; that was another host's address.
    fn weight(&self) -> u8 {
        match self {
            Self::Secret(_) | Self::Wire(_) | Self::Busy => 4,
            Self::Io(_) if self.is_silence() => 3,
            Self::Io(_) if self.is_refusal() => 2,
            Self::Io(_) => 1,
            Self::Stranger => 0,
        }
    }

    /// Whether nobody listens there.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

impl From<io::Error> for MeetError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<WireError> for MeetError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl std::fmt::Display for MeetError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("the other side closed the connection during the handshake")
            }
            Self::Io(error) => error.fmt(f),
            Self::Wire(error) => error.fmt(f),
            Self::Secret(why) => f.write_str(why),
            Self::Busy => f.write_str("the other engine has no room for another peer"),
            Self::Stranger => f.write_str("another engine lives at its address now"),
        }
    }
}

impl Meet {
    /// Begins a call, of which the caller says what it is for; the connection is being made when this returns.
    pub(crate) fn dial(to: SocketAddr, secret: Arc<[u8]>, deadline_ns: u64) -> Result<Self, MeetError> {
        let stream = Fd::new(Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), None)?);
        match SockRef::from(&*stream.as_stream()).connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let call = Call::new(!secret.is_empty(), random()?);
        Ok(Self {
            stream,
            secret,
            stage: Stage::Connecting(call),
            buffer: Vec::new(),
            wanted: 0,
            deadline_ns,
            call: None,
        })
    }

    /// Takes an accepted connection.
    pub(crate) fn accept(stream: Fd, secret: Arc<[u8]>, deadline_ns: u64) -> Result<Self, MeetError> {
        stream.as_stream().set_nodelay(true)?;
        Ok(Self {
            stream,
            secret,
            stage: Stage::AwaitCall,
            buffer: Vec::new(),
            wanted: CALL_BYTES,
            deadline_ns,
            call: None,
        })
    }

    pub(crate) fn stream(&self) -> &Fd {
        &self.stream
    }

    pub(crate) fn into_stream(self) -> Fd {
        self.stream
    }

    /// Whether a caller has said that he is an engine.
    pub(crate) fn has_heard(&self) -> bool {
        !matches!(self.stage, Stage::AwaitCall)
    }

    /// Whether room to write is waited for: the connection is being made.
    pub(crate) fn is_connecting(&self) -> bool {
        matches!(self.stage, Stage::Connecting(_))
    }

    /// Goes on as far as the connection allows.
    pub(crate) fn step(&mut self) -> Result<Progress, MeetError> {
        if let Stage::Connecting(call) = &self.stage {
            let stream = self.stream.as_stream();
            if let Some(error) = stream.take_error()? {
                return Err(error.into());
            }
            match stream.peer_addr() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(Progress::Waiting),
                Err(error) => return Err(error.into()),
            }
            stream.set_nodelay(true)?;
            drop(stream);
            let call = call.clone();
            self.send(&call.encode())?;
            self.await_next(Stage::AwaitAnswer(call), ANSWER_BYTES);
        }
        while self.fill()? {
            let progress = self.take_part()?;
            if !matches!(progress, Progress::Waiting) {
                return Ok(progress);
            }
        }
        Ok(Progress::Waiting)
    }

    /// Answers the caller; the handshake is over.
    pub(crate) fn welcome(&mut self, welcome: &Welcome) -> Result<(), MeetError> {
        if let Stage::AwaitHelloBody(seal, ..) = std::mem::replace(&mut self.stage, Stage::Over) {
            let bytes = seal.seal(Side::Listener, welcome);
            self.send(&bytes)?;
        }
        Ok(())
    }

    fn take_part(&mut self) -> Result<Progress, MeetError> {
        let part = std::mem::take(&mut self.buffer);
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::AwaitAnswer(call) => self.on_answer(call, &part)?,
            Stage::AwaitCall => self.on_call(&part)?,
            Stage::AwaitWelcome(seal, version) => {
                let header = exactly(&part)?;
                let nbytes = Seal::body_bytes(&header)?;
                self.await_next(Stage::AwaitWelcomeBody(seal, version, header), nbytes);
            }
            Stage::AwaitHello(seal, version) => {
                let header = exactly(&part)?;
                let nbytes = Seal::body_bytes(&header)?;
                self.await_next(Stage::AwaitHelloBody(seal, version, header), nbytes);
            }
            Stage::AwaitWelcomeBody(seal, version, header) => {
                let welcome = seal.open(Side::Listener, &header, &part)?.ok_or(WRONG_SECRET)?;
                return Ok(Progress::Welcomed(welcome, version));
            }
            Stage::AwaitHelloBody(seal, version, header) => {
                let hello = seal.open(Side::Caller, &header, &part)?.ok_or(WRONG_SECRET)?;
                self.stage = Stage::AwaitHelloBody(seal, version, header);
                return Ok(Progress::Introduced(hello, version));
            }
            Stage::Connecting(_) | Stage::Over => {}
        }
        Ok(Progress::Waiting)
    }

    fn on_call(&mut self, part: &[u8]) -> Result<(), MeetError> {
        let call = Call::decode(&exactly(part)?)?;
        let nonce = random()?;
        let agreed = call.agree();
        let verdict = match agreed {
            Err(_) => Verdict::Version,
            Ok(_) if call.secret == self.secret.is_empty() => Verdict::Secret,
            Ok(_) => Verdict::Ok,
        };
        let version = *agreed.as_ref().unwrap_or(&VERSION);
        let seal = Seal::new(&self.secret, &call, version, &nonce);
        let answer = Answer { verdict, version, oldest: OLDEST_VERSION, nonce, proof: seal.proof() };
        self.send(&answer.encode())?;
        agreed?;
        if verdict == Verdict::Secret {
            return Err(MeetError::Secret("the caller has no secret and we have one, or the reverse"));
        }
        self.await_next(Stage::AwaitHello(seal, version), SEAL_BYTES);
        Ok(())
    }

    fn on_answer(&mut self, call: Call, part: &[u8]) -> Result<(), MeetError> {
        let answer = Answer::decode(&exactly(part)?)?;
        match answer.verdict {
            Verdict::Ok | Verdict::Version => {}
            Verdict::Secret => {
                return Err(MeetError::Secret("one side has a cluster secret and the other has none"));
            }
            Verdict::Busy => return Err(MeetError::Busy),
        }
        let version = answer.agreed()?;
        let seal = Seal::new(&self.secret, &call, version, &answer.nonce);
        if !seal.check_proof(&answer.proof) {
            return Err(WRONG_SECRET);
        }
        if let Some(calling) = &self.call {
            let bytes = seal.seal(Side::Caller, &calling.hello);
            self.send(&bytes)?;
        }
        self.await_next(Stage::AwaitWelcome(seal, version), SEAL_BYTES);
        Ok(())
    }

    fn await_next(&mut self, stage: Stage, wanted: usize) {
        self.stage = stage;
        self.wanted = wanted;
    }

    /// Reads up to the end of the next part; true when it is whole.
    fn fill(&mut self) -> Result<bool, MeetError> {
        if matches!(self.stage, Stage::Over | Stage::Connecting(_)) {
            return Ok(false);
        }
        while self.buffer.len() < self.wanted {
            let mut chunk = [0; 512];
            let room = (self.wanted - self.buffer.len()).min(chunk.len());
            match (&*self.stream.as_stream()).read(&mut chunk[..room]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => self.buffer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if self.wanted == CALL_BYTES && !MAGIC.starts_with(&self.buffer[..self.buffer.len().min(MAGIC.len())]) {
                // Whoever does not begin like an engine is not waited for.
                return Err(WireError::magic("a call of an engine", "ANYF", &self.buffer).into());
            }
        }
        Ok(true)
    }

    /// Handshake messages fit every socket buffer; a full one is a hostile peer.
    fn send(&mut self, bytes: &[u8]) -> Result<(), MeetError> {
        Ok((&*self.stream.as_stream()).write_all(bytes)?)
    }
}

/// Random bytes of the system.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

fn exactly<const N: usize>(part: &[u8]) -> Result<[u8; N], MeetError> {
    part.try_into().map_err(|_| MeetError::Io(io::Error::from(io::ErrorKind::InvalidData)))
}

const WRONG_SECRET: MeetError = MeetError::Secret("the other side does not hold the same cluster secret");
const MAGIC: &[u8] = b"ANYF";

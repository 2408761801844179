//! What a test asks of a peer process, and what that answers.
//!
//! Over the socket that is the peer's standard input: a length of four bytes, then postcard. One answer to each
//! question, in order.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyfabric_engine::transports::libfabric::FabricSettings;
use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Config, Error, QueueFull};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::links::number;

/// The settings of an engine that tests choose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) transports: Vec<String>,
    pub(crate) streams: usize,
    pub(crate) nics: Vec<String>,
    /// Of libfabric.
    pub(crate) provider: Option<String>,
    pub(crate) isolate: bool,
    pub(crate) secret: Option<Vec<u8>>,
    pub(crate) listen: String,
    pub(crate) heartbeat: Duration,
    pub(crate) heartbeats_lost: u32,
    pub(crate) timeout: Duration,
    pub(crate) queue_depth: usize,
    pub(crate) raise_when_full: bool,
}

impl Settings {
    /// `ANYFABRIC_TEST_RETRIES` sets how often verbs sends again.
    pub(crate) fn config(&self) -> Config {
        let verbs = VerbsSettings::default();
        let retry_count = number("ANYFABRIC_TEST_RETRIES", verbs.retry_count.into()).try_into().unwrap();
        Config {
            verbs: VerbsSettings { retry_count, ..verbs },
            transports: self.transports.clone(),
            tcp_streams: self.streams,
            nics: self.nics.clone(),
            libfabric: FabricSettings { provider: self.provider.clone(), ..FabricSettings::default() },
            isolate: self.isolate,
            secret: self.secret.clone(),
            listen: self.listen.clone(),
            heartbeat: self.heartbeat,
            heartbeats_lost: self.heartbeats_lost,
            timeout: self.timeout,
            queue_depth: self.queue_depth,
            queue_full: if self.raise_when_full { QueueFull::Raise } else { QueueFull::Block },
            ..Config::default()
        }
    }
}

/// Who owns the memory of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Memory {
    /// `Engine::allocate`.
    Allocated,
    /// `Engine::register` of memory of the test's own.
    Foreign,
    /// The same, and peers may not write into it.
    ReadOnly,
    /// The same few pages again and again: as long as one likes for next to no memory. See [`crate::alias`].
    Alias,
}

/// How an operation of the peer's is to be made.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct How {
    pub(crate) imm: Option<u32>,
    pub(crate) verify: bool,
    pub(crate) timeout: Option<Duration>,
}

impl How {
    pub(crate) fn counted(imm: u32) -> Self {
        Self { imm: Some(imm), ..Self::default() }
    }
}

/// Numbers of engines, regions, counters and transfers are the peer's own, from zero in order of their making.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Ask {
    Start(Settings),
    Allocate {
        engine: usize,
        nbytes: u64,
        memory: Memory,
    },
    Descriptor {
        region: usize,
    },
    Fill {
        region: usize,
        at: u64,
        nbytes: u64,
        seed: u64,
    },
    Check {
        region: usize,
        at: u64,
        nbytes: u64,
        seed: u64,
        base: u64,
    },
    /// Pages of `nbytes`: each where it is, and where in the pattern it comes from.
    CheckPages {
        region: usize,
        pages: Vec<(u64, u64)>,
        nbytes: u64,
        seed: u64,
    },
    Read {
        region: usize,
        at: u64,
        nbytes: u64,
    },
    Connect {
        engine: usize,
        address: String,
    },
    Write {
        region: usize,
        at: u64,
        nbytes: u64,
        to: Vec<u8>,
        to_at: u64,
        how: How,
    },
    WritePages {
        region: usize,
        pages: Vec<u32>,
        to: Vec<u8>,
        to_pages: Vec<u32>,
        page_bytes: u64,
        how: How,
    },
    /// One write of 8 bytes for each of `num_imms` immediates; the number that went well, then the first error.
    Flood {
        region: usize,
        to: Vec<u8>,
        first_imm: u32,
        num_imms: u32,
    },
    Barrier {
        engine: usize,
        peers: Vec<String>,
        imm: u32,
    },
    Send {
        engine: usize,
        to: String,
        bytes: Vec<u8>,
    },
    Receive {
        engine: usize,
        timeout: Duration,
    },
    Wait {
        transfer: usize,
        timeout: Duration,
    },
    State {
        transfer: usize,
    },
    Open {
        engine: usize,
        imm: Option<u32>,
        sources: Vec<String>,
    },
    WaitCount {
        counter: usize,
        n: u64,
        timeout: Duration,
    },
    Count {
        counter: usize,
    },
    CloseCounter {
        counter: usize,
    },
    Revoke {
        region: usize,
        timeout: Duration,
    },
    CloseRegion {
        region: usize,
        timeout: Duration,
    },
    CloseEngine {
        engine: usize,
        timeout: Duration,
    },
    /// Threads of the peer write `nbytes` from `at` to `to_at` again and again, counted by `imm`, until they are told
    /// to stop or a write fails.
    Hammer {
        region: usize,
        nbytes: u64,
        to: Vec<u8>,
        to_at: u64,
        imm: Option<u32>,
        num_threads: usize,
    },
    HammerEnd,
    /// Forks; the child uses what it inherited and says what it got.
    Fork {
        engine: usize,
        region: usize,
    },
    /// Transport, NICs and reason, with bars between.
    Path {
        engine: usize,
        address: String,
    },
    /// Gives up the right to touch other processes' memory, for good.
    Forbid(Forbidden),
    /// Leaves the process so many bytes of addresses.
    LimitMemory {
        nbytes: u64,
    },
    /// Allocates, or says why not.
    TryAllocate {
        engine: usize,
        nbytes: u64,
    },
    /// Lowers the soft limit of descriptors.
    LimitFiles {
        soft: u64,
    },
    /// Opens descriptors until none is left, or closes them again.
    TakeFiles,
    GiveFiles,
    NumFiles,
    /// Peers that an engine lists and has not met.
    NumStrangers {
        engine: usize,
    },
    /// Packets with data that came over TCP.
    NumPackets,
    Exit,
}

/// What a machine may forbid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Forbidden {
    /// A filter of system calls: to write.
    Write,
    /// A filter of system calls: to read too.
    ReadAndWrite,
    /// The same: to take callers in.
    Accept,
    /// To trace others, as Yama and other security modules do.
    Trace,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Id(usize),
    Count(u64),
    Text(String),
    Bytes(Vec<u8>),
    /// Number and descriptor of a region.
    Region(usize, Vec<u8>),
    /// First byte that is wrong.
    Checked(Option<u64>),
    State {
        done: bool,
        quiesced: bool,
        error: Option<Fault>,
    },
    Flooded(u32, Option<Fault>),
    Failed(Fault),
}

/// An error of the peer's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) code: String,
    pub(crate) message: String,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self { code: error.code.as_str().into(), message: error.message }
    }
}

pub(crate) fn tell<T: Serialize>(stream: &mut UnixStream, what: &T) -> std::io::Result<()> {
    let body = postcard::to_stdvec(what).map_err(std::io::Error::other)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    stream.write_all(&bytes)
}

pub(crate) fn hear<T: DeserializeOwned>(stream: &mut UnixStream) -> std::io::Result<T> {
    let mut header = [0; 4];
    stream.read_exact(&mut header)?;
    let mut body = vec![0; u32::from_le_bytes(header) as usize];
    stream.read_exact(&mut body)?;
    postcard::from_bytes(&body).map_err(std::io::Error::other)
}

//! Peer processes, as a test sees them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyfabric_engine::{Address, Code, Engine, Error, Region, Remote, Transfer};

use crate::ask::{hear, tell, Answer, Ask, Fault, How, Memory, Settings};
use crate::fabric::Fabric;
use crate::pattern;
use crate::peer::ROLE;

/// Longer than anything takes on a busy machine, shorter than a test's own deadline.
pub(crate) const LONG: Duration = Duration::from_secs(40);

/// A process of this binary that does what it is told; killed on drop.
pub(crate) struct Peer {
    child: Child,
    stream: UnixStream,
    /// Of its first engine.
    pub(crate) address: Address,
}

/// A peer's region, as the peer numbers it.
pub(crate) struct PeerRegion {
    pub(crate) idx: usize,
    pub(crate) descriptor: Vec<u8>,
}

impl PeerRegion {
    pub(crate) fn remote(&self) -> Remote {
        Remote::decode(&self.descriptor).expect("a descriptor")
    }
}

impl Peer {
    /// Starts a process with one engine.
    pub(crate) fn start(settings: &Settings) -> Self {
        let mut peer = Self::bare();
        peer.address = peer.start_engine(settings);
        peer
    }

    /// Starts a process without an engine; its `address` is a placeholder.
    pub(crate) fn bare() -> Self {
        Self::bare_after(|| Ok(())).expect("a peer process")
    }

    /// The same, after the new process has prepared itself. What it calls must be allowed between `fork` and `exec`.
    ///
    /// # Errors
    /// What the preparation returned.
    pub(crate) fn bare_after(
        mut prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (stream, theirs) = UnixStream::pair().expect("a socket pair");
        stream.set_read_timeout(Some(LONG + Duration::from_secs(10))).expect("a timeout");
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command
            .args(["--exact", "peer::process", "--ignored", "--nocapture", "--test-threads=1", "--quiet"])
            .env(ROLE, std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        let prepare = move || {
            // libfabric opens sockets that an exec does not close: those of other tests are not the new process's.
            // SAFETY: only flags of descriptors change; a kernel that does not know the call leaves them.
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
            prepare()
        };
        // SAFETY: the caller keeps to what is allowed there: system calls.
        let child = unsafe { command.pre_exec(prepare) }.spawn()?;
        let nobody = "af:///00000000000000000000000000000000".parse().expect("an address");
        Ok(Self { child, stream, address: nobody })
    }

    pub(crate) fn start_engine(&mut self, settings: &Settings) -> Address {
        match self.ask(Ask::Start(settings.clone())) {
            Answer::Text(address) => address.parse().expect("an address"),
            other => panic!("the peer could not start an engine: {other:?}"),
        }
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask(&mut self, ask: Ask) -> Answer {
        let what = format!("{ask:?}");
        self.tell(&ask);
        hear(&mut self.stream).unwrap_or_else(|error| panic!("no answer from the peer to {what:.200}: {error}"))
    }

    /// Asks; [`Peer::answer`] takes the answer.
    pub(crate) fn tell(&mut self, ask: &Ask) {
        tell(&mut self.stream, ask).expect("the peer lives");
    }

    pub(crate) fn answer(&mut self) -> Answer {
        hear(&mut self.stream).expect("an answer from the peer")
    }

    fn done(&mut self, ask: Ask) -> Result<(), Fault> {
        match self.ask(ask) {
            Answer::Done => Ok(()),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    fn id(&mut self, ask: Ask) -> Result<usize, Fault> {
        match self.ask(ask) {
            Answer::Id(id) => Ok(id),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn count(&mut self, ask: Ask) -> u64 {
        match self.ask(ask) {
            Answer::Count(count) => count,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    // ---- regions -------------------------------------------------------------------------------

    pub(crate) fn region(&mut self, nbytes: u64, memory: Memory) -> PeerRegion {
        match self.ask(Ask::Allocate { engine: 0, nbytes, memory }) {
            Answer::Region(idx, descriptor) => PeerRegion { idx, descriptor },
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn fill(&mut self, region: &PeerRegion, (at, nbytes): (u64, u64), seed: u64) {
        self.done(Ask::Fill { region: region.idx, at, nbytes, seed }).expect("filled");
    }

    /// Where the peer's bytes differ from the seed's pattern beginning at `base`.
    pub(crate) fn mismatch(
        &mut self,
        region: &PeerRegion,
        (at, nbytes): (u64, u64),
        seed: u64,
        base: u64,
    ) -> Option<u64> {
        match self.ask(Ask::Check { region: region.idx, at, nbytes, seed, base }) {
            Answer::Checked(first) => first,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// The first page that differs; of each, where it is and where in the pattern it comes from.
    pub(crate) fn page_mismatch(
        &mut self,
        region: &PeerRegion,
        pages: Vec<(u64, u64)>,
        nbytes: u64,
        seed: u64,
    ) -> Option<u64> {
        match self.ask(Ask::CheckPages { region: region.idx, pages, nbytes, seed }) {
            Answer::Checked(first) => first,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn read(&mut self, region: &PeerRegion, at: u64, nbytes: u64) -> Vec<u8> {
        match self.ask(Ask::Read { region: region.idx, at, nbytes }) {
            Answer::Bytes(bytes) => bytes,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    // ---- operations ----------------------------------------------------------------------------

    pub(crate) fn write(
        &mut self,
        region: &PeerRegion,
        (at, nbytes): (u64, u64),
        to: &Region,
        to_at: u64,
        how: How,
    ) -> Result<usize, Fault> {
        let to = to.descriptor().expect("a descriptor").encode();
        self.id(Ask::Write { region: region.idx, at, nbytes, to, to_at, how })
    }

    pub(crate) fn write_pages(
        &mut self,
        region: &PeerRegion,
        pages: Vec<u32>,
        (to, to_pages): (&Region, Vec<u32>),
        page_bytes: u64,
        how: How,
    ) -> Result<usize, Fault> {
        let to = to.descriptor().expect("a descriptor").encode();
        self.id(Ask::WritePages { region: region.idx, pages, to, to_pages, page_bytes, how })
    }

    pub(crate) fn barrier(&mut self, peers: &[&Address], imm: u32) -> Result<usize, Fault> {
        let peers = peers.iter().map(ToString::to_string).collect();
        self.id(Ask::Barrier { engine: 0, peers, imm })
    }

    pub(crate) fn wait(&mut self, transfer: usize) -> Result<(), Fault> {
        self.done(Ask::Wait { transfer, timeout: LONG })
    }

    pub(crate) fn send(&mut self, to: &Address, bytes: &[u8]) -> Result<(), Fault> {
        let transfer = self.id(Ask::Send { engine: 0, to: to.to_string(), bytes: bytes.to_vec() })?;
        self.wait(transfer)
    }

    pub(crate) fn receive(&mut self) -> Result<Vec<u8>, Fault> {
        match self.ask(Ask::Receive { engine: 0, timeout: LONG }) {
            Answer::Bytes(bytes) => Ok(bytes),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    // ---- counters ------------------------------------------------------------------------------

    pub(crate) fn open(&mut self, imm: u32, sources: &[&Address]) -> usize {
        let sources = sources.iter().map(ToString::to_string).collect();
        self.id(Ask::Open { engine: 0, imm: Some(imm), sources }).expect("a counter")
    }

    pub(crate) fn wait_count(&mut self, counter: usize, n: u64) -> Result<(), Fault> {
        self.done(Ask::WaitCount { counter, n, timeout: LONG })
    }

    pub(crate) fn value(&mut self, counter: usize) -> u64 {
        self.count(Ask::Count { counter })
    }

    // ---- the process ---------------------------------------------------------------------------

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Stops every thread of it; returns when they stand.
    pub(crate) fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid());
        eventually("the peer stands", || {
            let Ok(list) = std::fs::read_dir(&tasks) else { return false };
            list.filter_map(Result::ok).all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with(['T', 't']))
            })
        });
    }

    pub(crate) fn go_on(&self) {
        self.signal(libc::SIGCONT);
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether the process lives.
    pub(crate) fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: our own child, which has not been waited for: its number is not another's.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0, "a signal to our own child");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The test's engine with a region, and a peer with one.
pub(crate) struct Pair {
    pub(crate) engine: Engine,
    pub(crate) region: Region,
    pub(crate) peer: Peer,
    pub(crate) there: PeerRegion,
    pub(crate) remote: Remote,
}

impl Pair {
    pub(crate) fn new(fabric: &Fabric, nbytes: u64) -> Self {
        Self::with(fabric, nbytes, |_| {})
    }

    /// With settings that differ from the fabric's, on both sides.
    pub(crate) fn with(fabric: &Fabric, nbytes: u64, change: impl Fn(&mut Settings)) -> Self {
        let (mut here, mut there) = (fabric.here(), fabric.there());
        change(&mut here);
        change(&mut there);
        let mut peer = Peer::start(&there);
        let engine = Engine::new(here.config()).expect("an engine");
        let region = fabric.region(&engine, nbytes);
        let there = peer.region(nbytes, fabric.memory);
        let remote = there.remote();
        Self { engine, region, peer, there, remote }
    }

    /// With the path made, over the fabric's transport.
    pub(crate) fn connected(fabric: &Fabric, nbytes: u64) -> Self {
        let pair = Self::new(fabric, nbytes);
        pair.connect(fabric);
        pair
    }

    pub(crate) fn connect(&self, fabric: &Fabric) {
        self.engine.connect(&self.peer.address, Some(LONG)).expect("a path");
        assert_eq!(self.engine.path(&self.peer.address).transport, fabric.transport);
    }

    pub(crate) fn bytes(&self) -> &'static mut [u8] {
        bytes(&self.region)
    }

    /// What became of writes of a slot each, counted as [`slot_imm`] says: those that were reported done are there and
    /// counted once, each of the others is counted whole or fails its counter.
    pub(crate) fn check_slots(&mut self, (num_slots, slot_bytes): (u64, u64), seed: u64, done: &[u64]) {
        for slot in 0..num_slots {
            let counter = self.peer.open(slot_imm(slot), &[]);
            let at = slot * slot_bytes;
            let whole = self.peer.mismatch(&self.there, (at, slot_bytes), seed, at).is_none();
            if done.contains(&slot) {
                self.peer.wait_count(counter, 1).unwrap();
                assert!(whole, "slot {slot} was reported done");
            } else if self.peer.value(counter) == 1 {
                assert!(whole, "slot {slot} was counted");
            } else {
                assert_fault(self.peer.wait_count(counter, 1), Code::TransferFailed);
            }
            assert!(self.peer.value(counter) <= 1, "slot {slot} was counted twice");
        }
    }
}

/// What counts the write of a slot; immediates below are for others.
pub(crate) fn slot_imm(slot: u64) -> u32 {
    100 + slot as u32
}

/// Which of them were done, once each has ended and quiesced; the others failed with their connection.
pub(crate) fn went_well(transfers: Vec<(u64, Transfer)>) -> Vec<u64> {
    let ends = transfers.into_iter().map(|(slot, transfer)| {
        let is_done = match transfer.wait(Some(LONG)) {
            Ok(()) => true,
            Err(error) if error.code == Code::ConnectionBroken => false,
            Err(error) => panic!("slot {slot}: {error}"),
        };
        transfer.wait_quiesced(Some(LONG)).unwrap();
        is_done.then_some(slot)
    });
    ends.flatten().collect()
}

/// A region's bytes. The caller keeps the region; races on them are what is tested.
pub(crate) fn bytes(region: &Region) -> &'static mut [u8] {
    // SAFETY: inside the region, which the test keeps while it looks.
    unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), region.nbytes() as usize) }
}

pub(crate) fn fill(region: &Region, seed: u64) {
    pattern::fill(bytes(region), seed, 0);
}

/// Waits until large writes are split as far as they will be: streams are made after the path.
pub(crate) fn wait_for_streams(engine: &Engine, peer: &Address, fabric: &Fabric) {
    let manner = match fabric.streams.0 {
        _ if !fabric.is_tcp() => return,
        1 => "1 stream".to_owned(),
        num_streams => format!("{num_streams} streams"),
    };
    eventually("every stream stands", || engine.path(peer).nics == [&*manner]);
}

/// Waits until something becomes true, with a bound.
pub(crate) fn eventually(what: &str, is_true: impl FnMut() -> bool) {
    eventually_within(LONG, what, is_true);
}

pub(crate) fn eventually_within(timeout: Duration, what: &str, mut is_true: impl FnMut() -> bool) {
    let until = Instant::now() + timeout;
    while !is_true() {
        assert!(Instant::now() < until, "not within {timeout:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// That a result is an error of that kind.
#[track_caller]
pub(crate) fn assert_code<T: std::fmt::Debug>(result: Result<T, Error>, code: Code) -> Error {
    match result {
        Ok(value) => panic!("expected {code:?}, got {value:?}"),
        Err(error) => {
            assert_eq!(error.code, code, "{error}");
            error
        }
    }
}

/// The same of a peer's.
#[track_caller]
pub(crate) fn assert_fault<T: std::fmt::Debug>(result: Result<T, Fault>, code: Code) -> Fault {
    match result {
        Ok(value) => panic!("expected {code:?}, got {value:?}"),
        Err(fault) => {
            assert_eq!(fault.code, code.as_str(), "{}", fault.message);
            fault
        }
    }
}

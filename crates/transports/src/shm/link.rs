//! One process's way to another on the same host.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard};
use std::time::Duration;

use anyfabric_wire::{Local, Refusal};

use super::incoming::Incoming;
use super::local::LocalChannel;
use super::outgoing::{fenced, given_up, Job, Outgoing};
use super::ring::{Consumer, Producer};
use super::witness::Witness;
use crate::mutant::Mutant;
use crate::sys::{is_readable_within, Fd, Interest, Mapping, Poller, Ready};
use crate::{
    lock, read, write, Binding, BindingState, BindingTable, Doorbell, Failure, Inline, Link, Op, Payload, PeerIdx,
    PeerStats, Region, RegionTable, Sink, Target,
};

/// What a [`ShmLink`] is made of; the engine's handshake gathers it.
#[derive(Debug)]
pub struct ShmOptions {
    /// The peer's number here.
    pub peer: PeerIdx,
    /// Its process, as the kernel reports it for the Unix socket.
    pub pid: u32,
    /// That process for good.
    pub pid_fd: Fd,
    /// The Unix socket.
    pub channel: LocalChannel,
    /// Ring that we write and the peer reads.
    pub outgoing: Arc<Mapping>,
    /// Ring that the peer writes and we read.
    pub incoming: Arc<Mapping>,
    /// The peer's doorbell.
    pub doorbell: Doorbell,
    /// Our regions.
    pub regions: Arc<RegionTable>,
    /// Neither use process_vm_writev nor let the peer use it.
    pub isolate: bool,
    /// Whether the probe showed that we can write to the peer's memory.
    pub writes_foreign: bool,
    /// Whether the peer has shown that it can write to our memory, if known.
    pub peer_writes_foreign: Option<bool>,
}

/// One process's way to another on the same host.
pub struct ShmLink {
    pub(super) peer: PeerIdx,
    pub(super) pid: u32,
    pub(super) witness: Witness,
    /// Until the peer is gone.
    ends: RwLock<Option<Ends>>,
    pub(super) regions: Arc<RegionTable>,
    pub(super) isolate: bool,
    /// Whether this engine itself writes into memory that the peer did not allocate.
    pub writes_foreign: bool,
    pub(super) peer_writes_foreign: OnceLock<bool>,
    pub(super) outgoing: Mutex<Outgoing>,
    /// Large operations, one chunk a poll; only the driver takes from it.
    pub(super) queue: Mutex<VecDeque<Job>>,
    pub(super) busy: AtomicBool,
    pub(super) incoming: Mutex<Incoming>,
    pub(super) bindings: Mutex<BindingTable>,
    /// What may still have been written to when the link was closed.
    left: Mutex<Vec<Arc<Binding>>>,
    pub(super) closed: AtomicBool,
    /// Where the last short write went; only ever asked for.
    pub(super) last_dst: AtomicPtr<u8>,
    /// The peer's process has exited, or has let go of our memory.
    is_out: AtomicBool,
    pub(super) stats: PeerStats,
}

/// Descriptors that tell of the peer.
struct Ends {
    channel: LocalChannel,
    pid_fd: Fd,
}

impl ShmLink {
    /// Channel of the Unix socket at the poller.
    pub const LOCAL: u8 = 64;
    /// Channel of the process descriptor at the poller.
    pub const PROCESS: u8 = 65;

    /// Over what the handshake gathered.
    pub fn new(options: ShmOptions) -> Self {
        let peer_writes_foreign = OnceLock::new();
        if let Some(known) = options.peer_writes_foreign {
            let _ = peer_writes_foreign.set(known);
        }
        Self {
            peer: options.peer,
            pid: options.pid,
            witness: Witness::default(),
            ends: RwLock::new(Some(Ends { channel: options.channel, pid_fd: options.pid_fd })),
            regions: options.regions,
            isolate: options.isolate,
            writes_foreign: options.writes_foreign,
            peer_writes_foreign,
            outgoing: Mutex::new(Outgoing {
                producer: Producer::new(options.outgoing),
                doorbell: Some(options.doorbell),
                backlog: VecDeque::new(),
                answers: VecDeque::new(),
                awaiting: HashMap::new(),
                inline_bytes: 0,
                inline_operations: 0,
            }),
            queue: Mutex::default(),
            busy: AtomicBool::new(false),
            incoming: Mutex::new(Incoming {
                consumer: Consumer::new(options.incoming),
                turns: 0,
                beats: 0,
                refused: HashMap::new(),
            }),
            bindings: Mutex::default(),
            left: Mutex::default(),
            closed: AtomicBool::new(false),
            last_dst: AtomicPtr::default(),
            is_out: AtomicBool::new(false),
            stats: PeerStats::new(1),
        }
    }

    /// Watches the Unix socket and the process; `token` names a channel to the poller.
    ///
    /// # Errors
    /// The system's.
    pub fn watch(&self, poller: &Poller, token: impl Fn(u8) -> u64) -> std::io::Result<()> {
        let Some(ends) = &*self.ends() else { return Ok(()) };
        poller.add(ends.channel.socket(), token(Self::LOCAL), Interest::Read)?;
        poller.add(&ends.pid_fd, token(Self::PROCESS), Interest::Read)
    }

    /// Watches the Unix socket no more: it has ended.
    pub fn forget_socket(&self, poller: &Poller) {
        if let Some(ends) = &*self.ends() {
            poller.remove(ends.channel.socket());
        }
    }

    /// Whether the peer's process has exited, now or within a timeout of at most some milliseconds; or was given back.
    pub fn has_exited(&self, timeout: Duration) -> bool {
        self.ends().as_ref().is_none_or(|ends| is_readable_within(&ends.pid_fd, timeout))
    }

    /// The peer says that it writes no more into our memory.
    pub fn peer_has_let_go(&self) {
        // ORDERING: the engine reads it in this thread.
        self.is_out.store(true, Ordering::Release);
    }

    /// After [`Link::close`]: whether no thread of ours writes into the peer's
    /// memory any more. What was mapped of it is unmapped.
    pub fn has_let_go(&self) -> bool {
        let left = lock(&self.left);
        let is_idle = left.iter().all(|binding| binding.is_idle());
        if is_idle {
            left.iter().for_each(|binding| binding.unmap());
        }
        is_idle
    }

    /// After [`Link::close`], of a peer that is gone: closes its descriptors and unmaps its memory, for whoever still holds
    /// a descriptor of its regions holds this link. Returns what tells of the end of its process.
    pub fn give_back(&self) -> Option<Fd> {
        let ends = write(&self.ends).take();
        let process = ends.map(|ends| ends.pid_fd);
        lock(&self.incoming).consumer.end();
        let mut outgoing = lock(&self.outgoing);
        outgoing.producer.end();
        let doorbell = outgoing.doorbell.take();
        drop(outgoing);
        drop(doorbell);
        // Short writes copied under the lock above; what another thread still copies stays mapped until then.
        if self.has_let_go() {
            lock(&self.left).clear();
        }
        process
    }

    /// Whether something waits for the peer to take what its ring holds: nobody is told when it has.
    pub fn awaits_room(&self) -> bool {
        // ORDERING: a hint; asked after `poll`.
        self.busy.load(Ordering::Relaxed) && !self.is_closed()
    }

    /// The peer's process.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Tells the peer whether we can write to its memory.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn tell_probed(&self, foreign: bool) -> std::io::Result<()> {
        self.send(&Local::Probed { foreign }, None)
    }

    pub(super) fn is_closed(&self) -> bool {
        // ORDERING: a late look posts into a ring that nobody reads, no more; what is kept looks under its lock.
        self.closed.load(Ordering::Relaxed)
    }

    /// After publishing: wakes whoever of the peer's threads must look.
    #[inline]
    pub(super) fn notify(&self, outgoing: &Outgoing) {
        self.notify_of(outgoing, 0);
    }

    /// As [`ShmLink::notify`], for `arrivals` counts that may wait for others.
    #[inline]
    pub(super) fn notify_of(&self, outgoing: &Outgoing, arrivals: u32) {
        if outgoing.doorbell.as_ref().is_some_and(|doorbell| doorbell.notify_remote(arrivals)) {
            if let Some(ends) = &*self.ends() {
                ends.channel.kick();
            }
        }
    }

    /// Queues a message.
    ///
    /// # Errors
    /// `TimedOut` when the peer reads none; else the socket has ended.
    pub(super) fn send(&self, message: &Local, fd: Option<Arc<Fd>>) -> std::io::Result<()> {
        let ends = self.ends();
        let ends = ends.as_ref().ok_or(std::io::ErrorKind::NotConnected)?;
        ends.channel.send(message, fd)
    }

    fn flush(&self) {
        if let Some(ends) = &*self.ends() {
            let _ = ends.channel.flush();
        }
    }

    fn ends(&self) -> RwLockReadGuard<'_, Option<Ends>> {
        read(&self.ends)
    }
}

impl Link for ShmLink {
    fn transport(&self) -> &'static str {
        "shm"
    }

    fn sees_exit(&self) -> bool {
        true
    }

    fn manner(&self) -> String {
        let foreign = match self.writes_foreign {
            _ if self.isolate => "bounce ring (isolated)",
            true => "process_vm_writev",
            false => "bounce ring (process_vm_writev is not allowed)",
        };
        format!("mapped memory; other memory by {foreign}")
    }

    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        let (binding, request) = lock(&self.bindings).find_or_ask(region, key, nbytes);
        let Some(request) = request else { return binding };
        let asked = self.send(&Local::Import { request, region, key }, None);
        // A socket that has ended is noticed where it is read, and what waits for the binding then learns why.
        if self.is_closed() || asked.is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut) {
            binding.refuse(Refusal::Closing);
        }
        binding
    }

    fn try_inline(&self, write: &Inline<'_>) -> Option<Result<(), Failure>> {
        let nbytes = write.extents.nbytes();
        if nbytes > INLINE_BYTES || self.is_closed() {
            return None;
        }
        let target = match write.binding.target()? {
            Target::Owner => return None,
            target => target,
        };
        self.ask_for_line(write, target);
        let early = Mutant::CountBeforeCopy.is_on();
        let mut outgoing = lock(&self.outgoing);
        if write.imm.is_some() {
            if outgoing.producer.is_fenced() {
                return Some(Err(fenced()));
            }
            if !outgoing.backlog.is_empty() || !outgoing.producer.has_room() {
                return None;
            }
        }
        // Short copies keep the lock, which `release` takes to be sure that none is under way.
        let is_short = nbytes <= SHORT_BYTES;
        let admitted = if is_short { write.binding.check() } else { write.binding.enter() };
        if let Err(state) = admitted {
            return match state {
                // A link that closes refuses everything: whoever submits again learns why it does.
                BindingState::Refused(_) if self.is_closed() => None,
                BindingState::Refused(refusal) => Some(Err(Failure::Refused(refusal))),
                _ => None,
            };
        }
        let mut pushed = !early || self.push_arrival(&mut outgoing, write.imm);
        let placed = if is_short {
            self.place_all(write, target)
        } else {
            drop(outgoing);
            let placed = self.place_all(write, target);
            write.binding.leave();
            outgoing = lock(&self.outgoing);
            placed
        };
        if !early && placed.is_ok() {
            pushed = self.push_arrival(&mut outgoing, write.imm);
        }
        match placed {
            Err(error) => Some(Err(self.system_failure(&error))),
            Ok(()) if !pushed => None,
            Ok(()) => {
                outgoing.inline_bytes += nbytes;
                outgoing.inline_operations += 1;
                Some(Ok(()))
            }
        }
    }

    fn post(&self, op: Op) -> bool {
        if self.is_closed() {
            self.end(op, Err(given_up()));
            return false;
        }
        if matches!(op.payload, Payload::Signal) {
            self.finish(op, &mut lock(&self.outgoing));
            return false;
        }
        if let Some(placed) = self.place_now(&op) {
            match placed {
                Ok(()) => self.finish(op, &mut lock(&self.outgoing)),
                Err(error) => self.end(op, Err(self.system_failure(&error))),
            }
            // ORDERING: a hint.
            return self.busy.load(Ordering::Relaxed);
        }
        self.keep(Job { op, extent_idx: 0, done: 0 }, false)
    }

    fn poll(&self, sink: &dyn Sink) -> bool {
        if self.is_closed() {
            return false;
        }
        let mut moved = self.drain_incoming(sink) > 0;
        // ORDERING: see `post`.
        if self.busy.load(Ordering::Acquire) {
            moved |= self.flush_backlog();
            moved |= self.advance_queue();
            let outgoing = lock(&self.outgoing);
            let queue = lock(&self.queue);
            if queue.is_empty() && outgoing.backlog.is_empty() && outgoing.answers.is_empty() {
                // ORDERING: under both locks, as every store of true.
                self.busy.store(false, Ordering::Release);
            }
        }
        moved
    }

    fn ready(&self, channel: u8, _ready: Ready, sink: &dyn Sink) {
        if channel == Self::PROCESS {
            // ORDERING: the engine reads it after `exited`, in this thread.
            self.is_out.store(true, Ordering::Release);
            self.drain_last(sink);
            sink.exited(self.peer);
            return;
        }
        self.flush();
        for _ in 0..DRAIN {
            let Some(received) = self.ends().as_ref().map(|ends| ends.channel.receive()) else { return };
            match received {
                Ok(Some((message, fds))) => {
                    if let Err(error) = self.on_local(message, fds) {
                        sink.broken(self.peer, Self::LOCAL, &format!("its Unix socket: {error}"));
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    self.drain_last(sink);
                    sink.broken(self.peer, Self::LOCAL, &format!("its Unix socket: {error}"));
                    return;
                }
            }
        }
        self.poll(sink);
    }

    fn reap(&self) {
        self.flush();
        let mut given_up = Vec::new();
        {
            let mut queue = lock(&self.queue);
            for job in std::mem::take(&mut *queue) {
                match job.op.given_up() {
                    // Bounced pieces may be under way: only the peer's answer ends those.
                    Some(why) if job.has_not_begun() => given_up.push((job.op, why)),
                    _ => queue.push_back(job),
                }
            }
        }
        {
            let mut outgoing = lock(&self.outgoing);
            for op in std::mem::take(&mut outgoing.backlog) {
                match op.ticket.given_up() {
                    Some(why) => given_up.push((op, why)),
                    None => outgoing.backlog.push_back(op),
                }
            }
            for op in outgoing.awaiting.values().filter(|op| op.ticket.given_up().is_some()) {
                op.note_loss();
            }
        }
        for (op, why) in given_up {
            self.end(op, Err(why));
        }
    }

    fn withhold(&self, region: &Region) -> bool {
        // Bounced bytes are placed by us, under this lock, after asking the region.
        drop(lock(&self.incoming));
        !region.granted_to().contains(&self.peer)
    }

    fn release(&self, region: u64, key: u64, refusal: Refusal) -> bool {
        lock(&self.bindings).refuse(region, key, refusal);
        // Short writes check and copy under this lock.
        drop(lock(&self.outgoing));
        lock(&self.bindings).settle(region, key)
    }

    fn close(&self, why: &Failure) {
        // ORDERING: the locks below order the rest.
        self.closed.store(true, Ordering::Release);
        lock(&self.incoming).consumer.fence();
        let left = lock(&self.bindings).close();
        lock(&self.left).extend(left);
        let jobs = std::mem::take(&mut *lock(&self.queue));
        let mut outgoing = lock(&self.outgoing);
        let backlog = std::mem::take(&mut outgoing.backlog);
        let awaiting = std::mem::take(&mut outgoing.awaiting);
        drop(outgoing);
        for op in jobs.into_iter().map(|job| job.op).chain(backlog).chain(awaiting.into_values()) {
            self.end(op, Err(why.clone()));
        }
    }

    fn is_quiet(&self) -> bool {
        // ORDERING: see `ready` and `peer_has_let_go`.
        self.is_out.load(Ordering::Acquire)
    }

    fn note_latency(&self, ns: u64) {
        self.stats.nic(0).latency.record(ns);
    }

    fn stats(&self) -> &PeerStats {
        let mut outgoing = lock(&self.outgoing);
        let (bytes, operations) = (outgoing.inline_bytes, outgoing.inline_operations);
        (outgoing.inline_bytes, outgoing.inline_operations) = (0, 0);
        let PeerStats { inline_bytes, inline_operations, .. } = &self.stats;
        let nic = self.stats.nic(0);
        // ORDERING: statistics; under the lock, so that nobody looks in between.
        nic.bytes.fetch_add(bytes, Ordering::Relaxed);
        nic.parts.fetch_add(operations, Ordering::Relaxed);
        inline_bytes.fetch_add(bytes, Ordering::Relaxed);
        inline_operations.fetch_add(operations, Ordering::Relaxed);
        &self.stats
    }
}

impl std::fmt::Debug for ShmLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShmLink").field("peer", &self.peer).field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Writes up to this length are carried out in the caller's thread.
///
/// MEASURED: below it a hand-over to the worker costs more than the copy; benchmarks/records, perf write rows.
pub(super) const INLINE_BYTES: u64 = 256 << 10;
/// Writes up to this length keep the ring's lock while they copy.
const SHORT_BYTES: u64 = 4096;
/// Entries or messages taken in one turn.
pub(super) const DRAIN: usize = 256;

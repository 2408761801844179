//! One process's way to another on the same host.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyfabric_plan::Extents;
use anyfabric_wire::{Access, Imm, Local, Refusal, WireImm};

use super::local::LocalChannel;
use super::ring::{Consumer, Entry, Producer, AREA};
use crate::copy::prefetch;
use crate::mutant::Mutant;
use crate::sys::{self, Fd, Foreign, ForeignWrite, Mapping, Ready};
use crate::{
    copy, Backing, Binding, BindingState, Doorbell, Failure, Inline, Link, LinkError, Op, Payload, PeerIdx, PeerStats,
    Region, RegionTable, Sink, Target,
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
    /// Whether the peer has shown that it can write to our memory, if known.
    pub peer_writes_foreign: Option<bool>,
}

/// One process's way to another on the same host.
pub struct ShmLink {
    peer: PeerIdx,
    pid: u32,
    pid_fd: Fd,
    channel: LocalChannel,
    doorbell: Doorbell,
    regions: Arc<RegionTable>,
    isolate: bool,
    peer_writes_foreign: OnceLock<bool>,
    outgoing: Mutex<Outgoing>,
    /// Large operations, one chunk a poll; only the driver takes from it.
    queue: Mutex<VecDeque<Job>>,
    busy: AtomicBool,
    incoming: Mutex<Incoming>,
    bindings: Mutex<Bindings>,
    closed: AtomicBool,
    exited: AtomicBool,
    bounced: AtomicU64,
    stats: PeerStats,
}

struct Outgoing {
    producer: Producer,
    /// Bytes are placed, the entry waits for room in the ring.
    backlog: VecDeque<Op>,
    /// Answers that wait for room.
    answers: VecDeque<Entry>,
    /// Sent through the bounce area; the peer will answer.
    awaiting: HashMap<u64, Op>,
    /// Inline writes since the statistics were last read.
    inline_bytes: u64,
    inline_operations: u64,
}

struct Incoming {
    consumer: Consumer,
    /// Turns that brought something; every so many the peer counts as heard.
    turns: u32,
    /// Bounced operations of which a part was refused.
    refused: HashMap<u64, Refusal>,
}

#[derive(Default)]
struct Bindings {
    by_region: HashMap<u64, Arc<Binding>>,
    asked: HashMap<u64, Arc<Binding>>,
    next_request: u64,
}

/// A large operation and how far it has come.
struct Job {
    op: Op,
    extent_idx: usize,
    /// Bytes of that extent that are done.
    done: u64,
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
            pid_fd: options.pid_fd,
            channel: options.channel,
            doorbell: options.doorbell,
            regions: options.regions,
            isolate: options.isolate,
            peer_writes_foreign,
            outgoing: Mutex::new(Outgoing {
                producer: Producer::new(options.outgoing),
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
                refused: HashMap::new(),
            }),
            bindings: Mutex::default(),
            closed: AtomicBool::new(false),
            exited: AtomicBool::new(false),
            bounced: AtomicU64::new(0),
            stats: PeerStats::new(1),
        }
    }

    /// The Unix socket, for the poller.
    pub fn socket(&self) -> &Fd {
        self.channel.socket()
    }

    /// The process descriptor, for the poller.
    pub fn process(&self) -> &impl AsRawFd {
        &self.pid_fd
    }

    /// The peer's process.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Tells the peer whether we can write to its memory.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn tell_probed(&self, foreign: bool) -> Result<(), LinkError> {
        let sent = self.channel.send(&Local::Probed { foreign }, None);
        sent.map_err(|error| LinkError::System { what: "sending the result of the probe", error })
    }

    fn is_closed(&self) -> bool {
        // ORDERING: a late look posts into a ring that nobody reads, no more.
        self.closed.load(Ordering::Relaxed)
    }

    /// After publishing: wakes whoever of the peer's threads must look.
    #[inline]
    fn notify(&self) {
        if self.doorbell.notify_remote() {
            self.channel.kick();
        }
    }

    /// Copies ranges to where the peer's region is mapped or lives.
    ///
    /// # Errors
    /// The system's, of process_vm_writev.
    fn place(&self, source: &Region, target: &Target, ranges: impl Iterator<Item = Range>) -> std::io::Result<()> {
        match target {
            Target::Mapped(mapping) => {
                let (src, dst) = (source.as_ptr().cast_const(), mapping.as_ptr());
                let mut ranges = Ahead::new(ranges);
                while let Some((range, soon)) = ranges.next() {
                    if let Some(soon) = soon {
                        let (src, dst) = (src.wrapping_add(soon.src as usize), dst.wrapping_add(soon.dst as usize));
                        prefetch(src, dst, soon.nbytes as usize);
                    }
                    // SAFETY: the engine checked the ranges against both regions; the binding is entered, so the
                    // mapping stays; the ticket holds the source.
                    unsafe { copy(src.add(range.src as usize), dst.add(range.dst as usize), range.nbytes as usize) };
                }
                Ok(())
            }
            Target::Foreign(address) => {
                let src = source.as_ptr().cast_const();
                let ranges = ranges.map(|range| ForeignWrite {
                    // SAFETY: inside the source region, as above.
                    src: unsafe { src.add(range.src as usize) },
                    dst: address + range.dst,
                    nbytes: range.nbytes as usize,
                });
                FOREIGN.with_borrow_mut(|room| {
                    // SAFETY: as above.
                    unsafe { sys::foreign_write(self.pid, room, ranges) }
                })
            }
            Target::Owner => Err(std::io::Error::from(std::io::ErrorKind::Unsupported)),
        }
    }

    /// Publishes the count of a finished operation, or keeps it for later.
    fn finish(&self, op: Op, outgoing: &mut Outgoing) {
        let Some((imm, count)) = op.imm else {
            self.end(op, Ok(()));
            return;
        };
        if outgoing.backlog.is_empty() && outgoing.producer.push(&arrival(imm, count)) {
            self.notify();
            self.end(op, Ok(()));
        } else {
            // ORDERING: statistics.
            self.stats.nic(0).retries.fetch_add(1, Ordering::Relaxed);
            outgoing.backlog.push_back(op);
            // ORDERING: see `poll`.
            self.busy.store(true, Ordering::Release);
        }
    }

    fn end(&self, op: Op, result: Result<(), Failure>) {
        let nic = self.stats.nic(0);
        match &result {
            Ok(()) => nic.sent(op.nbytes()),
            // ORDERING: statistics.
            Err(_) => drop(nic.errors.fetch_add(1, Ordering::Relaxed)),
        }
        let ticket = Arc::clone(&op.ticket);
        op.end(result);
        if let Some((submitted_ns, ended_ns)) = ticket.interval_ns() {
            nic.latency.record(ended_ns.saturating_sub(submitted_ns));
        }
    }

    fn drain_incoming(&self, sink: &dyn Sink) -> bool {
        let mut incoming = lock(&self.incoming);
        if !incoming.consumer.has_news() {
            incoming.consumer.publish_head(true);
            return false;
        }
        for _ in 0..DRAIN {
            match incoming.consumer.pop() {
                None => break,
                Some(Ok(entry)) => self.take(entry, &mut incoming, sink),
                Some(Err(why)) => {
                    sink.broken(self.peer, Self::LOCAL, why);
                    break;
                }
            }
            incoming.consumer.publish_head(false);
        }
        incoming.turns = incoming.turns.wrapping_add(1);
        if incoming.turns % HEARD_TURNS == 1 {
            sink.heard(self.peer);
        }
        true
    }

    fn take(&self, entry: Entry, incoming: &mut Incoming, sink: &dyn Sink) {
        match entry {
            Entry::Arrival { imm, count } => {
                let quarters = u64::from(imm.quarters) * u64::from(count);
                // A full table is told to the sender by the engine itself.
                let _ = sink.arrived(self.peer, imm.imm, quarters);
            }
            Entry::Message { op, start, nbytes } => {
                let result = match incoming.consumer.payload(start, nbytes) {
                    None => Err(Refusal::OutOfBounds),
                    Some(payload) => {
                        let mut bytes = vec![0; nbytes as usize];
                        // SAFETY: `payload` is valid for `nbytes`; a peer that changes it now changes its own message.
                        unsafe { std::ptr::copy_nonoverlapping(payload, bytes.as_mut_ptr(), bytes.len()) };
                        sink.message(self.peer, bytes)
                    }
                };
                incoming.consumer.publish_head(true);
                self.answer(op, result);
            }
            Entry::Bounce { op, region, key, offset, start, nbytes } => {
                if let Err(refusal) = self.place_bounced(incoming, (region, key, offset), (start, nbytes)) {
                    if incoming.refused.len() >= MAX_REFUSED {
                        sink.broken(self.peer, Self::LOCAL, "too many refused operations without an end");
                        return;
                    }
                    incoming.refused.entry(op).or_insert(refusal);
                }
                incoming.consumer.publish_head(true);
            }
            Entry::BounceEnd { op, imm } => {
                let result = incoming.refused.remove(&op).map_or(Ok(()), Err);
                let result = result.and_then(|()| match imm {
                    Some((imm, count)) => sink.arrived(self.peer, imm.imm, u64::from(imm.quarters) * u64::from(count)),
                    None => Ok(()),
                });
                self.answer(op, result);
            }
            Entry::Answer { op, result } => {
                let awaited = lock(&self.outgoing).awaiting.remove(&op);
                if let Some(op) = awaited {
                    self.end(op, result.map_err(Failure::Refused));
                }
            }
        }
    }

    fn place_bounced(
        &self,
        incoming: &Incoming,
        (region, key, offset): (u64, u64, u64),
        (start, nbytes): (u32, u32),
    ) -> Result<(), Refusal> {
        let region = self.regions.admit(self.peer, region, key)?;
        let end = offset.checked_add(nbytes.into()).ok_or(Refusal::OutOfBounds)?;
        if end > region.nbytes() {
            return Err(Refusal::OutOfBounds);
        }
        let payload = incoming.consumer.payload(start, nbytes).ok_or(Refusal::OutOfBounds)?;
        // SAFETY: both ranges were checked; the table keeps the region alive through `region`.
        unsafe { copy(payload, region.as_ptr().add(offset as usize), nbytes as usize) };
        Ok(())
    }

    fn answer(&self, op: u64, result: Result<(), Refusal>) {
        let mut outgoing = lock(&self.outgoing);
        outgoing.answers.push_back(Entry::Answer { op, result });
        self.flush_answers(&mut outgoing);
    }

    fn flush_answers(&self, outgoing: &mut Outgoing) -> bool {
        let mut moved = false;
        while let Some(answer) = outgoing.answers.front() {
            if !outgoing.producer.push(answer) {
                break;
            }
            outgoing.answers.pop_front();
            moved = true;
        }
        if moved {
            self.notify();
        }
        if !outgoing.answers.is_empty() {
            // ORDERING: see `poll`.
            self.busy.store(true, Ordering::Release);
        }
        moved
    }

    fn flush_backlog(&self) -> bool {
        let mut outgoing = lock(&self.outgoing);
        let mut moved = self.flush_answers(&mut outgoing);
        while let Some(op) = outgoing.backlog.front() {
            if let Some(why) = op.ticket.given_up() {
                if let Some(op) = outgoing.backlog.pop_front() {
                    self.end(op, Err(why));
                }
                continue;
            }
            let Some((imm, count)) = op.imm else { break };
            if !outgoing.producer.push(&arrival(imm, count)) {
                break;
            }
            self.notify();
            moved = true;
            if let Some(op) = outgoing.backlog.pop_front() {
                self.end(op, Ok(()));
            }
        }
        moved
    }

    /// One chunk of the oldest large operation.
    fn advance_queue(&self) -> bool {
        let Some(mut job) = lock(&self.queue).pop_front() else { return false };
        if let Some(why) = self.given_up(&job.op) {
            self.end(job.op, Err(why));
            return true;
        }
        match self.advance(&mut job) {
            Ok(Step::Done) => self.finish(job.op, &mut lock(&self.outgoing)),
            Ok(Step::Bounced) => {
                let id = job.op.id;
                lock(&self.outgoing).awaiting.insert(id, job.op);
                let end = self.push_bounce_end(id);
                if !end {
                    // No room for the end: it follows the answers.
                    let imm = lock(&self.outgoing).awaiting.get(&id).and_then(|op| bounce_imm(op.imm));
                    lock(&self.outgoing).answers.push_back(Entry::BounceEnd { op: id, imm });
                }
            }
            Ok(Step::More) => enqueue(&mut lock(&self.queue), job, true),
            Ok(Step::Blocked) => {
                enqueue(&mut lock(&self.queue), job, true);
                return false;
            }
            Err(error) => self.end(job.op, Err(self.system_failure(&error))),
        }
        true
    }

    fn push_bounce_end(&self, id: u64) -> bool {
        let mut outgoing = lock(&self.outgoing);
        let Some(op) = outgoing.awaiting.get(&id) else { return true };
        if matches!(op.payload, Payload::Message(_)) {
            return true;
        }
        let imm = bounce_imm(op.imm);
        let pushed = outgoing.producer.push(&Entry::BounceEnd { op: id, imm });
        self.notify();
        pushed
    }

    fn given_up(&self, op: &Op) -> Option<Failure> {
        if let Some(why) = op.ticket.given_up() {
            return Some(why);
        }
        match &op.payload {
            Payload::Write { binding, .. } => match binding.state() {
                BindingState::Refused(refusal) => Some(Failure::Refused(refusal)),
                _ => None,
            },
            _ => None,
        }
    }

    fn advance(&self, job: &mut Job) -> std::io::Result<Step> {
        match &job.op.payload {
            Payload::Signal => Ok(Step::Done),
            Payload::Message(bytes) => Ok(self.advance_message(job.op.id, bytes)),
            Payload::Write { source, binding, extents } => {
                let Some(target) = binding.target() else { return Ok(Step::Blocked) };
                if matches!(target, Target::Owner) {
                    return Ok(self.advance_bounce(job));
                }
                let (mut extent_idx, mut done) = (job.extent_idx, job.done);
                let chunk = Chunk { extents, extent_idx: &mut extent_idx, done: &mut done, left: CHUNK };
                self.place(source, target, chunk)?;
                let finished = extent_idx >= extents.num_extents();
                (job.extent_idx, job.done) = (extent_idx, done);
                Ok(if finished { Step::Done } else { Step::More })
            }
        }
    }

    fn advance_message(&self, op: u64, bytes: &[u8]) -> Step {
        let mut outgoing = lock(&self.outgoing);
        let Some((start, to)) = outgoing.producer.reserve(bytes.len()) else { return Step::Blocked };
        // SAFETY: `reserve` returned room for that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        // `reserve` made sure of room for the entry.
        outgoing.producer.push(&Entry::Message { op, start, nbytes: bytes.len() as u32 });
        self.notify();
        Step::Bounced
    }

    fn advance_bounce(&self, job: &mut Job) -> Step {
        let Payload::Write { source, binding, extents } = &job.op.payload else { return Step::Done };
        let mut outgoing = lock(&self.outgoing);
        let mut chunk = Chunk { extents, extent_idx: &mut job.extent_idx, done: &mut job.done, left: CHUNK };
        let mut moved = false;
        loop {
            let room = outgoing.producer.room().min(BOUNCE_BYTES);
            if room == 0 || !outgoing.producer.has_room() {
                break;
            }
            let Some(range) = chunk.next_at_most(room as u64) else { break };
            let Some((start, to)) = outgoing.producer.reserve(range.nbytes as usize) else { break };
            // SAFETY: inside the source, as the engine checked, and inside the reserved room.
            unsafe { copy(source.as_ptr().add(range.src as usize), to, range.nbytes as usize) };
            let (region, key) = (binding.region, binding.key);
            let nbytes = range.nbytes as u32;
            outgoing.producer.push(&Entry::Bounce { op: job.op.id, region, key, offset: range.dst, start, nbytes });
            moved = true;
        }
        if moved {
            // ORDERING: statistics.
            self.bounced.fetch_add(1, Ordering::Relaxed);
            self.notify();
        }
        match (job.extent_idx >= extents.num_extents(), moved) {
            (true, _) => Step::Bounced,
            (false, true) => Step::More,
            (false, false) => Step::Blocked,
        }
    }

    fn system_failure(&self, error: &std::io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::ESRCH) => Failure::PeerLost("its process has exited".into()),
            _ => Failure::System(format!("process_vm_writev to process {}: {error}", self.pid)),
        }
    }

    fn on_local(&self, message: Local, mut fds: Vec<Fd>) -> std::io::Result<()> {
        match message {
            Local::Import { request, region, key } => {
                let (result, fd) = match self.export(region, key) {
                    Ok((access, fd)) => (Ok(access), fd),
                    Err(refusal) => (Err(refusal), None),
                };
                self.channel.send(&Local::Imported { request, result }, fd)
            }
            Local::Imported { request, result } => {
                let Some(binding) = lock(&self.bindings).asked.remove(&request) else { return Ok(()) };
                match result {
                    Err(refusal) => binding.refuse(refusal),
                    Ok(Access::Bounce) => binding.accept(Target::Owner),
                    Ok(Access::Foreign { .. }) if self.isolate => binding.accept(Target::Owner),
                    // Nobody but us checks where process_vm_writev ends.
                    Ok(Access::Foreign { nbytes, .. }) if nbytes != binding.nbytes => {
                        binding.refuse(Refusal::OutOfBounds);
                    }
                    Ok(Access::Foreign { address, .. }) => binding.accept(Target::Foreign(address)),
                    Ok(Access::Mapped { nbytes }) if nbytes == binding.nbytes && fds.len() == 1 => {
                        let (fd, len) = (fds.remove(0), nbytes as usize);
                        sys::check_memfd(&fd, len)?;
                        binding.accept(Target::Mapped(Mapping::shared(&fd, len, len <= POPULATE)?));
                    }
                    Ok(Access::Mapped { .. }) => binding.refuse(Refusal::OutOfBounds),
                }
                Ok(())
            }
            Local::Probed { foreign } => {
                let _ = self.peer_writes_foreign.set(foreign);
                Ok(())
            }
            Local::Kick => Ok(()),
            Local::Join { .. } | Local::Joined { .. } => {
                Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "joined twice"))
            }
        }
    }

    fn export(&self, region: u64, key: u64) -> Result<(Access, Option<Arc<Fd>>), Refusal> {
        let region = self.regions.admit(self.peer, region, key)?;
        match region.backing() {
            Backing::Memfd { fd, .. } => {
                region.grant(self.peer, key)?;
                Ok((Access::Mapped { nbytes: region.nbytes() }, Some(Arc::clone(fd))))
            }
            Backing::Foreign { address, .. } => {
                if self.isolate || self.peer_writes_foreign.get() != Some(&true) {
                    return Ok((Access::Bounce, None));
                }
                region.grant(self.peer, key)?;
                Ok((Access::Foreign { address: *address as u64, nbytes: region.nbytes() }, None))
            }
        }
    }
}

impl Link for ShmLink {
    fn transport(&self) -> &'static str {
        "shm"
    }

    fn num_nics(&self) -> usize {
        1
    }

    fn manner(&self) -> String {
        let foreign = match self.peer_writes_foreign.get() {
            _ if self.isolate => "bounce ring (isolated)",
            Some(true) => "process_vm_writev",
            _ => "bounce ring (process_vm_writev is not allowed)",
        };
        format!("mapped memory; other memory by {foreign}")
    }

    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        let mut bindings = lock(&self.bindings);
        if let Some(binding) = bindings.by_region.get(&region) {
            // The key and length are part of what is cached: another descriptor asks again.
            if (binding.key, binding.nbytes) == (key, nbytes) {
                return Arc::clone(binding);
            }
        }
        let binding = Arc::new(Binding::pending(region, key, nbytes));
        let request = bindings.next_request;
        bindings.next_request += 1;
        bindings.asked.insert(request, Arc::clone(&binding));
        bindings.by_region.insert(region, Arc::clone(&binding));
        drop(bindings);
        if self.is_closed() || self.channel.send(&Local::Import { request, region, key }, None).is_err() {
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
        let early = Mutant::CountBeforeCopy.is_on();
        let mut outgoing = lock(&self.outgoing);
        if write.imm.is_some() {
            if outgoing.producer.is_fenced() {
                return Some(Err(Failure::PeerLost("it has given this process up".into())));
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
            self.end(op, Err(Failure::PeerLost("it was given up".into())));
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
        let mut queue = lock(&self.queue);
        enqueue(&mut queue, Job { op, extent_idx: 0, done: 0 }, false);
        // ORDERING: a hint for `poll`; the queue's lock orders the rest.
        self.busy.store(true, Ordering::Release);
        true
    }

    fn poll(&self, sink: &dyn Sink) -> bool {
        if self.is_closed() {
            return false;
        }
        let mut moved = self.drain_incoming(sink);
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
            self.exited.store(true, Ordering::Release);
            // What the peer published before its end still counts.
            while self.drain_incoming(sink) {}
            sink.exited(self.peer);
            return;
        }
        let _ = self.channel.flush();
        for _ in 0..DRAIN {
            match self.channel.receive() {
                Ok(Some((message, fds))) => {
                    if let Err(error) = self.on_local(message, fds) {
                        sink.broken(self.peer, Self::LOCAL, &error.to_string());
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    while self.drain_incoming(sink) {}
                    sink.broken(self.peer, Self::LOCAL, &error.to_string());
                    return;
                }
            }
        }
        self.poll(sink);
    }

    fn reap(&self) {
        let _ = self.channel.flush();
        let mut given_up = Vec::new();
        {
            let mut queue = lock(&self.queue);
            for job in std::mem::take(&mut *queue) {
                match self.given_up(&job.op) {
                    // Bounced pieces may be under way: only the peer's answer ends those.
                    Some(why) if job.extent_idx == 0 && job.done == 0 => given_up.push((job.op, why)),
                    _ => queue.push_back(job),
                }
            }
        }
        for op in lock(&self.outgoing).awaiting.values() {
            if let (Some(_), Some((imm, _))) = (op.ticket.given_up(), op.imm) {
                op.losses.note(imm);
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

    fn release(&self, region: u64, refusal: Refusal) -> bool {
        let Some(binding) = lock(&self.bindings).by_region.get(&region).cloned() else { return true };
        binding.refuse(refusal);
        // Short writes check and copy under this lock.
        drop(lock(&self.outgoing));
        if !binding.is_idle() && !Mutant::SkipFence.is_on() {
            return false;
        }
        binding.unmap();
        lock(&self.bindings).by_region.remove(&region);
        true
    }

    fn close(&self, why: &Failure) {
        // ORDERING: the locks below order the rest.
        self.closed.store(true, Ordering::Release);
        lock(&self.incoming).consumer.fence();
        for (_, binding) in lock(&self.bindings).by_region.drain() {
            binding.refuse(Refusal::Closing);
        }
        lock(&self.bindings).asked.clear();
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
        // ORDERING: see `ready`.
        self.exited.load(Ordering::Acquire)
    }

    fn note_latency(&self, ns: u64) {
        self.stats.nic(0).latency.record(ns);
    }

    fn stats(&self) -> &PeerStats {
        let mut outgoing = lock(&self.outgoing);
        let (bytes, operations) = (outgoing.inline_bytes, outgoing.inline_operations);
        (outgoing.inline_bytes, outgoing.inline_operations) = (0, 0);
        drop(outgoing);
        let nic = self.stats.nic(0);
        // ORDERING: statistics.
        nic.bytes.fetch_add(bytes, Ordering::Relaxed);
        nic.operations.fetch_add(operations, Ordering::Relaxed);
        &self.stats
    }
}

impl ShmLink {
    #[inline]
    fn place_all(&self, write: &Inline<'_>, target: &Target) -> std::io::Result<()> {
        let (mut extent_idx, mut done) = (0, 0);
        let chunk = Chunk { extents: write.extents, extent_idx: &mut extent_idx, done: &mut done, left: u64::MAX };
        self.place(write.source, target, chunk)
    }

    /// Carries a short write out in the caller's thread; `None` when it is none.
    fn place_now(&self, op: &Op) -> Option<std::io::Result<()>> {
        let Payload::Write { source, binding, extents } = &op.payload else { return None };
        let target = binding.target().filter(|target| !matches!(target, Target::Owner))?;
        if op.nbytes() > INLINE_BYTES || op.ticket.given_up().is_some() {
            return None;
        }
        let (mut extent_idx, mut done) = (0, 0);
        let chunk = Chunk { extents, extent_idx: &mut extent_idx, done: &mut done, left: u64::MAX };
        Some(self.place(source, target, chunk))
    }

    #[inline]
    fn push_arrival(&self, outgoing: &mut Outgoing, imm: Option<(Imm, u32)>) -> bool {
        let Some((imm, count)) = imm else { return true };
        let pushed = outgoing.producer.push(&arrival(imm, count));
        if pushed {
            self.notify();
        }
        pushed
    }
}

impl std::fmt::Debug for ShmLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShmLink").field("peer", &self.peer).field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Small operations are not stuck behind large ones, not even behind one whose
/// turn has just ended.
fn enqueue(queue: &mut VecDeque<Job>, job: Job, has_begun: bool) {
    let is_small = |job: &Job| job.op.nbytes() <= INLINE_BYTES;
    let num_small = queue.iter().take_while(|job| is_small(job)).count();
    let at = match (is_small(&job), has_begun) {
        (true, true) => 0,
        (true, false) | (false, true) => num_small,
        (false, false) => queue.len(),
    };
    queue.insert(at, job);
}

/// What one turn of a large operation came to.
enum Step {
    /// All bytes are placed.
    Done,
    /// All bytes are in the bounce area; the peer will answer.
    Bounced,
    /// There is more to do.
    More,
    /// There is more to do, and no room for it.
    Blocked,
}

/// Some bytes of one extent.
#[derive(Clone, Copy)]
struct Range {
    src: u64,
    dst: u64,
    nbytes: u64,
}

/// Walks an operation's extents, at most `left` bytes at a time.
struct Chunk<'a> {
    extents: &'a Extents,
    extent_idx: &'a mut usize,
    done: &'a mut u64,
    left: u64,
}

impl Chunk<'_> {
    #[inline]
    fn next_at_most(&mut self, max_bytes: u64) -> Option<Range> {
        if *self.extent_idx >= self.extents.num_extents() || self.left == 0 {
            return None;
        }
        let extent = self.extents.nth(*self.extent_idx);
        let nbytes = (extent.nbytes - *self.done).min(self.left).min(max_bytes);
        let range = Range { src: extent.src + *self.done, dst: extent.dst + *self.done, nbytes };
        self.left -= nbytes;
        *self.done += nbytes;
        if *self.done == extent.nbytes {
            *self.extent_idx += 1;
            *self.done = 0;
        }
        Some(range)
    }
}

impl Iterator for Chunk<'_> {
    type Item = Range;

    #[inline]
    fn next(&mut self) -> Option<Range> {
        self.next_at_most(u64::MAX)
    }
}

/// Ranges, each with the one that comes two later.
struct Ahead<I> {
    ranges: I,
    window: [Option<Range>; 2],
}

impl<I: Iterator<Item = Range>> Ahead<I> {
    fn new(mut ranges: I) -> Self {
        let window = [ranges.next(), ranges.next()];
        Self { ranges, window }
    }

    #[inline]
    fn next(&mut self) -> Option<(Range, Option<Range>)> {
        let now = self.window[0]?;
        let soon = if self.window[1].is_some() { self.ranges.next() } else { None };
        self.window = [self.window[1], soon];
        Some((now, soon))
    }
}

fn arrival(imm: Imm, count: u32) -> Entry {
    Entry::Arrival { imm: WireImm { imm, quarters: 4 }, count }
}

fn bounce_imm(imm: Option<(Imm, u32)>) -> Option<(WireImm, u32)> {
    imm.map(|(imm, count)| (WireImm { imm, quarters: 4 }, count))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static FOREIGN: std::cell::RefCell<Foreign> = std::cell::RefCell::default();
}

/// Writes up to this length are carried out in the caller's thread.
///
/// MEASURED: below it a hand-over to the worker costs more than the copy;
/// benchmarks/records, perf write rows.
const INLINE_BYTES: u64 = 256 << 10;
/// Writes up to this length keep the ring's lock while they copy.
const SHORT_BYTES: u64 = 4096;
/// Turns with news between two notes that the peer lives.
const HEARD_TURNS: u32 = 256;
/// Bytes of a large operation copied in one turn: bounds how long arrivals and
/// other operations wait for the copying thread.
const CHUNK: u64 = 1 << 20;
/// Bytes of one bounced piece.
const BOUNCE_BYTES: usize = AREA / 4;
/// Entries or messages taken in one turn.
const DRAIN: usize = 256;
/// Mappings up to this length are entered into the page table at once.
const POPULATE: usize = 256 << 20;
/// Bounced operations with a refused part that have not ended.
const MAX_REFUSED: usize = 1024;

//! The engine: what moves bytes between processes.

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use anyfabric_plan::{Extents, PageList};
use anyfabric_transports::{try_lock, Inline, Region as Memory};
use anyfabric_wire::{Address, Imm};

use crate::checks::{check_alike, check_imm, check_pages};
use crate::counter::Counter;
use crate::error::seconds;
use crate::inner::{lock, nanos, Inner};
use crate::region::Slice;
use crate::remote::{Remote, RemoteShared, RemoteSlice};
use crate::submission::Content;
use crate::submit::{Order, Part, What};
use crate::transfer::{About, Transfer, TIMED_BYTES};
use crate::under_way::Entry;
use crate::waiters::Waiter;
use crate::watcher::Watcher;
use crate::{Code, Config, Error, Message, Region, Result};

/// One endpoint: reaches every peer by the fastest transport that both have.
/// Closed on drop.
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
    /// Held by whoever closes the engine, until all of it is closed.
    worker: Mutex<Option<JoinHandle<()>>>,
    worker_id: Option<ThreadId>,
    closer_id: OnceLock<ThreadId>,
}

/// How a write is to be made.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteOptions {
    /// What the receiver counts.
    pub imm: Option<u32>,
    /// Whether the receiver checks a checksum over the bytes before it counts.
    pub verify: bool,
    /// Deadline; the engine's when `None`.
    pub timeout: Option<Duration>,
}

impl WriteOptions {
    /// Counted by `imm`, everything else as usual.
    pub fn counted(imm: u32) -> Self {
        Self { imm: Some(imm), ..Self::default() }
    }
}

impl Engine {
    /// Starts an engine: binds the listener, starts the worker.
    ///
    /// # Errors
    /// `InvalidArgument` for a setting, `ResourceExhausted` when no descriptor,
    /// memory or thread is left.
    pub fn new(config: Config) -> Result<Self> {
        let inner = Arc::new(Inner::new(config, None)?);
        let name = "anyfabric".to_owned();
        let shared = Arc::clone(&inner);
        let worker = std::thread::Builder::new()
            .name(name)
            .spawn(move || shared.work())
            .map_err(|error| Error::system("the worker thread", &error).during("start"))?;
        inner.presence.set_worker(worker.thread().clone());
        let worker_id = Some(worker.thread().id());
        Ok(Self { inner, worker: Mutex::new(Some(worker)), worker_id, closer_id: OnceLock::new() })
    }

    pub(crate) const fn without_worker(inner: Arc<Inner>) -> Self {
        Self { inner, worker: Mutex::new(None), worker_id: None, closer_id: OnceLock::new() }
    }

    /// Where this engine is reached.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// Whether `close` has begun.
    pub fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    /// Allocates zeroed memory that peers of this host can map.
    ///
    /// # Errors
    /// `ResourceExhausted`, `Closed`.
    pub fn allocate(&self, nbytes: u64) -> Result<Region> {
        self.inner.check_open_to("allocate")?;
        Region::allocate(&self.inner, nbytes)
    }

    /// Registers memory that somebody else owns; `owner` is dropped when
    /// nothing can touch it any more.
    ///
    /// # Errors
    /// `Closed`.
    ///
    /// # Safety
    /// `address` is valid for reads, and for writes if `writable`, of `nbytes`
    /// bytes for as long as `owner` lives.
    pub unsafe fn register(
        &self,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Region> {
        self.inner.check_open_to("register")?;
        // SAFETY: as promised by the caller.
        unsafe { Region::register(&self.inner, address, nbytes, writable, owner) }
    }

    /// A peer's region, from the bytes of its descriptor.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn import(&self, descriptor: &[u8]) -> Result<Remote> {
        Remote::decode(descriptor)
    }

    /// Writes `src` into `dst`; returns before the bytes move.
    ///
    /// # Errors
    /// `InvalidArgument`, `QueueFull`, `Closed`; `PeerLost` once that is known;
    /// `ResourceExhausted` when the peer keeps no more immediates without a counter.
    /// Everything else fails the transfer.
    #[inline]
    pub fn write(&self, src: &Slice, dst: &RemoteSlice, options: WriteOptions) -> Result<Transfer> {
        self.inner.check_source((&src.inner, &src.memory), "write")?;
        let extents = Extents::One(check_alike(src, dst)?);
        self.write_extents((&src.memory, &dst.shared, extents), 1, options, None)
    }

    /// Writes page `i` of `src` into page `i` of `dst`; counts once a page.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn write_pages(
        &self,
        src: (&Region, PageList),
        dst: (&Remote, PageList),
        options: WriteOptions,
    ) -> Result<Transfer> {
        let ((src, src_pages), (dst, dst_pages)) = (src, dst);
        self.inner.check_source((&src.inner, &src.memory), "write_pages")?;
        check_pages((src.nbytes(), &src_pages), (dst.nbytes(), &dst_pages))?;
        let num_pages = u32::try_from(src_pages.num_pages())
            .map_err(|_| Error::invalid("more than 2^32 pages in one call").during("write_pages"))?;
        let mut entry = self.inner.rings.draft();
        let extents = entry.extents(src_pages, dst_pages);
        self.write_extents((&src.memory, &dst.shared, extents), num_pages, options, Some(entry))
    }

    /// Sends a message; done when the peer's engine has queued it.
    ///
    /// # Errors
    /// `InvalidArgument` when it is too large; otherwise as [`Engine::write`].
    pub fn send(&self, address: &Address, message: Vec<u8>, timeout: Option<Duration>) -> Result<Transfer> {
        const OPERATION: &str = "send";
        self.inner.check_open_to(OPERATION)?;
        let nbytes = message.len() as u64;
        let limit = u64::from(self.inner.config.max_message_bytes);
        if nbytes > limit {
            let message = format!("the message has {nbytes} bytes, at most {limit}; write large data into a region");
            return Err(Error::invalid(message).during(OPERATION));
        }
        let mut about = About { operation: OPERATION, peer: None, region: None, nbytes };
        let peer = self.inner.peer_for(address, None, || about.clone())?;
        about.peer = Some(Arc::clone(&peer));
        let order = Order { nbytes, timeout, ..Order::default() };
        let ticket = self.inner.begin_one(&peer, order).map_err(|error| about.name(&self.inner, error))?;
        self.inner.submit(&peer, Content::Message(message), None, false, &ticket);
        Ok(Transfer::pending(Arc::clone(&self.inner), about, ticket))
    }

    /// Takes the oldest unread message, waiting for one if there is none.
    ///
    /// # Errors
    /// `WaitTimeout`, `Closed`.
    pub fn receive(&self, timeout: Option<Duration>) -> Result<Message> {
        self.inner.check_open_to("receive")?;
        let clock = &self.inner.clock;
        let until_ns = timeout.map(|timeout| clock.now_ns().saturating_add(nanos(timeout)));
        loop {
            if let Some(message) = self.inner.messages.take() {
                return Ok(message);
            }
            self.inner.check_open_to("receive")?;
            let left = until_ns.map(|until_ns| Duration::from_nanos(until_ns.saturating_sub(clock.now_ns())));
            if !self.inner.wait(left, || self.inner.messages.is_ready()) {
                let message = format!("no message after {}", seconds(timeout));
                return Err(Error::new(Code::WaitTimeout, message).during("receive"));
            }
        }
    }

    /// Takes the oldest unread message, if there is one.
    ///
    /// # Errors
    /// `Closed`.
    pub fn try_receive(&self) -> Result<Option<Message>> {
        self.inner.check_open_to("receive")?;
        self.inner.glance();
        Ok(self.inner.messages.take())
    }

    /// Runs `on_ready` once when a message can be taken or the engine is
    /// closed. It must not block and not call the engine.
    pub fn on_message(&self, on_ready: Box<dyn FnOnce() + Send>) -> Waiter {
        self.inner.messages.on_ready(on_ready)
    }

    /// What waits for a message will not be told any more, unless it was already.
    pub fn give_up_message(&self, waiter: Waiter) {
        // The lock may be held by a thread that is not in a forked child.
        if self.inner.check_fork().is_ok() {
            self.inner.messages.give_up(waiter);
        }
    }

    /// Opens a counter for `imm`, or for a fresh one of this engine. When a
    /// source is lost, its waiters fail.
    ///
    /// What comes late for a fresh one is counted for nobody; for a user's, for
    /// the next counter: let every transfer with it quiesce before it means
    /// something else.
    ///
    /// # Errors
    /// `InvalidArgument` when a counter for it is open already, or `imm` is not
    /// the user's; `ResourceExhausted` when no fresh one is left; `Closed`.
    pub fn counter(&self, imm: Option<u32>, sources: &[Address]) -> Result<Counter> {
        self.inner.check_open_to("counter")?;
        let imm = match imm {
            None => None,
            Some(imm) => {
                let user = check_imm(Some(imm), "counter")?.filter(|imm| !imm.is_of_engine());
                let limit = Imm::FIRST_OF_ENGINE;
                let message = format!("imm {imm} is not the user's: those are below {limit}; omit it for a fresh one");
                Some(user.ok_or_else(|| Error::invalid(message).during("counter"))?)
            }
        };
        let engines = sources.iter().map(|source| source.engine).collect();
        let name_of = |peer| self.inner.peer(peer).map_or_else(String::new, |peer| peer.address.to_string());
        let state = self.inner.counters.open(imm, engines, name_of)?;
        let counter = Counter::new(Arc::clone(&self.inner), state);
        for source in sources.iter().filter(|source| **source != self.inner.address) {
            let peer = self.inner.peer_at(source);
            if let Some(why) = peer.lost() {
                self.inner.counters.peer_lost(source.engine, &source.to_string(), why);
            } else {
                self.inner.prepare(&peer);
            }
        }
        Ok(counter)
    }

    /// A 64-bit word, 0 at first, that fires operations as it grows.
    ///
    /// # Errors
    /// `ResourceExhausted`, `Closed`.
    pub fn watch(&self) -> Result<Watcher> {
        self.inner.check_open_to("watch")?;
        Watcher::new(Arc::clone(&self.inner))
    }

    /// Stops taking work, waits for what is under way until the timeout, fails
    /// the rest with `Closed`, and frees everything. Idempotent, from any
    /// thread: a second one returns when the first does.
    pub fn close(&self, timeout: Duration) {
        if self.inner.check_fork().is_err() {
            return;
        }
        let this = std::thread::current().id();
        let is_worker = self.worker_id == Some(this);
        // What is dropped or told meanwhile may come back here, and the worker is waited for.
        let may_wait = !is_worker && self.closer_id.get() != Some(&this);
        let Some(mut worker) = (if may_wait { Some(lock(&self.worker)) } else { try_lock(&self.worker) }) else {
            return;
        };
        if self.inner.set_closed() {
            let _ = self.closer_id.set(this);
            self.inner.finish(timeout);
        }
        if let Some(worker) = worker.take_if(|_| !is_worker) {
            let _ = worker.join();
        }
        self.inner.stop_listening();
    }

    // ---- for callers that look up while they wait ------------------------------------------------

    /// Whether this process made the engine, and it is open.
    ///
    /// # Errors
    /// `EngineForked`, `Closed`.
    #[inline]
    pub fn check_open(&self) -> Result<()> {
        self.inner.check_open()
    }

    /// Whether this process made the engine.
    ///
    /// # Errors
    /// `EngineForked`.
    #[inline]
    pub fn check_fork(&self) -> Result<()> {
        self.inner.check_fork()
    }

    // ---- inside --------------------------------------------------------------------------------

    /// `entry`: one that has the pages, of pages.
    fn write_extents(
        &self,
        (source, remote, extents): (&Arc<Memory>, &RemoteShared, Extents),
        count: u32,
        options: WriteOptions,
        entry: Option<Entry>,
    ) -> Result<Transfer> {
        let operation = if entry.is_some() { "write_pages" } else { "write" };
        let inner = &self.inner;
        let imm = check_imm(options.imm, operation)?;
        let nbytes = extents.nbytes();
        let about = |peer| About { operation, peer, region: Some(source.id), nbytes };
        if count == 0 {
            return Ok(Transfer::done(0, None));
        }
        let route = remote.route(inner, imm.is_some());
        let found;
        let peer = match route {
            Some(route) => &route.peer,
            None => {
                found = inner.peer_for(&remote.descriptor.address, imm, || about(None))?;
                remote.find_route(inner, &found);
                &found
            }
        };
        let counted = imm.map(|imm| (imm, count));
        let is_inline = !options.verify && source.gpu_memory().is_none();
        if let (Some(route), true) = (route, is_inline) {
            let began_ns = (nbytes >= TIMED_BYTES || is_sampled()).then(|| inner.clock.now_ns());
            let write = Inline { source, binding: &route.binding, extents: &extents, imm: counted };
            if let Some(result) = route.link.try_inline(&write) {
                drop(extents);
                entry.into_iter().for_each(|entry| inner.rings.give_back(entry));
                return Ok(match result {
                    Ok(()) => {
                        let interval_ns = began_ns.map(|began_ns| (began_ns, inner.clock.now_ns()));
                        if let Some((began_ns, ended_ns)) = interval_ns {
                            route.link.note_latency(ended_ns - began_ns);
                            peer.operations.sample(ended_ns - began_ns);
                        }
                        Transfer::done(nbytes, interval_ns)
                    }
                    Err(failure) => {
                        peer.operations.failed();
                        imm.iter().for_each(|imm| peer.note_loss(*imm));
                        Transfer::failed(nbytes, about(Some(Arc::clone(peer))).error(inner, &failure))
                    }
                });
            }
        }
        let mut entry = entry.unwrap_or_else(|| inner.rings.draft());
        entry.recipients.add(peer.idx, &peer.operations, nbytes);
        let kept = Some(Arc::clone(source));
        let order = Order { num_parts: 1, nbytes, source: kept, imm, timeout: options.timeout, is_probe: false };
        let about = about(Some(Arc::clone(peer)));
        let ticket = inner.begin(entry, order).map_err(|error| about.name(inner, error))?;
        let what = What::Write { source, remote, extents };
        inner.submit_part(Part { peer, what }, (counted, options.verify), &ticket);
        Ok(Transfer::pending(Arc::clone(inner), about, ticket))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({})", self.inner.address)
    }
}

/// Every sixteenth small write is timed, for the statistics.
fn is_sampled() -> bool {
    thread_local!(static TURN: std::cell::Cell<u32> = const { std::cell::Cell::new(0) });
    TURN.with(|turn| {
        turn.set(turn.get().wrapping_add(1));
        turn.get() % 16 == 0
    })
}

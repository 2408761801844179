//! A 64-bit word, and operations that fire when it reaches a value.
//!
//! Whoever grows the word through [`Watcher::set`] or [`Watcher::add`] fires
//! what is due in the same call. Stores from elsewhere, once the word's address
//! has been given out, are seen by a thread that polls as long as something is
//! armed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use anyfabric_plan::{Extents, PageList};
use anyfabric_transports::sys::Mapping;
use anyfabric_transports::{Failure, Recipients, Terms, Ticket};
use anyfabric_wire::Imm;

use crate::checks::{check_alike, check_imm, check_pages};
use crate::inner::{lock, nanos, Inner};
use crate::peer::Peer;
use crate::region::Slice;
use crate::remote::RemoteSlice;
use crate::submission::Content;
use crate::transfer::{About, Transfer};
use crate::waiters::{Waiter, Waiters};
use crate::{Code, Error, Result};

/// What a watcher fires.
#[derive(Debug, Clone)]
pub enum Operation {
    /// One range.
    Write {
        /// The source.
        src: Slice,
        /// The destination.
        dst: RemoteSlice,
    },
    /// Pages; counts once a page.
    WritePages {
        /// The source region.
        src: Slice,
        /// Its pages.
        src_pages: PageList,
        /// The destination region.
        dst: RemoteSlice,
        /// Its pages.
        dst_pages: PageList,
    },
}

/// A 64-bit word that fires operations as it grows. Closed on drop.
pub struct Watcher {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
}

struct Shared {
    word: Mapping,
    armed: Mutex<Waiters<Trigger>>,
    /// The smallest armed value; `u64::MAX` when none is.
    next: AtomicU64,
    closed: AtomicBool,
    /// The word's address was given out: others may store into it.
    external: AtomicBool,
}

struct Trigger {
    inner: Arc<Inner>,
    peer: Arc<Peer>,
    content: Content,
    imm: Option<(Imm, u32)>,
    ticket: Arc<Ticket>,
}

impl Watcher {
    pub(crate) fn new(inner: Arc<Inner>) -> Result<Self> {
        let word = Mapping::anonymous(4096).map_err(|error| Error::system("the word", &error).during("watch"))?;
        let shared = Arc::new(Shared {
            word,
            armed: Mutex::default(),
            next: AtomicU64::new(u64::MAX),
            closed: AtomicBool::new(false),
            external: AtomicBool::new(false),
        });
        inner.watching.add(&shared);
        Ok(Self { inner, shared })
    }

    /// The word.
    pub fn value(&self) -> u64 {
        // ORDERING: acquire what was written before the word grew.
        self.shared.word().load(Ordering::Acquire)
    }

    /// Address of the word; from now on stores by others are seen, by polling.
    ///
    /// # Errors
    /// `ResourceExhausted` when no thread is left.
    pub fn as_ptr(&self) -> Result<*mut u64> {
        // ORDERING: before the polling thread looks.
        self.shared.external.store(true, Ordering::Release);
        self.inner.watching.start().map_err(|error| Error::system("the watch thread", &error).during("watch"))?;
        Ok(self.shared.word.as_ptr().cast())
    }

    /// Stores a value, and fires what is due.
    ///
    /// # Errors
    /// `InvalidArgument` when the word would shrink; `Closed`.
    pub fn set(&self, value: u64) -> Result<()> {
        self.check_open()?;
        // ORDERING: release the source bytes; partner: the acquire in `fire_due`.
        let before = self.shared.word().fetch_max(value, Ordering::AcqRel);
        if before > value {
            return Err(
                Error::invalid(format!("the word is {before} already; it only grows, given {value}")).during("watch")
            );
        }
        self.shared.fire_due();
        Ok(())
    }

    /// Adds to the word, and fires what is due; returns the new value.
    ///
    /// # Errors
    /// `InvalidArgument` when the sum is beyond 64 bits; `Closed`.
    pub fn add(&self, n: u64) -> Result<u64> {
        self.check_open()?;
        // ORDERING: see `set`.
        let before = self.shared.word().fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| word.checked_add(n));
        let before = before.map_err(|word| {
            Error::invalid(format!("the word is {word}; it only grows, and with {n} more it is beyond 64 bits"))
                .during("watch")
        })?;
        self.shared.fire_due();
        Ok(before + n)
    }

    /// Submits an operation when the word is `value` or more; at once if it
    /// is. Its deadline starts then. It is never turned away for want of room in
    /// the queue: nobody is there to be told.
    ///
    /// # Errors
    /// As the operation itself: everything is checked now.
    pub fn at(&self, value: u64, operation: Operation, imm: Option<u32>) -> Result<Transfer> {
        self.check_open()?;
        let (name, src, dst) = match &operation {
            Operation::Write { src, dst } => ("write", src.clone(), dst.clone()),
            Operation::WritePages { src, dst, .. } => ("write_pages", src.clone(), dst.clone()),
        };
        self.inner.check_source((&src.inner, &src.memory), name)?;
        let imm = check_imm(imm, name)?;
        let extents = match operation {
            Operation::Write { src, dst } => Extents::One(check_alike(&src, &dst)?),
            Operation::WritePages { src, src_pages, dst, dst_pages } => {
                check_pages((src.nbytes, &src_pages), (dst.nbytes, &dst_pages))?;
                Extents::pages(src_pages, dst_pages)
            }
        };
        let descriptor = &dst.shared.descriptor;
        let nbytes = extents.nbytes();
        let mut about = About { operation: name, peer: None, region: Some(src.memory.id), nbytes };
        let peer = self.inner.peer_for(&descriptor.address, imm, || about.clone())?;
        about.peer = Some(Arc::clone(&peer));
        // The path is made now, so that firing finds it.
        self.inner.prepare(&peer);
        let count = extents.num_extents() as u32;
        if count == 0 {
            return Ok(Transfer::done(0, None));
        }
        let source = Some(Arc::clone(&src.memory));
        let submitted_ns = self.inner.clock.now_ns();
        let terms = Terms { num_parts: 1, nbytes, submitted_ns, deadline_ns: u64::MAX, source, is_probe: false };
        let (mut ticket, mut recipients) = (Ticket::new(Arc::clone(&self.inner.office), terms), Recipients::default());
        recipients.add(peer.idx, &peer.operations, nbytes);
        ticket.set_recipients(&mut recipients);
        let ticket = Arc::new(ticket);
        let content = dst.content(&src, extents);
        let transfer = Transfer::pending(Arc::clone(&self.inner), about, Arc::clone(&ticket));
        let imm = imm.map(|imm| (imm, count));
        self.arm(value, Trigger { inner: Arc::clone(&self.inner), peer, content, imm, ticket })?;
        Ok(transfer)
    }

    /// From now on it fires at its value; now, if that is reached.
    fn arm(&self, value: u64, trigger: Trigger) -> Result<()> {
        let (ticket, shared) = (Arc::clone(&trigger.ticket), Arc::downgrade(&self.shared));
        let waiter = {
            let mut armed = lock(&self.shared.armed);
            if let Err(error) = self.check_open() {
                // Who closes it empties it under this lock, and had not seen this one.
                trigger.end(Failure::Closed);
                return Err(error);
            }
            let waiter = armed.add(value, trigger);
            self.shared.note_next(&armed);
            waiter
        };
        // Cancelled, it does not wait for the word to let go of its region and to tell the receiver.
        ticket.on_end(Box::new(move || {
            if let Some(shared) = shared.upgrade() {
                shared.disarm(waiter);
            }
        }));
        self.shared.fire_due();
        self.inner.watching.nudge();
        Ok(())
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        // ORDERING: for people.
        self.shared.closed.load(Ordering::Relaxed)
    }

    /// Fails what has not fired with `Cancelled`.
    pub fn close(&self) {
        if self.inner.check_fork().is_ok() {
            self.shared.close(&Failure::Cancelled);
        }
    }

    fn check_open(&self) -> Result<()> {
        self.inner.check_open_to("watch")?;
        if self.is_closed() {
            return Err(Error::new(Code::Closed, "the watcher is closed").during("watch"));
        }
        Ok(())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("value", &self.value()).finish_non_exhaustive()
    }
}

impl Shared {
    fn word(&self) -> &AtomicU64 {
        // SAFETY: page-aligned, inside the mapping, which lives as long as `self`; everybody accesses it atomically.
        unsafe { &*self.word.as_ptr().cast::<AtomicU64>() }
    }

    fn is_due(&self) -> bool {
        // ORDERING: sequentially consistent with arming: the word is read after `next` was stored, or the reverse.
        self.word().load(Ordering::SeqCst) >= self.next.load(Ordering::SeqCst)
    }

    fn note_next(&self, armed: &Waiters<Trigger>) {
        // ORDERING: see `is_due`.
        self.next.store(armed.first().unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    fn fire_due(&self) {
        while self.is_due() {
            let due = {
                let mut armed = lock(&self.armed);
                // ORDERING: acquire the source bytes.
                let value = self.word().load(Ordering::Acquire);
                let due = armed.take_until(value);
                self.note_next(&armed);
                due
            };
            if due.is_empty() {
                return;
            }
            due.into_iter().for_each(Trigger::fire);
        }
    }

    fn close(&self, why: &Failure) {
        // ORDERING: for people.
        self.closed.store(true, Ordering::Relaxed);
        let armed = {
            let mut armed = lock(&self.armed);
            let all = armed.take_all();
            self.note_next(&armed);
            all
        };
        armed.into_iter().for_each(|trigger| trigger.end(why.clone()));
    }

    /// Ends that trigger, if it has not fired.
    fn disarm(&self, waiter: Waiter) {
        let trigger = {
            let mut armed = lock(&self.armed);
            let trigger = armed.remove(waiter);
            if trigger.is_some() {
                self.note_next(&armed);
            }
            trigger
        };
        if let Some(trigger) = trigger {
            trigger.end(Failure::Cancelled);
        }
    }
}

impl Trigger {
    fn fire(self) {
        if let Some(why) = self.ticket.given_up() {
            return self.end(why);
        }
        let Self { inner, peer, content, imm, ticket } = self;
        ticket.restart(nanos(inner.config.timeout));
        inner.track(&ticket, imm.map(|(imm, _)| imm));
        inner.submit(&peer, content, imm, false, &ticket);
    }

    /// It will not be submitted: whoever counts on it is told.
    fn end(self, why: Failure) {
        if let Some((imm, _)) = self.imm {
            self.peer.note_loss(imm);
        }
        self.ticket.part_ended(Err(why));
    }
}

/// The thread that sees stores from elsewhere; started when a word's address
/// is first given out.
#[derive(Default)]
pub(crate) struct Watching {
    shared: Arc<WatchList>,
    started: Mutex<bool>,
}

#[derive(Default)]
struct WatchList {
    watchers: Mutex<Vec<Weak<Shared>>>,
    nudged: Condvar,
    stopped: AtomicBool,
}

impl Watching {
    fn add(&self, watcher: &Arc<Shared>) {
        let mut watchers = lock(&self.shared.watchers);
        watchers.retain(|other| other.strong_count() > 0);
        watchers.push(Arc::downgrade(watcher));
    }

    fn start(&self) -> std::io::Result<()> {
        let mut started = lock(&self.started);
        if !*started {
            let shared = Arc::clone(&self.shared);
            // Ends by itself: `stop` wakes it, and it holds no engine.
            std::thread::Builder::new().name("anyfabric-watch".into()).spawn(move || shared.poll())?;
            *started = true;
        }
        Ok(())
    }

    /// Something was armed.
    fn nudge(&self) {
        self.shared.nudged.notify_one();
    }

    /// The engine closes: fails what has not fired.
    pub(crate) fn stop(&self) {
        // ORDERING: followed by a wake-up.
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.nudged.notify_one();
        for watcher in self.shared.alive(|_| true) {
            watcher.close(&Failure::Closed);
        }
    }
}

impl WatchList {
    fn alive(&self, keep: impl Fn(&Shared) -> bool) -> Vec<Arc<Shared>> {
        lock(&self.watchers).iter().filter_map(Weak::upgrade).filter(|watcher| keep(watcher)).collect()
    }

    fn poll(&self) {
        let is_armed = |watcher: &Shared| {
            // ORDERING: a look that comes late comes again.
            watcher.external.load(Ordering::Acquire) && watcher.next.load(Ordering::SeqCst) != u64::MAX
        };
        let mut quiet_since = Instant::now();
        while !self.stopped.load(Ordering::SeqCst) {
            let armed = self.alive(is_armed);
            if armed.is_empty() {
                let watchers = lock(&self.watchers);
                drop(self.nudged.wait_timeout(watchers, IDLE));
                continue;
            }
            if armed.iter().any(|watcher| watcher.is_due()) {
                armed.iter().for_each(|watcher| watcher.fire_due());
                quiet_since = Instant::now();
            }
            if quiet_since.elapsed() > SPIN {
                std::thread::sleep(NAP);
            }
        }
    }
}

/// How long the thread spins after something fired, and sleeps between looks
/// after that.
const SPIN: Duration = Duration::from_micros(50);
const NAP: Duration = Duration::from_micros(50);
const IDLE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use anyfabric_transports::loopback::{Fabric, Simulation};

    use super::*;
    use crate::{Config, Engine};

    #[test]
    fn one_of_many_at_a_value_is_given_up() {
        let simulation = Simulation::new(1, Fabric::default());
        let engine = || Engine::simulated(&simulation, Config::default(), &[100]).unwrap();
        let (one, other) = (engine(), engine());
        let (source, target) = (one.allocate(8).unwrap(), other.allocate(8).unwrap());
        let remote = one.import(&target.descriptor().unwrap().encode()).unwrap();
        let watcher = one.watch().unwrap();
        let arm = |_| {
            let (src, dst) = (source.slice(0..8).unwrap(), remote.slice(0..8).unwrap());
            watcher.at(5, Operation::Write { src, dst }, None).unwrap()
        };
        let armed: Vec<_> = (0..8).map(arm).collect();
        armed.iter().step_by(2).for_each(Transfer::cancel);
        let codes: Vec<_> = armed.iter().map(|transfer| transfer.error().map(|error| error.code)).collect();
        assert_eq!(codes, [Some(Code::Cancelled), None].repeat(4));
        armed.iter().for_each(Transfer::cancel);
        assert!(armed.iter().all(Transfer::is_quiesced) && lock(&watcher.shared.armed).is_empty());
    }
}

//! What the handles of an engine share.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) use anyfabric_transports::lock;
use anyfabric_transports::loopback::Endpoint;
use anyfabric_transports::sys::{self, fork_generation, EventFd, Fd, Interest, Mapping, Poller};
use anyfabric_transports::{Clock, Doorbell, Failure, Link, Region, RegionTable, TicketOffice};
use anyfabric_wire::handshake::Host;
use anyfabric_wire::{Address, Control, EngineId, Imm};

use crate::arrivals::Arrivals;
use crate::counter::{AtHand, Counters};
use crate::driver::{Driver, WAKE};
use crate::events::{Event, EventLog};
use crate::listeners::Listeners;
use crate::meet::random;
use crate::messages::Messages;
use crate::peer::{Peer, Phase};
use crate::peers::PeerTable;
use crate::placement::Pinning;
use crate::rails::Groups;
use crate::revoke::{release_orphans, Revokes};
use crate::simulated::simulated_host;
use crate::under_way::Rings;
use crate::wait::Presence;
use crate::watcher::Watching;
use crate::{Code, Config, Context, Error, Result};

/// An engine, as its handles, its worker and its links see it.
pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) secret: Arc<[u8]>,
    pub(crate) clock: Clock,
    pub(crate) address: Address,
    pub(crate) host: Host,
    /// Our place in the simulation that we live in, if so.
    pub(crate) simulated: Option<Endpoint>,
    pub(crate) doorbell: Arc<Doorbell>,
    pub(crate) doorbell_fd: Arc<Fd>,
    pub(crate) poller: Arc<Poller>,
    pub(crate) wake_fd: EventFd,
    /// Peers read it to learn whether they may touch our memory.
    pub(crate) probe: Box<u64>,
    pub(crate) regions: Arc<RegionTable>,
    pub(crate) counters: Counters,
    pub(crate) messages: Messages,
    pub(crate) presence: Presence,
    pub(crate) driver: Mutex<Driver>,
    pub(crate) revokes: Revokes,
    pub(crate) watching: Watching,
    pub(crate) office: Arc<TicketOffice>,
    pub(crate) rings: Rings,
    generation: u32,
    /// No two engines of a process have the same.
    pub(crate) serial: u64,
    pub(crate) peers: PeerTable,
    pub(crate) events: Mutex<VecDeque<Event>>,
    pub(crate) has_events: AtomicBool,
    pub(crate) log: Arc<EventLog>,
    next_op: AtomicU64,
    next_region: AtomicU64,
    pub(crate) closed: AtomicBool,
    uses_streams: AtomicBool,
    pub(crate) groups: Groups,
    pub(crate) pinning: Pinning,
}

impl Inner {
    pub(crate) fn new(config: Config, simulated: Option<Endpoint>) -> Result<Self> {
        config.validate()?;
        release_orphans();
        let system = |what: &'static str| move |error: std::io::Error| Error::system(what, &error).during("start");
        let poller = Arc::new(Poller::new().map_err(system("epoll"))?);
        let wake_fd = EventFd::new().map_err(system("an eventfd"))?;
        poller.add(&wake_fd, WAKE, Interest::Read).map_err(system("epoll"))?;
        let (id, sockets, listeners) = match &simulated {
            Some(endpoint) => (endpoint.id(), Vec::new(), None),
            None => {
                let id = EngineId(random().map_err(system("random numbers"))?);
                let (bound, listeners) = Listeners::bind(&config.listen, id, &poller)?;
                (id, crate::info::reachable(bound), Some(listeners))
            }
        };
        let groups = match &simulated {
            Some(_) => Groups::default(),
            None => Groups::new(&config, &poller)?,
        };
        let doorbell_fd = sys::memfd(c"anyfabric-doorbell", Doorbell::BYTES).map_err(system("the doorbell"))?;
        let mapping = Mapping::shared(&doorbell_fd, Doorbell::BYTES, true).map_err(system("the doorbell"))?;
        let doorbell = Arc::new(Doorbell::new(mapping));
        let clock = simulated.as_ref().map_or(Clock::Real, Endpoint::clock);
        let probe = u64::from_le_bytes(random().map_err(system("random numbers"))?);
        let office = Arc::new(TicketOffice::new(Arc::clone(&doorbell), clock.clone()));
        let this = Self {
            secret: config.secret.clone().unwrap_or_default().into(),
            clock,
            address: Address { engine: id, sockets },
            host: simulated.as_ref().map_or_else(crate::info::this_host, simulated_host),
            simulated,
            counters: Counters::new(Arc::clone(&doorbell)),
            doorbell_fd: Arc::new(doorbell_fd),
            poller,
            wake_fd,
            probe: Box::new(probe),
            regions: Arc::default(),
            messages: Messages::default(),
            presence: Presence::default(),
            driver: Mutex::new(Driver::new(listeners)),
            revokes: Revokes::default(),
            watching: Watching::default(),
            office,
            rings: Rings::default(),
            doorbell,
            generation: fork_generation(),
            // ORDERING: only a number.
            serial: NUM_ENGINES.fetch_add(1, Ordering::Relaxed),
            peers: PeerTable::default(),
            events: Mutex::default(),
            has_events: AtomicBool::new(false),
            log: Arc::default(),
            next_op: AtomicU64::new(1),
            // Region 0 is none.
            next_region: AtomicU64::new(1),
            closed: AtomicBool::new(false),
            uses_streams: AtomicBool::new(false),
            groups,
            pinning: Pinning::default(),
            config,
        };
        if this.secret.is_empty() && this.address.sockets.iter().any(|socket| !socket.ip().is_loopback()) {
            let told = "whoever can connect may speak to it: give it and its peers a secret (ANYFABRIC_SECRET)";
            this.log(30, format!("{}: {told}", this.address));
        }
        Ok(this)
    }

    // ---- state ---------------------------------------------------------------------------------

    /// Whether this process made the engine.
    #[inline]
    pub(crate) fn check_fork(&self) -> Result<()> {
        if self.generation == fork_generation() {
            return Ok(());
        }
        let message = "the engine belongs to the parent process; make one after fork()";
        Err(Error::new(Code::EngineForked, message))
    }

    #[inline]
    pub(crate) fn check_open(&self) -> Result<()> {
        self.check_fork()?;
        if self.is_closed() {
            return Err(Error::new(Code::Closed, "the engine is closed"));
        }
        Ok(())
    }

    /// As [`Inner::check_open`]; the error says of which operation.
    #[inline]
    pub(crate) fn check_open_to(&self, operation: &'static str) -> Result<()> {
        self.check_open().map_err(|error| error.during(operation))
    }

    pub(crate) fn is_closed(&self) -> bool {
        // ORDERING: a first look; operations look again once they are looked after (`submit`).
        self.closed.load(Ordering::Acquire)
    }

    /// Whether some peer's data comes through streams.
    #[inline]
    pub(crate) fn uses_streams(&self) -> bool {
        // ORDERING: a hint.
        self.uses_streams.load(Ordering::Relaxed)
    }

    pub(crate) fn set_uses_streams(&self) {
        self.uses_streams.store(true, Ordering::Relaxed);
    }

    /// True the first time.
    pub(crate) fn set_closed(&self) -> bool {
        // ORDERING: see `has_begun_to_close`.
        !self.closed.swap(true, Ordering::SeqCst)
    }

    /// Random bytes: the system's, or the simulation's.
    pub(crate) fn random<const N: usize>(&self) -> std::io::Result<[u8; N]> {
        self.simulated.as_ref().map_or_else(random, |endpoint| Ok(endpoint.random()))
    }

    pub(crate) fn next_region_id(&self) -> u64 {
        // ORDERING: a number of its own, no more.
        self.next_region.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn next_op_id(&self) -> u64 {
        self.next_op_ids(1)
    }

    /// The first of so many; not all need be used.
    pub(crate) fn next_op_ids(&self, count: u64) -> u64 {
        // ORDERING: as above.
        self.next_op.fetch_add(count, Ordering::Relaxed)
    }

    // ---- peers ---------------------------------------------------------------------------------

    /// Makes sure that a path is there or under way.
    pub(crate) fn prepare(&self, peer: &Peer) {
        if peer.needs_call() {
            self.push_event(Event::Call(peer.idx));
            self.wake();
        }
    }

    pub(crate) fn context(
        &self,
        operation: &'static str,
        peer: Option<&Peer>,
        region: Option<u64>,
        nbytes: u64,
    ) -> Context {
        Context {
            operation: Some(operation),
            peer: peer.map(|peer| peer.address.to_string()),
            region,
            nbytes: Some(nbytes),
            path: peer.and_then(|peer| peer.link()).map(|link| link.transport()),
        }
    }

    /// The owner of `imm` would like it back from its sources.
    pub(crate) fn retire_imm(&self, imm: Imm, sources: Vec<EngineId>) {
        for engine in sources {
            match self.find_peer(engine) {
                Some(peer) if peer.lost().is_none() && peer.has_session() => {
                    peer.base.send_control(Control::RetireImm { imm }.encode());
                }
                // Never met or dead: nothing of it can be under way.
                _ => self.counters.retired(imm, engine),
            }
        }
    }

    // ---- loss ----------------------------------------------------------------------------------

    /// Gives a peer up, for good.
    pub(crate) fn lose(&self, peer: &Arc<Peer>, why: &str) {
        self.part_from(peer, why, 30);
    }

    /// As [`Inner::lose`], for an end that is nobody's fault.
    pub(crate) fn part_from(&self, peer: &Arc<Peer>, why: &str, level: u8) {
        self.part(peer, Failure::PeerLost(why.to_owned()), level, why);
    }

    /// Gives up a session that the peer never heard of: what was under way to
    /// it fails, and the peer is met again like a new one.
    pub(crate) fn forget(&self, peer: &Arc<Peer>, why: &str) {
        self.unlist(peer.address.engine);
        self.part(peer, Failure::ConnectionBroken(why.to_owned()), 30, why);
        let losses = self.office.losses.take(peer.idx);
        let regions = self.regions.all();
        let is_owed = !losses.is_empty() || regions.iter().any(|region| region.is_revoked_for(peer.idx));
        // It may never come again: listed only if it then has to be told, or refused, something.
        if is_owed {
            let next = self.peer_at(&peer.address);
            losses.into_iter().for_each(|imm| next.note_loss(imm));
            regions.iter().for_each(|region| region.rename(peer.idx, next.idx));
            self.forget_strangers();
        }
    }

    fn part(&self, peer: &Arc<Peer>, failure: Failure, level: u8, why: &str) {
        if peer.lost().is_some() {
            return;
        }
        // What the peer had published before its end still counts: answers that overtook each other on two ways.
        let arrivals = Arrivals { inner: self, at_hand: &AtHand::default() };
        for link in peer.links() {
            for _ in 0..LAST_TURNS {
                if !link.poll(&arrivals) {
                    break;
                }
            }
        }
        peer.set_lost(failure.clone());
        peer.state().phase = Phase::Lost;
        for link in peer.links() {
            link.close(&failure);
        }
        peer.fail_waiting(&failure);
        if let Some(shm) = peer.shm() {
            shm.forget_socket(&self.poller);
        }
        self.note_lost(peer);
        self.revokes.peer_lost(self, peer);
        if peer.links().all(Link::is_quiet) {
            self.gone(peer);
        }
        // Who waits for one of its counts finds it in the log already.
        self.log(level, format!("lost {}: {why}", peer.address));
        self.counters.peer_lost(peer.address.engine, &peer.address.to_string(), &failure);
    }

    /// The peer's process has exited, or its links let nothing pass any more:
    /// nothing of it touches our memory.
    pub(crate) fn gone(&self, peer: &Peer) {
        for region in self.regions.all().iter().chain(&self.revokes.quarantined()) {
            region.released_by(peer.idx);
        }
        if let Some(shm) = peer.shm() {
            shm.give_back();
        }
        self.revokes.settle(self);
    }

    pub(crate) fn is_quarantined(&self, region: &Region) -> bool {
        !region.granted_to().is_empty()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.check_fork().is_ok() {
            self.revokes.leave_behind();
        }
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Engines of this process so far.
static NUM_ENGINES: AtomicU64 = AtomicU64::new(0);
/// Turns that a lost peer's link is still read.
const LAST_TURNS: usize = 64;

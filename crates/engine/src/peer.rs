//! A peer: one incarnation of another engine.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use anyfabric_transports::rdma::RailPath;
use anyfabric_transports::shm::ShmLink;
use anyfabric_transports::{lock, Failure, Link, OperationStats, PeerIdx, Place, TicketOffice};
use anyfabric_wire::handshake::Host;
use anyfabric_wire::{Address, Imm, NicLibrary};

use crate::backoff::Backoff;
use crate::base::Base;
use crate::heartbeat::Heartbeat;
use crate::submission::Submission;
use crate::wait::FRESH_NS;

/// One incarnation of another engine; what an operation looks at comes first: before it begins in one line of the
/// cache, on its way in the next.
#[repr(C, align(64))]
pub(crate) struct Peer {
    pub(crate) idx: PeerIdx,
    /// Why nothing may be submitted to it, or nothing that it counts: a bit each.
    obstacles: AtomicU8,
    pub(crate) has_waiting: AtomicBool,
    /// Of the user with this peer.
    pub(crate) operations: Arc<OperationStats>,
    lost: OnceLock<Failure>,
    link: OnceLock<Chosen>,
    pub(crate) base: Base,
    /// When it was last seen to have said nothing that nobody has read.
    silent_ns: AtomicU64,
    pub(crate) address: Address,
    office: Arc<TicketOffice>,
    shm: OnceLock<Arc<ShmLink>>,
    /// By library.
    rails: [OnceLock<Arc<dyn RailPath>>; 2],
    state: Mutex<PeerState>,
    pub(crate) waiting: Mutex<VecDeque<Submission>>,
    heard_ns: AtomicU64,
    /// We have told the peer so.
    pub(crate) told_full: AtomicBool,
}

/// How far a peer is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not yet, or given up for now.
    Idle,
    /// Our call is under way.
    Calling,
    /// Its call is expected: ours crossed it and lost, or was not answered.
    Expecting {
        /// When we call again.
        until_ns: u64,
    },
    /// The control connection stands; the Unix socket is being made.
    Joining {
        /// When tcp is used instead.
        until_ns: u64,
    },
    /// Ready.
    Up,
    /// The control connection broke and is being restored.
    Broken {
        /// When the peer is lost.
        until_ns: u64,
        /// When the next attempt is made; by the original caller only.
        retry_ns: u64,
    },
    /// For good.
    Lost,
}

/// The link that carries the data, and what never changes of it.
pub(crate) struct Chosen {
    pub(crate) link: Arc<dyn Link>,
    /// In a group of NICs.
    pub(crate) place: Option<Place>,
    sees_exit: bool,
}

impl Chosen {
    /// Whether both are in one group of NICs.
    #[inline]
    pub(crate) fn is_beside(&self, other: &Self) -> bool {
        self.place.is_some() && self.place.map(|place| place.group) == other.place.map(|place| place.group)
    }
}

pub(crate) struct PeerState {
    pub(crate) phase: Phase,
    pub(crate) session: Option<Session>,
    /// Where it answered our last call, of several addresses.
    pub(crate) reached_at: Option<SocketAddr>,
    /// Why no faster transport is used.
    pub(crate) reason: String,
    /// Why a transport cannot serve, of those that were looked at or tried.
    pub(crate) obstacles: Vec<(&'static str, String)>,
    pub(crate) heartbeat: Heartbeat,
    pub(crate) established_ns: u64,
    pub(crate) retry_lane_ns: u64,
    pub(crate) backoff: Backoff,
}

impl PeerState {
    /// Why that transport cannot serve, if that is known.
    pub(crate) fn obstacle(&self, name: &str) -> Option<&str> {
        self.obstacles.iter().find(|(known, _)| *known == name).map(|(_, why)| why.as_str())
    }
}

/// What both sides agreed on.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) is_caller: bool,
    pub(crate) token: [u8; 16],
    pub(crate) host: Host,
    pub(crate) transports: Vec<String>,
    pub(crate) max_message_bytes: u32,
    pub(crate) version: u16,
}

impl Peer {
    pub(crate) fn new(idx: PeerIdx, address: Address, base: Base, now_ns: u64, office: Arc<TicketOffice>) -> Self {
        let state = PeerState {
            phase: Phase::Idle,
            session: None,
            reached_at: None,
            reason: String::new(),
            obstacles: Vec::new(),
            heartbeat: Heartbeat::new(now_ns),
            established_ns: now_ns,
            retry_lane_ns: 0,
            backoff: Backoff::default(),
        };
        Self {
            idx,
            address,
            base,
            office,
            link: OnceLock::new(),
            shm: OnceLock::new(),
            rails: Default::default(),
            state: Mutex::new(state),
            waiting: Mutex::default(),
            has_waiting: AtomicBool::new(false),
            lost: OnceLock::new(),
            heard_ns: AtomicU64::new(now_ns),
            silent_ns: AtomicU64::new(0),
            obstacles: AtomicU8::new(0),
            told_full: AtomicBool::new(false),
            operations: Arc::default(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, PeerState> {
        lock(&self.state)
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state().phase
    }

    /// Whether the two have met, be the control connection up or being restored.
    pub(crate) fn has_session(&self) -> bool {
        self.state().session.is_some()
    }

    /// Whether it called, and its control connection broke before anything came:
    /// our welcome went down with it, and the session is ours alone.
    pub(crate) fn is_unheard(&self) -> bool {
        let state = self.state();
        matches!(state.phase, Phase::Broken { .. })
            && state.session.as_ref().is_some_and(|session| !session.is_caller)
            && self.heard_ns() <= state.established_ns
            && self.base.received() == 0
    }

    /// Whether its phase changes only when something comes.
    pub(crate) fn is_settled(&self) -> bool {
        matches!(self.phase(), Phase::Idle | Phase::Up | Phase::Lost)
    }

    /// Whether nobody is making a path: there was no call, or it found none.
    pub(crate) fn needs_call(&self) -> bool {
        match self.phase() {
            Phase::Idle => true,
            Phase::Up => self.link().is_none(),
            _ => false,
        }
    }

    /// The link that carries the data, once chosen.
    pub(crate) fn link(&self) -> Option<&Arc<dyn Link>> {
        self.link.get().map(|chosen| &chosen.link)
    }

    fn choose(&self, link: Arc<dyn Link>) {
        let (place, sees_exit) = (link.place(), link.sees_exit());
        let _ = self.link.set(Chosen { link, place, sees_exit });
    }

    pub(crate) fn shm(&self) -> Option<&Arc<ShmLink>> {
        self.shm.get()
    }

    pub(crate) fn use_shm(&self, shm: Arc<ShmLink>) {
        let _ = self.shm.set(Arc::clone(&shm));
        self.choose(shm);
    }

    /// The path over NICs of that library, if one was made or tried.
    pub(crate) fn rails(&self, library: NicLibrary) -> Option<&Arc<dyn RailPath>> {
        self.rails[library as usize].get()
    }

    pub(crate) fn all_rails(&self) -> impl Iterator<Item = &Arc<dyn RailPath>> {
        self.rails.iter().filter_map(OnceLock::get)
    }

    pub(crate) fn set_rails(&self, library: NicLibrary, path: Arc<dyn RailPath>) {
        let _ = self.rails[library as usize].set(path);
    }

    pub(crate) fn use_rails(&self, library: NicLibrary) {
        if let Some(path) = self.rails(library) {
            self.choose(Arc::clone(path) as Arc<dyn Link>);
        }
    }

    pub(crate) fn use_base(&self) {
        if let Some(tcp) = self.base.tcp() {
            tcp.expect_streams();
        }
        self.choose(self.base.to_link());
    }

    /// Every link that exists: the base, shm and rails where there are any.
    pub(crate) fn links(&self) -> impl Iterator<Item = &dyn Link> {
        let shm = self.shm.get().map(|shm| &**shm as &dyn Link);
        let rails = self.all_rails().map(|path| &**path as &dyn Link);
        std::iter::once(self.base.as_link()).chain(shm).chain(rails)
    }

    /// Where it is called, in that order.
    pub(crate) fn sockets(&self) -> Vec<SocketAddr> {
        let mut sockets = self.address.sockets.clone();
        if let Some(first) = self.state().reached_at {
            // Of the others each may cost a handshake's patience.
            sockets.sort_by_key(|socket| *socket != first);
        }
        sockets
    }

    /// Why the peer is lost, if it is.
    pub(crate) fn lost(&self) -> Option<&Failure> {
        self.lost.get()
    }

    /// True the first time.
    pub(crate) fn set_lost(&self, why: Failure) -> bool {
        let is_first = self.lost.set(why).is_ok();
        // ORDERING: after the reason; partner: `takes`.
        self.obstacles.fetch_or(IS_LOST, Ordering::Release);
        is_first
    }

    /// Whether it keeps no more arrivals that nobody waits for, as it has told.
    pub(crate) fn set_refuses_early(&self, refuses: bool) {
        // ORDERING: a notice; it comes late in any case.
        if refuses {
            self.obstacles.fetch_or(REFUSES_EARLY, Ordering::Relaxed);
        } else {
            self.obstacles.fetch_and(!REFUSES_EARLY, Ordering::Relaxed);
        }
    }

    /// Whether an operation that it counts, or does not, may be submitted to it.
    #[inline]
    pub(crate) fn takes(&self, is_counted: bool) -> bool {
        let obstacles = if is_counted { IS_LOST | REFUSES_EARLY } else { IS_LOST };
        // ORDERING: acquire the reason; partner: `set_lost`.
        self.obstacles.load(Ordering::Acquire) & obstacles == 0
    }

    /// Whether that was so lately.
    #[inline]
    pub(crate) fn was_silent(&self, now_ns: u64) -> bool {
        // ORDERING: as `Presence::has_listened`; partner: `set_silent`.
        now_ns.saturating_sub(self.silent_ns.load(Ordering::Acquire)) < FRESH_NS
    }

    /// It has said nothing that nobody has read.
    pub(crate) fn set_silent(&self, now_ns: u64) {
        // ORDERING: after the look at the socket; partner: `was_silent`.
        self.silent_ns.store(now_ns, Ordering::Release);
    }

    pub(crate) fn heard(&self, now_ns: u64) {
        // ORDERING: looked at once per heartbeat.
        self.heard_ns.store(now_ns, Ordering::Relaxed);
    }

    pub(crate) fn heard_ns(&self) -> u64 {
        // ORDERING: see `heard`.
        self.heard_ns.load(Ordering::Relaxed)
    }

    /// Has the peer told that a count will never come.
    pub(crate) fn note_loss(&self, imm: Imm) {
        self.office.losses.note(self.idx, imm);
    }

    /// The link that carries the data, if something can be posted to it now.
    #[inline]
    pub(crate) fn open_link(&self) -> Option<&Chosen> {
        let is_open = |chosen: &&Chosen| self.lost().is_none() && (chosen.sees_exit || self.base.has_control());
        self.link.get().filter(is_open)
    }
}

/// The obstacles of a peer.
const IS_LOST: u8 = 1;
const REFUSES_EARLY: u8 = 2;

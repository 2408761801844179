//! The life of a peer's control connection: calls, sessions, loss.
//!
//! ```text
//! Idle ─call─► Calling ─welcomed─► Joining ─joined or given up─► Up
//!   ▲             │ crossed, silence   (same host only)           │ broken
//!   │             ▼                                               ▼
//!   └─failed── Expecting ◄─────────── a peer's call ◄────────── Broken ─too long─► Lost
//! ```
//!
//! Who calls whom, and whose call wins, is in `calls`.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_plan::{choose, Candidate};
use anyfabric_transports::sys::Ready;
use anyfabric_transports::tcp::Lane;
use anyfabric_transports::Failure;
use anyfabric_wire::handshake::{Hello, Welcome};
use anyfabric_wire::Control;

use crate::arrivals::Arrivals;
use crate::base::Base;
use crate::driver::{link_token, Driver, Release, HANDSHAKE, LOCAL_CHANNELS};
use crate::events::Event;
use crate::heartbeat::Heartbeat;
use crate::inner::{nanos, Inner};
use crate::meet::{Meet, MeetError};
use crate::peer::{Peer, Phase, Session};
use crate::rails::{name_of, LIBRARIES};
use crate::under_way::Entry;

/// What a handshake is held over, and what the control connection becomes.
pub(crate) enum Way {
    Stream(Box<Meet>),
    /// A call inside a simulation, by its number.
    Call(u64),
}

impl Inner {
    // ---- sessions ------------------------------------------------------------------------------

    /// `session`: a new one; none if that of the peer goes on over another connection.
    pub(crate) fn establish(
        &self,
        driver: &mut Driver,
        peer: &Arc<Peer>,
        way: Way,
        received: u64,
        session: Option<Session>,
    ) {
        let now_ns = self.clock.now_ns();
        if let Err(error) = self.connect(peer, way, 0, received) {
            return self.lose(peer, &format!("its connection cannot be used: {error}"));
        }
        peer.heard(now_ns);
        {
            let mut state = peer.state();
            state.backoff.connected(now_ns);
            state.heartbeat = Heartbeat::new(now_ns);
            if session.is_none() {
                state.phase = Phase::Up;
                drop(state);
                self.log(20, format!("{}: the control connection is back", peer.address));
                if peer.link().is_none() {
                    self.resume_path(peer);
                }
                peer.dispatch_waiting(false);
                return;
            }
            state.established_ns = now_ns;
            state.session = session;
        }
        self.choose_path(driver, peer);
        // Streams are made in the next look at the clock.
        driver.look_at_clock(now_ns);
    }

    /// Settles what carries the data; on the same host after meeting on the
    /// Unix socket.
    pub(crate) fn choose_path(&self, driver: &mut Driver, peer: &Arc<Peer>) {
        let Some(session) = peer.state().session.clone() else { return };
        // Rails that were given up are not made again; everything else may have changed.
        let was_tried =
            |name: &str| LIBRARIES.into_iter().any(|library| name_of(library) == name && peer.rails(library).is_some());
        peer.state().obstacles.retain(|(name, _)| was_tried(name));
        match self.shm_obstacle(&session) {
            Some(obstacle) => self.settle_path(peer, Some(obstacle)),
            None => {
                peer.state().phase = Phase::Joining { until_ns: self.clock.now_ns() + nanos(HANDSHAKE) };
                if session.is_caller {
                    self.start_join(driver, peer, session.token);
                }
            }
        }
    }

    /// The control connection broke before it was known what carries the data.
    fn resume_path(&self, peer: &Arc<Peer>) {
        if peer.state().obstacle("shm").is_some() {
            return self.settle_path(peer, None);
        }
        // The Unix socket is on its way, or was.
        peer.state().phase = Phase::Joining { until_ns: self.clock.now_ns() + nanos(HANDSHAKE) };
    }

    /// Why shm cannot serve a session, if so.
    fn shm_obstacle(&self, session: &Session) -> Option<String> {
        if self.simulated.is_some() {
            return Some("simulated".into());
        }
        let has = |transports: &[String]| transports.iter().any(|name| name == "shm");
        if !has(&self.config.transports) {
            return Some("not enabled here".into());
        }
        if let Some(required) = self.config.require.as_deref().filter(|required| *required != "shm") {
            return Some(format!("{required} is required"));
        }
        if !has(&session.transports) {
            return Some("not enabled at the peer".into());
        }
        if session.host.boot_id != self.host.boot_id {
            return Some(format!("the peer is on another host ({})", session.host.name));
        }
        None
    }

    /// Decides what carries the data, once it is known whether shm can.
    pub(crate) fn settle_path(&self, peer: &Arc<Peer>, shm_obstacle: Option<String>) {
        if peer.lost().is_some() {
            return;
        }
        if let Some(why) = shm_obstacle {
            peer.state().obstacles.push(("shm", why));
        }
        // Rails, and tcp, need the control connection: once it is back.
        let is_broken = matches!(peer.phase(), Phase::Broken { .. });
        if peer.link().is_some() || !is_broken && !self.try_rails(peer) {
            self.finish_path(peer);
        }
    }

    /// Chooses among what was found to work.
    pub(crate) fn finish_path(&self, peer: &Arc<Peer>) {
        let Some(session) = peer.state().session.clone() else { return };
        let candidates = self.candidates(peer, &session);
        let require = self.config.require.as_deref().filter(|_| self.simulated.is_none());
        let choice = choose(&candidates, require);
        match choice.name {
            Some("tcp" | "loopback") => {
                peer.use_base();
                self.set_uses_streams();
            }
            // In use since it was made.
            Some(_) => {}
            None => {
                peer.state().reason.clone_from(&choice.reason);
                let why = format!(
                    "here {:?}{}, there {:?}: {}",
                    self.config.transports,
                    self.config.require.as_ref().map_or(String::new(), |name| format!(" and {name} required")),
                    session.transports,
                    choice.reason
                );
                peer.fail_waiting(&Failure::NoPath(why.clone()));
                self.log(30, format!("no path to {}: {why}", peer.address));
            }
        }
        {
            let mut state = peer.state();
            if !matches!(state.phase, Phase::Broken { .. }) {
                state.phase = Phase::Up;
            }
            state.reason.clone_from(&choice.reason);
        }
        if let Some(link) = peer.link() {
            let not_faster = if choice.reason.is_empty() { String::new() } else { format!(" ({})", choice.reason) };
            let line = format!("path to {}: {}, {}{not_faster}", peer.address, link.transport(), link.manner());
            self.log(20, line);
        }
        peer.dispatch_waiting(false);
        self.doorbell.notify();
    }

    /// What could carry the data, the fastest first, and what is known against each.
    fn candidates(&self, peer: &Peer, session: &Session) -> Vec<Candidate> {
        if self.simulated.is_some() {
            return vec![Candidate { name: "loopback", obstacle: None }];
        }
        let state = peer.state();
        let tried = |name| Candidate { name, obstacle: state.obstacle(name).map(str::to_owned) };
        let has_tcp = |transports: &[String]| transports.iter().any(|name| name == "tcp");
        let tcp_obstacle = match (has_tcp(&self.config.transports), has_tcp(&session.transports)) {
            (false, _) => Some("not enabled here".to_owned()),
            (_, false) => Some("not enabled at the peer".to_owned()),
            _ => None,
        };
        let rails = LIBRARIES.into_iter().map(|library| tried(name_of(library)));
        let tcp = Candidate { name: "tcp", obstacle: tcp_obstacle };
        std::iter::once(tried("shm")).chain(rails).chain([tcp]).collect()
    }

    pub(crate) fn add_stream(&self, peer: &Peer, way: Way, lane_idx: u8) {
        if let Err(error) = self.connect(peer, way, lane_idx, 0) {
            self.log(30, format!("{}: stream {lane_idx}: {error}", peer.address));
        }
    }

    /// What a handshake was held over carries the control connection, or a
    /// stream beside it.
    pub(crate) fn connect(&self, peer: &Peer, way: Way, lane_idx: u8, confirmed: u64) -> std::io::Result<()> {
        match (&peer.base, way) {
            (Base::Tcp(tcp), Way::Stream(meet)) => {
                let token = link_token(peer.idx, lane_idx);
                let patience = self.config.heartbeat.saturating_mul(self.config.heartbeats_lost);
                let lane = Lane::new(meet.into_stream(), lane_idx, token, Arc::clone(&self.poller), patience)?;
                tcp.set_lane(Arc::new(lane), confirmed);
            }
            (Base::Simulated(link), Way::Call(call)) => link.connect(call, confirmed),
            _ => {}
        }
        Ok(())
    }

    /// Answers a caller.
    pub(crate) fn welcome(&self, way: &mut Way, hello: &Hello, welcome: &Welcome) -> Result<(), MeetError> {
        match (way, &self.simulated) {
            (Way::Stream(meet), _) => meet.welcome(welcome),
            (Way::Call(call), Some(endpoint)) => {
                endpoint.answer(hello.address.engine, *call, welcome.clone());
                Ok(())
            }
            (Way::Call(_), None) => Ok(()),
        }
    }

    pub(crate) fn is_same_host(&self, peer: &Peer) -> bool {
        peer.state().session.as_ref().is_some_and(|session| session.host.boot_id == self.host.boot_id)
    }

    pub(crate) fn on_broken(&self, driver: &mut Driver, peer: &Arc<Peer>, channel: u8, why: &str) {
        if peer.lost().is_some() {
            return;
        }
        if channel >= LOCAL_CHANNELS {
            if let Some(shm) = peer.shm() {
                shm.forget_socket(&self.poller);
            }
            // It may have said goodbye before that.
            let arrivals = Arrivals { inner: self, at_hand: &driver.at_hand };
            peer.base.ready(0, Ready { token: 0, readable: true, writable: false, is_over: false }, &arrivals);
            return self.push_event(Event::Parted(peer.idx, why.to_owned()));
        }
        if !peer.base.disconnect(channel, why) {
            return;
        }
        self.log(20, format!("{}: stream {channel} broke: {why}", peer.address));
        if channel > 0 {
            peer.state().retry_lane_ns = self.clock.now_ns() + nanos(self.config.heartbeat) / 16;
            return;
        }
        let (now_ns, heartbeat_ns) = (self.clock.now_ns(), nanos(self.config.heartbeat));
        let (is_caller, wait_ns) = {
            let mut state = peer.state();
            let is_caller = state.session.as_ref().is_some_and(|session| session.is_caller);
            state.backoff.broke(now_ns, heartbeat_ns);
            let wait_ns = state.backoff.next_ns(heartbeat_ns);
            let retry_ns = if is_caller && wait_ns > 0 { now_ns + wait_ns } else { u64::MAX };
            let until_ns = now_ns.saturating_add(heartbeat_ns.saturating_mul(self.config.heartbeats_lost.into()));
            state.phase = Phase::Broken { until_ns, retry_ns };
            (is_caller, wait_ns)
        };
        match (wait_ns, is_caller) {
            (0, true) => self.call(driver, peer),
            (0, false) => self.look_for_end(peer),
            // It broke as soon as it was made.
            _ => {}
        }
    }

    /// The caller calls again. Whether it lives at all is quickly asked on the same
    /// host.
    fn look_for_end(&self, peer: &Arc<Peer>) {
        if self.is_same_host(peer) && !peer.address.sockets.is_empty() {
            // Others wait meanwhile: for all addresses together.
            let until = Instant::now() + LOOK;
            let gone = peer.address.sockets.iter().all(|socket| {
                let left = until.saturating_duration_since(Instant::now());
                !left.is_zero()
                    && std::net::TcpStream::connect_timeout(socket, left)
                        .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            });
            if gone {
                self.lose(peer, why_ended(peer));
            }
        }
    }

    pub(crate) fn on_parted(&self, peer: &Arc<Peer>, why: &str) {
        if peer.lost().is_none() {
            self.lose(peer, if has_exited(peer) { EXITED } else { why });
        }
    }

    // ---- time ----------------------------------------------------------------------------------

    /// What time brings for one peer; with `is_beat` also a heartbeat, if it needs one soon.
    pub(crate) fn tick_peer(&self, driver: &mut Driver, peer: &Arc<Peer>, now_ns: u64, is_beat: bool) {
        let phase = peer.phase();
        match phase {
            Phase::Idle | Phase::Calling | Phase::Lost => return,
            Phase::Expecting { until_ns } => {
                if now_ns >= until_ns {
                    peer.state().phase = Phase::Idle;
                    self.call(driver, peer);
                }
                return;
            }
            Phase::Joining { until_ns } if now_ns >= until_ns && !self.rails_are_late(peer) => {
                self.settle_path(peer, Some("no answer on the Unix socket: another network namespace?".into()));
            }
            Phase::Broken { until_ns, .. } if now_ns >= until_ns => {
                return self.give_up(peer, "its control connection broke and could not be restored");
            }
            Phase::Broken { until_ns, retry_ns } if now_ns >= retry_ns => {
                peer.state().phase = Phase::Broken { until_ns, retry_ns: u64::MAX };
                self.call(driver, peer);
            }
            _ => {}
        }
        if let Err(why) = self.exchange_beats(peer, now_ns) {
            return self.give_up(peer, &why);
        }
        self.send_due(driver, peer, now_ns, is_beat);
        peer.all_rails().for_each(|path| path.tick());
    }

    fn give_up(&self, peer: &Arc<Peer>, why: &str) {
        if peer.is_unheard() {
            self.forget(peer, why);
        } else {
            self.lose(peer, why);
        }
    }

    fn send_due(&self, driver: &mut Driver, peer: &Arc<Peer>, now_ns: u64, is_beat: bool) {
        if !peer.base.has_control() {
            return;
        }
        for imm in self.office.losses.take(peer.idx) {
            peer.base.send_control(Control::CountFailed { imm }.encode());
        }
        // ORDERING: only the driver looks at it.
        if peer.told_full.load(Ordering::Relaxed) && self.counters.early(|early| early.has_room(peer.idx)) {
            peer.told_full.store(false, Ordering::Relaxed);
            peer.base.send_control(Control::EarlyArrivalsRoom.encode());
        }
        if is_beat {
            self.send_heartbeat(peer, now_ns);
        }
        let missing = {
            let mut state = peer.state();
            let has_streams = peer.link().is_some_and(|link| link.has_streams());
            let calls = state.session.as_ref().filter(|session| session.is_caller).map(|session| session.token);
            let retry = has_streams && now_ns >= state.retry_lane_ns;
            if retry {
                state.retry_lane_ns = now_ns.saturating_add(nanos(self.config.heartbeat));
            }
            calls.filter(|_| retry)
        };
        if let Some(tcp) = peer.base.tcp() {
            tcp.tick(now_ns);
        }
        if let Some(token) = missing {
            for lane_idx in peer.base.tcp().map_or_else(Vec::new, |tcp| tcp.missing_lanes()) {
                // A second one would replace the first, and fail what is on its way there.
                if !driver.calls_lane(peer, lane_idx) {
                    self.call_lane(driver, peer, lane_idx, token);
                }
            }
        }
    }

    // ---- messages ------------------------------------------------------------------------------

    pub(crate) fn on_control(&self, driver: &mut Driver, peer: &Arc<Peer>, message: Control) {
        self.confirm_many(peer);
        match message {
            Control::Heartbeat { received } => {
                driver.num_heartbeats += 1;
                self.on_heartbeat(peer, received);
            }
            Control::Revoke { region, key, revoke } => {
                // At once: what comes after this message may be a new way to the region.
                let refusal = anyfabric_wire::Refusal::Revoked;
                for link in peer.links() {
                    link.release(region, key, refusal);
                }
                driver.releases.push(Release { peer: Arc::clone(peer), region, key, revoke });
                let is_its = |release: &&Release| release.peer.idx == peer.idx;
                if driver.releases.len() > MAX_RELEASES && driver.releases.iter().filter(is_its).count() > MAX_RELEASES
                {
                    self.lose(peer, "it takes back more at once than is under way to it");
                }
            }
            Control::Revoked { revoke } => self.revokes.acknowledged(self, peer, revoke),
            Control::RetireImm { imm } => {
                // One that asks again and again is answered once.
                if !driver.retires.iter().any(|(asks, asked)| asks.idx == peer.idx && *asked == imm) {
                    driver.retires.push((Arc::clone(peer), imm));
                }
                self.answer_retires(driver);
            }
            Control::ImmRetired { imm } => self.counters.retired(imm, peer.address.engine),
            Control::CountFailed { imm } => {
                if self.counters.lost(peer.idx, &peer.address.to_string(), imm).is_err() {
                    self.push_event(Event::EarlyFull(peer.idx));
                }
            }
            Control::EarlyArrivalsFull { .. } => peer.set_refuses_early(true),
            Control::EarlyArrivalsRoom => peer.set_refuses_early(false),
            Control::Rails { library, message } => self.on_rails(peer, library, message),
            Control::Goodbye => {
                if let Some(shm) = peer.shm() {
                    shm.peer_has_let_go();
                }
                self.part_from(peer, "it has closed its engine", 20);
            }
        }
    }

    /// Says which immediates we have nothing under way with any more.
    pub(crate) fn answer_retires(&self, driver: &mut Driver) {
        let Driver { retires, under_way, .. } = driver;
        // What was submitted before we were asked is under way too.
        under_way.take(&self.rings);
        retires.retain(|(peer, imm)| {
            let is_used = |entry: &Entry| entry.imm == Some(*imm) && entry.is_for(peer.idx);
            let uses =
                peer.lost().is_none() && (peer.waits_with(*imm) || under_way.iter().any(|(_, entry)| is_used(entry)));
            if !uses {
                peer.base.send_control(Control::ImmRetired { imm: *imm }.encode());
            }
            uses
        });
    }
}

/// Why nobody listens at the address of a peer on this host.
pub(crate) fn why_ended(peer: &Peer) -> &'static str {
    if has_exited(peer) {
        EXITED
    } else {
        "its engine has ended: nobody listens at its address any more"
    }
}

/// Whether a peer's process has exited, as far as can be seen. Its sockets end a
/// moment before it does, so one that seems to live is looked at for a moment.
fn has_exited(peer: &Peer) -> bool {
    peer.shm().is_some_and(|shm| shm.has_exited(LAST_MOMENT))
}

pub(crate) const EXITED: &str = "its process has exited";
/// Keys that one peer has taken back and that we have not answered for: an honest one waits for what is under way to it.
const MAX_RELEASES: usize = 1 << 14;
/// Longest time between the end of a process's sockets and its own; only a peer
/// that ends otherwise makes us wait for all of it.
const LAST_MOMENT: Duration = Duration::from_millis(50);
/// Longest time to ask whether anybody listens at a peer's addresses.
const LOOK: Duration = Duration::from_millis(20);

//! The life of a peer's control connection: calls, sessions, heartbeats, loss.
//!
//! ```text
//! Idle ─call─► Calling ─welcomed─► Joining ─joined or given up─► Up
//!   ▲             │ crossed            (same host only)           │ broken
//!   │             ▼                                               ▼
//!   └─failed── Expecting ◄─────────── a peer's call ◄────────── Broken ─too long─► Lost
//! ```
//!
//! Crossed calls: the call of the engine with the smaller id wins; the other
//! side's listener rejects, its caller waits for the call that won.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyfabric_plan::{choose, Candidate};
use anyfabric_transports::sys::Interest;
use anyfabric_transports::tcp::Lane;
use anyfabric_transports::Failure;
use anyfabric_wire::handshake::{Accepted, Hello, Purpose, Rejection, Resume, Welcome};
use anyfabric_wire::{Control, EngineId, Imm};

use crate::driver::{link_token, meet_token, Driver, Release, HANDSHAKE};
use crate::inner::{lock, nanos, Inner};
use crate::meet::{Calling, Meet, MeetError, Progress};
use crate::peer::{Base, Peer, Phase, Session};

/// What a handshake is held over, and what the control connection becomes.
pub(crate) enum Way {
    Stream(Box<Meet>),
    /// A call inside a simulation, by its number.
    Call(u64),
}

impl Inner {
    // ---- calling -------------------------------------------------------------------------------

    /// Calls a peer, or calls again after its control connection broke.
    pub(crate) fn call(&self, driver: &mut Driver, peer: &Arc<Peer>) {
        let resume = peer
            .state()
            .session
            .as_ref()
            .map(|session| Resume { token: session.token, received: peer.base.received() });
        let purpose = Purpose::Session { callee: peer.address.engine, resume };
        if resume.is_none() {
            peer.state().phase = Phase::Calling;
        }
        self.start_call(driver, peer, purpose, peer.address.sockets.clone());
    }

    fn call_lane(&self, driver: &mut Driver, peer: &Arc<Peer>, lane_idx: u8, token: [u8; 16]) {
        self.start_call(driver, peer, Purpose::Lane { token, lane_idx }, peer.address.sockets.clone());
    }

    fn start_call(&self, driver: &mut Driver, peer: &Arc<Peer>, purpose: Purpose, mut sockets: Vec<SocketAddr>) {
        let hello = self.hello(purpose);
        if let Some(endpoint) = &self.simulated {
            return self.call_simulated(driver, peer, hello, endpoint);
        }
        if sockets.is_empty() {
            self.call_failed(driver, peer, &hello.purpose, &MeetError::Secret("the address names no socket"));
            return;
        }
        let to = sockets.remove(0);
        let deadline_ns = self.clock.now_ns() + nanos(HANDSHAKE);
        let calling = Calling { peer: Arc::clone(peer), hello: hello.clone(), others: sockets };
        let result = Meet::call(to, Arc::clone(&self.secret), calling, deadline_ns).and_then(|meet| {
            let id = driver.next_id();
            self.poller.add(meet.stream(), meet_token(id), Interest::ReadWrite)?;
            driver.meets.insert(id, meet);
            Ok(())
        });
        if let Err(error) = result {
            self.call_failed(driver, peer, &hello.purpose, &error);
        }
    }

    fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            address: self.address.clone(),
            purpose,
            host: self.host.clone(),
            transports: self.transports(),
            max_message_bytes: self.config.max_message_bytes,
        }
    }

    fn transports(&self) -> Vec<String> {
        match &self.simulated {
            Some(_) => vec!["loopback".into()],
            None => self.config.transports.clone(),
        }
    }

    pub(crate) fn step_meet(&self, driver: &mut Driver, id: u32) {
        let Some(mut meet) = driver.meets.remove(&id) else { return };
        let was_connecting = meet.is_connecting();
        match meet.step() {
            Ok(Progress::Waiting) => {
                if was_connecting && !meet.is_connecting() {
                    let _ = self.poller.modify(meet.stream(), meet_token(id), Interest::Read);
                }
                driver.meets.insert(id, meet);
            }
            Ok(Progress::Introduced(hello, version)) => {
                self.poller.remove(meet.stream());
                self.introduced(driver, Way::Stream(Box::new(meet)), hello, version);
            }
            Ok(Progress::Welcomed(welcome, version)) => {
                self.poller.remove(meet.stream());
                if let Some(calling) = meet.call.take() {
                    self.welcomed(driver, calling, Way::Stream(Box::new(meet)), welcome, version);
                }
            }
            Err(error) => self.meet_failed(driver, meet, &error),
        }
    }

    pub(crate) fn meet_expired(&self, driver: &mut Driver, id: u32) {
        if let Some(meet) = driver.meets.remove(&id) {
            let error = MeetError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer to the handshake"));
            self.meet_failed(driver, meet, &error);
        }
    }

    fn meet_failed(&self, driver: &mut Driver, mut meet: Meet, error: &MeetError) {
        match meet.call.take() {
            None => self.log(20, format!("dropped a connection: {error}")),
            Some(calling) if !calling.others.is_empty() => {
                self.start_call(driver, &calling.peer, calling.hello.purpose, calling.others);
            }
            Some(calling) => self.call_failed(driver, &calling.peer, &calling.hello.purpose, error),
        }
    }

    pub(crate) fn call_failed(&self, driver: &mut Driver, peer: &Arc<Peer>, purpose: &Purpose, error: &MeetError) {
        let _ = driver;
        if peer.lost().is_some() {
            return;
        }
        let refused = matches!(error, MeetError::Io(io) if io.kind() == std::io::ErrorKind::ConnectionRefused);
        match purpose {
            Purpose::Lane { lane_idx, .. } => {
                self.log(30, format!("{}: stream {lane_idx}: {error}", peer.address));
            }
            // The listener lives as long as its engine, so a refusal is the engine's end, if we asked the right machine.
            Purpose::Session { resume: None, .. } if refused && peer.address.sockets.len() == 1 => {
                self.lose(peer, "no engine listens at its address any more");
            }
            Purpose::Session { resume: None, .. } => {
                peer.state().phase = Phase::Idle;
                let failure = match error {
                    MeetError::Secret(why) => Failure::Unauthenticated((*why).to_owned()),
                    _ => Failure::ConnectionBroken(error.to_string()),
                };
                self.log(30, format!("cannot reach {}: {error}", peer.address));
                peer.fail_waiting(&failure);
                self.counters.peer_lost(peer.address.engine, &peer.address.to_string(), &failure);
            }
            Purpose::Session { .. } if refused && self.is_same_host(peer) => {
                self.lose(peer, "its engine has ended");
            }
            Purpose::Session { .. } => {
                let mut state = peer.state();
                state.backoff_ns = (state.backoff_ns * 2).clamp(nanos(self.config.heartbeat) / 64, 250_000_000);
                let backoff_ns = state.backoff_ns;
                if let Phase::Broken { retry_ns, .. } = &mut state.phase {
                    *retry_ns = self.clock.now_ns() + backoff_ns;
                }
            }
        }
    }

    pub(crate) fn welcomed(&self, driver: &mut Driver, calling: Calling, way: Way, welcome: Welcome, version: u16) {
        let peer = calling.peer;
        match (welcome, calling.hello.purpose) {
            (Welcome::Accepted(_), Purpose::Lane { lane_idx, .. }) => self.add_stream(&peer, way, lane_idx),
            (Welcome::Accepted(accepted), Purpose::Session { resume, .. }) => {
                let stands = matches!(peer.phase(), Phase::Joining { .. } | Phase::Up);
                if accepted.address.engine != peer.address.engine || peer.lost().is_some() || stands {
                    return;
                }
                self.session_accepted(driver, &peer, way, (*accepted, version), resume.is_some());
            }
            (Welcome::Rejected(rejection), purpose) => self.rejected(driver, &peer, &purpose, rejection),
        }
    }

    fn session_accepted(
        &self,
        driver: &mut Driver,
        peer: &Arc<Peer>,
        way: Way,
        (accepted, version): (Accepted, u16),
        resumed: bool,
    ) {
        let session = Session {
            is_caller: true,
            token: accepted.token,
            host: accepted.host,
            transports: accepted.transports,
            max_message_bytes: accepted.max_message_bytes,
            version,
        };
        self.establish(driver, peer, way, session, accepted.received, resumed);
    }

    fn rejected(&self, driver: &mut Driver, peer: &Arc<Peer>, purpose: &Purpose, rejection: Rejection) {
        match rejection {
            Rejection::OtherIncarnation => self.lose(peer, "another engine lives at its address now"),
            Rejection::Fenced => self.lose(peer, "it has given this engine up"),
            Rejection::NoSession => self.lose(peer, "it does not know the session any more"),
            Rejection::Closing => self.lose(peer, "it is closing"),
            Rejection::Crossed => {
                let mut state = peer.state();
                if state.phase == Phase::Calling {
                    state.phase = Phase::Expecting { until_ns: self.clock.now_ns() + nanos(HANDSHAKE) };
                }
            }
            Rejection::Busy => self.call_failed(driver, peer, purpose, &MeetError::Busy),
        }
    }

    // ---- being called --------------------------------------------------------------------------

    pub(crate) fn introduced(&self, driver: &mut Driver, mut way: Way, hello: Hello, version: u16) {
        match hello.purpose {
            Purpose::Lane { token, lane_idx } => {
                let peer = self.find_peer(hello.address.engine).filter(|peer| {
                    peer.lost().is_none() && peer.state().session.as_ref().is_some_and(|session| session.token == token)
                });
                let welcome = match &peer {
                    Some(_) => Welcome::Accepted(Box::new(self.accepted(token, 0))),
                    None => Welcome::Rejected(Rejection::NoSession),
                };
                if self.welcome(&mut way, &hello, &welcome).is_ok() {
                    if let Some(peer) = peer.filter(|_| lane_idx > 0) {
                        self.add_stream(&peer, way, lane_idx);
                    }
                }
            }
            Purpose::Session { callee, resume } => {
                let verdict = self.judge(&hello, callee, resume);
                self.answer_session(driver, way, hello, version, verdict);
            }
        }
    }

    /// Whether a caller gets its session, and under which token.
    fn judge(&self, hello: &Hello, callee: EngineId, resume: Option<Resume>) -> Result<[u8; 16], Rejection> {
        if callee != self.address.engine || hello.address.engine == self.address.engine {
            return Err(Rejection::OtherIncarnation);
        }
        if self.is_closed() {
            return Err(Rejection::Closing);
        }
        let peer = self.find_peer(hello.address.engine);
        if let Some(peer) = &peer {
            if peer.lost().is_some() {
                return Err(Rejection::Fenced);
            }
            let state = peer.state();
            match (&state.session, resume, state.phase) {
                (Some(session), Some(resume), _) if session.token == resume.token => return Ok(session.token),
                (_, Some(_), _) => return Err(Rejection::NoSession),
                (Some(_), None, _) => return Err(Rejection::Crossed),
                (None, None, Phase::Calling) if self.address.engine < peer.address.engine => {
                    return Err(Rejection::Crossed);
                }
                _ => {}
            }
        } else if resume.is_some() {
            return Err(Rejection::NoSession);
        } else if self.num_peers() >= MAX_PEERS {
            return Err(Rejection::Busy);
        }
        self.random().map_err(|_| Rejection::Busy)
    }

    fn answer_session(
        &self,
        driver: &mut Driver,
        mut way: Way,
        hello: Hello,
        version: u16,
        verdict: Result<[u8; 16], Rejection>,
    ) {
        let token = match verdict {
            Ok(token) => token,
            Err(rejection) => {
                let _ = self.welcome(&mut way, &hello, &Welcome::Rejected(rejection));
                return;
            }
        };
        let peer = self.peer_at(&hello.address);
        let resume = match hello.purpose {
            Purpose::Session { resume, .. } => resume,
            Purpose::Lane { .. } => None,
        };
        let welcome = Welcome::Accepted(Box::new(self.accepted(token, peer.base.received())));
        if let Err(error) = self.welcome(&mut way, &hello, &welcome) {
            self.log(20, format!("dropped a connection: {error}"));
            return;
        }
        // Our own call, if there is one, has lost.
        let is_ours = |calling: &Calling| {
            calling.peer.idx == peer.idx && matches!(calling.hello.purpose, Purpose::Session { .. })
        };
        driver.meets.retain(|_, other| !other.call.as_ref().is_some_and(is_ours));
        driver.calls.retain(|_, (calling, _)| !is_ours(calling));
        let session = Session {
            is_caller: false,
            token,
            host: hello.host,
            transports: hello.transports,
            max_message_bytes: hello.max_message_bytes,
            version,
        };
        let received = resume.map_or(0, |resume| resume.received);
        self.establish(driver, &peer, way, session, received, resume.is_some());
    }

    fn accepted(&self, token: [u8; 16], received: u64) -> Accepted {
        Accepted {
            address: self.address.clone(),
            host: self.host.clone(),
            transports: self.transports(),
            max_message_bytes: self.config.max_message_bytes,
            token,
            received,
        }
    }

    // ---- sessions ------------------------------------------------------------------------------

    fn establish(
        &self,
        driver: &mut Driver,
        peer: &Arc<Peer>,
        way: Way,
        session: Session,
        received: u64,
        resumed: bool,
    ) {
        let now_ns = self.clock.now_ns();
        if let Err(error) = self.connect(peer, way, 0, received) {
            return self.lose(peer, &format!("its connection cannot be used: {error}"));
        }
        peer.heard(now_ns);
        let is_caller = session.is_caller;
        {
            let mut state = peer.state();
            state.backoff_ns = 0;
            state.heartbeat_ns = now_ns;
            if resumed {
                state.phase = Phase::Up;
                drop(state);
                self.log(20, format!("{}: the control connection is back", peer.address));
                peer.dispatch_waiting();
                return;
            }
            state.session = Some(session.clone());
        }
        match self.shm_obstacle(&session) {
            Some(obstacle) => self.settle_path(peer, Some(obstacle)),
            None => {
                peer.state().phase = Phase::Joining { until_ns: now_ns + nanos(HANDSHAKE) };
                if is_caller {
                    self.start_join(driver, peer, session.token);
                }
            }
        }
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
        let Some(session) = peer.state().session.clone() else { return };
        let has = |transports: &[String]| transports.iter().any(|name| name == "tcp");
        let tcp_obstacle = match (has(&self.config.transports), has(&session.transports)) {
            (false, _) => Some("not enabled here".to_owned()),
            (_, false) => Some("not enabled at the peer".to_owned()),
            _ => None,
        };
        let candidates = match &self.simulated {
            Some(_) => vec![Candidate { name: "loopback", obstacle: None }],
            None => vec![
                Candidate { name: "shm", obstacle: shm_obstacle },
                Candidate { name: "tcp", obstacle: tcp_obstacle },
            ],
        };
        let require = self.config.require.as_deref().filter(|_| self.simulated.is_none());
        let choice = choose(&candidates, require);
        match choice.name {
            Some("shm") => {}
            Some(_) => {
                peer.use_base();
                self.set_uses_streams();
            }
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
            state.phase = Phase::Up;
            state.reason.clone_from(&choice.reason);
        }
        if let Some(link) = peer.link() {
            let not_faster = if choice.reason.is_empty() { String::new() } else { format!(" ({})", choice.reason) };
            let line = format!("path to {}: {}, {}{not_faster}", peer.address, link.transport(), link.manner());
            self.log(20, line);
        }
        peer.dispatch_waiting();
        self.doorbell.notify();
    }

    fn add_stream(&self, peer: &Peer, way: Way, lane_idx: u8) {
        if let Err(error) = self.connect(peer, way, lane_idx, 0) {
            self.log(30, format!("{}: stream {lane_idx}: {error}", peer.address));
        }
    }

    /// What a handshake was held over carries the control connection, or a
    /// stream beside it.
    fn connect(&self, peer: &Peer, way: Way, lane_idx: u8, confirmed: u64) -> std::io::Result<()> {
        match (&peer.base, way) {
            (Base::Tcp(tcp), Way::Stream(meet)) => {
                let token = link_token(peer.idx, lane_idx);
                let lane = Lane::new(meet.into_stream(), lane_idx, token, Arc::clone(&self.poller))?;
                tcp.set_lane(Arc::new(lane), confirmed);
            }
            (Base::Simulated(link), Way::Call(call)) => link.connect(call, confirmed),
            _ => {}
        }
        Ok(())
    }

    /// Answers a caller.
    fn welcome(&self, way: &mut Way, hello: &Hello, welcome: &Welcome) -> Result<(), MeetError> {
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
        if channel >= 64 {
            // The Unix socket ends with the process; its descriptor says for sure, and nearly at once.
            if let Some(shm) = peer.shm() {
                self.poller.remove(shm.socket());
            }
            return self.lose(peer, &format!("its Unix socket: {why}"));
        }
        peer.base.disconnect(channel, why);
        self.log(20, format!("{}: stream {channel} broke: {why}", peer.address));
        if channel > 0 {
            peer.state().retry_lane_ns = self.clock.now_ns() + nanos(self.config.heartbeat) / 16;
            return;
        }
        let now_ns = self.clock.now_ns();
        let is_caller = {
            let mut state = peer.state();
            let until_ns = now_ns + nanos(self.config.heartbeat) * u64::from(self.config.heartbeats_lost);
            state.phase = Phase::Broken { until_ns, retry_ns: u64::MAX };
            state.session.as_ref().is_some_and(|session| session.is_caller)
        };
        if is_caller {
            self.call(driver, peer);
        } else if self.is_same_host(peer) && !peer.address.sockets.is_empty() {
            // The caller calls again. Whether it lives at all is quickly asked on the same host.
            let gone = peer.address.sockets.iter().all(|socket| {
                let timeout = std::time::Duration::from_millis(20);
                std::net::TcpStream::connect_timeout(socket, timeout)
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            });
            if gone {
                self.lose(peer, "its engine has ended");
            }
        }
    }

    // ---- time ----------------------------------------------------------------------------------

    pub(crate) fn tick_peer(&self, driver: &mut Driver, peer: &Arc<Peer>, now_ns: u64) {
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
            Phase::Joining { until_ns } if now_ns >= until_ns => {
                self.settle_path(peer, Some("no answer on the Unix socket: another network namespace?".into()));
            }
            Phase::Broken { until_ns, .. } if now_ns >= until_ns => {
                return self.lose(peer, "its control connection broke and could not be restored");
            }
            Phase::Broken { until_ns, retry_ns } if now_ns >= retry_ns => {
                peer.state().phase = Phase::Broken { until_ns, retry_ns: u64::MAX };
                self.call(driver, peer);
            }
            _ => {}
        }
        let interval_ns = nanos(self.config.heartbeat);
        let silent_ns = now_ns.saturating_sub(peer.heard_ns());
        if silent_ns > interval_ns * u64::from(self.config.heartbeats_lost) {
            let seconds = silent_ns as f64 / 1e9;
            return self.lose(peer, &format!("nothing heard for {seconds:.1} s"));
        }
        self.send_due(driver, peer, now_ns);
    }

    fn send_due(&self, driver: &mut Driver, peer: &Arc<Peer>, now_ns: u64) {
        if !peer.base.has_control() {
            return;
        }
        for imm in peer.losses.take() {
            peer.base.send_control(Control::CountFailed { imm }.encode());
        }
        // ORDERING: only the driver looks at it.
        if peer.told_full.load(Ordering::Relaxed) && self.counters.has_room(peer.idx) {
            peer.told_full.store(false, Ordering::Relaxed);
            peer.base.send_control(Control::EarlyArrivalsRoom.encode());
        }
        let (is_heartbeat_due, missing) = {
            let mut state = peer.state();
            let due = now_ns >= state.heartbeat_ns;
            if due {
                state.heartbeat_ns = now_ns + nanos(self.config.heartbeat);
            }
            let uses_tcp = peer.link().is_some_and(|link| link.transport() == "tcp");
            let calls = state.session.as_ref().filter(|session| session.is_caller).map(|session| session.token);
            let retry = uses_tcp && now_ns >= state.retry_lane_ns;
            if retry {
                state.retry_lane_ns = now_ns + nanos(self.config.heartbeat);
            }
            (due, calls.filter(|_| retry))
        };
        if is_heartbeat_due {
            let received = peer.base.received();
            peer.base.send_control(Control::Heartbeat { received }.encode());
        }
        if let Some(token) = missing {
            for lane_idx in peer.base.tcp().map_or_else(Vec::new, |tcp| tcp.missing_lanes()) {
                self.call_lane(driver, peer, lane_idx, token);
            }
        }
    }

    // ---- messages ------------------------------------------------------------------------------

    pub(crate) fn on_control(&self, driver: &mut Driver, peer: &Arc<Peer>, message: Control) {
        match message {
            Control::Heartbeat { received } => peer.base.confirm(received),
            Control::Revoke { region, revoke } => {
                driver.releases.push(Release { peer: Arc::clone(peer), region, revoke });
            }
            Control::Revoked { revoke } => self.revokes.acknowledged(self, peer, revoke),
            Control::RetireImm { imm } => {
                driver.retires.push((Arc::clone(peer), imm));
                self.answer_retires(driver);
            }
            Control::ImmRetired { imm } => self.counters.retired(imm, peer.address.engine),
            Control::CountFailed { imm } => self.counters.lost(peer.idx, &peer.address.to_string(), imm),
            // ORDERING: notices.
            Control::EarlyArrivalsFull { .. } => peer.refuses_early.store(true, Ordering::Relaxed),
            Control::EarlyArrivalsRoom => peer.refuses_early.store(false, Ordering::Relaxed),
            Control::Goodbye => self.part_from(peer, "it has closed its engine", 20),
            Control::Verify { .. } | Control::Verified { .. } => {}
        }
    }

    /// Says which immediates we have nothing under way with any more.
    pub(crate) fn answer_retires(&self, driver: &mut Driver) {
        driver.retires.retain(|(peer, imm)| {
            let uses = peer.lost().is_none() && self.uses_imm(peer, *imm);
            if !uses {
                peer.base.send_control(Control::ImmRetired { imm: *imm }.encode());
            }
            uses
        });
    }

    fn uses_imm(&self, peer: &Peer, imm: Imm) -> bool {
        peer.waits_with(imm)
            || lock(&self.under_way).iter().any(|entry| {
                entry.imm == Some(imm)
                    && !entry.ticket.has_quiesced()
                    && entry.peers.iter().any(|other| other.idx == peer.idx)
            })
    }
}

/// Peers of one engine at most.
const MAX_PEERS: usize = 4096;

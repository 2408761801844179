//! Calling a peer, and being called: who gets a session.
//!
//! Crossed calls: the call of the engine with the smaller id wins; the other
//! side's listener rejects, its caller waits for the call that won. Who says
//! nothing is called again for as long as something waits for him.

use std::net::SocketAddr;
use std::sync::Arc;

use anyfabric_transports::sys::Interest;
use anyfabric_transports::tcp::TcpLink;
use anyfabric_transports::Failure;
use anyfabric_wire::handshake::{Accepted, Hello, Purpose, Rejection, Resume, Welcome};
use anyfabric_wire::EngineId;

use crate::control::{why_ended, Way};
use crate::driver::{meet_token, Driver, HANDSHAKE};
use crate::inner::{nanos, Inner};
use crate::meet::{Calling, Meet, MeetError, Progress};
use crate::peer::{Peer, Phase, Session};

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
        self.start_call(driver, peer, purpose, peer.sockets(), None);
    }

    pub(crate) fn call_lane(&self, driver: &mut Driver, peer: &Arc<Peer>, lane_idx: u8, token: [u8; 16]) {
        self.start_call(driver, peer, Purpose::Lane { token, lane_idx }, peer.sockets(), None);
    }

    pub(crate) fn start_call(
        &self,
        driver: &mut Driver,
        peer: &Arc<Peer>,
        purpose: Purpose,
        mut sockets: Vec<SocketAddr>,
        mut failed: Option<MeetError>,
    ) {
        let hello = self.hello(purpose);
        if let Some(endpoint) = &self.simulated {
            return self.call_simulated(driver, peer, hello, endpoint);
        }
        while !sockets.is_empty() {
            let to = sockets.remove(0);
            let deadline_ns = self.clock.now_ns() + self.patience_ns(&hello.purpose);
            let id = driver.next_id();
            let dialled = Meet::dial(to, Arc::clone(&self.secret), deadline_ns).and_then(|meet| {
                self.poller.add(meet.stream(), meet_token(id), Interest::ReadWrite)?;
                Ok(meet)
            });
            match dialled {
                Ok(mut meet) => {
                    let (peer, to, others) = (Arc::clone(peer), Some(to), sockets);
                    meet.call = Some(Calling { peer, hello, to, others, failed });
                    driver.meets.insert(id, meet);
                    return;
                }
                Err(error) => failed = Some(error.after(failed)),
            }
        }
        let error = failed.unwrap_or(MeetError::Secret("the address names no socket"));
        self.call_failed(peer, &hello.purpose, &error);
    }

    /// How long a call may take: of the time in which a connection must be restored a
    /// part is left for another.
    pub(crate) fn patience_ns(&self, purpose: &Purpose) -> u64 {
        let lost_ns = nanos(self.config.heartbeat).saturating_mul(self.config.heartbeats_lost.into());
        match purpose {
            Purpose::Session { resume: Some(_), .. } => nanos(HANDSHAKE).min(lost_ns / 3 * 2),
            _ => nanos(HANDSHAKE),
        }
    }

    pub(crate) fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            address: self.address.clone(),
            purpose,
            host: self.host.clone(),
            transports: self.transports(),
            max_message_bytes: self.config.max_message_bytes,
        }
    }

    pub(crate) fn transports(&self) -> Vec<String> {
        match &self.simulated {
            Some(_) => vec!["loopback".into()],
            None => self.groups.available(&self.config),
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
            Err(error) => self.meet_failed(driver, meet, error),
        }
    }

    pub(crate) fn meet_expired(&self, driver: &mut Driver, id: u32) {
        if let Some(meet) = driver.meets.remove(&id) {
            self.meet_failed(driver, meet, MeetError::silence());
        }
    }

    fn meet_failed(&self, driver: &mut Driver, mut meet: Meet, error: MeetError) {
        match meet.call.take() {
            Some(calling) => self.call_elsewhere(driver, calling, error),
            None => driver.dropped.add(&error),
        }
    }

    /// Calls the next address, if there is one.
    fn call_elsewhere(&self, driver: &mut Driver, calling: Calling, error: MeetError) {
        let Calling { peer, hello, others, failed, .. } = calling;
        let error = error.after(failed);
        if others.is_empty() {
            self.call_failed(&peer, &hello.purpose, &error);
        } else {
            self.start_call(driver, &peer, hello.purpose, others, Some(error));
        }
    }

    pub(crate) fn call_failed(&self, peer: &Arc<Peer>, purpose: &Purpose, error: &MeetError) {
        if peer.lost().is_some() {
            return;
        }
        let refused = error.is_refusal();
        match purpose {
            // Why, and what it has let go of, comes on the control connection.
            Purpose::Lane { .. } if matches!(error, MeetError::Stranger) => {
                self.log(10, format!("{}: its session has ended", peer.address));
            }
            Purpose::Lane { lane_idx, .. } => {
                self.log(30, format!("{}: stream {lane_idx}: {error}", peer.address));
            }
            Purpose::Session { .. } if matches!(error, MeetError::Stranger) => self.lose(peer, &error.to_string()),
            // The listener lives as long as its engine, so a refusal is the engine's end, if we asked the right machine.
            Purpose::Session { resume: None, .. } if refused && peer.address.sockets.len() == 1 => {
                self.lose(peer, nobody_at(&peer.address.sockets[0]));
            }
            Purpose::Session { resume: None, .. } => {
                // First: what comes from now on has it called again.
                peer.state().phase = Phase::Idle;
                if error.is_silence() && !peer.is_clear() {
                    return self.call_later(peer, error);
                }
                let failure = match error {
                    MeetError::Secret(why) => Failure::Unauthenticated((*why).to_owned()),
                    MeetError::Io(io) if matches!(io.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                        Failure::Exhausted(format!("no file descriptor is left ({io}); raise the limit (ulimit -n)"))
                    }
                    _ => Failure::ConnectionBroken(error.to_string()),
                };
                self.log(30, format!("cannot reach {}: {error}", peer.address));
                peer.fail_waiting(&failure);
                self.counters.peer_lost(peer.address.engine, &peer.address.to_string(), &failure);
                self.forget_strangers();
            }
            Purpose::Session { .. } if refused && self.is_same_host(peer) => {
                self.lose(peer, why_ended(peer));
            }
            Purpose::Session { .. } => {
                let mut state = peer.state();
                let wait_ns = state.backoff.next_ns(nanos(self.config.heartbeat));
                if let Phase::Broken { retry_ns, .. } = &mut state.phase {
                    *retry_ns = self.clock.now_ns() + wait_ns;
                }
            }
        }
    }

    /// What waits for a peer that said nothing has time left: it is called again, and may call itself.
    fn call_later(&self, peer: &Peer, error: &MeetError) {
        let mut state = peer.state();
        let wait_ns = state.backoff.next_ns(nanos(self.config.heartbeat));
        state.phase = Phase::Expecting { until_ns: self.clock.now_ns().saturating_add(wait_ns) };
        state.reason = format!("{error}; it is called again");
        drop(state);
        self.log(20, format!("{}: {error}; it is called again", peer.address));
    }

    pub(crate) fn welcomed(&self, driver: &mut Driver, calling: Calling, way: Way, welcome: Welcome, version: u16) {
        let is_of_lane = matches!(calling.hello.purpose, Purpose::Lane { .. });
        match &welcome {
            Welcome::Rejected(Rejection::OtherIncarnation) => {
                return self.call_elsewhere(driver, calling, MeetError::Stranger);
            }
            Welcome::Rejected(Rejection::NoSession) if is_of_lane => {
                return self.call_elsewhere(driver, calling, MeetError::Stranger);
            }
            _ => {}
        }
        let Calling { peer, hello, to, .. } = calling;
        match (welcome, hello.purpose) {
            (Welcome::Accepted(_), Purpose::Lane { lane_idx, .. }) => self.add_stream(&peer, way, lane_idx),
            (Welcome::Accepted(accepted), Purpose::Session { resume, .. }) => {
                let stands = matches!(peer.phase(), Phase::Joining { .. } | Phase::Up);
                if accepted.address.engine != peer.address.engine || peer.lost().is_some() || stands {
                    return;
                }
                peer.state().reached_at = to;
                self.session_accepted(driver, &peer, way, (*accepted, version), resume.is_some());
            }
            (Welcome::Rejected(rejection), purpose) => self.rejected(&peer, &purpose, rejection),
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
        self.establish(driver, peer, way, accepted.received, (!resumed).then_some(session));
    }

    fn rejected(&self, peer: &Arc<Peer>, purpose: &Purpose, rejection: Rejection) {
        match rejection {
            Rejection::OtherIncarnation => self.call_failed(peer, purpose, &MeetError::Stranger),
            Rejection::Fenced => self.lose(peer, "it has given this engine up"),
            Rejection::NoSession => self.lose(peer, "it does not know the session any more"),
            Rejection::Closing => self.lose(peer, "it is closing"),
            Rejection::Crossed => {
                let mut state = peer.state();
                if state.phase == Phase::Calling {
                    state.phase = Phase::Expecting { until_ns: self.clock.now_ns() + nanos(HANDSHAKE) };
                }
            }
            Rejection::Busy => self.call_failed(peer, purpose, &MeetError::Busy),
        }
    }

    // ---- being called --------------------------------------------------------------------------

    pub(crate) fn introduced(&self, driver: &mut Driver, mut way: Way, hello: Hello, version: u16) {
        match hello.purpose {
            Purpose::Lane { token, lane_idx } => {
                // Other numbers would be taken for other channels at the poller: the Unix socket, the process.
                let is_one = (1..=TcpLink::MAX_STREAMS).contains(&lane_idx.into());
                let peer = self.find_peer(hello.address.engine).filter(|peer| {
                    is_one
                        && peer.lost().is_none()
                        && peer.state().session.as_ref().is_some_and(|session| session.token == token)
                });
                if let Some(tcp) = peer.as_ref().and_then(|peer| peer.base.tcp()) {
                    // What stood in its place is read no further, and the peer takes the answer for that word.
                    tcp.take_out(lane_idx, "the peer makes it anew");
                }
                let welcome = match &peer {
                    Some(_) => Welcome::Accepted(Box::new(self.accepted(token, 0))),
                    None => Welcome::Rejected(Rejection::NoSession),
                };
                if self.welcome(&mut way, &hello, &welcome).is_ok() {
                    if let Some(peer) = peer {
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
        let mut peer = self.find_peer(hello.address.engine);
        if let Some(unheard) = peer.take_if(|peer| resume.is_none() && peer.is_unheard()) {
            self.forget(&unheard, "it calls anew: it never heard of its session");
        }
        // While we close we still meet whom something of ours waits for: our own call may have crossed this one.
        if self.is_closed() && peer.as_ref().is_none_or(|peer| peer.is_clear()) {
            return Err(Rejection::Closing);
        }
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
        } else if self.num_met_peers() >= MAX_PEERS {
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
        let resume = match hello.purpose {
            Purpose::Session { resume, .. } => resume,
            Purpose::Lane { .. } => None,
        };
        let received = self.find_peer(hello.address.engine).map_or(0, |peer| peer.base.received());
        let welcome = Welcome::Accepted(Box::new(self.accepted(token, received)));
        if let Err(error) = self.welcome(&mut way, &hello, &welcome) {
            // It may have ended while it called; who never was here is not listed.
            return driver.dropped.add(&error);
        }
        let peer = self.peer_at(&hello.address);
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
        self.establish(driver, &peer, way, received, resume.is_none().then_some(session));
    }

    pub(crate) fn accepted(&self, token: [u8; 16], received: u64) -> Accepted {
        Accepted {
            address: self.address.clone(),
            host: self.host.clone(),
            transports: self.transports(),
            max_message_bytes: self.config.max_message_bytes,
            token,
            received,
        }
    }
}

/// Why nobody is there who was never met.
fn nobody_at(socket: &SocketAddr) -> &'static str {
    if socket.ip().is_loopback() {
        "no engine listens at its address any more; one that is called from other hosts is opened with `listen`, for \
         every host takes a loopback address for its own"
    } else {
        "no engine listens at its address any more"
    }
}

/// Peers of one engine at most.
const MAX_PEERS: usize = 4096;

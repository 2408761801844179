//! One turn of an engine: links, descriptors, timers.
//!
//! Whoever holds the [`Driver`] takes turns: see `wait` for who that is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::sys::Ready;
use anyfabric_transports::{Failure, Link, PeerIdx};
use anyfabric_wire::handshake::Purpose;
use anyfabric_wire::{Control, Imm};

use crate::arrivals::Arrivals;
use crate::counter::AtHand;
use crate::events::Event;
use crate::inner::{nanos, Inner};
use crate::join::Join;
use crate::listeners::{Dropped, Listeners};
use crate::meet::{Calling, Meet};
use crate::peer::{Peer, Phase};
use crate::under_way::UnderWay;

/// What only one thread at a time may touch.
pub(crate) struct Driver {
    /// None in a simulation.
    pub(crate) listeners: Option<Listeners>,
    pub(crate) meets: HashMap<u32, Meet>,
    /// Calls inside a simulation, with their deadlines.
    pub(crate) calls: BTreeMap<u64, (Calling, u64)>,
    pub(crate) joins: HashMap<u32, Join>,
    /// Peers whose Unix socket had no room for us, with the tokens of their sessions.
    pub(crate) turned_away: Vec<(Arc<Peer>, [u8; 16])>,
    pub(crate) dropped: Dropped,
    /// Keys of regions that peers took back, to be answered once we are out.
    pub(crate) releases: Vec<Release>,
    /// Immediates that peers want back, to be answered once none is under way.
    pub(crate) retires: Vec<(Arc<Peer>, Imm)>,
    pub(crate) under_way: UnderWay,
    pub(crate) at_hand: AtHand,
    /// That ever came.
    pub(crate) num_heartbeats: usize,
    next_id: u32,
    ready: Vec<Ready>,
    /// Those that are not lost.
    peers: Vec<Arc<Peer>>,
    peers_version: u64,
    next_tick_ns: u64,
    ticked_ns: u64,
    /// A deadline calls for the next tick earlier than was said at the last one.
    is_expecting: bool,
    /// Of the last look at all links.
    awaits_room: bool,
}

/// A peer's revocation that we have not answered yet.
pub(crate) struct Release {
    pub(crate) peer: Arc<Peer>,
    pub(crate) region: u64,
    pub(crate) key: u64,
    pub(crate) revoke: u64,
}

impl Driver {
    pub(crate) fn new(listeners: Option<Listeners>) -> Self {
        Self {
            listeners,
            meets: HashMap::new(),
            calls: BTreeMap::new(),
            joins: HashMap::new(),
            turned_away: Vec::new(),
            dropped: Dropped::default(),
            releases: Vec::new(),
            retires: Vec::new(),
            under_way: UnderWay::default(),
            at_hand: AtHand::default(),
            num_heartbeats: 0,
            next_id: 0,
            ready: Vec::new(),
            peers: Vec::new(),
            peers_version: 0,
            next_tick_ns: 0,
            ticked_ns: 0,
            is_expecting: false,
            awaits_room: false,
        }
    }

    pub(crate) fn next_id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Whether something waits for room that nobody announces: it is looked for again and again.
    pub(crate) const fn awaits_room(&self) -> bool {
        self.awaits_room
    }

    pub(crate) const fn is_expecting(&self) -> bool {
        self.is_expecting
    }

    pub(crate) const fn next_tick_ns(&self) -> u64 {
        self.next_tick_ns
    }

    pub(crate) fn until_tick(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(self.next_tick_ns.saturating_sub(now_ns)).min(CALM_TICK)
    }

    /// A peer is sought: time matters more from now on.
    pub(crate) fn hurry(&mut self, now_ns: u64) {
        self.next_tick_ns = self.next_tick_ns.min(now_ns + nanos(MEETING_TICK));
    }

    /// Something ends at that time; the clock is not looked at more often for it than while the engine is busy.
    #[inline]
    fn expect(&mut self, deadline_ns: u64) {
        if deadline_ns < self.next_tick_ns {
            self.next_tick_ns = self.next_tick_ns.min(deadline_ns.max(self.ticked_ns + nanos(BUSY_TICK)));
            self.is_expecting = true;
        }
    }

    /// Something waits for the clock to be looked at.
    pub(crate) fn look_at_clock(&mut self, now_ns: u64) {
        self.next_tick_ns = self.next_tick_ns.min(now_ns);
    }

    /// Whether a call for that stream is under way.
    pub(crate) fn calls_lane(&self, peer: &Peer, lane_idx: u8) -> bool {
        self.meets.values().filter_map(|meet| meet.call.as_ref()).any(|call| {
            let is_lane = matches!(call.hello.purpose, Purpose::Lane { lane_idx: called, .. } if called == lane_idx);
            is_lane && call.peer.idx == peer.idx
        })
    }

    pub(crate) fn live_peer(&self, idx: PeerIdx) -> Option<&Arc<Peer>> {
        self.peers.binary_search_by_key(&idx, |peer| peer.idx).ok().map(|at| &self.peers[at])
    }

    pub(crate) fn take_ready(&mut self) -> Vec<Ready> {
        std::mem::take(&mut self.ready)
    }

    pub(crate) fn put_ready(&mut self, ready: Vec<Ready>) {
        self.ready = ready;
    }
}

impl Inner {
    /// Everything that needs no descriptor; true when something moved.
    #[inline]
    pub(crate) fn poll_links(&self, driver: &mut Driver) -> bool {
        let peers_version = self.peers_version();
        if driver.peers_version != peers_version {
            driver.peers_version = peers_version;
            driver.peers = self.live_peers();
        }
        let first_deadline_ns = driver.under_way.take(&self.rings);
        driver.expect(first_deadline_ns);
        let arrivals = Arrivals { inner: self, at_hand: &driver.at_hand };
        let mut moved = false;
        driver.awaits_room = false;
        for idx in 0..driver.peers.len() {
            let peer = &driver.peers[idx];
            if let Some(shm) = peer.shm() {
                moved |= shm.poll(&arrivals);
                driver.awaits_room |= shm.awaits_room();
            }
            moved |= peer.base.poll(&arrivals);
            if !peer.is_clear() {
                moved |= peer.dispatch_waiting(self.presence.has_listened(self.clock.now_ns()));
            }
        }
        for group in self.groups.opened() {
            moved |= group.poll(&arrivals);
        }
        while let Some(event) = self.take_event() {
            self.handle_event(driver, event);
            moved = true;
        }
        if !driver.releases.is_empty() {
            self.answer_releases(driver);
        }
        moved
    }

    /// Everything that a descriptor announces, now or within `timeout`; true
    /// when there was something.
    pub(crate) fn poll_descriptors(&self, driver: &mut Driver, timeout: Duration) -> bool {
        let mut ready = driver.take_ready();
        let _ = self.poller.wait(timeout, &mut ready);
        let some = !ready.is_empty();
        driver.put_ready(ready);
        self.handle_ready(driver);
        some
    }

    pub(crate) fn handle_ready(&self, driver: &mut Driver) {
        self.presence.set_hearing(true);
        let ready = driver.take_ready();
        for event in &ready {
            let idx = (event.token >> 8 & 0xffff_ffff) as u32;
            match event.token >> 56 {
                KIND_OWN => match event.token & 0xff {
                    LISTENER => self.accept_calls(driver),
                    LOCAL_LISTENER => self.accept_joins(driver),
                    NICS | NIC_ANNOUNCEMENTS => self.on_nics(*event),
                    _ => self.wake_fd.clear(),
                },
                KIND_MEET => self.step_meet(driver, idx),
                KIND_JOIN => self.step_join(driver, idx),
                _ => self.ready_link(driver, idx, *event),
            }
        }
        driver.put_ready(ready);
        while let Some(event) = self.take_event() {
            self.handle_event(driver, event);
        }
        self.presence.set_hearing(false);
    }

    fn handle_event(&self, driver: &mut Driver, event: Event) {
        match event {
            Event::Call(idx) => {
                if let Some(peer) = self.peer(idx) {
                    driver.hurry(self.clock.now_ns());
                    match peer.phase() {
                        Phase::Idle => self.call(driver, &peer),
                        Phase::Up if peer.link().is_none() => self.choose_path(driver, &peer),
                        _ => {}
                    }
                }
            }
            Event::Control(idx, bytes) => {
                let Some(peer) = self.peer(idx) else { return };
                match Control::decode(&bytes) {
                    Ok(message) => self.on_control(driver, &peer, message),
                    Err(error) => self.lose(&peer, &format!("it sent garbage: {error}")),
                }
            }
            Event::Broken(idx, channel, why) => {
                if let Some(peer) = self.peer(idx) {
                    driver.hurry(self.clock.now_ns());
                    self.on_broken(driver, &peer, channel, &why);
                }
            }
            Event::Parted(idx, why) => {
                if let Some(peer) = self.peer(idx) {
                    self.on_parted(&peer, &why);
                }
            }
            Event::Exited(idx) => {
                if let Some(peer) = self.peer(idx) {
                    self.lose(&peer, crate::control::EXITED);
                    self.gone(&peer);
                }
            }
            Event::Overrun(idx, why) => {
                if let Some(peer) = self.peer(idx) {
                    self.lose(&peer, &why);
                }
            }
            Event::EarlyFull(idx) => {
                if let Some(peer) = self.peer(idx) {
                    self.on_early_full(&peer);
                }
            }
            Event::Closing => self.turn_last(driver),
        }
    }

    fn on_early_full(&self, peer: &Arc<Peer>) {
        if self.counters.early(|early| early.is_flooded_by(peer.idx)) {
            return self.lose(peer, "it goes on sending immediates that no counter is open for");
        }
        // ORDERING: only the driver looks at it.
        if !peer.told_full.swap(true, std::sync::atomic::Ordering::Relaxed) {
            let limit = crate::early::MAX_EARLY;
            peer.base.send_control(Control::EarlyArrivalsFull { limit }.encode());
            self.log(30, format!("{} sends immediates that no counter is open for", peer.address));
        }
    }

    // ---- timers --------------------------------------------------------------------------------

    /// What time brings: deadlines, heartbeats, retries.
    #[inline]
    pub(crate) fn tick(&self, driver: &mut Driver, now_ns: u64) {
        if now_ns >= driver.next_tick_ns {
            self.tick_now(driver, now_ns);
        }
    }

    #[cold]
    fn tick_now(&self, driver: &mut Driver, now_ns: u64) {
        // If this process was stopped for a while, its peers are not to blame for their silence.
        let late_ns = now_ns.saturating_sub(driver.next_tick_ns.max(1));
        let was_stopped = driver.next_tick_ns > 0 && late_ns > nanos(self.config.heartbeat);
        if was_stopped {
            self.poll_descriptors(driver, Duration::ZERO);
        }
        if let Some(listeners) = &mut driver.listeners {
            // If it fails, the next tick tries again.
            let _ = listeners.resume(&self.poller);
        }
        self.tick_meets(driver, now_ns);
        if let Some(line) = driver.dropped.take_line() {
            self.log(20, line);
        }
        let known = self.peers.known();
        let is_beat = self.is_beat(&known, now_ns);
        for peer in known.live() {
            if was_stopped {
                peer.heard(now_ns);
                peer.state().heartbeat.heard_ns = now_ns;
            }
            self.tick_peer(driver, peer, now_ns, is_beat);
        }
        for group in self.groups.opened() {
            group.look_at_ports(now_ns);
        }
        let is_busy = self.expire(driver, now_ns);
        self.revokes.settle(self);
        if !driver.retires.is_empty() {
            self.answer_retires(driver);
        }
        let is_busy = is_busy || !driver.releases.is_empty() || !driver.retires.is_empty();
        let is_calm = driver.meets.is_empty() && driver.joins.is_empty() && known.live().all(|peer| peer.is_settled());
        let interval = match (is_busy, is_calm) {
            (true, _) => BUSY_TICK,
            (_, true) => (self.config.heartbeat / 4).clamp(MEETING_TICK, CALM_TICK),
            _ => MEETING_TICK,
        };
        (driver.ticked_ns, driver.is_expecting) = (now_ns, false);
        driver.next_tick_ns = now_ns + nanos(interval);
    }

    fn tick_meets(&self, driver: &mut Driver, now_ns: u64) {
        let expired = |(id, deadline_ns): (u32, u64)| (deadline_ns <= now_ns).then_some(id);
        let meets: Vec<_> = driver.meets.iter().filter_map(|(id, meet)| expired((*id, meet.deadline_ns))).collect();
        for id in meets {
            self.meet_expired(driver, id);
        }
        let joins: Vec<_> = driver.joins.iter().filter_map(|(id, join)| expired((*id, join.deadline_ns))).collect();
        for id in joins {
            self.join_failed(driver, id, "no answer on the Unix socket");
        }
        self.join_again(driver, now_ns);
        self.expire_calls(driver, now_ns);
    }

    /// Fails what is over its deadline; true when operations are under way.
    fn expire(&self, driver: &mut Driver, now_ns: u64) -> bool {
        let mut expired = Vec::new();
        let is_busy = driver.under_way.sweep(&self.rings);
        for (ticket, _) in driver.under_way.iter() {
            let given_up = ticket.given_up().is_some();
            if ticket.deadline_ns() <= now_ns && !ticket.has_ended() {
                let given_ns = ticket.deadline_ns().saturating_sub(ticket.submitted_ns());
                ticket.fail(Failure::Timeout(Duration::from_nanos(given_ns)));
                expired.extend(ticket.recipients().peers());
            } else if given_up {
                ticket.fail(Failure::Cancelled);
                expired.extend(ticket.recipients().peers());
            }
        }
        expired.sort_unstable();
        expired.dedup();
        for peer in expired.into_iter().filter_map(|idx| self.peer(idx)) {
            peer.reap_waiting();
            peer.links().for_each(Link::reap);
        }
        is_busy
    }

    fn answer_releases(&self, driver: &mut Driver) {
        driver.releases.retain(|release| {
            if release.peer.lost().is_some() {
                return false;
            }
            let refusal = anyfabric_wire::Refusal::Revoked;
            // Every link is asked, also after one that is not out yet.
            let out =
                release.peer.links().fold(true, |out, link| link.release(release.region, release.key, refusal) & out);
            if out {
                release.peer.base.send_control(Control::Revoked { revoke: release.revoke }.encode());
            }
            !out
        });
    }
}

pub(crate) fn meet_token(id: u32) -> u64 {
    KIND_MEET << 56 | u64::from(id) << 8
}

pub(crate) fn join_token(id: u32) -> u64 {
    KIND_JOIN << 56 | u64::from(id) << 8
}

pub(crate) fn link_token(peer: u32, channel: u8) -> u64 {
    KIND_LINK << 56 | u64::from(peer) << 8 | u64::from(channel)
}

pub(crate) const WAKE: u64 = 1;
pub(crate) const LISTENER: u64 = 2;
pub(crate) const LOCAL_LISTENER: u64 = 3;
/// With the descriptor above them: that something has completed, and what a device announces.
pub(crate) const NICS: u64 = 4;
pub(crate) const NIC_ANNOUNCEMENTS: u64 = 5;
/// How long both sides have to introduce themselves: longer than a process that
/// loads a model, or shares its cores with one, keeps its other threads waiting.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);

const KIND_OWN: u64 = 0;
const KIND_MEET: u64 = 1;
const KIND_JOIN: u64 = 2;
const KIND_LINK: u64 = 3;
/// Channels from here on are the Unix socket's.
pub(crate) const LOCAL_CHANNELS: u8 = 64;
/// Longest while that nobody looks at the clock; every look costs a wake-up and a glance at every peer.
const CALM_TICK: Duration = Duration::from_millis(250);
/// The same while peers meet, or are sought again.
const MEETING_TICK: Duration = Duration::from_millis(25);
/// The same while operations are under way.
const BUSY_TICK: Duration = Duration::from_millis(5);

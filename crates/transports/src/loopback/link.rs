//! One engine's way to another in a simulation.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use anyfabric_wire::{Control, Imm, Refusal, WireImm};

use super::fabric::nic_down;
use super::simulation::Simulation;
use crate::controls::{Controls, OVERRUN};
use crate::mutant::Mutant;
use crate::sys::Ready;
use crate::{
    lock, Binding, BindingTable, ControlPath, Failure, Link, Op, PeerIdx, PeerStats, Region, RegionTable, Sink, Splits,
    Target,
};

/// One engine's way to another in a simulation: what a queue pair on every NIC,
/// a memory region table and a control connection are in reality.
pub struct SimLink {
    pub(super) simulation: Simulation,
    /// Our own place; the peer's, if there is an engine.
    pub(super) ends: (usize, Option<usize>),
    peer: PeerIdx,
    regions: Arc<RegionTable>,
    /// What has come and waits for the engine's turn.
    inbox: Mutex<VecDeque<News>>,
    /// Operations of ours that the fabric carries.
    flights: Mutex<BTreeMap<u64, Flight>>,
    pub(super) splits: Mutex<Splits>,
    bindings: Mutex<BindingTable>,
    /// Regions of ours that the peer was granted, with their keys: what our NICs
    /// let it write to.
    granted: Mutex<HashMap<(u64, u64), Weak<Region>>>,
    controls: Mutex<ControlQueue>,
    turn: AtomicUsize,
    closed: AtomicBool,
    stats: PeerStats,
}

/// What comes to a link.
#[derive(Debug)]
pub(super) enum News {
    /// To be counted: its bytes are placed.
    Arrived { imm: WireImm, count: u32 },
    /// A message; the engine answers.
    Message { op: u64, bytes: Hidden },
    /// The end of one part of an operation of ours.
    Completed { op: u64, nic_idx: usize, by_engine: bool, result: Result<(), Failure> },
    /// "May I write into this region?"
    Import { request: u64, region: u64, key: u64 },
    /// The answer.
    Imported { request: u64, result: Result<(), Refusal> },
    /// A control message.
    Control { connection: u64, sequence: u64, bytes: Hidden },
    /// The control connection broke.
    Broken { connection: u64 },
    /// It confirms none of our control messages.
    Overrun,
}

/// Bytes that a story need not spell out.
pub(super) struct Hidden(pub(super) Vec<u8>);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Control::decode(&self.0) {
            Ok(control) => control.fmt(f),
            Err(_) => write!(f, "{} bytes, crc {:08x}", self.0.len(), crc32fast::hash(&self.0)),
        }
    }
}

struct Flight {
    op: Op,
    parts_left: usize,
    failure: Option<Failure>,
    /// Its count is split over NICs.
    split: Option<Imm>,
    posted_ns: u64,
}

/// Control messages, and the connection that they use now.
#[derive(Default)]
struct ControlQueue {
    connection: Option<u64>,
    messages: Controls,
}

impl SimLink {
    pub(super) fn new(
        simulation: Simulation,
        ends: (usize, Option<usize>),
        peer: PeerIdx,
        regions: Arc<RegionTable>,
    ) -> Self {
        let num_nics = simulation.state().stands[ends.0].nics.len();
        Self {
            simulation,
            ends,
            peer,
            regions,
            inbox: Mutex::default(),
            flights: Mutex::default(),
            splits: Mutex::default(),
            bindings: Mutex::default(),
            granted: Mutex::default(),
            controls: Mutex::default(),
            turn: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            stats: PeerStats::new(num_nics),
        }
    }

    /// The call became the control connection; the peer has every control
    /// message up to `confirmed`.
    pub fn connect(&self, connection: u64, confirmed: u64) {
        self.confirm(confirmed);
        let mut controls = lock(&self.controls);
        controls.connection = Some(connection);
        for (sequence, bytes) in controls.messages.unconfirmed() {
            let bytes = Hidden(bytes);
            self.push_control(connection, News::Control { connection, sequence, bytes });
        }
    }

    pub(super) fn connection(&self) -> Option<u64> {
        lock(&self.controls).connection
    }

    pub(super) fn is_closed(&self) -> bool {
        // ORDERING: a simulation runs in one thread.
        self.closed.load(Ordering::Relaxed)
    }

    pub(super) fn tell(&self, news: News) {
        lock(&self.inbox).push_back(news);
    }

    /// Where a part of the peer's may be placed, as our NICs know it.
    pub(super) fn admit(&self, region: u64, key: u64, checks_rights: bool) -> Result<Arc<Region>, Refusal> {
        if checks_rights {
            return self.regions.admit_host(self.peer, region, key);
        }
        let granted = lock(&self.granted);
        let of_any_key = || granted.iter().find_map(|((id, _), memory)| (*id == region).then_some(memory));
        let memory = match granted.get(&(region, key)) {
            None if Mutant::IgnoreKey.is_on() => of_any_key(),
            memory => memory,
        };
        memory.ok_or(Refusal::BadKey)?.upgrade().ok_or(Refusal::NoRegion)
    }

    // ---- sending -------------------------------------------------------------------------------

    fn push_news(&self, news: News) {
        if let (from, Some(to)) = self.ends {
            self.simulation.state().push_news(from, to, news);
        }
    }

    fn push_control(&self, connection: u64, news: News) {
        if let (from, Some(to)) = self.ends {
            self.simulation.state().push_control(from, to, connection, news);
        }
    }

    // ---- receiving -----------------------------------------------------------------------------

    fn take(&self, news: News, sink: &dyn Sink) {
        match news {
            News::Arrived { imm, count } => {
                // A full table is told to the sender by the engine itself.
                let _ = sink.arrived(self.peer, imm.imm, u64::from(imm.quarters) * u64::from(count));
                sink.heard(self.peer);
            }
            News::Message { op, bytes } => {
                let result = sink.message(self.peer, bytes.0).map_err(Failure::Refused);
                self.push_news(News::Completed { op, nic_idx: 0, by_engine: true, result });
                sink.heard(self.peer);
            }
            News::Completed { op, nic_idx, by_engine, result } => {
                self.completed(op, nic_idx, result);
                // What its NIC says proves nothing of the engine.
                if by_engine {
                    sink.heard(self.peer);
                }
            }
            News::Import { request, region, key } => {
                let result = self.export(region, key);
                self.push_news(News::Imported { request, result });
                sink.heard(self.peer);
            }
            News::Imported { request, result } => {
                let asked = lock(&self.bindings).answered(request);
                match (asked, result) {
                    (Some(binding), Ok(())) => binding.accept(Target::Owner),
                    (Some(binding), Err(refusal)) => binding.refuse(refusal),
                    (None, _) => {}
                }
                sink.heard(self.peer);
            }
            News::Control { connection, sequence, bytes } => match self.is_next(connection, sequence) {
                Ok(true) => {
                    sink.heard(self.peer);
                    sink.control(self.peer, &bytes.0);
                }
                Ok(false) => {}
                Err(why) => sink.broken(self.peer, 0, &why),
            },
            News::Overrun => sink.overrun(self.peer, OVERRUN),
            News::Broken { connection } => {
                if self.connection() == Some(connection) {
                    sink.broken(self.peer, 0, "the connection was reset");
                }
            }
        }
    }

    /// Whether a control message is of the connection that stands, and the next of it.
    fn is_next(&self, connection: u64, sequence: u64) -> Result<bool, String> {
        let mut controls = lock(&self.controls);
        if controls.connection != Some(connection) {
            return Ok(false);
        }
        controls.messages.receive(sequence)
    }

    fn export(&self, region: u64, key: u64) -> Result<(), Refusal> {
        let memory = self.regions.admit_host(self.peer, region, key)?;
        memory.grant(self.peer, key)?;
        lock(&self.granted).insert((region, key), Arc::downgrade(&memory));
        Ok(())
    }

    fn completed(&self, op: u64, nic_idx: usize, result: Result<(), Failure>) {
        let ended = {
            let mut flights = lock(&self.flights);
            let Some(flight) = flights.get_mut(&op) else { return };
            let nic = self.stats.nic(nic_idx);
            let now_ns = self.simulation.now_ns();
            nic.latency.record(now_ns.saturating_sub(flight.posted_ns));
            if let Err(failure) = result {
                // ORDERING: statistics.
                nic.errors.fetch_add(1, Ordering::Relaxed);
                // The owner learns of the first failure at once; the rest only quiesces.
                flight.op.fail(failure.clone());
                flight.failure.get_or_insert(failure);
            }
            flight.parts_left -= 1;
            if flight.parts_left > 0 {
                return;
            }
            flights.remove(&op)
        };
        if let Some(flight) = ended {
            self.end(flight);
        }
    }

    fn end(&self, flight: Flight) {
        if let Some(imm) = flight.split {
            lock(&self.splits).end(imm, flight.op.id, flight.failure.is_none());
        }
        flight.op.end(flight.failure.map_or(Ok(()), Err));
    }
}

impl Link for SimLink {
    fn transport(&self) -> &'static str {
        "loopback"
    }

    fn manner(&self) -> String {
        let speeds = self.simulation.state().speeds(self.ends.0);
        let up = speeds.iter().filter(|speed| **speed > 0).count();
        format!("simulated, {up} of {} NICs", speeds.len())
    }

    fn is_degraded(&self) -> bool {
        self.simulation.state().speeds(self.ends.0).contains(&0)
    }

    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        if self.simulation.state().fabric.checks_rights {
            return lock(&self.bindings).find_or_ready(region, key, nbytes);
        }
        let (binding, request) = lock(&self.bindings).find_or_ask(region, key, nbytes);
        let Some(request) = request else { return binding };
        self.push_news(News::Import { request, region, key });
        binding
    }

    fn post(&self, mut op: Op) -> bool {
        if self.is_closed() {
            op.end(Err(Failure::PeerLost("it was given up".into())));
            return false;
        }
        // ORDERING: a number, no more.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let nbytes = op.nbytes();
        let (parts, split) = self.parts(&mut op, turn);
        if parts.is_empty() {
            op.end(Err(nic_down()));
            return false;
        }
        for part in &parts {
            self.stats.nic(part.nics.0).sent(nbytes / parts.len() as u64);
        }
        let (id, posted_ns) = (op.id, self.simulation.now_ns());
        let flight = Flight { op, parts_left: parts.len(), failure: None, split, posted_ns };
        lock(&self.flights).insert(id, flight);
        let mut state = self.simulation.state();
        for part in parts {
            state.launch(part, turn);
        }
        true
    }

    fn poll(&self, sink: &dyn Sink) -> bool {
        let mut moved = false;
        loop {
            let Some(news) = lock(&self.inbox).pop_front() else { return moved };
            if !self.is_closed() {
                self.take(news, sink);
            }
            moved = true;
        }
    }

    fn ready(&self, _channel: u8, _ready: Ready, _sink: &dyn Sink) {}

    fn reap(&self) {
        // What a NIC has been told cannot be taken back; it may yet arrive.
        for flight in lock(&self.flights).values() {
            if flight.op.ticket.given_up().is_some() {
                flight.op.note_loss();
            }
        }
    }

    fn release(&self, region: u64, key: u64, refusal: Refusal) -> bool {
        let mut table = lock(&self.bindings);
        table.refuse(region, key, refusal);
        table.settle(region, key)
    }

    fn withhold(&self, region: &Region) -> bool {
        self.simulation.state().fabric.checks_rights || !region.granted_to().contains(&self.peer)
    }

    fn close(&self, why: &Failure) {
        // ORDERING: a simulation runs in one thread.
        self.closed.store(true, Ordering::Relaxed);
        if let (from, Some(to)) = self.ends {
            self.simulation.state().flush(from, to);
        }
        if let Some(connection) = lock(&self.controls).connection.take() {
            self.push_control(connection, News::Broken { connection });
        }
        lock(&self.granted).clear();
        drop(lock(&self.bindings).close());
        let flights = std::mem::take(&mut *lock(&self.flights));
        for mut flight in flights.into_values() {
            flight.failure.get_or_insert_with(|| why.clone());
            self.end(flight);
        }
    }

    fn is_quiet(&self) -> bool {
        // Its queue pairs are gone: our NICs take nothing of the peer's any more.
        self.is_closed()
    }

    fn stats(&self) -> &PeerStats {
        &self.stats
    }
}

impl ControlPath for SimLink {
    fn has_control(&self) -> bool {
        self.connection().is_some()
    }

    fn has_news(&self) -> bool {
        false
    }

    fn send_control(&self, bytes: Vec<u8>) {
        let mut controls = lock(&self.controls);
        let Some(sequence) = controls.messages.send(&bytes) else { return self.tell(News::Overrun) };
        if let Some(connection) = controls.connection {
            let bytes = Hidden(bytes);
            self.push_control(connection, News::Control { connection, sequence, bytes });
        }
    }

    fn confirm(&self, sequence: u64) {
        lock(&self.controls).messages.confirm(sequence);
    }

    fn received(&self) -> u64 {
        lock(&self.controls).messages.received()
    }

    fn disconnect(&self, _channel: u8, _why: &str) -> bool {
        lock(&self.controls).connection.take().is_some()
    }
}

impl std::fmt::Debug for SimLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimLink").field("ends", &self.ends).finish_non_exhaustive()
    }
}

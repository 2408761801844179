//! The clock, the queue of events, and what goes wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use anyfabric_wire::EngineId;

use super::endpoint::{Endpoint, Mail, Resident};
use super::fabric::{Fabric, Part};
use super::faults::Fault;
use super::link::{News, SimLink};
use super::random::Random;
use crate::{lock, Clock, ControlPath};

/// Engines, the fabric between them, and their clock; cheap to clone.
#[derive(Clone)]
pub struct Simulation {
    shared: Arc<Shared>,
}

struct Shared {
    now_ns: Arc<AtomicU64>,
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) random: Random,
    pub(super) fabric: Fabric,
    pub(super) stands: Vec<Stand>,
    pub(super) by_engine: HashMap<EngineId, usize>,
    /// By owner and peer.
    pub(super) links: HashMap<(usize, usize), Weak<SimLink>>,
    now_ns: Arc<AtomicU64>,
    pub(super) parts: BTreeMap<u64, Part>,
    /// By when it is due, and by number.
    pub(super) queue: BTreeMap<(u64, u64), Event>,
    /// When the last control message from one to the other is due.
    control_due: HashMap<(usize, usize), u64>,
    /// Control connections that are cut, which their ends may not know yet.
    pub(super) cut: BTreeSet<u64>,
    pub(super) corrupt: u32,
    last_id: u64,
    trace: u64,
    story: Option<VecDeque<String>>,
}

/// An engine's place: its NICs, and what waits for it.
pub(super) struct Stand {
    pub(super) nics: Vec<Nic>,
    pub(super) mail: VecDeque<Mail>,
    pub(super) resident: Option<Weak<dyn Resident>>,
    pub(super) life: Life,
}

pub(super) struct Nic {
    pub(super) speed: u32,
    pub(super) is_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Running,
    Stopped,
    /// Silent.
    Killed,
    /// Nobody listens there any more.
    Left,
}

#[derive(Debug)]
pub(super) enum Event {
    /// Bytes of a part reach the target's NIC.
    Segment {
        part: u64,
        start: u64,
        nbytes: u64,
    },
    /// Something for the link from `to` to `from`.
    News {
        from: usize,
        to: usize,
        news: News,
    },
    Mail {
        from: usize,
        to: usize,
        mail: Mail,
    },
    Fault(Fault),
}

impl Simulation {
    /// One whose chances all hang on `seed`.
    pub fn new(seed: u64, fabric: Fabric) -> Self {
        let now_ns = Arc::new(AtomicU64::new(START_NS));
        let state = State {
            random: Random::new(seed),
            fabric,
            stands: Vec::new(),
            by_engine: HashMap::new(),
            links: HashMap::new(),
            now_ns: Arc::clone(&now_ns),
            parts: BTreeMap::new(),
            queue: BTreeMap::new(),
            control_due: HashMap::new(),
            cut: BTreeSet::new(),
            corrupt: 0,
            last_id: 0,
            trace: 0xcbf2_9ce4_8422_2325,
            story: None,
        };
        Self { shared: Arc::new(Shared { now_ns, state: Mutex::new(state) }) }
    }

    /// A place for one more engine; `nics` are the speeds of its NICs, at least
    /// one.
    pub fn endpoint(&self, nics: &[u32]) -> Endpoint {
        let mut state = self.state();
        let id = EngineId(std::array::from_fn(|_| state.random.draw() as u8));
        let idx = state.stands.len();
        let nics = nics.iter().map(|&speed| Nic { speed, is_up: true }).collect();
        let stand = Stand { nics, mail: VecDeque::new(), resident: None, life: Life::Running };
        state.stands.push(stand);
        state.by_engine.insert(id, idx);
        Endpoint::new(self.clone(), idx, id)
    }

    /// The clock that all engines go by.
    pub fn clock(&self) -> Clock {
        Clock::Virtual(Arc::clone(&self.shared.now_ns))
    }

    /// Now, in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        // ORDERING: one thread; see `Clock`.
        self.shared.now_ns.load(Ordering::Relaxed)
    }

    // ---- time ----------------------------------------------------------------------------------

    /// Lets every engine take its turn, then goes on to the next event or timer.
    pub fn step(&self) {
        self.take_turns();
        self.advance(u64::MAX);
    }

    /// Lets time pass.
    pub fn run_for(&self, time: Duration) {
        let until_ns = self.now_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        self.run(until_ns, &|| false);
    }

    /// Lets time pass until `done`, at most until `until_ns`; true when done.
    pub fn run(&self, until_ns: u64, done: &dyn Fn() -> bool) -> bool {
        loop {
            self.take_turns();
            if done() {
                return true;
            }
            if !self.advance(until_ns) {
                return done();
            }
        }
    }

    pub(super) fn take_turns(&self) {
        for resident in self.residents(true) {
            resident.turn();
        }
    }

    /// The engines that run; shuffled as a scheduler might.
    fn residents(&self, shuffled: bool) -> Vec<Arc<dyn Resident>> {
        let mut state = self.state();
        let running = state.stands.iter().filter(|stand| stand.is_running());
        let mut residents: Vec<_> = running.filter_map(|stand| stand.resident.as_ref()?.upgrade()).collect();
        if shuffled && residents.len() > 1 {
            let first = state.random.below(residents.len() as u64) as usize;
            residents.rotate_left(first);
        }
        residents
    }

    /// Moves the clock to what comes next and has it happen; false when nothing
    /// comes before `until_ns`.
    fn advance(&self, until_ns: u64) -> bool {
        let next_turn_ns = self.residents(false).iter().map(|resident| resident.next_turn_ns()).min();
        let event = {
            let mut state = self.state();
            let due_ns = state.queue.first_key_value().map(|((due_ns, _), _)| *due_ns);
            let next_ns = due_ns.into_iter().chain(next_turn_ns).min().unwrap_or(u64::MAX);
            if next_ns > until_ns || next_ns == u64::MAX {
                if until_ns != u64::MAX {
                    state.set_clock(until_ns);
                }
                return false;
            }
            state.set_clock(next_ns);
            let event = state.queue.first_entry().filter(|entry| entry.key().0 <= next_ns).map(|entry| entry.remove());
            if let Some(event) = &event {
                state.note(event);
            }
            event
        };
        if let Some(event) = event {
            self.happen(event);
        }
        true
    }

    fn happen(&self, event: Event) {
        match event {
            Event::Segment { part, start, nbytes } => self.state().segment(part, start, nbytes),
            Event::News { from, to, news } => {
                let link = self.state().link(to, from);
                if let Some(link) = link {
                    link.tell(news);
                }
            }
            Event::Mail { from, to, mail } => self.state().deliver(from, to, mail),
            Event::Fault(fault) => self.inject(&fault),
        }
    }

    /// An engine says something on its control connection to another.
    pub fn say(&self, from: EngineId, to: EngineId, bytes: Vec<u8>) {
        let link = {
            let state = self.state();
            let ends = state.by_engine.get(&from).copied().zip(state.by_engine.get(&to).copied());
            ends.and_then(|(from, to)| state.link(from, to))
        };
        if let Some(link) = link {
            link.send_control(bytes);
        }
    }

    /// Whether an engine is neither stopped nor killed nor closed.
    pub fn is_running(&self, engine: EngineId) -> bool {
        let state = self.state();
        state.by_engine.get(&engine).is_some_and(|idx| state.stands[*idx].is_running())
    }

    /// Whether no byte is on its way.
    pub fn is_idle(&self) -> bool {
        !self.state().queue.values().any(|event| matches!(event, Event::Segment { .. }))
    }

    // ---- what happened -------------------------------------------------------------------------

    /// A hash over every event so far: the same for the same seed and calls.
    pub fn trace(&self) -> u64 {
        self.state().trace
    }

    /// Keeps the last events in words, from now on.
    pub fn keep_story(&self) {
        self.state().story = Some(VecDeque::new());
    }

    /// The last events in words, if they were kept.
    pub fn story(&self) -> Vec<String> {
        self.state().story.iter().flatten().cloned().collect()
    }

    pub(super) fn leave(&self, idx: usize) {
        self.state().leave(idx);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }
}

impl std::fmt::Debug for Simulation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulation({} ns)", self.now_ns())
    }
}

impl Stand {
    pub(super) fn is_running(&self) -> bool {
        self.life == Life::Running
    }

    pub(super) fn has_left(&self) -> bool {
        self.life == Life::Left
    }

    pub(super) fn is_dead(&self) -> bool {
        matches!(self.life, Life::Killed | Life::Left)
    }
}

impl State {
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn now_ns(&self) -> u64 {
        // ORDERING: one thread; see `Clock`.
        self.now_ns.load(Ordering::Relaxed)
    }

    fn set_clock(&self, to_ns: u64) {
        // ORDERING: one thread; see `Clock`.
        self.now_ns.fetch_max(to_ns, Ordering::Relaxed);
    }

    pub(super) fn push_at(&mut self, due_ns: u64, event: Event) {
        let id = self.next_id();
        self.queue.insert((due_ns, id), event);
    }

    /// A time for something that overtakes and is overtaken.
    pub(super) fn due(&mut self) -> u64 {
        self.now_ns() + self.fabric.latency(&mut self.random)
    }

    /// A time for a control message, after all before it.
    pub(super) fn control_due(&mut self, from: usize, to: Option<usize>) -> u64 {
        let (first, last) = self.fabric.control_ns;
        let due_ns = self.now_ns() + self.random.between(first, last);
        let last_ns = self.control_due.entry((from, to.unwrap_or(from))).or_default();
        *last_ns = due_ns.max(*last_ns + 1);
        *last_ns
    }

    /// News for the link from `to` to `from`, in any order.
    pub(super) fn push_news(&mut self, from: usize, to: usize, news: News) {
        let due_ns = self.due();
        self.push_at(due_ns, Event::News { from, to, news });
    }

    /// A message over a control connection, in order; lost when it is cut.
    pub(super) fn push_control(&mut self, from: usize, to: usize, connection: u64, news: News) {
        if self.stands[from].is_dead() {
            return;
        }
        let due_ns = self.control_due(from, Some(to));
        if self.cut.contains(&connection) {
            // Who sends on it learns that it is.
            self.push_at(due_ns, Event::News { from: to, to: from, news: News::Broken { connection } });
        } else {
            self.push_at(due_ns, Event::News { from, to, news });
        }
    }

    pub(super) fn link(&self, owner: usize, peer: usize) -> Option<Arc<SimLink>> {
        if self.stands[owner].is_dead() {
            return None;
        }
        self.links.get(&(owner, peer))?.upgrade()
    }

    fn deliver(&mut self, from: usize, to: usize, mail: Mail) {
        match mail {
            Mail::Called { call, .. } if self.stands[to].has_left() => {
                let due_ns = self.due();
                self.push_at(due_ns, Event::Mail { from: to, to: from, mail: Mail::Failed { call, refused: true } });
            }
            _ if self.stands[to].is_dead() => {}
            mail => self.stands[to].mail.push_back(mail),
        }
    }

    // ---- what happened -------------------------------------------------------------------------

    fn note(&mut self, event: &Event) {
        let line = format!("{:>13} {event:?}", self.now_ns());
        for byte in line.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if let Some(story) = &mut self.story {
            if story.len() >= MAX_STORY {
                story.pop_front();
            }
            story.push_back(line);
        }
    }
}

/// Time 0 is reserved by timers that have not run yet.
const START_NS: u64 = 1_000_000_000;
const MAX_STORY: usize = 400;

//! The clock, the queue of events, and what goes wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyfabric_wire::EngineId;

use super::endpoint::{Endpoint, Mail, Resident};
use super::fabric::{crc, nic_down, place, Content, Fabric, Part};
use super::link::{Hidden, News, SimLink};
use super::random::Random;
use crate::mutant::Mutant;
use crate::{Clock, ControlPath, Failure};

/// Engines, the fabric between them, and their clock; cheap to clone.
#[derive(Clone)]
pub struct Simulation {
    shared: Arc<Shared>,
}

struct Shared {
    now_ns: Arc<AtomicU64>,
    state: Mutex<State>,
}

/// What can go wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// An engine's host loses power: nothing of it is heard any more, and any
    /// subset of what it had under way lands.
    Kill(EngineId),
    /// An engine's process exits: its host resets its connections, and its
    /// NICs take nothing any more.
    Exit(EngineId),
    /// An engine is stopped. Its NICs go on with what was posted, and take what
    /// comes.
    Stop(EngineId),
    /// A stopped engine goes on.
    Continue(EngineId),
    /// A NIC goes down, with what is under way on it, or comes back.
    Nic {
        /// Whose.
        engine: EngineId,
        /// Which.
        nic_idx: usize,
        /// Whether it is up from now on.
        up: bool,
    },
    /// The control connection of two engines breaks.
    Cut(EngineId, EngineId),
    /// The next parts that carry bytes, this many, arrive with a bit flipped.
    Corrupt(u32),
}

pub(super) struct State {
    pub(super) random: Random,
    pub(super) fabric: Fabric,
    pub(super) stands: Vec<Stand>,
    pub(super) by_engine: HashMap<EngineId, usize>,
    /// By owner and peer.
    pub(super) links: HashMap<(usize, usize), Weak<SimLink>>,
    now_ns: Arc<AtomicU64>,
    parts: BTreeMap<u64, Part>,
    /// By when it is due, and by number.
    queue: BTreeMap<(u64, u64), Event>,
    /// When the last control message from one to the other is due.
    control_due: HashMap<(usize, usize), u64>,
    /// Control connections that are cut, which their ends may not know yet.
    cut: BTreeSet<u64>,
    corrupt: u32,
    last_id: u64,
    trace: u64,
    story: Option<VecDeque<String>>,
}

/// An engine's place: its NICs, and what waits for it.
pub(super) struct Stand {
    pub(super) nics: Vec<Nic>,
    pub(super) mail: VecDeque<Mail>,
    pub(super) resident: Option<Weak<dyn Resident>>,
    life: Life,
}

pub(super) struct Nic {
    pub(super) speed: u32,
    pub(super) is_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
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

    // ---- faults --------------------------------------------------------------------------------

    /// Something goes wrong now. Engines that are not of this simulation are
    /// passed over.
    pub fn inject(&self, fault: &Fault) {
        let mut state = self.state();
        let stand = |state: &State, engine: &EngineId| state.by_engine.get(engine).copied();
        match fault {
            Fault::Kill(engine) => {
                if let Some(idx) = stand(&state, engine) {
                    state.set_life(idx, Life::Killed);
                    state.lose_power(idx);
                    state.parts.retain(|_, part| part.to != idx);
                }
            }
            Fault::Exit(engine) => {
                if let Some(idx) = stand(&state, engine) {
                    state.lose_power(idx);
                    state.leave(idx);
                    state.reset_connections(idx);
                }
            }
            Fault::Stop(engine) => {
                if let Some(idx) = stand(&state, engine) {
                    state.set_life(idx, Life::Stopped);
                }
            }
            Fault::Continue(engine) => {
                if let Some(idx) = stand(&state, engine).filter(|idx| state.stands[*idx].life == Life::Stopped) {
                    state.set_life(idx, Life::Running);
                }
            }
            Fault::Nic { engine, nic_idx, up } => {
                if let Some(idx) = stand(&state, engine).filter(|idx| *nic_idx < state.stands[*idx].nics.len()) {
                    state.stands[idx].nics[*nic_idx].is_up = *up;
                    if !up {
                        let end = (idx, *nic_idx);
                        state.fail_parts(|part| (part.from, part.nics.0) == end || (part.to, part.nics.1) == end);
                    }
                }
            }
            Fault::Cut(one, other) => {
                if let (Some(one), Some(other)) = (stand(&state, one), stand(&state, other)) {
                    state.cut(one, other);
                }
            }
            Fault::Corrupt(parts) => state.corrupt += parts,
        }
    }

    /// Something will go wrong, that long from now.
    pub fn schedule(&self, after: Duration, fault: Fault) {
        let mut state = self.state();
        let due_ns = self.now_ns() + u64::try_from(after.as_nanos()).unwrap_or(u64::MAX / 2);
        state.push_at(due_ns, Event::Fault(fault));
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
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn is_dead(&self) -> bool {
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

    fn link(&self, owner: usize, peer: usize) -> Option<Arc<SimLink>> {
        if self.stands[owner].is_dead() {
            return None;
        }
        self.links.get(&(owner, peer))?.upgrade()
    }

    fn deliver(&mut self, from: usize, to: usize, mail: Mail) {
        match mail {
            Mail::Called { call, .. } if self.stands[to].has_left() => {
                let due_ns = self.due();
                self.push_at(due_ns, Event::Mail { from: to, to: from, mail: Mail::Refused { call } });
            }
            _ if self.stands[to].is_dead() => {}
            mail => self.stands[to].mail.push_back(mail),
        }
    }

    // ---- the fabric ----------------------------------------------------------------------------

    /// Speeds of an engine's NICs; 0 for one that is down.
    pub(super) fn speeds(&self, idx: usize) -> Vec<u32> {
        self.stands[idx].nics.iter().map(|nic| if nic.is_up { nic.speed } else { 0 }).collect()
    }

    /// Hands a part to a NIC. The target's NIC is one that is up, whatever
    /// their numbers.
    pub(super) fn launch(&mut self, mut part: Part, turn: usize) {
        if self.stands[part.from].is_dead() {
            return;
        }
        let speeds = self.speeds(part.to);
        let up: Vec<usize> = (0..speeds.len()).filter(|idx| speeds[*idx] > 0).collect();
        let segments = part.content.segments(self.fabric.segment_bytes);
        part.segments_left = segments.len();
        let id = self.next_id();
        match up.get((part.nics.0 + turn).checked_rem(up.len()).unwrap_or(0)) {
            Some(&nic_idx) if !self.stands[part.to].has_left() => part.nics.1 = nic_idx,
            _ => {
                self.parts.insert(id, part);
                return self.fail_part(id, nic_down());
            }
        }
        if Mutant::CountBeforeCopy.is_on() {
            if let Some((imm, count)) = part.imm.take() {
                let (from, to) = (part.from, part.to);
                let due_ns = self.now_ns() + 1;
                self.push_at(due_ns, Event::News { from, to, news: News::Arrived { imm, count } });
            }
        }
        let is_lost = self.stands[part.to].is_dead();
        if !is_lost {
            self.parts.insert(id, part);
            for (start, nbytes) in segments {
                let due_ns = self.due();
                self.push_at(due_ns, Event::Segment { part: id, start, nbytes });
            }
        }
    }

    /// Bytes reach the target's NIC.
    fn segment(&mut self, id: u64, start: u64, nbytes: u64) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        let Some(link) = self.links.get(&(part.to, part.from)).and_then(Weak::upgrade).filter(|link| !link.is_closed())
        else {
            return self.fail_part(id, Failure::ConnectionBroken("the peer takes nothing from here any more".into()));
        };
        if let Content::Write { source, region, key, extent } = &part.content {
            let checks_rights = self.fabric.checks_rights;
            let placed = link.admit(*region, *key, checks_rights).and_then(|target| {
                place(source, &target, extent, (start, nbytes))?;
                if self.corrupt > 0 && nbytes > 0 {
                    self.corrupt -= 1;
                    target.flip_bit(extent.dst + start);
                }
                Ok(target)
            });
            let checked = placed.and_then(|target| match part.crc {
                Some(expected) if part.segments_left == 1 => {
                    let found = crc(&target, extent.dst, extent.nbytes)?;
                    if found == expected {
                        Ok(())
                    } else {
                        Err(anyfabric_wire::Refusal::Checksum)
                    }
                }
                _ => Ok(()),
            });
            if let Err(refusal) = checked {
                return self.fail_part(id, Failure::Refused(refusal));
            }
        }
        part.segments_left -= 1;
        if part.segments_left == 0 {
            if let Some(part) = self.parts.remove(&id) {
                self.arrive(part, &link);
            }
        }
    }

    /// A part is placed whole: now, and not before, it counts.
    fn arrive(&mut self, part: Part, link: &SimLink) {
        let Part { from, to, nics, op, content, imm, .. } = part;
        if let Some((imm, count)) = imm {
            link.tell(News::Arrived { imm, count });
            if Mutant::DoublePart.is_on() && op % 3 == 1 {
                link.tell(News::Arrived { imm, count });
            }
        }
        match content {
            // The receiving engine answers, for it may have no room.
            Content::Message(bytes) => link.tell(News::Message { op, bytes: Hidden(bytes) }),
            Content::Write { .. } | Content::Signal => {
                self.push_news(to, from, News::Completed { op, nic_idx: nics.0, by_engine: false, result: Ok(()) });
            }
        }
    }

    fn fail_part(&mut self, id: u64, why: Failure) {
        if let Some(part) = self.parts.remove(&id) {
            let news = News::Completed { op: part.op, nic_idx: part.nics.0, by_engine: false, result: Err(why) };
            // The sender's own NIC says so: that arrives whatever becomes of the other side.
            let due_ns = self.due();
            self.push_at(due_ns, Event::News { from: part.to, to: part.from, news });
        }
    }

    fn fail_parts(&mut self, hit: impl Fn(&Part) -> bool) {
        let ids: Vec<u64> = self.parts.iter().filter(|(_, part)| hit(part)).map(|(id, _)| *id).collect();
        for id in ids {
            self.fail_part(id, nic_down());
        }
    }

    /// A sender destroys its queue pairs to a peer: nothing of them lands from
    /// now on.
    pub(super) fn flush(&mut self, from: usize, to: usize) {
        self.parts.retain(|_, part| (part.from, part.to) != (from, to));
    }

    // ---- faults --------------------------------------------------------------------------------

    fn set_life(&mut self, idx: usize, life: Life) {
        if !self.stands[idx].is_dead() {
            self.stands[idx].life = life;
        }
    }

    /// Nobody listens there any more.
    fn leave(&mut self, idx: usize) {
        self.set_life(idx, Life::Left);
        self.stands[idx].resident = None;
        self.fail_parts(|part| part.to == idx);
    }

    /// Of what an engine sent any subset is lost, and what it would still have
    /// said is not said.
    fn lose_power(&mut self, idx: usize) {
        let (random, parts) = (&mut self.random, &self.parts);
        self.queue.retain(|_, event| match event {
            Event::Segment { part, .. } => parts.get(part).is_none_or(|part| part.from != idx) || random.one_in(2),
            // Acknowledgements come from its NICs.
            Event::News { from, news: News::Completed { by_engine: false, result: Ok(()), .. }, .. } => {
                *from != idx || random.one_in(2)
            }
            Event::News { news: News::Completed { by_engine: false, .. }, .. } => true,
            Event::News { from, .. } | Event::Mail { from, .. } => *from != idx,
            Event::Fault(_) => true,
        });
    }

    fn reset_connections(&mut self, idx: usize) {
        let peers: Vec<usize> = (0..self.stands.len()).filter(|peer| *peer != idx).collect();
        for peer in peers {
            self.cut(idx, peer);
        }
    }

    fn cut(&mut self, one: usize, other: usize) {
        for (owner, peer) in [(one, other), (other, one)] {
            let Some(link) = self.link(owner, peer) else { continue };
            let Some(connection) = link.connection() else { continue };
            self.cut.insert(connection);
            // What is under way is lost from some message on.
            let until_ns = self.now_ns() + self.random.below(self.fabric.control_ns.1);
            self.queue.retain(|(due_ns, _), event| {
                !matches!(event, Event::News { news: News::Control { connection: over, .. }, .. } if *over == connection)
                    || *due_ns < until_ns
            });
            let due_ns = self.control_due(peer, Some(owner));
            self.push_at(due_ns, Event::News { from: peer, to: owner, news: News::Broken { connection } });
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

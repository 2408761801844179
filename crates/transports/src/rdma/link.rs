//! One engine's way to another over the NICs of a group.

use std::collections::{HashMap, VecDeque};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use anyfabric_plan::{Rota, MAX_NICS};
use anyfabric_wire::{NicLibrary, Rails, Refusal};

use super::book::{Path, Stage};
use super::group::{NicGroup, RailGroup};
use super::messages::HEADER;
use super::nic::{Nic, RemoteMemory};
use super::slab::Slab;
use crate::mutant::Mutant;
use crate::sys::Ready;
use crate::{
    lock, Binding, BindingTable, ControlPath, Failure, Leg, Link, Op, PeerIdx, PeerStats, Place, Region, RegionTable,
    Sink, Splits, Spread, Target,
};

/// What a path over NICs is made of.
pub struct PathOptions {
    /// The peer's number here.
    pub peer: PeerIdx,
    /// Our regions.
    pub regions: Arc<RegionTable>,
    /// What carries the messages about rails.
    pub control: Arc<dyn ControlPath>,
    /// Whether we called the peer: then we call the rails too.
    pub is_caller: bool,
    /// What only the two of us know: messages over the rails carry it.
    pub key: u64,
    /// Takes a line for the log, of what nobody here is told otherwise.
    pub tell: Arc<dyn Fn(&str) + Send + Sync>,
}

/// A link over rails: it is made and kept by messages.
pub trait RailPath: Link {
    /// Begins: tells the peer what NICs there are.
    fn begin(&self);

    /// A message of the peer's about the rails. What a peer sends may be anything.
    fn on_message(&self, message: Rails);

    /// Rails that are due to be called again are called.
    fn tick(&self);

    /// How far the path is.
    fn standing(&self) -> Standing;

    /// The owner acts alone: stops every rail of this peer, so that nothing it
    /// had posted lands any more. They are made again; by then the peer has been
    /// told what was taken back from it. False when some rail cannot be stopped.
    fn expel(&self) -> bool;
}

/// How far a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Rails are being made.
    Making,
    /// At least one stands; the rest too, or it could not be made for now.
    Ready,
    /// None could be made.
    Failed(String),
    /// The peer has given it up.
    Ended(String),
}

/// One engine's way to another over the NICs of a group.
pub(super) struct RailLink<N: Nic> {
    group: Arc<RailGroup<N>>,
    path: u32,
    peer: PeerIdx,
    regions: Arc<RegionTable>,
    control: Arc<dyn ControlPath>,
    tell: Arc<dyn Fn(&str) + Send + Sync>,
    is_caller: bool,
    bindings: Mutex<BindingTable>,
    ended: OnceLock<String>,
    closed: AtomicBool,
    /// Closed, and every rail that there was is stopped.
    quiet: AtomicBool,
    num_theirs: AtomicUsize,
    /// By rail, once those are known.
    stats: OnceLock<Arc<PeerStats>>,
}

impl<N: Nic> RailLink<N> {
    pub(super) fn make(group: Arc<RailGroup<N>>, options: PathOptions) -> Arc<dyn RailPath> {
        let PathOptions { peer, regions, control, is_caller, key, tell } = options;
        let path = Path {
            peer,
            rails: Vec::new(),
            waiting: VecDeque::new(),
            stranded: VecDeque::new(),
            unanswered: HashMap::new(),
            key,
            rota: Rota::default(),
            held: Slab::default(),
            stats: Arc::new(PeerStats::new(1)),
            splits: Splits::default(),
            control: Arc::clone(&control),
            library: group.library(),
            is_caller,
            why: String::new(),
            is_stuck: false,
        };
        let path = group.state().book.paths.insert(path);
        Arc::new(Self {
            group,
            path,
            peer,
            regions,
            control,
            tell,
            is_caller,
            bindings: Mutex::default(),
            ended: OnceLock::new(),
            closed: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
            num_theirs: AtomicUsize::new(0),
            stats: OnceLock::new(),
        })
    }

    fn is_closed(&self) -> bool {
        // ORDERING: a late look finds the path gone.
        self.closed.load(Ordering::Acquire)
    }

    fn tell(&self, message: Rails) {
        let control = anyfabric_wire::Control::Rails { library: self.group.library(), message };
        self.control.send_control(control.encode());
    }

    /// A peer asks for a region's keys.
    fn export(&self, request: u64, region: u64, key: u64, nbytes: u64) {
        let admitted = self.regions.admit(self.peer, region, key).and_then(|memory| {
            let is_whole = memory.nbytes() == nbytes;
            is_whole.then_some(memory).ok_or(Refusal::OutOfBounds)
        });
        let memory = match admitted {
            Ok(memory) => memory,
            Err(refusal) => return self.tell(Rails::Bound { request, result: Err(refusal) }),
        };
        let (peer, control, granted) = (self.peer, Arc::clone(&self.control), Arc::clone(&memory));
        let tell = Arc::clone(&self.tell);
        self.group.when_registered(&memory, move |group, registered| {
            let result = match registered {
                // By now it may have been closed, or taken back.
                Ok(keys) => granted.grant(peer, key).map(|()| keys),
                Err(error) => {
                    tell(&format!("region {region} cannot be registered for it: {error}"));
                    Err(Refusal::NotRegistered)
                }
            };
            let message = Rails::Bound { request, result };
            control.send_control(anyfabric_wire::Control::Rails { library: group.library(), message }.encode());
        });
    }

    fn bound(&self, request: u64, result: Result<Vec<(u64, u64)>, Refusal>) {
        let Some(binding) = lock(&self.bindings).answered(request) else { return };
        match result {
            // ORDERING: messages come one after the other, the offer before.
            Ok(keys) if keys.len() == self.num_theirs.load(Ordering::Relaxed) && !keys.is_empty() => {
                let keys = keys.into_iter().map(|(base, key)| RemoteMemory { base, key }).collect();
                let held = self.group.state().book.hold(self.path, &binding);
                binding.accept(Target::Nics { keys, held });
            }
            Ok(_) => binding.refuse(Refusal::NotRegistered),
            Err(refusal) => binding.refuse(refusal),
        }
    }

    fn up(&self) -> (usize, usize) {
        let mut state = self.group.state();
        state.book.paths.get_mut(self.path).map_or((0, 0), |path| (path.num_up(), path.rails.len()))
    }
}

impl<N: Nic> RailPath for RailLink<N> {
    fn begin(&self) {
        self.tell(Rails::Offer { nics: self.group.abouts().iter().map(|about| about.gbps).collect() });
    }

    fn on_message(&self, message: Rails) {
        if self.is_closed() {
            return;
        }
        let now_ns = self.group.clock.now_ns();
        let path = self.path;
        match message {
            Rails::Offer { nics } => {
                // ORDERING: messages come one after the other; statistics and people read it too.
                self.num_theirs.store(nics.len().min(MAX_NICS), Ordering::Relaxed);
                let mut state = self.group.state();
                state.offered(path, self.group.abouts(), &nics[..nics.len().min(MAX_NICS)], now_ns);
                if let Some(path) = state.book.paths.get(path).filter(|path| !path.rails.is_empty()) {
                    let _ = self.stats.set(Arc::clone(&path.stats));
                }
            }
            Rails::Call { rail, attempt, address } if !self.is_caller => {
                self.group.state().called(path, rail.into(), attempt, &address, now_ns);
            }
            Rails::Answered { rail, attempt, result } if self.is_caller => {
                self.group.state().answered(path, rail.into(), attempt, result, now_ns);
            }
            Rails::Ready { rail, attempt } if !self.is_caller => {
                self.group.state().ready(path, rail.into(), attempt, now_ns);
            }
            Rails::Call { .. } | Rails::Answered { .. } | Rails::Ready { .. } => {}
            Rails::Broken { rail, attempt } => {
                self.group.state().broken_there(path, rail.into(), attempt, now_ns);
            }
            Rails::End { why } => drop(self.ended.set(why)),
            Rails::Bind { request, region, key, nbytes } => self.export(request, region, key, nbytes),
            Rails::Bound { request, result } => self.bound(request, result),
        }
    }

    fn tick(&self) {
        if !self.is_closed() {
            self.group.state().tick(self.path, self.group.clock.now_ns());
        }
    }

    fn standing(&self) -> Standing {
        if let Some(why) = self.ended.get() {
            return Standing::Ended(format!("the peer: {why}"));
        }
        let mut state = self.group.state();
        let Some(path) = state.book.paths.get_mut(self.path) else {
            return Standing::Failed("the path was closed".into());
        };
        let is_decided = !path.rails.is_empty() && path.rails.iter().all(|rail| rail.is_decided);
        match path.num_up() {
            _ if !is_decided => Standing::Making,
            0 => Standing::Failed(format!("no rail could be made: {}", path.why)),
            _ => Standing::Ready,
        }
    }

    fn expel(&self) -> bool {
        let now_ns = self.group.clock.now_ns();
        let mut state = self.group.state();
        let num_rails = state.book.paths.get_mut(self.path).map_or(0, |path| path.rails.len());
        for rail in 0..num_rails {
            // What we have called and nobody has answered is not connected: there is nothing to stop, and it may come.
            let lets_in = |stage| stage == Stage::Up || stage == Stage::Called && !self.is_caller;
            if state.book.rail(self.path, rail).is_some_and(|rail| lets_in(rail.stage)) {
                state.stop_rail(self.path, rail, "a peer was fenced that did not answer", now_ns);
                // Now, and not when somebody polls: whoever goes on must not post before it can know.
                state.tell_broken(self.path, rail);
            }
        }
        state.book.paths.get(self.path).map_or_else(|| self.is_quiet(), |path| !path.is_stuck)
    }
}

impl<N: Nic> Link for RailLink<N> {
    fn transport(&self) -> &'static str {
        match self.group.library() {
            NicLibrary::Verbs => "verbs",
            NicLibrary::Libfabric => "libfabric",
        }
    }

    fn manner(&self) -> String {
        let (up, all) = self.up();
        let names: Vec<_> =
            self.group.abouts().iter().map(|about| format!("{} ({})", about.name, about.manner)).collect();
        format!("{up} of {all} rails over {}", names.join(", "))
    }

    fn is_degraded(&self) -> bool {
        let (up, all) = self.up();
        up < all
    }

    fn max_message_bytes(&self) -> usize {
        // While no rail stands the control connection is better than waiting.
        let longest = self.group.abouts().iter().map(|about| about.max_message_bytes).min();
        longest.filter(|_| self.up().0 > 0).map_or(0, |longest| longest.saturating_sub(HEADER))
    }

    fn follows_control(&self) -> bool {
        true
    }

    fn reaches_gpu_memory(&self) -> bool {
        self.group.reaches_gpus()
    }

    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        let (binding, request) = lock(&self.bindings).find_or_ask(region, key, nbytes);
        let Some(request) = request else { return binding };
        if self.is_closed() {
            binding.refuse(Refusal::Closing);
        } else {
            self.tell(Rails::Bind { request, region, key, nbytes });
        }
        binding
    }

    fn post(&self, op: Op) -> bool {
        if self.is_closed() {
            op.end(Err(Failure::PeerLost("it was given up".into())));
            return false;
        }
        self.group.enter(self.path, op);
        true
    }

    fn place(&self) -> Option<Place> {
        Some(Place { group: NonNull::from(&*self.group).addr(), link: self.path })
    }

    fn post_legs<'t>(&self, spread: &Spread<'t>, leg: &mut Leg<'t>, next: &mut dyn FnMut(&mut Leg<'t>) -> bool) {
        // A path that was closed is gone from the group, which ends its operations.
        self.group.submit_legs(spread, leg, next);
    }

    fn poll(&self, sink: &dyn Sink) -> bool {
        self.group.poll(sink)
    }

    fn ready(&self, _channel: u8, _ready: Ready, _sink: &dyn Sink) {}

    fn reap(&self) {
        let now_ns = self.group.clock.now_ns();
        let mut state = self.group.state();
        state.book.reap(self.path, now_ns);
    }

    fn release(&self, region: u64, key: u64, refusal: Refusal) -> bool {
        let mut table = lock(&self.bindings);
        table.refuse(region, key, refusal);
        // Legs look at the binding with the NICs in hand, and are counted there.
        let has_let_go = self.group.state().book.let_go(self.path, region, key);
        (has_let_go || Mutant::SkipFence.is_on()) && table.settle(region, key)
    }

    fn withhold(&self, region: &Region) -> bool {
        // Its NIC writes without asking: only its word, or stopping its rails, is sure.
        !region.granted_to().contains(&self.peer)
    }

    fn owes_answers(&self) -> bool {
        self.group.state().book.owes_answers(self.path)
    }

    fn close(&self, why: &Failure) {
        // ORDERING: see `is_closed`.
        self.closed.store(true, Ordering::Release);
        lock(&self.bindings).close();
        let now_ns = self.group.clock.now_ns();
        let mut state = self.group.state();
        // What was left for us ends with the rest; what comes later finds the path gone.
        self.group.take_left(&mut state, now_ns);
        state.book.fail_all(self.path, why);
        let num_rails = state.book.paths.get_mut(self.path).map_or(0, |path| path.rails.len());
        (0..num_rails).for_each(|rail| state.abandon(self.path, rail, "the peer was given up", now_ns));
        state.book.drop_stranded(self.path, "the peer was given up", now_ns);
        let Some(path) = state.book.paths.remove(self.path) else { return };
        // ORDERING: release, for who gives back what its NICs had.
        self.quiet.store(!path.is_stuck, Ordering::Release);
        drop(state);
        for op in path.waiting {
            op.end(Err(why.clone()));
        }
    }

    fn is_quiet(&self) -> bool {
        // Its rails are gone: our NICs take nothing of the peer's any more.
        // ORDERING: acquire; partner: `close`.
        self.quiet.load(Ordering::Acquire)
    }

    fn stats(&self) -> &PeerStats {
        static NOTHING: LazyLock<PeerStats> = LazyLock::new(|| PeerStats::new(1));
        self.stats.get().map_or(&*NOTHING, |stats| stats)
    }
}

impl<N: Nic> std::fmt::Debug for RailLink<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RailLink").field("peer", &self.peer).finish_non_exhaustive()
    }
}

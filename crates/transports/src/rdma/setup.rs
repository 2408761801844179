//! The life of a rail: offered, called, up, broken, called again.
//!
//! The caller of the session calls rails too; see `anyfabric_wire::Rails` for
//! what is said. A rail that is down is called again after a pause that doubles,
//! for as long as the peer lives.

use std::sync::Arc;

use anyfabric_plan::{join_nics, RailPlan, Rota};
use anyfabric_wire::Rails;

use super::book::{Path, Rail, Stage};
use super::group::State;
use super::nic::{Nic, NicAbout};
use crate::PeerStats;

impl<N: Nic> State<N> {
    /// The peer's NICs are known: so are the rails.
    pub(super) fn offered(&mut self, path_idx: u32, abouts: &[NicAbout], theirs: &[u32], now_ns: u64) {
        let Some(path) = self.book.paths.get_mut(path_idx) else { return };
        if !path.rails.is_empty() {
            return;
        }
        let ours: Vec<u32> = abouts.iter().map(|about| about.gbps).collect();
        let plan = join_nics(&ours, theirs);
        path.rails = plan.iter().map(Rail::new).collect();
        path.stats = Arc::new(PeerStats::new(plan.len()));
        path.rota = Rota::new(plan);
        if path.is_caller {
            (0..path.rails.len()).for_each(|rail| self.call(path_idx, rail, now_ns));
        }
    }

    /// Asks the peer to connect a rail.
    pub(super) fn call(&mut self, path_idx: u32, rail_no: usize, now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        rail.attempt = rail.attempt.wrapping_add(1);
        let (nic_no, attempt) = (rail.nic, rail.attempt);
        match self.open(nic_no) {
            Ok(idx) => {
                let address = self.nics[nic_no].address(idx);
                self.own(path_idx, rail_no, nic_no, idx, now_ns);
                self.tell(path_idx, Rails::Call { rail: rail_no as u8, attempt, address });
            }
            Err(why) => {
                self.tell(path_idx, Rails::Broken { rail: rail_no as u8, attempt });
                self.not_made(path_idx, rail_no, why, now_ns);
            }
        }
    }

    /// Makes an end at a NIC whose port is up: what goes over another rail would fail on this one.
    fn open(&mut self, nic_no: usize) -> Result<u32, String> {
        let nic = &mut self.nics[nic_no];
        if !self.are_up[nic_no] {
            return Err(format!("{}: its port is down", nic.about().name));
        }
        nic.open().map_err(|error| error.to_string())
    }

    fn own(&mut self, path_idx: u32, rail_no: usize, nic_no: usize, idx: u32, now_ns: u64) {
        self.book.set_owner(nic_no, idx, (path_idx, rail_no));
        if let Some(rail) = self.book.rail(path_idx, rail_no) {
            rail.idx = Some(idx);
            rail.answers = 0;
            rail.stage = Stage::Called;
            rail.due_ns = now_ns.saturating_add(ANSWER_NS);
        }
    }

    /// The caller wants a rail: makes our end, whatever there was.
    pub(super) fn called(&mut self, path_idx: u32, rail_no: usize, attempt: u32, theirs: &[u8], now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        if attempt <= rail.attempt {
            return;
        }
        let nic_no = rail.nic;
        self.abandon(path_idx, rail_no, "the peer makes the rail anew", now_ns);
        if let Some(rail) = self.book.rail(path_idx, rail_no) {
            rail.attempt = attempt;
        }
        let made = self.open(nic_no).and_then(|idx| {
            let nic = &mut self.nics[nic_no];
            match nic.connect(idx, theirs) {
                Ok(()) => Ok((idx, nic.address(idx))),
                Err(error) => {
                    nic.close(idx);
                    Err(error.to_string())
                }
            }
        });
        let result = match made {
            Ok((idx, address)) => {
                self.own(path_idx, rail_no, nic_no, idx, now_ns);
                Ok(address)
            }
            Err(why) => {
                let reason = Rails::reason(&why);
                self.not_made(path_idx, rail_no, why, now_ns);
                Err(reason)
            }
        };
        self.tell(path_idx, Rails::Answered { rail: rail_no as u8, attempt, result });
    }

    /// The peer has made its end, or could not.
    pub(super) fn answered(
        &mut self,
        path_idx: u32,
        rail_no: usize,
        attempt: u32,
        result: Result<Vec<u8>, String>,
        now_ns: u64,
    ) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        let (nic_no, Some(idx), Stage::Called) = (rail.nic, rail.idx, rail.stage) else { return };
        if attempt != rail.attempt {
            return;
        }
        let connected = result
            .map_err(|why| format!("the peer: {why}"))
            .and_then(|theirs| self.nics[nic_no].connect(idx, &theirs).map_err(|error| error.to_string()));
        match connected {
            Ok(()) => {
                self.tell(path_idx, Rails::Ready { rail: rail_no as u8, attempt });
                self.ready(path_idx, rail_no, attempt, now_ns);
            }
            Err(why) => {
                self.tell(path_idx, Rails::Broken { rail: rail_no as u8, attempt });
                self.abandon(path_idx, rail_no, &why, now_ns);
                self.not_made(path_idx, rail_no, why, now_ns);
            }
        }
    }

    /// Both ends are connected.
    pub(super) fn ready(&mut self, path_idx: u32, rail_no: usize, attempt: u32, now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        if rail.stage == Stage::Called && rail.attempt == attempt {
            (rail.stage, rail.is_decided, rail.backoff_ns) = (Stage::Up, true, 0);
            self.book.unstrand(path_idx, rail_no);
            self.take_waiting(path_idx, now_ns);
        }
    }

    /// The peer's end broke, or could not be made.
    pub(super) fn broken_there(&mut self, path_idx: u32, rail_no: usize, attempt: u32, now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        // Both ends break, and each tells the other: that is one failure and not two.
        let is_known = attempt == rail.attempt && rail.stage == Stage::Down && rail.is_decided;
        if attempt < rail.attempt || is_known {
            return;
        }
        rail.attempt = attempt;
        self.abandon(path_idx, rail_no, "the rail broke at the peer", now_ns);
        self.not_made(path_idx, rail_no, "the rail broke at the peer".into(), now_ns);
    }

    fn not_made(&mut self, path_idx: u32, rail_no: usize, why: String, now_ns: u64) {
        let Some(path) = self.book.paths.get_mut(path_idx) else { return };
        path.why = why;
        let rail = &mut path.rails[rail_no];
        rail.is_decided = true;
        rail.backoff_ns = (rail.backoff_ns * 2).clamp(FIRST_RETRY_NS, LAST_RETRY_NS);
        rail.due_ns = now_ns.saturating_add(rail.backoff_ns);
    }

    // ---- the end of a rail ---------------------------------------------------------------------

    /// Stops a rail that stands: nothing of the peer's lands through it any more.
    pub(super) fn stop_rail(&mut self, path_idx: u32, rail_no: usize, why: &str, now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        let (nic_no, Some(idx)) = (rail.nic, rail.idx) else { return };
        rail.set_broken(now_ns);
        if !self.nics[nic_no].fence(idx) {
            self.book.paths.get_mut(path_idx).into_iter().for_each(|path| path.is_stuck = true);
        }
        self.book.faulty.push((path_idx, rail_no));
        self.book.rail_stopped(path_idx, rail_no, why, now_ns);
    }

    /// Closes our end at once; what was under way on it fails.
    pub(super) fn abandon(&mut self, path_idx: u32, rail_no: usize, why: &str, now_ns: u64) {
        let Some(rail) = self.book.rail(path_idx, rail_no) else { return };
        let (nic_no, idx) = (rail.nic, rail.idx.take());
        rail.stage = Stage::Down;
        self.book.rail_stopped(path_idx, rail_no, why, now_ns);
        let Some(idx) = idx else { return };
        // Its owner stays noted: what had arrived by now is reported by later polls, and the number rests until then.
        if !self.nics[nic_no].close(idx) {
            return self.book.keep_batches(path_idx, rail_no, why);
        }
        for token in self.book.batches_on(path_idx, rail_no) {
            self.book.batch_ended(token, Err(super::nic::Fault::Flushed), now_ns);
        }
    }

    /// Closes broken rails of which nothing is under way any more, or for too long.
    #[cold]
    pub(super) fn settle_faulty(&mut self, now_ns: u64) {
        let faulty = std::mem::take(&mut self.book.faulty);
        for (path_idx, rail_no) in faulty {
            let Some(rail) = self.book.rail(path_idx, rail_no) else { continue };
            if rail.stage != Stage::Broken {
                continue;
            }
            // A device that is gone flushes nothing; closed, the rail ends all the same.
            if rail.under_way > 0 && now_ns < rail.due_ns {
                self.book.faulty.push((path_idx, rail_no));
                continue;
            }
            let why = self.book.paths.get(path_idx).map_or_else(String::new, |path| path.why.clone());
            self.abandon(path_idx, rail_no, &why, now_ns);
            self.not_made(path_idx, rail_no, why, now_ns);
            self.tell_broken(path_idx, rail_no);
        }
    }

    /// What time brings: calls that are due again. When no rail is up and none is
    /// being made, what waits for one fails.
    pub(super) fn tick(&mut self, path_idx: u32, now_ns: u64) {
        let Some(path) = self.book.paths.get(path_idx) else { return };
        if path.is_caller && path.control.has_control() {
            for rail_no in 0..path.rails.len() {
                let Some(rail) = self.book.rail(path_idx, rail_no) else { break };
                let is_due = matches!(rail.stage, Stage::Down | Stage::Called) && now_ns >= rail.due_ns;
                if is_due && rail.attempt > 0 {
                    self.abandon(path_idx, rail_no, "no answer to the call of a rail", now_ns);
                    self.call(path_idx, rail_no, now_ns);
                }
            }
        }
        let Some(path) = self.book.paths.get_mut(path_idx) else { return };
        if path.is_hopeless() && !(path.waiting.is_empty() && path.stranded.is_empty()) {
            let why = format!("no NIC of the group is up: {}", path.why);
            for op in std::mem::take(&mut path.waiting) {
                op.end(Err(crate::Failure::ConnectionBroken(why.clone())));
            }
            self.book.drop_stranded(path_idx, &why, now_ns);
        }
    }

    /// Tells the peer that our end of a rail is of no more use.
    pub(super) fn tell_broken(&mut self, path_idx: u32, rail_no: usize) {
        let attempt = self.book.rail(path_idx, rail_no).map(|rail| rail.attempt);
        if let Some(attempt) = attempt {
            self.tell(path_idx, Rails::Broken { rail: rail_no as u8, attempt });
        }
    }

    fn tell(&self, path_idx: u32, message: Rails) {
        if let Some(path) = self.book.paths.get(path_idx) {
            path.send(message);
        }
    }
}

impl Path {
    /// Whether every rail was tried, and failed more than once.
    fn is_hopeless(&self) -> bool {
        self.rails.iter().all(|rail| rail.stage == Stage::Down && rail.backoff_ns > FIRST_RETRY_NS)
    }
}

impl Rail {
    fn new(plan: &RailPlan) -> Self {
        Self {
            nic: plan.ours,
            theirs: plan.theirs,
            idx: None,
            stage: Stage::Down,
            attempt: 0,
            is_decided: false,
            due_ns: 0,
            backoff_ns: 0,
            small: std::collections::VecDeque::new(),
            bulk: std::collections::VecDeque::new(),
            messages: std::collections::VecDeque::new(),
            under_way: 0,
            bulk_bytes: 0,
            answers: 0,
            is_dirty: false,
        }
    }

    /// It carries nothing any more; what was posted has yet to end.
    pub(super) fn set_broken(&mut self, now_ns: u64) {
        (self.stage, self.due_ns) = (Stage::Broken, now_ns.saturating_add(FLUSH_NS));
    }
}

/// How long an answer may take.
const ANSWER_NS: u64 = 3_000_000_000;
/// How long a NIC may take to flush what was posted on a broken rail.
const FLUSH_NS: u64 = 1_000_000_000;
const FIRST_RETRY_NS: u64 = 10_000_000;
const LAST_RETRY_NS: u64 = 500_000_000;

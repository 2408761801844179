//! Where an engine stands in a simulation.

use std::sync::{Arc, Weak};

use anyfabric_wire::handshake::{Hello, Welcome};
use anyfabric_wire::EngineId;

use super::link::SimLink;
use super::simulation::{Event, Simulation};
use crate::{Clock, PeerIdx, RegionTable};

/// An engine that lives in a simulation.
pub trait Resident: Send + Sync {
    /// Takes a turn: its mail, its links, its timers.
    fn turn(&self);

    /// When its timers want the next one.
    fn next_turn_ns(&self) -> u64;
}

/// What comes to an engine and belongs to no link yet.
#[derive(Debug)]
pub enum Mail {
    /// A peer calls.
    Called {
        /// Number of the call: the control connection it may become.
        call: u64,
        /// Who calls, and what for.
        hello: Box<Hello>,
    },
    /// The answer to a call.
    Answered {
        /// Of the call.
        call: u64,
        /// The answer.
        welcome: Box<Welcome>,
    },
    /// The call came to nothing.
    Failed {
        /// Of the call.
        call: u64,
        /// Nobody listens there; otherwise the connection was reset.
        refused: bool,
    },
}

/// One engine's place in a simulation. Dropped, nobody listens there any more.
#[derive(Debug)]
pub struct Endpoint {
    simulation: Simulation,
    idx: usize,
    id: EngineId,
}

impl Endpoint {
    pub(super) const fn new(simulation: Simulation, idx: usize, id: EngineId) -> Self {
        Self { simulation, idx, id }
    }

    /// The engine that stands here.
    pub const fn id(&self) -> EngineId {
        self.id
    }

    /// The simulation's clock.
    pub fn clock(&self) -> Clock {
        self.simulation.clock()
    }

    /// Random bytes, from the simulation's seed.
    pub fn random<const N: usize>(&self) -> [u8; N] {
        let mut state = self.simulation.state();
        std::array::from_fn(|_| state.random.draw() as u8)
    }

    /// Whose turn it is when it is this endpoint's.
    pub fn attend(&self, resident: Weak<dyn Resident>) {
        self.simulation.state().stands[self.idx].resident = Some(resident);
    }

    /// The way to another engine.
    pub fn link(&self, peer: PeerIdx, engine: EngineId, regions: Arc<RegionTable>) -> Arc<SimLink> {
        let to = self.simulation.state().by_engine.get(&engine).copied();
        let link = Arc::new(SimLink::new(self.simulation.clone(), (self.idx, to), peer, regions));
        if let Some(to) = to {
            self.simulation.state().links.insert((self.idx, to), Arc::downgrade(&link));
        }
        link
    }

    /// Calls another engine; returns the number of the call.
    pub fn call(&self, engine: EngineId, hello: Hello) -> u64 {
        let mut state = self.simulation.state();
        let call = state.next_id();
        let to = state.by_engine.get(&engine).copied();
        let due_ns = state.control_due(self.idx, to);
        match to {
            Some(to) if !state.stands[to].has_left() => {
                let mail = Mail::Called { call, hello: Box::new(hello) };
                state.push_at(due_ns, Event::Mail { from: self.idx, to, mail });
            }
            _ => {
                let mail = Mail::Failed { call, refused: true };
                state.push_at(due_ns, Event::Mail { from: self.idx, to: self.idx, mail });
            }
        }
        call
    }

    /// Answers a call.
    pub fn answer(&self, engine: EngineId, call: u64, welcome: Welcome) {
        let mut state = self.simulation.state();
        if let Some(to) = state.by_engine.get(&engine).copied() {
            let due_ns = state.control_due(self.idx, Some(to));
            let mail = Mail::Answered { call, welcome: Box::new(welcome) };
            state.push_at(due_ns, Event::Mail { from: self.idx, to, mail });
        }
    }

    /// The oldest mail.
    pub fn take_mail(&self) -> Option<Mail> {
        self.simulation.state().stands[self.idx].mail.pop_front()
    }

    /// Lets time pass until `done`, at most until `until_ns`; true when done.
    /// An engine that is stopped or killed does not wait. No lock of any engine
    /// of the simulation may be held.
    pub fn wait(&self, until_ns: u64, done: &dyn Fn() -> bool) -> bool {
        let is_awake = || self.simulation.state().stands[self.idx].is_running();
        self.simulation.run(until_ns, &|| done() || !is_awake());
        done()
    }

    /// The engine has closed: nobody listens here any more.
    pub fn leave(&self) {
        self.simulation.leave(self.idx);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.simulation.leave(self.idx);
    }
}

//! What goes wrong: engines, NICs, connections.

use std::time::Duration;

use anyfabric_wire::EngineId;

use super::endpoint::Mail;
use super::link::News;
use super::simulation::{Event, Life, Simulation, State};

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

impl Simulation {
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
}

impl State {
    fn set_life(&mut self, idx: usize, life: Life) {
        if !self.stands[idx].is_dead() {
            self.stands[idx].life = life;
        }
    }

    /// Nobody listens there any more.
    pub(super) fn leave(&mut self, idx: usize) {
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
                match event {
                    Event::News { news: News::Control { connection: over, .. }, .. } if *over == connection => {
                        return *due_ns < until_ns;
                    }
                    // An answer that is lost is a connection reset.
                    Event::Mail { mail, .. } if *due_ns >= until_ns => {
                        if matches!(mail, Mail::Answered { call, .. } if *call == connection) {
                            *mail = Mail::Failed { call: connection, refused: false };
                        }
                    }
                    _ => {}
                }
                true
            });
            let due_ns = self.control_due(peer, Some(owner));
            self.push_at(due_ns, Event::News { from: peer, to: owner, news: News::Broken { connection } });
        }
    }
}

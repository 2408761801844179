//! What a NIC reported, for tests of every library.

use std::collections::HashMap;

use anyfabric_transports::rdma::{Completions, Fault, RailIdx};

/// Everything that a NIC reported.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) completed: Vec<(RailIdx, u32, Result<(), Fault>)>,
    pub(crate) arrived: Vec<(RailIdx, u32)>,
    pub(crate) messages: Vec<(RailIdx, Vec<u8>)>,
    pub(crate) broken: Vec<(RailIdx, Fault)>,
}

impl Completions for Seen {
    fn completed(&mut self, rail: RailIdx, token: u32, result: Result<(), Fault>) {
        self.completed.push((rail, token, result));
    }

    fn arrived(&mut self, rail: RailIdx, imm: u32) {
        self.arrived.push((rail, imm));
    }

    fn message(&mut self, rail: RailIdx, message: &[u8]) {
        self.messages.push((rail, message.to_vec()));
    }

    fn broken(&mut self, rail: RailIdx, why: Fault) {
        self.broken.push((rail, why));
    }
}

// Not every test asks in both ways.
#[allow(dead_code)]
impl Seen {
    /// How each batch ended, once or more often.
    pub(crate) fn ended(&self) -> HashMap<u32, Vec<Result<(), Fault>>> {
        let mut ended = HashMap::<_, Vec<_>>::new();
        for (_, token, result) in &self.completed {
            ended.entry(*token).or_default().push(*result);
        }
        ended
    }

    /// How a batch ended.
    pub(crate) fn result(&self, token: u32) -> Option<Result<(), Fault>> {
        self.completed.iter().find(|(_, of, _)| *of == token).map(|(_, _, result)| *result)
    }
}

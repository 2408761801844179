//! What a NIC reported, for tests of every library.

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

impl Seen {
    /// How a batch ended.
    pub(crate) fn result(&self, token: u32) -> Option<Result<(), Fault>> {
        self.completed.iter().find(|(_, of, _)| *of == token).map(|(_, _, result)| *result)
    }
}

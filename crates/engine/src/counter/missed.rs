//! What becomes of counters when a NIC has lost arrivals.

use anyfabric_transports::PeerIdx;
use anyfabric_wire::EngineId;

use super::{Counters, Entry};
use crate::early::Missing;

impl Counters {
    /// Arrivals of a peer's were lost, and nobody knows of which immediates: fails
    /// the counters that may lack some, and notes it of what came early.
    pub(crate) fn missed(&self, peer: PeerIdx, engine: EngineId, peer_name: &str) {
        let mut table = self.lock();
        for entry in table.by_imm.values_mut() {
            if let Entry::Early { missing, .. } = entry {
                *missing = Some(Missing::Missed(peer));
            }
        }
        let states = table.open_states();
        drop(table);
        let may_lack = |sources: &[EngineId]| sources.is_empty() || sources.contains(&engine);
        for state in states.iter().filter(|state| may_lack(&state.lock().sources)) {
            state.fail(Missing::Missed(peer).error(state.imm, peer_name));
        }
        self.doorbell.notify();
    }
}

//! Which NICs of two engines are joined, and how much each pair can carry.

use crate::MAX_SHARDS;

/// A connection between one NIC here and one there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RailPlan {
    /// Our NIC.
    pub ours: usize,
    /// The peer's.
    pub theirs: usize,
    /// What it can carry beside the others, in twelfths of a Gbit/s; at least 1.
    pub speed: u32,
}

/// Joins NICs of these speeds in Gbit/s, each in turn: as many rails as the side
/// with more has NICs, at most four. Both sides get the same rails.
///
/// Rails that share a NIC share its speed.
pub fn join_nics(ours: &[u32], theirs: &[u32]) -> Vec<RailPlan> {
    if ours.is_empty() || theirs.is_empty() {
        return Vec::new();
    }
    let num_rails = ours.len().max(theirs.len()).min(MAX_SHARDS);
    let share = |nics: &[u32], idx: usize| {
        let num_sharing = (0..num_rails).filter(|rail| rail % nics.len() == idx).count() as u64;
        u64::from(nics[idx]) * TWELFTHS / num_sharing.max(1)
    };
    let rail = |rail: usize| {
        let (our_nic, their_nic) = (rail % ours.len(), rail % theirs.len());
        let speed = share(ours, our_nic).min(share(theirs, their_nic));
        RailPlan { ours: our_nic, theirs: their_nic, speed: speed.clamp(1, u32::MAX.into()) as u32 }
    };
    (0..num_rails).map(rail).collect()
}

/// Divided by 1, 2, 3 and 4 alike.
const TWELFTHS: u64 = 12;

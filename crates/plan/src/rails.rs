//! Which NICs of two engines are joined, and how much each pair can carry.

/// Most NICs of one engine, and so rails between two: those of a machine with
/// one beside each of its eight GPUs. Every peer costs a connection for each.
pub const MAX_NICS: usize = 8;

/// A connection between one NIC here and one there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RailPlan {
    /// Our NIC.
    pub ours: usize,
    /// The peer's.
    pub theirs: usize,
    /// Speed of ours in Gbit/s; at least 1.
    pub our_gbps: u32,
    /// Speed of the peer's in Gbit/s; at least 1.
    pub their_gbps: u32,
}

/// Joins NICs of these speeds in Gbit/s, each in turn: as many rails as the side
/// with more has NICs, at most [`MAX_NICS`]. Both sides get the same rails.
///
/// Neighbours among the rails have different NICs at both ends, as far as there
/// are any: so a few in a row reach as much of either side as so few can.
pub fn join_nics(ours: &[u32], theirs: &[u32]) -> Vec<RailPlan> {
    if ours.is_empty() || theirs.is_empty() {
        return Vec::new();
    }
    let num_rails = ours.len().max(theirs.len()).min(MAX_NICS);
    let gbps = |nics: &[u32], nic: usize| nics[nic].clamp(1, MAX_GBPS);
    let rail = |rail: usize| {
        let (our_nic, their_nic) = (rail % ours.len(), rail % theirs.len());
        RailPlan {
            ours: our_nic,
            theirs: their_nic,
            our_gbps: gbps(ours, our_nic),
            their_gbps: gbps(theirs, their_nic),
        }
    };
    (0..num_rails).map(rail).collect()
}

/// More than any NIC has; a peer may claim anything.
const MAX_GBPS: u32 = 1 << 20;

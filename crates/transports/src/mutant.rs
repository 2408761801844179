//! Deliberate mistakes that the conformance suite must catch.
//!
//! Without the feature `mutants` every question below is a constant `false`
//! and nothing of this remains in the binary. With it, the environment variable
//! `ANYFABRIC_MUTANT` names the mistake to make.

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Count an arrival before its bytes are copied.
    CountBeforeCopy,
    /// Acknowledge a revocation without draining.
    SkipFence,
    /// Do not compare keys at the receiver.
    IgnoreKey,
    /// Deliver one part of an operation twice.
    DoublePart,
    /// Lose a quarter of a split write's count.
    DropQuarter,
    /// Never end one transfer.
    LoseCompletion,
}

impl Mutant {
    /// Every mistake, with the name that the environment variable takes.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::CountBeforeCopy, "count_before_copy"),
        (Self::SkipFence, "skip_fence"),
        (Self::IgnoreKey, "ignore_key"),
        (Self::DoublePart, "double_part"),
        (Self::DropQuarter, "drop_quarter"),
        (Self::LoseCompletion, "lose_completion"),
    ];

    /// Whether to make this mistake.
    #[cfg(not(feature = "mutants"))]
    #[inline(always)]
    pub const fn is_on(self) -> bool {
        false
    }

    /// Whether to make this mistake.
    #[cfg(feature = "mutants")]
    pub fn is_on(self) -> bool {
        use std::sync::OnceLock;
        static CHOSEN: OnceLock<Option<Mutant>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("ANYFABRIC_MUTANT").ok()?;
            Self::ALL.iter().find(|(_, known)| *known == name).map(|(mutant, _)| *mutant)
        });
        *chosen == Some(self)
    }
}

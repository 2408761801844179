//! Which transport two engines use.

/// A transport as both sides see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name in the API.
    pub name: &'static str,
    /// Why it cannot serve this peer; `None` when it can.
    pub obstacle: Option<String>,
}

/// The transport chosen, and why not a faster one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Name of the transport; `None` when none serves.
    pub name: Option<&'static str>,
    /// "shm: another host; ..." for every faster one passed over.
    pub reason: String,
}

/// Picks the first candidate without an obstacle; candidates come fastest
/// first. With `require`, every other transport has an obstacle, and one that is
/// not among the candidates is named as missing.
pub fn choose(candidates: &[Candidate], require: Option<&str>) -> Choice {
    let mut passed_over = Vec::new();
    for candidate in candidates {
        let excluded = require.filter(|required| *required != candidate.name);
        match (&candidate.obstacle, excluded) {
            (None, None) => return Choice { name: Some(candidate.name), reason: passed_over.join("; ") },
            (Some(obstacle), _) => passed_over.push(format!("{}: {obstacle}", candidate.name)),
            (None, Some(required)) => {
                passed_over.push(format!("{}: {required} is required", candidate.name));
            }
        }
    }
    if let Some(required) = require.filter(|required| candidates.iter().all(|candidate| candidate.name != *required)) {
        passed_over.push(format!("{required}: not a transport of both engines"));
    }
    Choice { name: None, reason: passed_over.join("; ") }
}

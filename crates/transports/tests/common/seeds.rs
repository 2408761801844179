//! Tests over seeds. `ANYFABRIC_SEED` runs that one alone, `ANYFABRIC_CASES` sets how many there are.

use std::panic::AssertUnwindSafe;

/// Runs a test for many seeds, and names the one that fails; `test` is told whether it is the only one.
pub(crate) fn for_seeds(cases: u64, test: impl Fn(u64, bool)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("ANYFABRIC_SEED") {
        return test(seed, true);
    }
    // The number given is for a test of average length; longer ones do fewer.
    let cases = number("ANYFABRIC_CASES").map_or(cases, |asked| (asked * cases / DEFAULT_CASES).max(1));
    for seed in 0..cases {
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| test(seed, false))) {
            eprintln!("seed {seed} fails; ANYFABRIC_SEED={seed} runs it alone");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Of a test of average length.
const DEFAULT_CASES: u64 = 200;

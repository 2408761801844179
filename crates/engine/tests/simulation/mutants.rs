//! The suite proves itself: with every deliberate mistake some test fails.
//!
//! Needs the feature `mutants`. Runs this test binary again, once a mistake.

use std::process::{Command, Stdio};

use anyfabric_engine::transports::mutant::Mutant;

#[test]
#[cfg_attr(not(feature = "mutants"), ignore = "needs --features mutants")]
fn every_mutant_is_caught() {
    if std::env::var_os("ANYFABRIC_MUTANT").is_some() {
        return;
    }
    for (_, name) in Mutant::ALL {
        let run = |filter: &str| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([filter, "--test-threads=1"]).env("ANYFABRIC_MUTANT", name);
            // A mistake that few seeds notice is not caught.
            command.env("ANYFABRIC_CASES", "40").env_remove("ANYFABRIC_SEED");
            command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
        };
        let caught = ["chaos::", "fences::", "counts::", "transfers::"].iter().any(|filter| !run(filter).success());
        assert!(caught, "nothing failed although the engine makes the mistake {name}");
    }
}

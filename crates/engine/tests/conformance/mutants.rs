//! The suite proves itself: each deliberate mistake must make a test fail.
//!
//! `cargo test -p anyfabric-engine --features mutants --test conformance mutants::`

use std::process::{Command, Stdio};

use anyfabric_engine::transports::mutant::Mutant;

/// What must notice each mistake. All of these pass without one.
const TESTS: [(Mutant, &[&str]); 6] = [
    (
        Mutant::CountBeforeCopy,
        &["visibility::bytes_are_there_when_counted::shm", "visibility::bytes_are_there_when_counted::shm_foreign"],
    ),
    (Mutant::SkipFence, &["fencing::revoked_under_load::shm", "fencing::revoked_under_load::shm_foreign"]),
    (Mutant::IgnoreKey, &["bounds::checked_at_the_receiver::tcp_2", "bounds::crafted_descriptors_are_refused::shm"]),
    (Mutant::DoublePart, &["counts::write_counts_once::shm", "counts::write_counts_once::tcp_2"]),
    (Mutant::DropQuarter, &["counts::write_counts_once::tcp_2", "counts::write_counts_once::tcp_4"]),
    (Mutant::LoseCompletion, &["ending::many_under_way::shm_isolated", "ending::many_under_way::tcp_2"]),
];

#[test]
fn each_is_caught() {
    let mut survived = Vec::new();
    for (mutant, name) in Mutant::ALL {
        let (_, tests) = TESTS.iter().find(|(listed, _)| *listed == mutant).expect("a test for every mutant");
        let failed = run(tests, Some(name));
        println!("{name}: {}", if failed.is_empty() { "survived".into() } else { failed.join(", ") });
        if failed.is_empty() {
            survived.push(name);
        }
    }
    assert!(survived.is_empty(), "not caught: {survived:?}");
}

/// Without a mistake the same tests pass.
#[test]
fn none_is_imagined() {
    let mut tests: Vec<_> = TESTS.iter().flat_map(|(_, tests)| *tests).copied().collect();
    tests.sort_unstable();
    tests.dedup();
    assert_eq!(run(&tests, None), Vec::<String>::new());
}

/// Runs tests of this binary with a mistake in it; returns those that failed.
fn run(tests: &[&str], mutant: Option<&str>) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.arg("--exact").args(tests).env("ANYFABRIC_MUTANT", mutant.unwrap_or_default());
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().expect("the suite");
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = text.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    let failed: Vec<_> = failed.map(str::to_owned).collect();
    assert_eq!(output.status.success(), failed.is_empty(), "the suite ended with {}:\n{text}", output.status);
    failed
}

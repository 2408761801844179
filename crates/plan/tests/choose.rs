//! Choosing a transport: the first that serves, and why not a faster one.

use anyfabric_plan::{choose, Candidate, Choice};

fn candidates(of: &[(&'static str, Option<&str>)]) -> Vec<Candidate> {
    of.iter().map(|(name, obstacle)| Candidate { name, obstacle: obstacle.map(str::to_owned) }).collect()
}

fn choice(name: Option<&'static str>, reason: &str) -> Choice {
    Choice { name, reason: reason.to_owned() }
}

#[test]
fn the_first_without_an_obstacle() {
    let both = candidates(&[("shm", None), ("tcp", None)]);
    assert_eq!(choose(&both, None), choice(Some("shm"), ""));
    let apart = candidates(&[("nvlink", Some("no GPU")), ("shm", Some("another host")), ("tcp", None), ("x", None)]);
    assert_eq!(choose(&apart, None), choice(Some("tcp"), "nvlink: no GPU; shm: another host"));
}

#[test]
fn the_one_that_is_required() {
    let both = candidates(&[("shm", None), ("tcp", None)]);
    assert_eq!(choose(&both, Some("shm")), choice(Some("shm"), ""));
    assert_eq!(choose(&both, Some("tcp")), choice(Some("tcp"), "shm: tcp is required"));
}

#[test]
fn none_and_why() {
    let none = candidates(&[("shm", Some("another host")), ("tcp", Some("no route"))]);
    assert_eq!(choose(&none, None), choice(None, "shm: another host; tcp: no route"));
    let one = candidates(&[("shm", Some("another host")), ("tcp", None)]);
    assert_eq!(choose(&one, Some("shm")), choice(None, "shm: another host; tcp: shm is required"));
    let missing = "shm: another host; tcp: verbs is required; verbs: not a transport of both engines";
    assert_eq!(choose(&one, Some("verbs")), choice(None, missing));
    assert_eq!(choose(&[], None), choice(None, ""));
}

//! What an engine refuses and gives up says what was given, in words of users.

use std::time::Duration;

use anyfabric_engine::{Code, Config, Engine, Error};

#[test]
fn a_wait_that_ends_says_after_how_long() {
    let engine = Engine::new(Config::default()).unwrap();
    let counter = engine.counter(Some(7), &[]).unwrap();
    let late = |error: Error| (error.code, error.message);
    let timeout = Some(Duration::from_millis(5));
    assert_eq!(
        late(counter.wait(3, timeout).unwrap_err()),
        (Code::WaitTimeout, "imm 7: 0 of 3 arrivals after 0.005 s".to_owned())
    );
    assert_eq!(late(engine.receive(timeout).unwrap_err()), (Code::WaitTimeout, "no message after 0.005 s".to_owned()));
}

/// Whoever hands over an empty variable does not mean to let everybody in.
#[test]
fn an_empty_secret_is_none() {
    let error = Engine::new(Config { secret: Some(Vec::new()), ..Config::default() }).unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (Code::InvalidArgument, "the secret is empty; give none, or one of some bytes")
    );
}

#[test]
fn a_setting_that_must_not_be_zero_is_named() {
    let config = Config::default;
    let refused = [
        (Config { queue_depth: 0, ..config() }, "queue_depth is 0, expected 1 or more"),
        (Config { heartbeats_lost: 0, ..config() }, "heartbeats_lost is 0, expected 1 or more"),
        (Config { heartbeat: Duration::ZERO, ..config() }, "heartbeat is 0 s, expected more"),
    ];
    for (config, told) in refused {
        let error = Engine::new(config).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (Code::InvalidArgument, told));
    }
}

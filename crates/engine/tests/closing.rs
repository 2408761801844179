//! Whoever closes an engine returns when all of it is closed, whichever thread it is.

use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;

use anyfabric_engine::{Config, Engine};

/// The memory that was registered may be given back after any of the calls.
#[test]
fn a_second_thread_returns_when_all_is_closed() {
    let engine = Engine::new(Config::default()).unwrap();
    let (started, has_started) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    // Told towards the end: until it returns the first thread is not through.
    engine.on_message(Box::new(move || {
        started.send(()).unwrap();
        let _ = may_go_on.recv_timeout(LONG);
    }));
    thread::scope(|scope| {
        scope.spawn(|| engine.close(Duration::ZERO));
        has_started.recv_timeout(LONG).unwrap();
        let (closed, has_closed) = mpsc::channel();
        let engine = &engine;
        scope.spawn(move || {
            engine.close(Duration::ZERO);
            closed.send(()).unwrap();
        });
        let early = has_closed.recv_timeout(Duration::from_millis(200));
        go_on.send(()).unwrap();
        assert!(early.is_err(), "returned while the first was at it");
        has_closed.recv_timeout(LONG).unwrap();
    });
}

/// What is dropped with the last of an engine may close it once more.
#[test]
fn a_call_from_within_another_does_not_wait_for_itself() {
    let engine = Arc::new(Engine::new(Config::default()).unwrap());
    let (closed, has_closed) = mpsc::channel();
    let within = Arc::clone(&engine);
    engine.on_message(Box::new(move || {
        within.close(Duration::ZERO);
        closed.send(()).unwrap();
    }));
    thread::spawn(move || engine.close(Duration::ZERO));
    has_closed.recv_timeout(LONG).unwrap();
}

const LONG: Duration = Duration::from_secs(10);

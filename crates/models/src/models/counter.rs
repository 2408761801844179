//! Whoever waits for a count hears of it, and sees the bytes that it counts.

// Only here are its functions known.
#[path = "../../../engine/src/counter/state.rs"]
mod state;

use std::time::Duration;

use anyfabric_wire::Imm;
use loom::thread;

use crate::fractions::Places;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::Arc;
use crate::sys::Mapping;
use crate::{Code, Doorbell, Error, Region};
use state::State;

/// Who sleeps is woken by the count, and sees its bytes.
pub fn count_wakes() {
    let (state, bell, region) = (state(), bell(), Arc::new(Region::default()));
    let driver = thread::spawn({
        let (state, bell, region) = (Arc::clone(&state), Arc::clone(&bell), Arc::clone(&region));
        move || {
            region.write(1);
            state.add(4, &bell);
        }
    });
    while !state.is_settled(1) {
        bell.sleep(Duration::MAX, || state.is_settled(1), || 0);
    }
    assert_eq!((state.outcome(1).is_ok(), region.read()), (true, 1));
    driver.join().expect("a thread of the model");
}

/// Who asked to be told is told once, whichever thread counts the last.
pub fn count_is_told() {
    let (state, bell, told) = (state(), bell(), Arc::new(AtomicU32::new(0)));
    let drivers = [(); 2].map(|()| {
        let (state, bell) = (Arc::clone(&state), Arc::clone(&bell));
        thread::spawn(move || state.add(4, &bell))
    });
    state.on_settled(2, tell(&told));
    drivers.into_iter().for_each(|driver| driver.join().expect("a thread of the model"));
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

/// So is who asks while the counter fails, and he finds out why.
pub fn failure_is_told() {
    let (state, told) = (state(), Arc::new(AtomicU32::new(0)));
    let failing = thread::spawn({
        let state = Arc::clone(&state);
        move || state.fail(Error::new(Code::PeerLost, "gone"))
    });
    if state.is_settled(1) {
        assert_eq!(state.outcome(1).map_err(|error| error.code), Err(Code::PeerLost));
    }
    state.on_settled(1, tell(&told));
    failing.join().expect("a thread of the model");
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

/// Who gives up while it is counted is told once or never, and others still are.
pub fn others_give_up() {
    let (state, bell) = (state(), bell());
    let (gone, there) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let waiter = state.on_settled(1, tell(&gone));
    let driver = thread::spawn({
        let (state, bell) = (Arc::clone(&state), Arc::clone(&bell));
        move || state.add(4, &bell)
    });
    state.give_up(waiter);
    state.on_settled(1, tell(&there));
    driver.join().expect("a thread of the model");
    assert!(gone.load(Ordering::Relaxed) <= 1);
    assert_eq!(there.load(Ordering::Relaxed), 1);
}

fn state() -> Arc<State> {
    Arc::new(State::new(Imm::new(7).expect("below 2^30"), 0, Places::new(), Vec::new()))
}

fn bell() -> Arc<Doorbell> {
    Arc::new(Doorbell::new(Mapping::of_doorbell()))
}

fn tell(told: &Arc<AtomicU32>) -> Box<dyn FnOnce() + Send> {
    let told = Arc::clone(told);
    Box::new(move || {
        told.fetch_add(1, Ordering::Relaxed);
    })
}

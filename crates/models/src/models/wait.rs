//! Whatever is to be done is done, whoever drives, looks once or leaves: nobody sleeps while
//! all others rely on him. A model has no time-outs, as in `doorbell`.

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use crate::engine::Inner;
use crate::sync::thread::Thread;

/// Who looks once and then does something else leaves the rest to the worker, whose wake-up
/// he may have read.
pub fn rest_is_left_to_the_worker() {
    with_worker(true, |inner| {
        inner.submit(PIECES);
        inner.glance();
        inner.is_told();
    });
}

/// So does who waits for a moment only.
pub fn a_moment_is_no_promise() {
    with_worker(true, |inner| {
        inner.submit(PIECES);
        inner.wait(Some(MOMENT), || inner.has_ended());
        inner.is_told();
    });
}

/// And who finds the deadline of what he submitted nearer than the next look at the clock.
pub fn deadline_is_looked_at() {
    with_worker(true, |inner| {
        inner.submit_urgent();
        inner.glance();
        inner.is_told();
    });
}

/// What a look reads is answered, by whomever.
pub fn what_is_read_is_answered() {
    with_worker(true, |inner| {
        let looks = spawn(inner, |inner| inner.glance());
        inner.bring_data();
        inner.is_told();
        join(looks);
    });
}

/// Who waits hears of the end, whether he works himself or the worker does.
pub fn the_end_is_heard_of() {
    with_worker(true, |inner| {
        inner.submit(PIECES);
        assert!(inner.wait(None, || inner.has_ended()));
    });
}

/// Who waits hears of what a peer of this host brings.
pub fn an_arrival_is_heard_of() {
    with_worker(true, |inner| {
        let peer = spawn(inner, |inner| inner.arrive());
        assert!(inner.wait_for_arrivals(None, || inner.counted() == 1, || 1));
        join(peer);
    });
}

/// Two wait for different things, of which one of them drives.
pub fn two_wait() {
    with_worker(true, |inner| {
        let other = spawn(inner, |inner| {
            inner.arrive();
            assert!(inner.wait(None, || inner.has_ended()));
        });
        inner.submit(PIECES);
        assert!(inner.wait_for_arrivals(None, || inner.counted() == 1, || 1));
        join(other);
    });
}

/// Who waits for what will not come hears of the engine's end, and who closes it of his turn.
pub fn the_end_of_the_engine_is_heard_of() {
    with_worker(true, |inner| {
        let waits = spawn(inner, |inner| assert!(inner.wait(None, || inner.has_ended())));
        inner.submit_end();
        assert!(inner.wait(None, || inner.presence.has_turned_last()));
        join(waits);
    });
}

/// Beside a worker that ends when all is over.
fn with_worker(uses_streams: bool, run: impl Fn(&Arc<Inner>)) {
    let inner = Arc::new(Inner::new(uses_streams));
    let worker = spawn(&inner, |inner| inner.work());
    inner.presence.set_worker(Thread::of(worker.thread()));
    run(&inner);
    inner.presence.stop();
    inner.wake_fd.notify();
    inner.presence.wake_worker();
    join(worker);
}

fn spawn(inner: &Arc<Inner>, run: impl FnOnce(&Arc<Inner>) + 'static) -> thread::JoinHandle<()> {
    let inner = Arc::clone(inner);
    thread::spawn(move || run(&inner))
}

fn join(thread: thread::JoinHandle<()>) {
    thread.join().expect("a thread of the model");
}

/// More than whoever looks once takes.
const PIECES: u32 = 4;
const MOMENT: Duration = Duration::from_nanos(1);

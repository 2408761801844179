//! Lines that the transports log. They know no engine, so a line goes to the log of whichever engine's thread comes first.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use anyfabric_engine::transports::sys::fork_generation;
use anyfabric_engine::transports::{lock, try_lock};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::notifier::Queue;

/// Takes lines from now on.
pub(crate) fn install() {
    // Once in a process.
    if log::set_logger(&Lines).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Delivers the token whenever there are lines, as long as the queue is open.
pub(crate) fn tell(queue: &Arc<Queue>, token: u64) {
    let Some(mut state) = state() else { return };
    state.queues.retain(|(queue, _)| queue.strong_count() > 0);
    state.queues.push((Arc::downgrade(queue), token));
    if !state.lines.is_empty() {
        queue.deliver_once(token);
    }
}

/// Takes the lines, each with its level as in Python's logging.
pub(crate) fn take() -> Vec<(u8, String)> {
    state().map_or_else(Vec::new, |mut state| state.lines.drain(..).collect())
}

struct Lines;

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the engine logs it keeps itself.
        metadata.level() <= Level::Info && metadata.target().starts_with("anyfabric_transports")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => 40,
            Level::Warn => 30,
            Level::Info | Level::Debug | Level::Trace => 20,
        };
        let line = record.args().to_string();
        let Some(mut state) = state() else { return };
        if state.lines.len() >= MAX_LINES {
            state.lines.pop_front();
        }
        state.lines.push_back((level, line));
        let open = state.queues.iter().filter_map(|(queue, token)| Some((queue.upgrade()?, *token)));
        open.for_each(|(queue, token)| queue.deliver_once(token));
    }

    fn flush(&self) {}
}

struct State {
    lines: VecDeque<(u8, String)>,
    queues: Vec<(Weak<Queue>, u64)>,
}

/// The lines; none in a forked child whose parent was about to look at them, and left the lock behind.
fn state() -> Option<MutexGuard<'static, State>> {
    if fork_generation() == 0 {
        Some(lock(&STATE))
    } else {
        try_lock(&STATE)
    }
}

static STATE: Mutex<State> = Mutex::new(State { lines: VecDeque::new(), queues: Vec::new() });

/// Lines kept until somebody takes them.
const MAX_LINES: usize = 256;

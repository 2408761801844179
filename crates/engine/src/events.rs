//! What links report to the driver, and what an engine tells the log.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Mutex;

use anyfabric_transports::PeerIdx;

use crate::inner::{lock, Inner};

/// What links report and handles ask for; handled by the driver between turns.
pub(crate) enum Event {
    Call(PeerIdx),
    Control(PeerIdx, Vec<u8>),
    Broken(PeerIdx, u8, String),
    /// Its Unix socket ended, and what its streams had before that was read.
    Parted(PeerIdx, String),
    Exited(PeerIdx),
    /// It must be given up: more waits for it than it may leave unread.
    Overrun(PeerIdx, String),
    EarlyFull(PeerIdx),
    /// The engine closes, and what is under way was waited for.
    Closing,
}

/// Lines for the log, until somebody takes them.
#[derive(Default)]
pub(crate) struct EventLog {
    state: Mutex<LogState>,
}

#[derive(Default)]
struct LogState {
    lines: VecDeque<(u8, String)>,
    waiters: Vec<Box<dyn Fn() + Send>>,
}

impl EventLog {
    /// A line: `level` as in Python's logging.
    pub(crate) fn add(&self, level: u8, line: String) {
        match level {
            0..=10 => log::debug!("{line}"),
            11..=20 => log::info!("{line}"),
            21..=30 => log::warn!("{line}"),
            _ => log::error!("{line}"),
        }
        let mut log = lock(&self.state);
        if log.lines.len() >= MAX_LOG {
            log.lines.pop_front();
        }
        log.lines.push_back((level, line));
        for run in &log.waiters {
            run();
        }
    }
}

impl Inner {
    pub(crate) fn push_event(&self, event: Event) {
        lock(&self.events).push_back(event);
        // ORDERING: a hint; the lock orders the rest.
        self.has_events.store(true, Ordering::Release);
    }

    #[inline]
    pub(crate) fn take_event(&self) -> Option<Event> {
        // ORDERING: see `push_event`.
        if self.has_events.load(Ordering::Acquire) {
            self.pop_event()
        } else {
            None
        }
    }

    #[inline(never)]
    fn pop_event(&self) -> Option<Event> {
        let mut events = lock(&self.events);
        let event = events.pop_front();
        if events.is_empty() {
            self.has_events.store(false, Ordering::Release);
        }
        event
    }

    /// A line for the log: `level` as in Python's logging.
    pub(crate) fn log(&self, level: u8, line: String) {
        self.log.add(level, line);
    }

    pub(crate) fn take_log(&self) -> Vec<(u8, String)> {
        lock(&self.log.state).lines.drain(..).collect()
    }

    pub(crate) fn on_log(&self, on_log: Box<dyn Fn() + Send>) {
        let mut log = lock(&self.log.state);
        if !log.lines.is_empty() {
            on_log();
        }
        log.waiters.push(on_log);
    }
}

/// Lines kept until somebody takes them.
const MAX_LOG: usize = 1024;

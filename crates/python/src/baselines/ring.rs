//! Two processes that answer one another through two polled words.
//!
//! ```text
//! 0   8  what the side that pings has sent, 1 and up
//! 64  8  what the other has answered
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyfabric_engine::Code;
use pyo3::prelude::*;

use super::fail;

/// Half the round trip of 8 bytes, each round.
#[pyfunction]
pub(crate) fn baseline_ring_ping(py: Python<'_>, memory: usize, rounds: u64) -> PyResult<Vec<u64>> {
    py.detach(|| {
        let [ping, pong] = words(memory);
        (1..=rounds)
            .map(|round| {
                let began = Instant::now();
                // ORDERING: as a ring would release what came before; partner: the acquire in `await_value`.
                ping.store(round, Ordering::Release);
                await_value(pong, round).then(|| began.elapsed().as_nanos() as u64 / 2)
            })
            .collect::<Option<Vec<_>>>()
    })
    .ok_or_else(|| silent(py))
}

/// Answers `baseline_ring_ping`.
#[pyfunction]
pub(crate) fn baseline_ring_pong(py: Python<'_>, memory: usize, rounds: u64) -> PyResult<()> {
    let answered = py.detach(|| {
        let [ping, pong] = words(memory);
        (1..=rounds).all(|round| {
            let came = await_value(ping, round);
            // ORDERING: see `baseline_ring_ping`.
            pong.store(round, Ordering::Release);
            came
        })
    });
    if answered {
        Ok(())
    } else {
        Err(silent(py))
    }
}

fn words<'a>(memory: usize) -> [&'a AtomicU64; 2] {
    // SAFETY: the contract of the stub: 128 bytes, aligned, shared, alive through the call and only used atomically.
    [0, 64].map(|offset| unsafe { &*((memory + offset) as *const AtomicU64) })
}

/// Polls until the word has the value; false when it is given up.
fn await_value(word: &AtomicU64, value: u64) -> bool {
    let mut began = None;
    loop {
        for _ in 0..SPINS {
            // ORDERING: see `baseline_ring_ping`.
            if word.load(Ordering::Acquire) == value {
                return true;
            }
            std::hint::spin_loop();
        }
        if began.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return false;
        }
        // Both sides may have to share one core.
        std::thread::yield_now();
    }
}

fn silent(py: Python<'_>) -> PyErr {
    fail(py, Code::WaitTimeout, format!("the other side of the ring was silent for {PATIENCE:?}"))
}

const SPINS: usize = 500;
const PATIENCE: Duration = Duration::from_secs(10);

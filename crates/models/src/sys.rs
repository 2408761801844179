//! Shared memory and futexes, as a model has them.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use loom::sync::{Condvar, Mutex};

use crate::ring;
use crate::sync::atomic::{AtomicU32, Ordering};

/// Memory of which some words are used: loom pays for each.
#[derive(Debug)]
pub(crate) struct Mapping(BTreeMap<usize, Box<[AtomicU32]>>);

impl Mapping {
    /// With words from these bytes on, so many each.
    pub(crate) fn of(words: impl IntoIterator<Item = (usize, usize)>) -> Self {
        Self(words.into_iter().map(|(at, num)| (at, (0..num).map(|_| AtomicU32::new(0)).collect())).collect())
    }

    /// That a doorbell needs.
    pub(crate) fn of_doorbell() -> Self {
        Self::of([0, 4, 64, 68, 128, 132].map(|at| (at, 1)))
    }

    pub(crate) fn anonymous(_len: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// # Safety
    /// None; as the product's.
    pub(crate) unsafe fn words<const N: usize>(&self, at: usize) -> &[AtomicU32; N] {
        (&*self.0[&at]).try_into().expect("as many words as were asked for")
    }

    /// Nothing is done with it but to reckon.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        static ADDRESSES: OnceLock<Vec<u8>> = OnceLock::new();
        ADDRESSES.get_or_init(|| vec![0; ring::BYTES]).as_ptr().cast_mut()
    }

    pub(crate) fn len(&self) -> usize {
        ring::BYTES
    }

    pub(crate) fn unmap_early(&self) {}
}

/// Blocks while `word` holds `seen`; a model has no time, so that a wake-up that
/// is lost is for good.
pub(crate) fn futex_wait(word: &AtomicU32, seen: u32, _timeout: Duration) {
    let queue = FUTEX.queue.lock().expect("a thread of a model panicked");
    // ORDERING: under the lock, as in the kernel.
    if word.load(Ordering::Relaxed) == seen {
        drop(FUTEX.woken.wait(queue));
    }
}

/// Wakes everybody who blocks.
pub(crate) fn futex_wake_all(_word: &AtomicU32) {
    drop(FUTEX.queue.lock().expect("a thread of a model panicked"));
    FUTEX.woken.notify_all();
}

struct Futex {
    queue: Mutex<()>,
    woken: Condvar,
}

loom::lazy_static! {
    static ref FUTEX: Futex = Futex { queue: Mutex::new(()), woken: Condvar::new() };
}

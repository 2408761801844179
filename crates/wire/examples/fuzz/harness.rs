//! What catches a failing decoder: panics, and memory out of proportion.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::decoders::{again, Verdict};

/// Runs `decode`, which holds no more memory than an input of `nbytes` deserves.
pub(crate) fn metered<T>(nbytes: usize, decode: impl FnOnce() -> T) -> T {
    // The dearest message is a Hello with transports without a name: 24 bytes
    // of memory for each of the input, thrice while their vector grows. What
    // is allocated whatever the input is mostly the text of an error.
    let limit = 72 * nbytes + 4096;
    HELD.set(0);
    PEAK.set(0);
    let value = decode();
    let peak = PEAK.get();
    assert!(peak <= limit as isize, "held {peak} bytes for an input of {nbytes}, at most {limit}");
    value
}

/// Runs `decode`; says why it failed.
pub(crate) fn attempt<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    QUIET.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(decode));
    QUIET.set(false);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        format!("failed at {}: {}", PLACE.take(), text.unwrap_or("a panic without a text"))
    })
}

/// A harness that catches nothing would pass everything.
pub(crate) fn prove_harness() -> Result<(), String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if QUIET.get() {
            let place = info.location().map_or_else(String::new, ToString::to_string);
            PLACE.with_borrow_mut(|last| *last = place);
        } else {
            hook(info);
        }
    }));
    let length = |bytes: &[u8]| Some(bytes.len());
    let seen = [
        attempt(|| [0_u8; 4][std::hint::black_box(4)]).is_err(),
        attempt(|| metered(4, || Vec::<u8>::with_capacity(std::hint::black_box(1 << 20)))).is_err(),
        attempt(|| again(b"x", length, |_| vec![0; 2])).is_err(),
        attempt(|| again(b"x", length, |_| vec![0; 1])) == Ok(Verdict::Accepted),
    ];
    if seen == [true; 4] {
        Ok(())
    } else {
        Err(format!("the harness itself is broken: panic, allocation, difference, none: {seen:?}"))
    }
}

thread_local! {
    /// Bytes this thread has allocated and not freed, and the most since
    /// `metered` began.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    /// Whether a panic of this thread is to be caught without a word.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// Where it happened.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: it adds nothing to the system's allocator but numbers; the two thread
// locals it uses are constant-initialised, have no destructor and so do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get() + layout.size() as isize);
        PEAK.set(PEAK.get().max(HELD.get()));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

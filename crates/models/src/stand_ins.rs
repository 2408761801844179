//! What the product's files use of others that are not modelled.

use anyfabric_wire::Imm;

use crate::sync::{Mutex, MutexGuard};

pub(crate) type PeerIdx = u32;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a thread of a model panicked")
}

pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    mutex.try_lock().ok()
}

/// As the engine's files call it.
pub(crate) mod inner {
    pub(crate) use super::lock;
    pub(crate) use crate::engine::{nanos, Inner};
}

/// As the engine's files call it.
pub(crate) mod driver {
    pub(crate) use crate::engine::Driver;
}

pub(crate) mod rdma {
    #[derive(Debug)]
    pub(crate) struct RemoteMemory;
}

#[derive(Default)]
pub(crate) struct Losses {}

impl Losses {
    pub(crate) fn note(&self, _peer: PeerIdx, _imm: Imm) {}
}

/// Bytes that loom watches: to touch them in two threads at the same time is an
/// error, and their owner overwrites them when he gets them back.
#[derive(Debug, Default)]
pub(crate) struct Region(loom::cell::UnsafeCell<u64>);

impl Region {
    pub(crate) fn read(&self) -> u64 {
        // SAFETY: loom checks that nobody writes.
        self.0.with(|bytes| unsafe { *bytes })
    }

    pub(crate) fn write(&self, value: u64) {
        // SAFETY: loom checks that nobody else reads or writes.
        self.0.with_mut(|bytes| unsafe { *bytes = value });
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.write(0);
    }
}

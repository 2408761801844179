//! What threads share: std's here; where the files that take it from here are model-checked, loom's (`crates/models`).

pub(crate) use std::sync::{atomic, Mutex, MutexGuard};
pub(crate) use std::thread;

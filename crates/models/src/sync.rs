//! What threads share: loom's.

pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};

/// Loom's threads. A model has no time: a short sleep only lets others go first, and
/// a long one lasts until it is ended.
pub(crate) mod thread {
    use std::panic::Location;
    use std::time::Duration;

    pub(crate) use loom::thread::yield_now;

    use crate::check;

    #[derive(Debug)]
    pub(crate) struct Thread(loom::thread::Thread);

    impl Thread {
        pub(crate) fn of(thread: &loom::thread::Thread) -> Self {
            Self(thread.clone())
        }

        #[track_caller]
        pub(crate) fn unpark(&self) {
            if check::is_kept(Location::caller()) {
                self.0.unpark();
            }
        }
    }

    pub(crate) fn park_timeout(timeout: Duration) {
        if timeout < LONG {
            yield_now();
        } else {
            loom::thread::park();
        }
    }

    /// From here on who sleeps is late for what others wait for.
    pub(crate) const LONG: Duration = Duration::from_millis(20);
}

/// Loom's atomics, with two additions.
///
/// loom takes a sequentially consistent access for one that acquires and
/// releases, and takes only fences at their word. What compilers may make of such
/// an access is a fence before it, or one after it; so each model runs with the
/// one and with the other, and must hold in both ([`crate::check`]). Neither
/// orders it with weaker accesses on both sides, so that a mistake shows in one.
///
/// And an ordering that the product's files ask for is weakened when that is
/// tested.
pub(crate) mod atomic {
    use std::panic::Location;

    pub(crate) use std::sync::atomic::Ordering;

    use crate::check;

    #[track_caller]
    pub(crate) fn fence(order: Ordering) {
        let order = check::ordering(order, Location::caller());
        if order != Ordering::Relaxed {
            loom::sync::atomic::fence(order);
        }
    }

    #[track_caller]
    fn access<T>(order: Ordering, act: impl FnOnce(Ordering) -> T) -> T {
        let order = check::ordering(order, Location::caller());
        let fence_if = |is_here: bool| {
            if is_here && order == Ordering::SeqCst {
                loom::sync::atomic::fence(Ordering::SeqCst);
            }
        };
        let is_before = check::fences_before();
        fence_if(is_before);
        let result = act(order);
        fence_if(!is_before);
        result
    }

    macro_rules! atomic {
        ($name:ident, $value:ty, $($of:ident)?) => {
            #[derive(Debug)]
            pub(crate) struct $name$(<$of>)?(loom::sync::atomic::$name$(<$of>)?);

            impl$(<$of>)? $name$(<$of>)? {
                #[track_caller]
                pub(crate) fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }

                #[track_caller]
                pub(crate) fn load(&self, order: Ordering) -> $value {
                    access(order, |order| self.0.load(order))
                }

                #[track_caller]
                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    access(order, |order| self.0.store(value, order));
                }

                #[track_caller]
                pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                    access(order, |order| self.0.swap(value, order))
                }

                #[track_caller]
                pub(crate) fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    let failure = check::ordering(failure, Location::caller());
                    access(success, |success| self.0.compare_exchange(current, new, success, failure))
                }

                #[track_caller]
                pub(crate) fn fetch_update(
                    &self,
                    set: Ordering,
                    fetch: Ordering,
                    update: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    let fetch = check::ordering(fetch, Location::caller());
                    access(set, |set| self.0.fetch_update(set, fetch, update))
                }
            }
        };
    }

    macro_rules! default {
        ($name:ident) => {
            impl Default for $name {
                fn default() -> Self {
                    Self::new(Default::default())
                }
            }
        };
    }

    macro_rules! number {
        ($name:ident, $value:ty) => {
            atomic!($name, $value,);
            default!($name);

            impl $name {
                #[track_caller]
                pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    access(order, |order| self.0.fetch_add(value, order))
                }

                #[track_caller]
                pub(crate) fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    access(order, |order| self.0.fetch_sub(value, order))
                }
            }
        };
    }

    atomic!(AtomicBool, bool,);
    default!(AtomicBool);
    atomic!(AtomicPtr, *mut T, T);
    number!(AtomicU32, u32);
    number!(AtomicU64, u64);
}

//! Every model holds, and notices every ordering that is missing.

use anyfabric_models::check::{needs_orderings, Model};

/// A test for each model of a file, and one that weakens those orderings of the
/// file that it needs. A number bounds how often threads are interrupted.
macro_rules! models {
    ($file:ident: $($model:ident $($max_preemptions:literal)?),* $(,)?; needs $orderings:expr) => {
        mod $file {
            use super::*;

            $(#[test]
            fn $model() {
                model!($file, $model $($max_preemptions)?).holds();
            })*

            #[test]
            fn needs_its_orderings() {
                needs_orderings(&[$(model!($file, $model $($max_preemptions)?)),*], $orderings);
            }
        }
    };
}

macro_rules! model {
    ($file:ident, $model:ident $($max_preemptions:literal)?) => {
        Model {
            name: concat!(stringify!($file), "::", stringify!($model)),
            run: anyfabric_models::models::$file::$model,
            max_preemptions: None$(.or(Some($max_preemptions)))?,
        }
    };
}

models!(binding: fence, fence_by_lock; needs &[
    "enter: self.under_way.fetch_add(1, Ordering::SeqCst);",
    "enter: match self.state.load(Ordering::SeqCst) {",
    "leave: self.under_way.fetch_sub(1, Ordering::Release);",
    "is_idle: self.under_way.load(Ordering::SeqCst) == 0",
    "refuse: self.state.store(REFUSED + u32::from(refusal.code()), Ordering::SeqCst);",
]);

models!(counter: count_wakes, count_is_told 2, failure_is_told, others_give_up; needs &[
    "value: self.quarters.load(Ordering::SeqCst) / 4",
    "add: self.quarters.fetch_add(quarters, Ordering::SeqCst);",
    "add: if self.has_waiters.load(Ordering::SeqCst) {",
    "on_settled: self.has_waiters.store(true, Ordering::SeqCst);",
]);

models!(doorbell: local_news, swapped_news, worker_in_epoll, driven_beside_the_worker, patience 2,
    driver_in_epoll 2, patience_of_another 2; needs &[
    "notify: fence(Ordering::SeqCst);",
    "notify_after_swap: if self.word(SLEEPERS).load(Ordering::SeqCst) > 0 {",
    "notify_remote: let sleepers = self.word(SLEEPERS).load(Ordering::SeqCst);",
    "reset_patience: fence(Ordering::SeqCst);",
    "set_blocked: fence(Ordering::SeqCst);",
]);

models!(fractions: a_whole_is_made_once, peers_have_places_of_their_own; needs &[
    "whole: let kept = place.fetch_update(Ordering::AcqRel, Ordering::Acquire, after).ok()?;",
]);

models!(ring: entries_come_whole, payload_is_kept_until_read; needs &[
    "publish: stamp.swap(self.tail.wrapping_add(1), Ordering::SeqCst);",
    "has_news: entry_at(&self.memory, self.head)[0].load(Ordering::Acquire) == self.head.wrapping_add(1)",
    "publish_head: word(&self.memory, HEAD).store(self.head, Ordering::Release);",
    "refresh: let head = word(&self.memory, HEAD).load(Ordering::Acquire);",
]);

models!(ticket: end_shows_all_parts 2, quiesced_is_untouched, ended_is_untouched, source_outlives_all_parts 2,
    one_end_is_told 2, counted_while_cancelled, used_again; needs &[
    "state: match self.state.load(Ordering::Acquire) {",
    "has_ended: matches!(self.state.load(Ordering::Acquire), DONE | FAILED)",
    "has_quiesced: self.parts.load(Ordering::Acquire) == 0",
    "parts_ended: if num_parts > 0 && self.parts.fetch_sub(num_parts, Ordering::AcqRel) == num_parts {",
    "settle_well: if is_heard || self.state.compare_exchange(ENDING, DONE, told, seen).is_err() {",
    "tell_done: self.state.store(DONE, Ordering::Release);",
]);

models!(wait: rest_is_left_to_the_worker 3, a_moment_is_no_promise 2, deadline_is_looked_at 3,
    what_is_read_is_answered 2, the_end_is_heard_of 2, the_end_of_the_engine_is_heard_of 1, two_wait 1,
    an_arrival_is_heard_of 3; needs &[
    "leave_to_worker: let goes_on = self.poll_links(driver) && self.poll_links(driver);",
    "wake: fence(Ordering::SeqCst);",
    "wake: self.wake_fd.notify();",
    "wake_worker: worker.unpark();",
    "look_or_wake: self.wake_fd.notify();",
    "block_worker: let timeout = if self.poll_links(&mut driver) || self.presence.is_stopped() {",
]);

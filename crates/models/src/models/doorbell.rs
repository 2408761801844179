//! Nobody sleeps while there is news for him. A model has no time-outs: who is
//! not woken sleeps for ever, which loom reports.

use std::time::Duration;

use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::stand_ins::lock;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::Arc;
use crate::sys::Mapping;
use crate::{Blocked, Doorbell};

/// News of this process wake who sleeps.
pub fn local_news() {
    wakes(|bell, news| {
        news.store(1, Ordering::Relaxed);
        bell.notify();
    });
}

/// So do those that a swap published.
pub fn swapped_news() {
    wakes(|bell, news| {
        news.swap(1, Ordering::SeqCst);
        bell.notify_after_swap();
    });
}

/// Who waits for two arrivals is woken by the second, whoever brings them.
pub fn patience() {
    let (bell, arrived) = (bell(), Arc::new(AtomicU32::new(0)));
    let tellers = [(); 2].map(|()| {
        let (bell, arrived) = (Arc::clone(&bell), Arc::clone(&arrived));
        thread::spawn(move || {
            arrived.fetch_add(1, Ordering::SeqCst);
            assert!(!bell.notify_remote(1), "nobody is in epoll");
        })
    });
    let count = || arrived.load(Ordering::Relaxed);
    while count() < 2 {
        bell.sleep(LONG, || count() >= 2, || 2_u32.saturating_sub(count()));
    }
    tellers.into_iter().for_each(|teller| teller.join().expect("a thread of the model"));
}

/// The patience of one who has left does not keep another one asleep.
pub fn patience_of_another() {
    let (bell, local, remote) = (bell(), Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let patient = thread::spawn({
        let (bell, local) = (Arc::clone(&bell), Arc::clone(&local));
        move || sleep_until(&bell, || local.load(Ordering::Relaxed) == 1, 9)
    });
    let teller = thread::spawn({
        let (bell, local, remote) = (Arc::clone(&bell), Arc::clone(&local), Arc::clone(&remote));
        move || {
            local.swap(1, Ordering::SeqCst);
            bell.notify_after_swap();
            remote.swap(1, Ordering::SeqCst);
            bell.notify_remote(1);
        }
    });
    sleep_until(&bell, || remote.load(Ordering::Relaxed) == 1, 1);
    patient.join().expect("a thread of the model");
    teller.join().expect("a thread of the model");
}

/// The worker in epoll is kicked, or sees the news before it blocks.
pub fn worker_in_epoll() {
    let (bell, epoll, news) = (bell(), Arc::new(Epoll::default()), Arc::new(AtomicU32::new(0)));
    let teller = thread::spawn({
        let (bell, epoll, news) = (Arc::clone(&bell), Arc::clone(&epoll), Arc::clone(&news));
        move || tell(&bell, &epoll, &news)
    });
    bell.set_patience(|| 0);
    bell.set_blocked(Blocked::Worker);
    if news.load(Ordering::Relaxed) == 0 {
        bell.set_patience(|| 1);
        epoll.wait();
    }
    bell.set_blocked(Blocked::Nobody);
    teller.join().expect("a thread of the model");
}

/// Who drives while the worker is in epoll leaves nothing unseen: it sees the
/// news itself, or the worker is kicked.
pub fn driven_beside_the_worker() {
    let (bell, epoll, news) = (bell(), Arc::new(Epoll::default()), Arc::new(AtomicU32::new(0)));
    bell.set_blocked(Blocked::Worker);
    let teller = thread::spawn({
        let (bell, epoll, news) = (Arc::clone(&bell), Arc::clone(&epoll), Arc::clone(&news));
        move || tell(&bell, &epoll, &news)
    });
    bell.set_blocked(Blocked::Nobody);
    bell.set_blocked(Blocked::Worker);
    let is_seen = news.load(Ordering::Relaxed) == 1;
    teller.join().expect("a thread of the model");
    assert!(is_seen || *lock(&epoll.kicked), "nobody looks");
}

/// Beside a thread that blocks with the driver in its hands, who sleeps hears of an
/// arrival that only the first one can look for, however patient either is.
pub fn driver_in_epoll() {
    let (bell, epoll) = (bell(), Arc::new(Epoll::default()));
    let (news, counted) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let driver = thread::spawn({
        let (bell, epoll, news, counted) =
            (Arc::clone(&bell), Arc::clone(&epoll), Arc::clone(&news), Arc::clone(&counted));
        move || {
            let look = || {
                let is_news = news.load(Ordering::Relaxed) == 1;
                if is_news {
                    counted.swap(1, Ordering::SeqCst);
                    bell.notify_after_swap();
                }
                is_news
            };
            while !look() {
                epoll.announce(true);
                bell.set_blocked(Blocked::Driver);
                bell.reset_patience();
                if !look() {
                    bell.set_patience(|| 9);
                    epoll.wait();
                }
                bell.set_blocked(Blocked::Nobody);
                epoll.announce(false);
            }
        }
    });
    let teller = thread::spawn({
        let (bell, epoll) = (Arc::clone(&bell), Arc::clone(&epoll));
        move || tell(&bell, &epoll, &news)
    });
    let is_counted = || counted.load(Ordering::Relaxed) == 1;
    while !is_counted() {
        let has_news = || {
            epoll.wake();
            is_counted()
        };
        bell.sleep(LONG, has_news, || 9);
    }
    driver.join().expect("a thread of the model");
    teller.join().expect("a thread of the model");
}

fn bell() -> Arc<Doorbell> {
    Arc::new(Doorbell::new(Mapping::of_doorbell()))
}

/// What another thread tells is heard.
fn wakes(tell: fn(&Doorbell, &AtomicU32)) {
    let (bell, news) = (bell(), Arc::new(AtomicU32::new(0)));
    let teller = thread::spawn({
        let (bell, news) = (Arc::clone(&bell), Arc::clone(&news));
        move || tell(&bell, &news)
    });
    sleep_until(&bell, || news.load(Ordering::Relaxed) == 1, 0);
    teller.join().expect("a thread of the model");
}

fn sleep_until(bell: &Doorbell, has_news: impl Fn() -> bool, patience: u32) {
    while !has_news() {
        bell.sleep(LONG, &has_news, || patience);
    }
}

/// As a peer: publishes one arrival, and kicks whom it is told to.
fn tell(bell: &Doorbell, epoll: &Epoll, news: &AtomicU32) {
    news.swap(1, Ordering::SeqCst);
    if bell.notify_remote(1) {
        epoll.kick();
    }
}

/// What a kick makes ready, as the kernel has it.
struct Epoll {
    kicked: Mutex<bool>,
    ready: Condvar,
    /// As `Presence::user_blocked` of the engine.
    user_blocked: AtomicU32,
}

impl Default for Epoll {
    fn default() -> Self {
        Self { kicked: Mutex::new(false), ready: Condvar::new(), user_blocked: AtomicU32::new(0) }
    }
}

impl Epoll {
    fn kick(&self) {
        *lock(&self.kicked) = true;
        self.ready.notify_all();
    }

    fn wait(&self) {
        let mut kicked = lock(&self.kicked);
        while !*kicked {
            kicked = self.ready.wait(kicked).expect("a thread of the model panicked");
        }
        *kicked = false;
    }

    fn announce(&self, is_blocked: bool) {
        self.user_blocked.store(is_blocked.into(), Ordering::SeqCst);
    }

    /// As a thread does that found the driver taken.
    fn wake(&self) {
        if self.user_blocked.load(Ordering::SeqCst) == 1 {
            self.kick();
        }
    }
}

const LONG: Duration = Duration::MAX;

//! Of several threads that block, one is woken that can look.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyfabric_transports::{Blocked, Doorbell};

const LONG: Duration = Duration::from_secs(40);

#[test]
fn who_sleeps_looks_beside_a_worker_in_epoll() {
    let sleeper = Sleeper::new(1);
    sleeper.doorbell.set_blocked(Blocked::Worker);
    assert!(!sleeper.doorbell.notify_remote(1), "the worker was kicked for what the sleeper can see");
    sleeper.wake();
}

#[test]
fn who_sleeps_cannot_look_beside_the_driver_in_epoll() {
    let sleeper = Sleeper::new(1);
    sleeper.doorbell.set_blocked(Blocked::Driver);
    assert!(sleeper.doorbell.notify_remote(1), "nobody who can look was woken");
    assert!(!sleeper.doorbell.notify_remote(1), "one kick is enough");
    sleeper.doorbell.set_blocked(Blocked::Nobody);
    assert!(!sleeper.doorbell.notify_remote(1));
    sleeper.wake();
}

#[test]
fn patience_is_of_one_who_blocks_alone() {
    let sleeper = Sleeper::new(3);
    assert!((0..2).all(|_| !sleeper.doorbell.notify_remote(1)) && !sleeper.is_awake());
    sleeper.doorbell.set_blocked(Blocked::Driver);
    sleeper.doorbell.reset_patience();
    sleeper.doorbell.set_patience(|| 100);
    assert!(sleeper.doorbell.notify_remote(1), "the first waits for one arrival, the second for another");
    sleeper.doorbell.set_blocked(Blocked::Nobody);
    sleeper.doorbell.notify_remote(1);
    sleeper.wake();

    let doorbell = Doorbell::private().unwrap();
    doorbell.set_blocked(Blocked::Driver);
    doorbell.reset_patience();
    doorbell.set_patience(|| 2);
    assert!(!doorbell.notify_remote(1));
    assert!(doorbell.notify_remote(1));
    assert!(!doorbell.notify_remote(0), "it was kicked already");
}

/// A thread that sleeps on a bell until it is told to wake, and says when it is about to.
struct Sleeper {
    doorbell: Arc<Doorbell>,
    has_news: Arc<AtomicBool>,
    woken: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Sleeper {
    /// That can wait for so many arrivals.
    fn new(patience: u32) -> Self {
        let (doorbell, has_news) = (Arc::new(Doorbell::private().unwrap()), Arc::new(AtomicBool::new(false)));
        let ((says_ready, ready), (says_woken, woken)) = (channel(), channel());
        let (bell, news) = (Arc::clone(&doorbell), Arc::clone(&has_news));
        let thread = std::thread::spawn(move || {
            let has_news = || news.load(Ordering::SeqCst);
            while !has_news() {
                bell.sleep(LONG, has_news, || {
                    let _ = says_ready.send(());
                    patience
                });
                let _ = says_woken.send(());
            }
        });
        ready.recv_timeout(LONG).unwrap();
        // What it said is in force as soon as another may say something.
        doorbell.set_patience(|| unreachable!("somebody sleeps"));
        Self { doorbell, has_news, woken, thread }
    }

    fn is_awake(&self) -> bool {
        self.woken.try_recv().is_ok()
    }

    /// The bell has rung: it needs no other.
    fn wake(self) {
        self.has_news.store(true, Ordering::SeqCst);
        self.woken.recv_timeout(LONG).unwrap();
        self.doorbell.notify();
        self.thread.join().unwrap();
    }
}

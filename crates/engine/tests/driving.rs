//! A thread that waits drives: it looks after all that the worker does, for as long as it was told to.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyfabric_engine::transports::lock;
use anyfabric_engine::transports::sys::{affinity, pin, thread_id};
use anyfabric_engine::{Address, Code, Config, Engine, PageList, Polling, Region, Remote, Transfer, WriteOptions};

const LONG: Duration = Duration::from_secs(40);

/// Waits that are all soon done leave the worker no turn: they look after deadlines, and all else that time brings.
#[test]
fn short_waits_look_after_time() {
    let pair = Pair::new("shm", 4 * MIB);
    // It never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody: Address = format!("af://{}/{}", silent.local_addr().unwrap(), "0f".repeat(16)).parse().unwrap();
    let deadline = Duration::from_millis(20);
    let mut late: Vec<_> = (0..NUM_TRIES)
        .map(|_| {
            let began = Instant::now();
            let call = pair.here.start_connect(&nobody, Some(deadline)).unwrap();
            while call.error().is_none() {
                // More than the caller's thread places by itself, less than the worker's patience with who drives.
                pair.write_pages(8).wait(Some(LONG)).unwrap();
                assert!(began.elapsed() < LONG, "a deadline passed unnoticed");
            }
            assert_eq!(call.error().unwrap().code, Code::TransferTimeout);
            began.elapsed() - deadline
        })
        .collect();
    late.sort_unstable();
    assert!(late[NUM_TRIES / 2] < Duration::from_millis(50), "deadlines were noticed after {late:?}");
}

/// A thread goes on for as long as it moves something, and no longer than it was told to wait.
#[test]
fn a_wait_ends_while_bytes_move() {
    let pair = Pair::new("tcp", LARGE);
    let (src, dst) = (pair.region.slice(0..LARGE).unwrap(), pair.remote.slice(0..LARGE).unwrap());
    let ended_early = (0..NUM_TRIES).any(|_| {
        let large = pair.here.write(&src, &dst, WriteOptions::default()).unwrap();
        let outcome = large.wait(Some(Duration::from_millis(1)));
        large.wait(Some(LONG)).unwrap();
        outcome.is_err_and(|error| error.code == Code::WaitTimeout)
    });
    assert!(ended_early, "each of {NUM_TRIES} waits of a millisecond lasted until {LARGE} bytes had been written");
}

/// A thread that waits copies, and does not sleep in the midst of that: the worker, which steps aside for it, would
/// notice long after. A sleep is told by the system, whatever time the host leaves this machine.
#[test]
fn who_copies_does_not_sleep() {
    let nbytes = 32 * MIB;
    let pair = Pair::new("shm", nbytes);
    let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
    let write = || pair.here.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    // Nobody has touched the memory before.
    write();
    let before = num_sleeps();
    (0..NUM_WRITES).for_each(|_| write());
    let num_sleeps = num_sleeps() - before;
    // A few, for the worker may have begun to copy.
    assert!(num_sleeps < i64::from(NUM_WRITES) / 2, "slept {num_sleeps} times in {NUM_WRITES} writes");
}

/// Who looks once, or waits too short, leaves the rest to the worker, whose wake-up he may have taken.
#[test]
fn who_looks_once_leaves_the_rest_to_the_worker() {
    let nbytes = 8 * MIB;
    let looks: [fn(&Transfer); 2] = [|write| _ = write.is_done(), |write| _ = write.wait(Some(MOMENT))];
    for transport in ["tcp", "shm"] {
        let pair = Pair::new(transport, nbytes);
        let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
        for look in looks {
            let took = median(|| {
                // Until the workers sleep.
                std::thread::sleep(PAUSE);
                let began = Instant::now();
                let write = pair.here.write(&src, &dst, WriteOptions::default()).unwrap();
                look(&write);
                until_it_ends(&write);
                began.elapsed()
            });
            assert!(took < TICK / 2, "{transport}: after a look {nbytes} bytes took {took:?}");
        }
    }
}

/// Who finds the count that it looked for does not look again: what it read is acknowledged all the same.
#[test]
fn what_a_look_reads_is_acknowledged() {
    let pair = Pair::new("tcp", MIB);
    let counter = pair.there.counter(Some(7), &[]).unwrap();
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    let took = median(|| {
        std::thread::sleep(PAUSE);
        let (began, before) = (Instant::now(), counter.value());
        let options = WriteOptions { imm: Some(7), ..WriteOptions::default() };
        let write = pair.here.write(&src, &dst, options).unwrap();
        while counter.value() == before {
            assert!(began.elapsed() < LONG, "nothing came");
        }
        until_it_ends(&write);
        began.elapsed()
    });
    assert!(took < TICK / 2, "it took {took:?} to acknowledge 8 bytes that had come");
}

/// Nobody tells the writer that there is room again.
#[test]
fn room_in_a_ring_is_soon_found() {
    let nbytes = 8 * MIB;
    let pair = Pair::isolated(nbytes);
    let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
    let waits: [fn(&Transfer); 2] = [until_it_ends, |write| write.wait(Some(LONG)).unwrap()];
    for wait in waits {
        let took = median(|| {
            std::thread::sleep(PAUSE);
            let began = Instant::now();
            wait(&pair.here.write(&src, &dst, WriteOptions::default()).unwrap());
            began.elapsed()
        });
        assert!(took < TICK / 2, "{nbytes} bytes that do not fit the ring took {took:?}");
    }
}

/// An engine that never blocks, and has no news, leaves the core to a thread that has no other.
#[test]
fn a_worker_without_news_leaves_its_core() {
    let alone = lock(&ALONE);
    pin(thread_id(), &affinity(thread_id()).unwrap()[..1]).unwrap();
    // Its worker runs where this thread does.
    let config = Config { polling: Polling::Busy, transports: vec!["shm".into()], ..Config::default() };
    let engine = Engine::new(config).unwrap();
    std::thread::sleep(PAUSE);
    let before = (cpu_time(libc::CLOCK_THREAD_CPUTIME_ID), cpu_time(libc::CLOCK_PROCESS_CPUTIME_ID));
    let (mut own, began) = (Duration::ZERO, Instant::now());
    while own < TICK && began.elapsed() < LONG {
        own = cpu_time(libc::CLOCK_THREAD_CPUTIME_ID) - before.0;
    }
    let workers = cpu_time(libc::CLOCK_PROCESS_CPUTIME_ID) - before.1 - own;
    assert!(workers < own / 4, "beside {own:?} of this thread the worker took {workers:?}");
    drop((engine, alone));
}

/// The median of some tries.
fn median(mut took: impl FnMut() -> Duration) -> Duration {
    let mut all: Vec<_> = (0..NUM_TRIES).map(|_| took()).collect();
    all.sort_unstable();
    all[NUM_TRIES / 2]
}

/// Waits for an end without looking for it.
fn until_it_ends(transfer: &Transfer) {
    let (tell, told) = std::sync::mpsc::channel();
    transfer.on_end(Box::new(move || _ = tell.send(())));
    told.recv_timeout(LONG).unwrap();
}

/// How often this thread has slept so far.
fn num_sleeps() -> i64 {
    // SAFETY: numbers, for which zero is a value, and which the call fills in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage), 0);
        usage.ru_nvcsw
    }
}

/// How long this thread, or the whole process, has computed.
fn cpu_time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the time.
    assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Two engines of this process, the first with a region of its own and one of the second's.
struct Pair {
    here: Engine,
    region: Region,
    remote: Remote,
    there: Engine,
    _theirs: Region,
    _alone: MutexGuard<'static, ()>,
}

impl Pair {
    fn new(transport: &str, nbytes: u64) -> Self {
        let alone = lock(&ALONE);
        let [here, there] = engines(transport, false);
        let theirs = there.allocate(nbytes).unwrap();
        Self::over(here, there, theirs, alone)
    }

    /// Over a ring: what is written neither maps nor reaches by itself.
    fn isolated(nbytes: u64) -> Self {
        let alone = lock(&ALONE);
        let [here, there] = engines("shm", true);
        let mut bytes = vec![0_u8; nbytes as usize];
        let address = bytes.as_mut_ptr();
        // SAFETY: the region keeps the bytes, which do not move.
        let theirs = unsafe { there.register(address, nbytes, true, Box::new(bytes)) }.unwrap();
        Self::over(here, there, theirs, alone)
    }

    fn over(here: Engine, there: Engine, theirs: Region, alone: MutexGuard<'static, ()>) -> Self {
        let region = here.allocate(theirs.nbytes()).unwrap();
        let remote = here.import(&theirs.descriptor().unwrap().encode()).unwrap();
        here.connect(remote.address(), Some(LONG)).unwrap();
        Self { here, region, remote, there, _theirs: theirs, _alone: alone }
    }

    /// Writes so many pages of 64 KiB.
    fn write_pages(&self, num_pages: u32) -> Transfer {
        let pages = || PageList::new((0..num_pages).collect(), PAGE, PAGE, 0);
        let (src, dst) = ((&self.region, pages()), (&self.remote, pages()));
        self.here.write_pages(src, dst, WriteOptions::default()).unwrap()
    }
}

fn engines(transport: &str, isolate: bool) -> [Engine; 2] {
    // A heartbeat that came would be heard at once, whoever drives.
    let (transports, heartbeat) = (vec![transport.to_owned()], 10 * LONG);
    let config = || Config { transports: transports.clone(), heartbeat, isolate, ..Config::default() };
    [Engine::new(config()).unwrap(), Engine::new(config()).unwrap()]
}

/// The tests measure what threads of this process do to each other.
static ALONE: Mutex<()> = Mutex::new(());
const MIB: u64 = 1 << 20;
const PAGE: u64 = 64 << 10;
const LARGE: u64 = 256 * MIB;
const NUM_TRIES: usize = 10;
/// Between two looks of a calm engine at the clock.
const TICK: Duration = Duration::from_millis(250);
const PAUSE: Duration = Duration::from_millis(20);
const MOMENT: Duration = Duration::from_micros(20);
const NUM_WRITES: u32 = 50;

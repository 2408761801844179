//! Where the worker runs. One test, for the workers of other engines would look the same.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/topology/machine.rs"]
#[allow(dead_code, reason = "others read machines as they are")]
mod machine;
#[path = "../../transports/tests/null_nic/mod.rs"]
#[allow(dead_code, reason = "no knob is turned here")]
mod null_nic;

use std::time::{Duration, Instant};

use anyfabric_engine::transports::sys::{affinity, pin, thread_id};
use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Config, Engine};
use machine::Machine;

const LONG: Duration = Duration::from_secs(20);

/// CPUs of the only engine's worker, by the kernel's word.
fn worker_cpus() -> Vec<u32> {
    let name = |tid: &i32| std::fs::read_to_string(format!("/proc/self/task/{tid}/comm")).unwrap_or_default();
    let workers = || -> Vec<i32> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let tids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
        tids.filter(|tid| name(tid).trim() == "anyfabric").collect()
    };
    settles("one worker runs", || workers().len() == 1);
    affinity(workers()[0]).unwrap()
}

#[test]
fn the_worker_stays_near_its_nics_within_what_the_process_was_given() {
    let near = Machine::from("cpus 0-63 node 0\nnic null0 pci0000:00/0000:01:00.0 node 0 link InfiniBand rate 400\n");
    let nowhere =
        Machine::from("cpus 0-63 node 0\nnic null0 pci0000:00/0000:01:00.0 node -1 link InfiniBand rate 400\n");
    let verbs = VerbsSettings { library: Some(null_nic::library().to_owned()), ..VerbsSettings::default() };
    let config = |machine: &Machine| Config {
        transports: vec!["verbs".into()],
        machine: machine.root.clone(),
        verbs: verbs.clone(),
        ..Config::default()
    };
    let given = affinity(thread_id()).unwrap();

    // The kernel's own work gathers on the first.
    let expected: Vec<u32> = given.iter().copied().filter(|cpu| (1..64).contains(cpu)).collect();
    let engine = Engine::new(config(&near)).unwrap();
    if expected.is_empty() {
        settles("not on any", || engine.info().worker.reason.contains("may not run on any of them"));
        assert_eq!(worker_cpus(), given);
    } else {
        settles("kept near", || engine.info().worker.cpus == expected);
        assert_eq!(worker_cpus(), expected);
    }
    drop(engine);

    let free = |config: Config, reason: &str| {
        let engine = Engine::new(config).unwrap();
        settles(reason, || engine.info().worker.reason == reason);
        assert_eq!((engine.info().worker.cpus, worker_cpus()), (Vec::new(), given.clone()));
    };
    free(Config { pin_worker: false, ..config(&near) }, "`pin_worker` is off");
    free(config(&nowhere), "no cores are nearer to the NICs than others");
    free(Config { transports: vec!["tcp".into()], ..config(&near) }, "no NIC is open");

    // NICs that are opened later, by the first peer that needs them.
    let also_tcp = Config { transports: vec!["verbs".into(), "tcp".into()], ..config(&near) };
    let engine = Engine::new(also_tcp.clone()).unwrap();
    assert_eq!(engine.info().worker.reason, "no NIC is open");
    std::thread::scope(|scope| {
        // Its worker is another thread of that name only while it lives.
        let peer = scope.spawn(|| {
            let peer = Engine::new(also_tcp.clone()).unwrap();
            peer.connect(engine.address(), Some(LONG)).unwrap();
            peer.path(engine.address()).transport
        });
        assert_eq!(peer.join().unwrap(), "verbs");
    });
    if !expected.is_empty() {
        assert_eq!((engine.info().worker.cpus, worker_cpus()), (expected.clone(), expected));
    }
    drop(engine);

    // A process that was given one CPU keeps to it.
    let last = *given.last().unwrap();
    pin(thread_id(), &[last]).unwrap();
    let engine = Engine::new(config(&near)).unwrap();
    let kept = if last == 0 { Vec::new() } else { vec![last] };
    settles("within what was given", || engine.info().worker.cpus == kept);
    assert_eq!(worker_cpus(), [last]);
}

#[track_caller]
fn settles(what: &str, is_true: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !is_true() {
        assert!(Instant::now() < until, "not within {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

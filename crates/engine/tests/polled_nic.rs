//! Engines over a NIC that has no descriptor to wait on, as EFA's: the fake libfabric.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyfabric_engine::transports::libfabric::FabricSettings;
use anyfabric_engine::{Code, Config, Engine, Polling, WriteOptions};

const LONG: Duration = Duration::from_secs(20);

fn engine(library: &Path, polling: Polling) -> Engine {
    let libfabric = FabricSettings {
        provider: Some("fake".into()),
        library: Some(library.to_str().unwrap().to_owned()),
        ..FabricSettings::default()
    };
    Engine::new(Config { transports: vec!["libfabric".into()], libfabric, polling, ..Config::default() }).unwrap()
}

/// Processor time that the worker of the only engine has used.
fn worker_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default());
    let worker = stats.filter_map(|stat| Some(stat.split_once("(anyfabric) ")?.1.to_owned())).next().unwrap();
    let ticks: u64 = worker.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

/// The part of one core that an idle engine's worker uses, of what it could get.
fn idle_use(library: &Path, polling: Polling) -> f64 {
    let _engine = engine(library, polling);
    std::thread::sleep(Duration::from_millis(100));
    let (began, used) = (Instant::now(), worker_time());
    std::thread::sleep(Duration::from_secs(2));
    (worker_time() - used).as_secs_f64() / began.elapsed().as_secs_f64()
}

// One test: what is counted is the only worker's.
#[test]
fn a_nic_without_a_descriptor_is_looked_at_and_does_not_cost_a_core() {
    let Some(library) = fake() else { return };
    // Processor time, so that a busy machine makes it less and not more.
    let adaptive = idle_use(&library, Polling::Adaptive);
    only_the_library_sees_its_setting(&library);
    assert!(adaptive < 0.2, "an idle engine uses {:.0} % of a core", 100.0 * adaptive);

    // What comes after any silence is seen, by the worker and by whoever waits.
    let (here, there) = (engine(&library, Polling::Adaptive), engine(&library, Polling::Adaptive));
    let (source, target) = (here.allocate(4096).unwrap(), there.allocate(4096).unwrap());
    let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
    let counter = there.counter(Some(7), &[]).unwrap();
    for (round, silence_ms) in [0, 0, 1, 3, 30, 300].into_iter().enumerate() {
        std::thread::sleep(Duration::from_millis(silence_ms));
        let (src, dst) = (source.slice(0..64).unwrap(), remote.slice(0..64).unwrap());
        let transfer = here.write(&src, &dst, WriteOptions::counted(7)).unwrap();
        counter.wait(round as u64 + 1, Some(LONG)).unwrap();
        transfer.wait(Some(LONG)).unwrap();
    }
    assert_eq!(here.path(there.address()).transport, "libfabric");
    messages_go_over_the_nic(&here, &there);
    what_a_nic_lost_fails_its_counters(&library, &here, &there);
}

/// A NIC's queue overruns: no counter that may lack something waits for ever, and all goes on.
fn what_a_nic_lost_fails_its_counters(library: &Path, here: &Engine, there: &Engine) {
    let set_full = |is_full: u64| {
        // SAFETY: the function has this type.
        unsafe { std::mem::transmute::<*mut libc::c_void, extern "C" fn(u64)>(symbol(library, c"fake_full"))(is_full) }
    };
    let (source, target) = (here.allocate(4096).unwrap(), there.allocate(4096).unwrap());
    let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
    let write = |imm| {
        let (src, dst) = (source.slice(0..64).unwrap(), remote.slice(0..64).unwrap());
        here.write(&src, &dst, WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(imm) }).unwrap()
    };
    // The fake keeps the order, so that the first has come when the second is counted.
    [20, 19].into_iter().for_each(|imm| write(imm).wait(None).unwrap());
    there.counter(Some(19), &[]).unwrap().wait(1, Some(LONG)).unwrap();
    let counters = [there.counter(Some(21), &[]).unwrap(), there.counter(Some(22), &[here.address().clone()]).unwrap()];
    set_full(1);
    let transfers: Vec<_> = (0..8).map(|_| write(21)).collect();
    let errors = counters.map(|counter| counter.wait(9, Some(LONG)).unwrap_err());
    assert!(errors.iter().all(|error| error.code == Code::TransferFailed), "{errors:?}");
    // Of the first its writers may have told before. With the second nobody wrote anything.
    assert!(errors[1].to_string().contains("overran"), "{}", errors[1]);
    set_full(0);
    // What had come for nobody may lack something too.
    let error = there.counter(Some(20), &[]).unwrap().wait(2, Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::TransferFailed, "{error}");
    transfers.iter().for_each(|transfer| drop(transfer.wait_quiesced(Some(LONG))));
    // The last overrun may not have been seen yet.
    let until = Instant::now() + LONG;
    let goes_on = |imm| {
        let counter = there.counter(Some(imm), &[here.address().clone()]).unwrap();
        write(imm).wait(None).is_ok() && counter.wait(1, Some(LONG)).is_ok()
    };
    assert!((30..).take_while(|_| Instant::now() < until).any(goes_on), "no write after it");
}

/// libfabric was told to leave GPUs alone; what this process starts was not.
fn only_the_library_sees_its_setting(library: &Path) {
    // SAFETY: the function has this type, and returns a string of its own.
    let seen = unsafe {
        let hmem = symbol(library, c"fake_hmem");
        CStr::from_ptr(std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> *const libc::c_char>(hmem)())
    };
    assert_eq!(seen, c"system");
    assert_eq!(std::env::var_os("FI_HMEM"), None);
    let child = Command::new("sh").args(["-c", "echo ${FI_HMEM-none}"]).output().unwrap();
    assert_eq!(child.stdout, b"none\n");
}

/// Of the library that the engines have opened.
fn symbol(library: &Path, name: &CStr) -> *mut libc::c_void {
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: our own library, which is open, and strings that live through the calls.
    let found = unsafe { libc::dlsym(libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD), name.as_ptr()) };
    assert!(!found.is_null(), "the fake has no {name:?}");
    found
}

fn messages_go_over_the_nic(here: &Engine, there: &Engine) {
    let sent = || -> u64 {
        let stats = here.stats();
        let nics = &stats.peers[&there.address().to_string()].nics;
        nics.iter().filter(|(name, _)| name.starts_with("rail")).map(|(_, rail)| rail.bytes).sum()
    };
    let send = |nbytes: usize, fill: u8| here.send(there.address(), vec![fill; nbytes], None).unwrap();
    // 4096 bytes less what a rail puts before a message.
    for (nbytes, over_the_nic) in [(0, true), (1, true), (4072, true), (4073, false), (1 << 16, false)] {
        let before = sent();
        send(nbytes, 7).wait(Some(LONG)).unwrap();
        assert_eq!(there.receive(Some(LONG)).unwrap().data, vec![7; nbytes]);
        assert_eq!(sent() - before, if over_the_nic { nbytes as u64 } else { 0 }, "{nbytes} bytes");
    }
    // Many more than a NIC has buffers: each is there once, and its sender knows.
    let transfers: Vec<_> = (0..500).map(|idx| send(100, idx as u8)).collect();
    transfers.iter().for_each(|transfer| transfer.wait(Some(LONG)).unwrap());
    let mut found: Vec<u8> = (0..500).map(|_| there.receive(Some(LONG)).unwrap().data[99]).collect();
    found.sort_unstable();
    let mut expected: Vec<u8> = (0..500).map(|idx| idx as u8).collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
    assert!(there.try_receive().unwrap().is_none(), "one too many");
    // Unread ones are bounded, and who sends one more is told.
    for _ in 0..4096 / 256 {
        let transfers: Vec<_> = (0..256).map(|_| send(1, 1)).collect();
        transfers.iter().for_each(|transfer| transfer.wait(Some(LONG)).unwrap());
    }
    let error = send(1, 2).wait(Some(LONG)).unwrap_err();
    assert!(error.to_string().contains("keeps no more"), "{error}");
    assert_eq!(there.receive(Some(LONG)).unwrap().data, [1]);
    send(1, 3).wait(Some(LONG)).unwrap();
}

/// Compiles the fake libfabric; `None`, with the reason printed, without a compiler.
fn fake() -> Option<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transports/tests/libfabric");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("polled-libfabric-{}.so", std::process::id()));
    let map = format!("-Wl,--version-script={}", sources.join("fake.map").display());
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-shared", "-fPIC", "-pthread", &map, "-o"]).args([&library, &sources.join("fake.c")]);
    let Ok(built) = compile.status() else {
        println!("skipped: no C compiler for the fake libfabric");
        return None;
    };
    assert!(built.success());
    Some(library)
}

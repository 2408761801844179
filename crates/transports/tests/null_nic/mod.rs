//! Builds and drives the null NIC: a libibverbs without hardware behind it, `ibverbs.c`.

use std::ffi::{c_int, c_long, c_void, CString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What can be asked of it, in the order of its table.
#[allow(dead_code, reason = "each user asks for some")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Knob {
    /// Completions are held back.
    Holds,
    /// So many requests succeed, then one fails; -1: none.
    FailsAfter,
    /// With this status.
    Status,
    /// Posts are refused: 1 is the next request, 2 the one after it.
    Refuses,
    /// Every port is down.
    PortIsDown,
    /// No queue pair can be made.
    NoQueuePairs,
    /// No memory can be registered.
    NoMemory,
    /// Calls of post_send so far.
    NumPosts,
    /// Requests posted so far.
    NumRequests,
    /// The device is gone: nothing completes, no queue pair can be stopped.
    IsGone,
    /// What a broken queue pair has is forgotten.
    FlushesNothing,
    /// Where in its table each port has its GID.
    GidIndex,
    /// With which index the last queue pair was connected.
    SgidIndex,
    /// How long a registration takes.
    PinningMs,
    /// Registrations so far.
    NumMemories,
    /// Registrations wait, a second at most, until so many are being made.
    PinsAtOnce,
    /// Registrations that are being made.
    #[allow(dead_code, reason = "keeps its place")]
    NumPinning,
    /// The most at a time.
    MostPinning,
    /// 1: immediates reach the other end; 2: bytes too, of NICs opened since.
    Delivers,
    /// With this error no dmabuf is registered.
    NoDmabuf,
    /// With this error nothing is registered by its address.
    NoAddress,
    /// Of the last dmabuf: the registered range of it, the address that peers use, rights, and its first eight bytes.
    DmabufOffset,
    DmabufLength,
    DmabufIova,
    DmabufAccess,
    DmabufWord,
    /// Registrations that live.
    LiveMemories,
    /// When something was posted first after this was set to 0.
    PostedNs,
    /// A bit for each device whose ports are down.
    PortsDown,
    /// A bit for each device whose ports have a quarter of the speed.
    Narrow,
    /// A bit for each device that cannot be opened.
    Shut,
    /// A bit for each device on which no completion queue can be made.
    NoQueues,
    /// Registrations so far that peers may write.
    NumWritable,
    /// The number of the port that has none, of every device.
    PortWithoutGid,
    /// What was taken is placed before the rest is refused.
    IsPrompt,
    /// Completions that a queue can hold, if not 32768.
    MaxCqe,
    /// Receives are refused: 1 is the next, 2 the one after it.
    RefusesReceives,
    /// Looks for announcements so far.
    NumHeard,
    /// Announcements that were read and not acknowledged.
    NumUnheeded,
    /// A bit for each device whose queue of completions breaks at its next poll; another one does not.
    BreaksQueues,
    /// Of the last queue pair, as it was told.
    PkeyIndex,
    TrafficClass,
    ServiceLevel,
    RnrTimer,
    Timeout,
    RetryCount,
    RnrRetry,
    Dlid,
    IsGlobal,
    /// Every port is InfiniBand's.
    IsInfiniband,
    /// Of every port.
    Lid,
    /// Rights of the last memory that was registered by its address.
    Access,
    /// With this error nothing is registered with relaxed ordering.
    NoRelaxed,
    /// With this error no registration is ended.
    KeepsMemory,
    /// With this error no queue pair is destroyed.
    KeepsQueuePairs,
}

/// Path of the library, built at the first call.
pub(crate) fn library() -> &'static str {
    static BUILT: OnceLock<String> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transports/tests/null_nic");
        let to: PathBuf = std::env::temp_dir().join(format!("anyfabric-null-nic-{}.so", std::process::id()));
        let map = format!("-Wl,--version-script={}", source.join("symbols.map").display());
        let status = Command::new("cc")
            .args(["-O2", "-shared", "-fPIC", "-Wall", "-Wextra", &map, "-o"])
            .args([&to, &source.join("ibverbs.c")])
            .status();
        assert!(status.expect("a C compiler").success(), "the null NIC does not compile");
        let name = to.to_str().expect("a path in UTF-8").to_owned();
        load(&name);
        // Loaded it is found by its name, and stays until the process ends.
        let _ = std::fs::remove_file(&to);
        name
    })
}

/// Reads a knob, and turns it to `value` if there is one.
pub(crate) fn knob(knob: Knob, value: Option<i64>) -> i64 {
    static FUNCTION: OnceLock<usize> = OnceLock::new();
    let function = FUNCTION.get_or_init(|| symbol("null_nic_knob"));
    // SAFETY: the library's function has this type, and the library is never unloaded.
    let function: extern "C" fn(c_int, c_long) -> c_long = unsafe { std::mem::transmute(*function) };
    function(knob as c_int, value.unwrap_or(-2))
}

/// An immediate comes for a queue pair, by its number; the receives that are left, or -1 without any, or without the
/// queue pair.
#[allow(dead_code, reason = "as above")]
pub(crate) fn arrive(queue_pair: u32, imm: u32) -> i64 {
    // SAFETY: the library's function has this type, and the queue pair lives.
    unsafe {
        let arrive: extern "C" fn(*mut c_void, u32) -> c_long = std::mem::transmute(symbol("null_nic_arrive"));
        arrive(find(queue_pair), imm)
    }
}

/// A message comes for a queue pair, and its receive ends with that status; the receives that are left, as above.
#[allow(dead_code, reason = "as above")]
pub(crate) fn message(queue_pair: u32, status: u32, bytes: &[u8]) -> i64 {
    type Message = extern "C" fn(*mut c_void, u32, *const u8, u32) -> c_long;
    // SAFETY: as above; the bytes live through the call.
    let message: Message = unsafe { std::mem::transmute(symbol("null_nic_message")) };
    message(find(queue_pair), status, bytes.as_ptr(), bytes.len() as u32)
}

/// The NIC reports a completion of a queue pair that is what it likes.
#[allow(dead_code, reason = "as above")]
pub(crate) fn say(queue_pair: u32, wr_id: u64, status: u32, nonsense: u32) {
    // SAFETY: as above.
    let say: extern "C" fn(*mut c_void, u64, u32, u32) = unsafe { std::mem::transmute(symbol("null_nic_say")) };
    say(find(queue_pair), wr_id, status, nonsense);
}

fn find(queue_pair: u32) -> *mut c_void {
    // SAFETY: the library's function has this type.
    let find: extern "C" fn(u32) -> *mut c_void = unsafe { std::mem::transmute(symbol("null_nic_qp")) };
    find(queue_pair)
}

/// A device announces something, by the library's code: of the queue pair of that number or of what it uses, or with 0 of
/// itself.
#[allow(dead_code, reason = "as above")]
pub(crate) fn announce(device: usize, queue_pair: u32, code: u32) {
    // SAFETY: the library's function has this type.
    let announce: extern "C" fn(c_int, u32, u32) = unsafe { std::mem::transmute(symbol("null_nic_announce")) };
    announce(device as c_int, queue_pair, code);
}

/// A device is gone, wherever it is open.
#[allow(dead_code, reason = "as above")]
pub(crate) fn remove(device: usize) {
    // SAFETY: the library's function has this type.
    let remove: extern "C" fn(c_int) = unsafe { std::mem::transmute(symbol("null_nic_remove")) };
    remove(device as c_int);
}

/// Bytes that each device has sent and received, where bytes are moved.
#[allow(dead_code, reason = "as above")]
pub(crate) fn carried() -> [[i64; 8]; 2] {
    // SAFETY: the library's function has this type.
    let carried: extern "C" fn(c_int, c_int) -> c_long = unsafe { std::mem::transmute(symbol("null_nic_carried")) };
    [0, 1].map(|way| std::array::from_fn(|device| carried(device as c_int, way)))
}

/// What it takes for a request by itself, in nanoseconds: posted to so many queue pairs in turn, of that depth.
#[allow(dead_code, reason = "as above")]
pub(crate) fn baseline(num_qps: usize, depth: usize, count: usize) -> f64 {
    // SAFETY: the library's function has this type; it uses queue pairs of its own.
    let baseline: extern "C" fn(c_int, c_int, c_long) -> f64 =
        unsafe { std::mem::transmute(symbol("null_nic_baseline")) };
    baseline(num_qps as c_int, depth as c_int, count as c_long)
}

/// Waits for what comes by itself.
#[allow(dead_code, reason = "as above")]
pub(crate) fn eventually(what: &str, is_true: impl Fn() -> bool) {
    const LONG: Duration = Duration::from_secs(20);
    let until = Instant::now() + LONG;
    while !is_true() {
        assert!(Instant::now() < until, "not within {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn symbol(name: &str) -> usize {
    let handle = load(library());
    let name = CString::new(name).expect("a name");
    // SAFETY: an open library and a string that lives through the call.
    let found = unsafe { libc::dlsym(handle as *mut c_void, name.as_ptr()) };
    assert!(!found.is_null(), "the null NIC has no {name:?}");
    found as usize
}

fn load(path: &str) -> usize {
    let path = CString::new(path).expect("a path");
    // SAFETY: our own library; the string lives through the call.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null(), "the null NIC was just built");
    handle as usize
}

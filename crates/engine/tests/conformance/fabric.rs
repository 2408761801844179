//! The fabrics that every case runs on. A new transport is one constant here and one line in `on_every_fabric`.

use std::sync::mpsc;
use std::time::Duration;

use anyfabric_engine::transports::libfabric::sys::version;
use anyfabric_engine::transports::libfabric::Library;
use anyfabric_engine::{Config, Engine, Region};
use anyfabric_transports::loopback::Random;

use crate::alias::Alias;
use crate::ask::{Memory, Settings};

/// A way between two processes, and what is special about it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fabric {
    pub(crate) name: &'static str,
    pub(crate) transport: &'static str,
    /// Streams of the test's own engine, and of its peers.
    pub(crate) streams: (usize, usize),
    /// Who owns the memory of regions.
    pub(crate) memory: Memory,
    pub(crate) isolate: bool,
}

pub(crate) const SHM: Fabric =
    Fabric { name: "shm", transport: "shm", streams: (1, 1), memory: Memory::Allocated, isolate: false };
pub(crate) const SHM_FOREIGN: Fabric = Fabric { name: "shm_foreign", memory: Memory::Foreign, ..SHM };
pub(crate) const SHM_ISOLATED: Fabric = Fabric { name: "shm_isolated", isolate: true, ..SHM_FOREIGN };
pub(crate) const TCP_1: Fabric = Fabric { name: "tcp_1", transport: "tcp", ..SHM_FOREIGN };
pub(crate) const TCP_2: Fabric = Fabric { name: "tcp_2", streams: (2, 2), ..TCP_1 };
pub(crate) const TCP_4: Fabric = Fabric { name: "tcp_4", streams: (4, 4), memory: Memory::Allocated, ..TCP_1 };
/// Peers with different numbers of streams: who calls decides.
pub(crate) const TCP_1_4: Fabric = Fabric { name: "tcp_1_4", streams: (1, 4), ..TCP_1 };
pub(crate) const TCP_4_1: Fabric = Fabric { name: "tcp_4_1", streams: (4, 1), ..TCP_1 };

/// One NIC on each side; for `streams` read NICs.
pub(crate) const VERBS_1: Fabric = Fabric { name: "verbs_1", transport: "verbs", ..SHM_FOREIGN };
pub(crate) const VERBS_2: Fabric = Fabric { name: "verbs_2", streams: (2, 2), memory: Memory::Allocated, ..VERBS_1 };
/// Peers with different numbers of NICs.
pub(crate) const VERBS_1_2: Fabric = Fabric { name: "verbs_1_2", streams: (1, 2), ..VERBS_1 };
pub(crate) const VERBS_2_1: Fabric = Fabric { name: "verbs_2_1", streams: (2, 1), ..VERBS_1 };
pub(crate) const VERBS_1_3: Fabric = Fabric { name: "verbs_1_3", streams: (1, 3), ..VERBS_1 };
pub(crate) const VERBS_3_2: Fabric = Fabric { name: "verbs_3_2", streams: (3, 2), ..VERBS_1 };
pub(crate) const VERBS_3_4: Fabric = Fabric { name: "verbs_3_4", streams: (3, 4), ..VERBS_1 };
pub(crate) const VERBS_4_2: Fabric = Fabric { name: "verbs_4_2", streams: (4, 2), ..VERBS_2 };

/// libfabric's `tcp` provider; a NIC is a loopback address.
pub(crate) const LIBFABRIC_1: Fabric = Fabric { name: "libfabric_1", transport: "libfabric", ..SHM_FOREIGN };
pub(crate) const LIBFABRIC_2: Fabric =
    Fabric { name: "libfabric_2", streams: (2, 2), memory: Memory::Allocated, ..LIBFABRIC_1 };
pub(crate) const LIBFABRIC_1_4: Fabric = Fabric { name: "libfabric_1_4", streams: (1, 4), ..LIBFABRIC_1 };
pub(crate) const LIBFABRIC_3_2: Fabric = Fabric { name: "libfabric_3_2", streams: (3, 2), ..LIBFABRIC_1 };
/// More than serve one operation, at one side or both.
pub(crate) const LIBFABRIC_8: Fabric = Fabric { name: "libfabric_8", streams: (8, 8), ..LIBFABRIC_2 };
pub(crate) const LIBFABRIC_8_3: Fabric = Fabric { name: "libfabric_8_3", streams: (8, 3), ..LIBFABRIC_1 };
pub(crate) const VERBS_8: Fabric = Fabric { name: "verbs_8", streams: (8, 8), ..VERBS_2 };
pub(crate) const VERBS_8_3: Fabric = Fabric { name: "verbs_8_3", streams: (8, 3), ..VERBS_1 };

impl Fabric {
    /// Settings for the test's own side.
    pub(crate) fn here(&self) -> Settings {
        self.settings(self.streams.0)
    }

    /// Settings for its peers.
    pub(crate) fn there(&self) -> Settings {
        let mut nics = self.nics();
        // The other end of the cable comes first.
        nics.reverse();
        nics.truncate(self.streams.1);
        Settings { nics, ..self.settings(self.streams.1) }
    }

    /// Settings with that many streams or NICs.
    pub(crate) fn settings(&self, streams: usize) -> Settings {
        let mut nics = self.nics();
        nics.truncate(streams);
        Settings {
            transports: vec![self.transport.into()],
            // Of tcp, which has no more.
            streams: streams.min(4),
            nics,
            provider: self.provider(),
            isolate: self.isolate,
            secret: None,
            listen: "127.0.0.1:0".into(),
            heartbeat: Duration::from_secs(1),
            heartbeats_lost: 5,
            timeout: Config::default().timeout,
            queue_depth: Config::default().queue_depth,
            raise_when_full: false,
        }
    }

    /// The NICs of both ends, each once: of a cable, or one NIC that talks to itself.
    fn nics(&self) -> Vec<String> {
        match self.transport {
            "verbs" => {}
            "libfabric" => return (1..=8).map(|host| format!("127.0.0.{host}")).collect(),
            _ => return Vec::new(),
        }
        let named = std::env::var("ANYFABRIC_TEST_NICS").unwrap_or_else(|_| "rxe1,rxe2".into());
        let mut nics: Vec<String> = named.split(',').map(str::to_owned).collect();
        nics.dedup();
        nics
    }

    /// Of libfabric: sockets without a layer between, which 1.17 has under another name.
    fn provider(&self) -> Option<String> {
        let library = Library::get(None).ok().filter(|_| self.transport == "libfabric")?;
        Some(if library.version() < version(1, 18) { "net" } else { "tcp" }.into())
    }

    /// Why it is not there on this machine.
    fn obstacle(&self) -> Option<String> {
        match self.transport {
            "verbs" => {}
            "libfabric" => return Library::get(None).err().map(|error| error.to_string()),
            _ => return None,
        }
        let wanted = self.streams.0.max(self.streams.1);
        let too_few =
            || (self.nics().len() < wanted).then(|| format!("{wanted} NICs are needed, ANYFABRIC_TEST_NICS=a,b"));
        anyfabric_engine::transports::verbs::no_device().or_else(too_few)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.transport == "tcp"
    }

    /// Whether the writer's own hands place the bytes: fencing then waits for its word or exit.
    pub(crate) fn writer_places(&self) -> bool {
        self.transport == "shm" && !self.isolate
    }

    /// Memory as this fabric has it.
    pub(crate) fn region(&self, engine: &Engine, nbytes: u64) -> Region {
        new_region(engine, nbytes, self.memory)
    }
}

/// A region of zeroes.
pub(crate) fn new_region(engine: &Engine, nbytes: u64, memory: Memory) -> Region {
    if memory == Memory::Allocated {
        return engine.allocate(nbytes).expect("memory");
    }
    if memory == Memory::Alias {
        let owner = Alias::new(nbytes);
        // SAFETY: the mapping is the region's owner.
        return unsafe { engine.register(owner.as_ptr(), nbytes, true, Box::new(owner)) }.expect("a region");
    }
    let mut owner = vec![0_u8; nbytes as usize].into_boxed_slice();
    let address = owner.as_mut_ptr();
    // SAFETY: the box is the region's owner and is not touched but through the region.
    unsafe { engine.register(address, nbytes, memory != Memory::ReadOnly, Box::new(owner)) }.expect("a region")
}

/// Runs a case, with a deadline: a hang is a failure and not a wait for the CI's patience.
pub(crate) fn run(name: &str, fabric: Fabric, case: fn(&Fabric)) {
    if let Some(why) = fabric.obstacle() {
        println!("skipped: {why}");
        return;
    }
    let (send, receive) = mpsc::channel();
    let body = std::thread::Builder::new().name(format!("{name} on {}", fabric.name));
    let thread = body
        .spawn(move || {
            case(&fabric);
            let _ = send.send(());
        })
        .expect("a thread");
    match receive.recv_timeout(DEADLINE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name} on {}: not over after {DEADLINE:?}", fabric.name),
        _ => {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// The run's seed: printed, and replayed with `ANYFABRIC_SEED`.
pub(crate) fn random() -> Random {
    let seed = std::env::var("ANYFABRIC_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64)
    });
    println!("ANYFABRIC_SEED={seed}");
    Random::new(seed)
}

/// Makes a module per case with a test per fabric.
macro_rules! on_every_fabric {
    ($($case:ident),* $(,)?) => {
        $crate::fabric::on_fabrics! {
            [$($case),*]
            [
                shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED, tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4,
                verbs_1 VERBS_1, verbs_2 VERBS_2, libfabric_1 LIBFABRIC_1, libfabric_2 LIBFABRIC_2
            ]
        }
    };
}

/// Makes a module per case with a test on each fabric listed.
macro_rules! on_fabrics {
    ([$($case:ident),*] $fabrics:tt) => { $( $crate::fabric::on_fabrics! { @case $case $fabrics } )* };
    (@case $case:ident [$($test:ident $fabric:ident),*]) => {
        mod $case {
            $(
                #[test]
                fn $test() {
                    $crate::fabric::run(stringify!($case), $crate::fabric::$fabric, super::$case);
                }
            )*
        }
    };
}

pub(crate) use {on_every_fabric, on_fabrics};

const DEADLINE: Duration = Duration::from_secs(180);

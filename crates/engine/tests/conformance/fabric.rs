//! The fabrics that every case runs on. A new transport is one constant here and one line in `on_every_fabric`.

use std::sync::mpsc;
use std::time::Duration;

use anyfabric_engine::{Config, Engine, Region};

use crate::alias::Alias;
use crate::ask::{Memory, Settings};
use crate::pattern::Random;

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

impl Fabric {
    /// Settings for one side.
    pub(crate) fn settings(&self, streams: usize) -> Settings {
        Settings {
            transports: vec![self.transport.into()],
            streams,
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

    pub(crate) fn is_tcp(&self) -> bool {
        self.transport == "tcp"
    }

    /// Whether the writer's own hands place the bytes: fencing then waits for its word or exit.
    pub(crate) fn writer_places(&self) -> bool {
        !self.is_tcp() && !self.isolate
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
    Random(seed)
}

/// Makes a module per case with a test per fabric.
macro_rules! on_every_fabric {
    ($($case:ident),* $(,)?) => {
        $crate::fabric::on_fabrics! {
            [$($case),*]
            [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED, tcp_1 TCP_1, tcp_2 TCP_2, tcp_4 TCP_4]
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

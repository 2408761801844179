//! Libraries, NICs, and what was reported by them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_plan::Extent;
use anyfabric_transports::libfabric::{FabricMemory, FabricNic, FabricSettings, Library, Provider, Wanted};
use anyfabric_transports::rdma::{Batch, Completions, Domain, Fault, Marks, Nic, RailIdx};

#[path = "../common/seen.rs"]
mod seen;
pub(crate) use seen::Seen;

/// Libraries that tests may use, by the name of their test.
pub(crate) fn library(name: &str) -> Option<&'static Library> {
    let path = match name {
        "system" => ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"]
            .map(|folder| Path::new(folder).join("libfabric.so.1"))
            .into_iter()
            .find(|path| path.exists()),
        _ => {
            let given = std::env::var_os("ANYFABRIC_TEST_MPICH").map(PathBuf::from);
            let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib/mpich/libfabric.so.1");
            given.or(Some(venv)).filter(|path| path.exists())
        }
    };
    let Some(path) = path else {
        println!("skipped: no libfabric of the {}", if name == "system" { "system" } else { "wheel mpich" });
        return None;
    };
    Some(Library::load(&path).unwrap())
}

/// A NIC over the `tcp` provider, on a loopback address.
pub(crate) fn tcp_nic(library: &'static Library, address: &str) -> FabricNic {
    let settings = FabricSettings { answer_timeout: Duration::from_secs(2), ..FabricSettings::default() };
    nic_of(library, "tcp", Some(address), &settings)
}

pub(crate) fn nic_of(
    library: &'static Library,
    provider: &str,
    nic: Option<&str>,
    settings: &FabricSettings,
) -> FabricNic {
    let wanted = Wanted { provider: Some(provider.into()), nic: nic.map(Into::into) };
    let provider = Provider::all(library, &wanted).unwrap().remove(0);
    FabricNic::open(Arc::new(provider), settings).unwrap()
}

/// Counts batches that ended well, and what arrived; anything else is a failure of the test.
#[derive(Default)]
pub(crate) struct Ended(pub(crate) u32, pub(crate) u32);

impl Completions for Ended {
    fn completed(&mut self, _: u32, _: u32, result: Result<(), Fault>) {
        result.unwrap();
        self.0 += 1;
    }
    fn arrived(&mut self, _: u32, _: u32) {
        self.1 += 1;
    }
    fn message(&mut self, _: u32, _: &[u8]) {
        self.1 += 1;
    }
    fn broken(&mut self, _: u32, why: Fault) {
        panic!("{why}");
    }
}

/// Memory that a NIC knows.
pub(crate) struct Region {
    pub(crate) memory: FabricMemory,
    pub(crate) bytes: Box<[u8]>,
}

impl Region {
    pub(crate) fn new(nic: &FabricNic, nbytes: usize, byte: u8) -> Self {
        let mut bytes = vec![byte; nbytes].into_boxed_slice();
        // SAFETY: the registration is dropped before the bytes, which move with their box.
        let memory = unsafe { nic.domain().register(bytes.as_mut_ptr(), nbytes as u64, true) }.unwrap();
        Self { memory, bytes }
    }

    /// A byte, although the NIC may have written it behind the compiler's back.
    pub(crate) fn at(&self, idx: usize) -> u8 {
        // SAFETY: inside the box.
        unsafe { self.bytes.as_ptr().add(idx).read_volatile() }
    }
}

/// Two ends in one process, of one rail.
pub(crate) struct Pair {
    pub(crate) here: FabricNic,
    pub(crate) there: FabricNic,
    pub(crate) rail: RailIdx,
    pub(crate) back: RailIdx,
    pub(crate) seen: Seen,
    pub(crate) seen_there: Seen,
}

impl Pair {
    pub(crate) fn new(here: FabricNic, there: FabricNic) -> Self {
        let (seen, seen_there) = (Seen::default(), Seen::default());
        let mut pair = Self { here, there, rail: 0, back: 0, seen, seen_there };
        pair.connect();
        pair
    }

    /// Another rail, which the tests use from now on.
    pub(crate) fn connect(&mut self) {
        self.rail = self.here.open().unwrap();
        self.back = self.there.open().unwrap();
        let (ours, theirs) = (self.here.address(self.rail), self.there.address(self.back));
        self.here.connect(self.rail, &theirs).unwrap();
        self.there.connect(self.back, &ours).unwrap();
    }

    pub(crate) fn poll(&mut self) {
        self.here.poll(&mut self.seen);
        self.there.poll(&mut self.seen_there);
    }

    /// Polls both ends until something is true.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, is_true: impl Fn(&Self) -> bool) {
        let end = Instant::now() + LONG;
        while !is_true(self) {
            self.poll();
            assert!(Instant::now() < end, "not within {LONG:?}: {what}; {:?} {:?}", self.seen, self.seen_there);
        }
    }

    /// Posts a batch, all of it, polling as long as there is no room.
    #[track_caller]
    pub(crate) fn write(&mut self, (from, to): (&Region, &Region), writes: &[Extent], marks: Marks, token: u32) {
        let target = anyfabric_transports::libfabric::FabricDomain::remote(&to.memory);
        let (mut posted, end) = (0, Instant::now() + LONG);
        while posted < writes.len() {
            let batch = Batch { source: &from.memory, target, writes: &writes[posted..], marks, token };
            posted += self.here.post(self.rail, &batch).unwrap();
            self.poll();
            assert!(Instant::now() < end, "posted {posted} of {}", writes.len());
        }
    }
}

/// Longer than anything takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Makes a test of a case for each library.
macro_rules! on_every_library {
    ($($case:ident),* $(,)?) => { $(
        mod $case {
            #[test]
            fn system() {
                $crate::support::library("system").into_iter().for_each(super::$case);
            }
            #[test]
            fn wheel() {
                $crate::support::library("wheel").into_iter().for_each(super::$case);
            }
        }
    )* };
}

pub(crate) use on_every_library;

//! Libraries without hardware, as benchmarks and tests of the engine use them.

use std::cell::RefCell;

use anyfabric_engine::transports::libfabric::FabricSettings;
use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Config, Engine};

use crate::fake::Copy;
use crate::null_nic::{self, knob, library, Knob};

/// A library, and what it has seen.
pub(crate) trait Fabric {
    /// Name of the transport.
    fn name(&self) -> &'static str;

    fn config(&self) -> Config;

    /// Requests posted so far.
    fn num_requests(&self) -> u64;

    /// Forgets when something was posted.
    fn forget_post(&self);

    /// When something was posted first since then.
    fn posted_ns(&self) -> u64;

    /// What the library takes for a request that it is called for from C, in turn for so many peers; of libfabric with
    /// the completion.
    fn library_ns(&self, num_peers: usize) -> f64;

    fn engine(&self) -> Engine {
        Engine::new(self.config()).unwrap()
    }
}

/// A libibverbs.
pub(crate) struct Verbs {
    /// Of each engine.
    num_nics: usize,
}

impl Verbs {
    pub(crate) fn new() -> Self {
        Self::with(1)
    }

    pub(crate) fn with(num_nics: usize) -> Self {
        library();
        Self { num_nics }
    }
}

impl Fabric for Verbs {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn config(&self) -> Config {
        Config {
            transports: vec!["verbs".into()],
            nics: (0..self.num_nics).map(|nic| format!("null{nic}")).collect(),
            verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
            ..Config::default()
        }
    }

    fn num_requests(&self) -> u64 {
        knob(Knob::NumRequests, None) as u64
    }

    fn forget_post(&self) {
        knob(Knob::PostedNs, Some(0));
    }

    fn posted_ns(&self) -> u64 {
        knob(Knob::PostedNs, None) as u64
    }

    fn library_ns(&self, num_peers: usize) -> f64 {
        null_nic::baseline(num_peers, VERBS_DEPTH, 1 << 18)
    }
}

/// A libfabric.
pub(crate) struct Libfabric {
    copy: RefCell<Copy>,
}

impl Libfabric {
    /// `None` without a C compiler.
    pub(crate) fn new() -> Option<Self> {
        Self::with(1)
    }

    /// As [`Libfabric::new`]; one that moves the bytes, and counts arrive.
    pub(crate) fn delivering() -> Option<Self> {
        Self::with(0)
    }

    fn with(null: u64) -> Option<Self> {
        let copy = Copy::new(|fake| (fake.null, fake.has_fd, fake.has_trywait) = (null, 1, 1))?;
        Some(Self { copy: RefCell::new(copy) })
    }
}

impl Fabric for Libfabric {
    fn name(&self) -> &'static str {
        "libfabric"
    }

    fn config(&self) -> Config {
        let library = Some(self.copy.borrow().path().to_str().unwrap().to_owned());
        Config {
            transports: vec!["libfabric".into()],
            libfabric: FabricSettings { library, provider: Some("fake".into()), ..FabricSettings::default() },
            ..Config::default()
        }
    }

    fn num_requests(&self) -> u64 {
        self.copy.borrow_mut().get().writes
    }

    fn forget_post(&self) {
        self.copy.borrow_mut().get().posted_ns = 0;
    }

    fn posted_ns(&self) -> u64 {
        self.copy.borrow_mut().get().posted_ns
    }

    fn library_ns(&self, _: usize) -> f64 {
        const COUNT: u64 = 1 << 18;
        let began = std::time::Instant::now();
        self.copy.borrow().baseline(COUNT);
        began.elapsed().as_nanos() as f64 / COUNT as f64
    }
}

/// Work requests under way on a rail of verbs.
const VERBS_DEPTH: usize = 128;

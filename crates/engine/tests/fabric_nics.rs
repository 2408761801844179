//! Engines of two NICs over a libfabric without hardware: one of them goes down, and comes back.

// What the tests of the NICs share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

#[path = "../../transports/tests/libfabric/fake.rs"]
mod fake;
mod filled;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/libfabric/support.rs"]
mod support;

use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyfabric_engine::transports::libfabric::FabricSettings;
use anyfabric_engine::{Code, Config, Counter, Engine, Region, Remote, Transfer, WriteOptions};
use fake::{Copy, Fake};
use filled::fill;
use null_nic::eventually;

/// What is on it fails, and nothing else; the other one goes on, and it is used again when it is back.
#[test]
fn one_of_two_goes_down_and_comes_back() {
    let machine = Machine::new();
    let Some(copy) = Copy::new(|fake| {
        (fake.nics, fake.has_fd, fake.has_trywait) = (2, 1, 1);
        fake.place(&machine.0);
    }) else {
        return;
    };
    let pair = Pair::new(&copy);
    for (round, down) in [1, 0].into_iter().enumerate() {
        let (other, imm) = (1 - down, round as u32);
        let counter = pair.there.counter(Some(imm), &[]).unwrap();
        (0..10).for_each(|_| pair.write(NBYTES, imm));
        assert_eq!(pair.parts_of(|| (0..10).for_each(|_| pair.write(64, imm))), [5, 5]);
        pair.counts(&counter, 20);

        // Its link carries nothing any more, and then the system says so.
        copy.field(offset_of!(Fake, down)).store(1 << down, Ordering::SeqCst);
        let transfers: Vec<_> = (0..20).map(|_| pair.start(64, None)).collect();
        eventually("the other NIC's are done", || transfers.iter().filter(|transfer| transfer.is_done()).count() == 10);
        assert!(transfers.iter().all(|transfer| transfer.error().is_none()));
        machine.set(down, "down\n");
        let failed: Vec<_> = transfers.iter().filter_map(|transfer| transfer.wait(None).err()).collect();
        assert_eq!(failed.len(), 10, "those of one rail in two: {failed:?}");
        assert!(failed.iter().all(|error| error.code == Code::ConnectionBroken), "{failed:?}");
        assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
        let path = pair.here.path(pair.there.address());
        assert_eq!((path.state.as_str(), path.nics[0].starts_with("1 of 2 rails")), ("degraded", true), "{path:?}");

        let mut parts = [0; 2];
        parts[other] = 20;
        assert_eq!(pair.parts_of(|| (0..20).for_each(|_| pair.write(64, imm))), parts);
        (0..5).for_each(|_| pair.write(NBYTES, imm));
        pair.counts(&counter, 45);

        copy.field(offset_of!(Fake, down)).store(0, Ordering::SeqCst);
        machine.set(down, "up\n");
        eventually("the path is ready", || pair.here.path(pair.there.address()).state == "ready");
        assert_eq!(pair.parts_of(|| (0..10).for_each(|_| pair.write(64, imm))), [5, 5]);
        assert_eq!(pair.parts_of(|| (0..5).for_each(|_| pair.write(NBYTES, imm))), [5, 5]);
        pair.counts(&counter, 60);
    }
}

/// What the system says of the NICs, in a folder of our own.
struct Machine(PathBuf);

impl Machine {
    fn new() -> Self {
        let folder = format!("fabric-nics-{}", std::process::id());
        let this = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder));
        (0..2).for_each(|nic| this.set(nic, "up\n"));
        this
    }

    fn set(&self, nic: usize, state: &str) {
        let folder = self.0.join(format!("fake{nic}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("operstate"), state).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Pair {
    here: Engine,
    there: Engine,
    source: Region,
    target: Region,
    remote: Remote,
}

impl Pair {
    fn new(copy: &Copy) -> Self {
        let library = Some(copy.path().to_str().unwrap().to_owned());
        // Long enough that nothing is given up for its silence.
        let libfabric = FabricSettings {
            provider: Some("fake".into()),
            library,
            answer_timeout: 2 * LONG,
            ..FabricSettings::default()
        };
        let nics = vec!["fake0".into(), "fake1".into()];
        let config = Config { transports: vec!["libfabric".into()], nics, libfabric, ..Config::default() };
        let (here, there) = (Engine::new(config.clone()).unwrap(), Engine::new(config).unwrap());
        let (source, target) = (here.allocate(NBYTES).unwrap(), there.allocate(NBYTES).unwrap());
        fill(&source);
        let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
        here.connect(there.address(), Some(LONG)).unwrap();
        let path = here.path(there.address());
        assert!(path.transport == "libfabric" && path.nics[0].starts_with("2 of 2 rails"), "{path:?}");
        Self { here, there, source, target, remote }
    }

    fn start(&self, nbytes: u64, imm: Option<u32>) -> Transfer {
        let (src, dst) = (self.source.slice(0..nbytes).unwrap(), self.remote.slice(0..nbytes).unwrap());
        let options = WriteOptions { imm, timeout: Some(LONG), ..WriteOptions::default() };
        self.here.write(&src, &dst, options).unwrap()
    }

    /// Ends well, and its bytes are there, which are then forgotten.
    fn write(&self, nbytes: u64, imm: u32) {
        self.start(nbytes, Some(imm)).wait(None).unwrap();
        // SAFETY: inside the regions, and nothing is under way.
        let at = |region: &Region| unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), nbytes as usize) };
        assert!(*at(&self.target) == *at(&self.source), "{nbytes} bytes");
        at(&self.target).fill(0);
    }

    fn counts(&self, counter: &Counter, count: u64) {
        counter.wait(count, Some(LONG)).unwrap();
        assert_eq!(counter.value(), count);
    }

    /// Parts that each rail carries meanwhile.
    fn parts_of(&self, meanwhile: impl FnOnce()) -> [u64; 2] {
        let parts = || {
            let stats = self.here.stats();
            let rails = &stats.peers[&self.there.address().to_string()].nics;
            ["rail0", "rail1"].map(|rail| rails[rail].parts)
        };
        let before = parts();
        meanwhile();
        let now = parts();
        [0, 1].map(|rail| now[rail] - before[rail])
    }
}

const NBYTES: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(20);

//! Regions of GPU memory, over a libcuda without a GPU and a libibverbs without a NIC. The knobs are the process's, so
//! this is one test that goes through its chapters. The CPU cannot touch the memory: where it does, the test dies.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../cuda/tests/fake/mod.rs"]
mod fake;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;

use std::sync::Arc;
use std::time::Duration;

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Code, Config, Engine, Error, Region, Remote, ScatterTarget, WriteOptions};
use anyfabric_wire::{Descriptor, Device};
use fake::{Age, FakeCuda, Kind};
use null_nic::{knob, library, Knob};

const LONG: Duration = Duration::from_secs(20);
const NBYTES: u64 = 10_000;

fn engine(transports: &[&str], cuda: &FakeCuda) -> Engine {
    let is_rdma = transports.contains(&"verbs");
    Engine::new(Config {
        transports: transports.iter().map(|name| (*name).to_owned()).collect(),
        nics: if is_rdma { vec!["null0".into()] } else { Vec::new() },
        verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
        cuda_library: Some(cuda.path().to_owned()),
        ..Config::default()
    })
    .unwrap()
}

/// Memory of the second GPU, and what tells when nobody holds it any more.
fn on_gpu(engine: &Engine, cuda: &FakeCuda, writable: bool) -> (Region, Arc<()>) {
    cuda.align(512);
    let (address, owner) = (cuda.alloc(NBYTES, Kind::Device, 1), Arc::new(()));
    // SAFETY: the fake's memory is there for ever.
    let region = unsafe { engine.register_gpu(address, NBYTES, writable, Box::new(Arc::clone(&owner))) }.unwrap();
    (region, owner)
}

fn remote(engine: &Engine, region: &Region) -> Remote {
    engine.import(&region.descriptor().unwrap().encode()).unwrap()
}

fn write(from: &Engine, src: &Region, dst: &Remote, options: WriteOptions) -> Result<(), Error> {
    let nbytes = src.nbytes().min(dst.nbytes());
    let options = WriteOptions { timeout: Some(LONG), ..options };
    from.write(&src.slice(0..nbytes).unwrap(), &dst.slice(0..nbytes).unwrap(), options).unwrap().wait(None)
}

#[test]
fn gpu_memory() {
    what_is_registered_is_known_and_kept();
    what_cannot_be_registered_says_why();
    the_cpu_moves_none_of_it();
    a_peer_that_lies_about_it_is_refused();
    nics_move_it();
    writes_are_flushed_where_the_gpu_does_not_order_them();
    memory_that_no_nic_can_be_given();
}

fn what_is_registered_is_known_and_kept() {
    let cuda = FakeCuda::new(Age::Recent);
    let engine = engine(&["tcp"], &cuda);
    assert!(engine.info().gpus.is_empty(), "the driver is not touched before it is needed");
    let (region, owner) = on_gpu(&engine, &cuda, true);
    assert_eq!((region.device().as_str(), region.nbytes()), ("cuda:1", NBYTES));
    let Device::Cuda(uuid) = region.descriptor().unwrap().device else { panic!("a GPU's") };
    assert_eq!(uuid[..2], [1, 17]);
    let info = engine.info();
    assert_eq!(info.regions[0].device, "cuda:1");
    let gpu = &info.gpus[1];
    assert_eq!((gpu.device.as_str(), gpu.name.as_str(), gpu.pci.as_str()), ("cuda:1", "Fake H100 1", "0000:5b:00.0"));
    assert!(gpu.rdma && gpu.dmabuf && gpu.writes == "ordered" && gpu.uuid.starts_with("GPU-0111"));
    assert_eq!(Arc::strong_count(&owner), 2);
    region.close(LONG);
    drop(region);
    assert_eq!(Arc::strong_count(&owner), 1, "what was registered is let go of");
}

fn what_cannot_be_registered_says_why() {
    let fails = |cuda: &FakeCuda, address: u64, code: Code, words: &str| {
        let engine = engine(&["tcp"], cuda);
        // SAFETY: nothing is registered.
        let error = unsafe { engine.register_gpu(address, 64, true, Box::new(())) }.unwrap_err();
        assert!(error.code == code && error.message.contains(words), "{:?}: {error}", error.code);
    };
    let cuda = FakeCuda::new(Age::Recent);
    fails(&cuda, cuda.alloc(64, Kind::Managed, 0), Code::InvalidArgument, "managed memory");
    fails(&cuda, 64, Code::InvalidArgument, "no memory of a GPU");
    let address = cuda.alloc(64, Kind::Device, 0);
    cuda.get().pointer_code = 719;
    fails(&cuda, address, Code::DeviceLost, "unspecified launch failure");
    fails(&FakeCuda::new(Age::Ancient), 64, Code::Unsupported, "older than 470");
    let config = Config { cuda_library: Some("/nowhere/libcuda.so".into()), ..Config::default() };
    // SAFETY: nothing is registered.
    let error = unsafe { Engine::new(config).unwrap().register_gpu(64, 64, true, Box::new(())) }.unwrap_err();
    assert!(error.code == Code::Unsupported && error.message.contains("install the NVIDIA driver"), "{error}");
}

/// Neither as source nor as destination, whatever the operation; and the receiver's counter is told.
fn the_cpu_moves_none_of_it() {
    let cuda = FakeCuda::new(Age::Recent);
    for transport in ["shm", "tcp"] {
        let transports: &[&str] = if transport == "shm" { &["shm", "tcp"] } else { &["tcp"] };
        let (here, there) = (engine(transports, &cuda), engine(transports, &cuda));
        let (ours, _) = on_gpu(&here, &cuda, true);
        let (theirs, _) = on_gpu(&there, &cuda, true);
        let (host, host_there) = (here.allocate(NBYTES).unwrap(), there.allocate(NBYTES).unwrap());
        let fails = |result: Result<(), Error>, words: &[&str]| {
            let error = result.unwrap_err();
            assert_eq!(error.code, Code::Unsupported, "{error}");
            words.iter().for_each(|word| assert!(error.message.contains(word), "{word:?}: {error}"));
        };
        let moves = format!("{transport} moves host memory only");
        let source = [moves.as_str(), "the source lies on cuda:1", "verbs"];
        let target = [moves.as_str(), "the destination lies on a GPU", "libfabric"];
        // Twice: the second time the way is known.
        for _ in 0..2 {
            let (on_gpu, on_host) = (remote(&here, &theirs), remote(&here, &host_there));
            fails(write(&here, &ours, &on_host, WriteOptions::counted(7)), &source);
            fails(write(&here, &host, &on_gpu, WriteOptions::counted(8)), &target);
            fails(write(&here, &ours, &on_gpu, WriteOptions::default()), &source);
            let verified = WriteOptions { verify: true, ..WriteOptions::default() };
            fails(write(&here, &host, &on_gpu, verified), &["tcp moves host memory only"]);
            let targets = [&on_host, &on_gpu].map(|remote| ScatterTarget {
                remote: remote.clone(),
                src_offset: 0,
                dst_offset: 64,
                nbytes: 64,
            });
            let scattered = here.scatter(&host, &targets, None, WriteOptions::default()).unwrap();
            fails(scattered.wait(Some(LONG)), &target);
            write(&here, &host, &on_host, WriteOptions::default()).unwrap();
        }
        for imm in [7, 8] {
            let counter = there.counter(Some(imm), &[]).unwrap();
            assert_eq!(counter.wait(1, Some(LONG)).unwrap_err().code, Code::TransferFailed, "imm {imm}");
        }
    }
}

/// A descriptor that calls it host memory, as a careless or older peer might.
fn a_peer_that_lies_about_it_is_refused() {
    let cuda = FakeCuda::new(Age::Recent);
    for transports in [&["shm", "tcp"][..], &["tcp"]] {
        let (here, there) = (engine(transports, &cuda), engine(transports, &cuda));
        let (theirs, _) = on_gpu(&there, &cuda, true);
        let host = here.allocate(NBYTES).unwrap();
        let lie: Remote = Descriptor { device: Device::Host, ..theirs.descriptor().unwrap() }.into();
        for verify in [false, true] {
            let error = write(&here, &host, &lie, WriteOptions { verify, ..WriteOptions::default() }).unwrap_err();
            assert!(error.code == Code::Refused && error.message.contains("lies on a GPU"), "{error}");
        }
    }
}

fn nics_move_it() {
    let cuda = FakeCuda::new(Age::Recent);
    let (here, there) = (engine(&["verbs"], &cuda), engine(&["verbs"], &cuda));
    knob(Knob::Delivers, Some(1));
    let (ours, owner) = on_gpu(&here, &cuda, false);
    let (theirs, _) = on_gpu(&there, &cuda, true);
    let (host, host_there) = (here.allocate(64).unwrap(), there.allocate(64).unwrap());
    let counter = there.counter(Some(3), &[]).unwrap();
    let (on_gpu, on_host) = (remote(&here, &theirs), remote(&here, &host_there));
    for (done, (src, dst)) in [(&ours, &on_gpu), (&ours, &on_host), (&host, &on_gpu)].into_iter().enumerate() {
        write(&here, src, dst, WriteOptions::counted(3)).unwrap();
        counter.wait(done as u64 + 1, Some(LONG)).unwrap();
    }
    assert_eq!((cuda.get().exports, cuda.get().flushes), (2, 0), "a GPU that orders writes needs no flush");
    // The CPU would have to read it for the checksum.
    let verified = WriteOptions { verify: true, ..WriteOptions::default() };
    let error = write(&here, &ours, &on_host, verified).unwrap_err();
    assert!(
        error.code == Code::Unsupported && error.message.contains("without verify=True it goes over verbs"),
        "{error}"
    );
    // Released with the last registration, and not before.
    let registered = knob(Knob::LiveMemories, None);
    ours.close(LONG);
    drop(ours);
    assert_eq!(Arc::strong_count(&owner), 1);
    assert_eq!(knob(Knob::LiveMemories, None), registered - 1);
    knob(Knob::Delivers, Some(0));
}

fn writes_are_flushed_where_the_gpu_does_not_order_them() {
    let cuda = FakeCuda::new(Age::Recent);
    cuda.get().ordering = 0;
    let (here, there) = (engine(&["verbs"], &cuda), engine(&["verbs"], &cuda));
    knob(Knob::Delivers, Some(1));
    let (host, host_there) = (here.allocate(64).unwrap(), there.allocate(64).unwrap());
    let (theirs, _) = on_gpu(&there, &cuda, true);
    let counter = there.counter(Some(3), &[]).unwrap();
    write(&here, &host, &remote(&here, &host_there), WriteOptions::counted(3)).unwrap();
    counter.wait(1, Some(LONG)).unwrap();
    assert_eq!(cuda.get().flushes, 0, "no peer can write into the GPU yet");
    let on_gpu = remote(&here, &theirs);
    for done in 1..=20 {
        write(&here, &host, &on_gpu, WriteOptions::counted(3)).unwrap();
        counter.wait(done + 1, Some(LONG)).unwrap();
        assert!(cuda.get().flushes >= done as i64, "counted before it was visible");
    }
    assert_eq!(cuda.get().unbalanced, 0);
    assert!(there.info().gpus.iter().all(|gpu| gpu.writes == "flushed"));
    // A GPU that is gone: what came is not counted, and whoever waits is told.
    cuda.get().flush_code = 719;
    write(&here, &host, &on_gpu, WriteOptions::counted(3)).unwrap();
    let error = counter.wait(22, Some(LONG)).unwrap_err();
    assert!(error.code == Code::DeviceLost && error.message.contains("cannot make its bytes visible"), "{error}");
    assert_eq!(counter.value(), 21);
    assert!(there.take_log().iter().any(|(_, line)| line.contains("unspecified launch failure")));
    knob(Knob::Delivers, Some(0));
}

fn memory_that_no_nic_can_be_given() {
    // Its driver can neither export it, nor is there a module for its address.
    let cuda = FakeCuda::new(Age::Before11_7);
    let (here, there) = (engine(&["verbs"], &cuda), engine(&["verbs"], &cuda));
    let (ours, _) = on_gpu(&here, &cuda, false);
    let host_there = there.allocate(64).unwrap();
    let on_host = remote(&here, &host_there);
    write(&here, &here.allocate(64).unwrap(), &on_host, WriteOptions::default()).unwrap();
    knob(Knob::NoAddress, Some(libc::EFAULT.into()));
    let error = write(&here, &ours, &on_host, WriteOptions::default()).unwrap_err();
    assert!(error.code == Code::Unsupported && error.message.contains("modprobe nvidia-peermem"), "{error}");
    knob(Knob::NoAddress, Some(0));
    // Nothing would make what peers write visible: they are refused, and the owner's log says why.
    let cuda = FakeCuda::new(Age::Recent);
    (cuda.get().ordering, cuda.get().flush_options) = (0, 0);
    let (here, there) = (engine(&["verbs"], &cuda), engine(&["verbs"], &cuda));
    let (theirs, _) = on_gpu(&there, &cuda, true);
    let error =
        write(&here, &here.allocate(64).unwrap(), &remote(&here, &theirs), WriteOptions::default()).unwrap_err();
    assert!(error.code == Code::Refused && error.message.contains("cannot register the region"), "{error}");
}

//! The driver's bindings over a libcuda without a GPU: what is asked of it, and what becomes of each of its refusals.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

mod fake;

use std::io::Read;
use std::os::unix::fs::FileExt;

use anyfabric_cuda::{peer_memory_module, CudaError, Driver, GpuMemory, Visibility};
use fake::{Age, FakeCuda, Kind};

const LAUNCH_FAILED: i64 = 719;

fn open(change: impl FnOnce(&mut fake::Fake)) -> (FakeCuda, &'static Driver) {
    let fake = FakeCuda::new(Age::Recent);
    change(fake.get());
    let driver = Driver::get(Some(fake.path())).unwrap();
    (fake, driver)
}

#[test]
fn gpus_are_told_by_name_place_and_ability() {
    let (_fake, driver) = open(|_| {});
    let [first, second] = driver.gpus() else { panic!("{:?}", driver.gpus()) };
    assert_eq!((first.label().as_str(), first.name.as_str()), ("cuda:0", "Fake H100 0"));
    assert_eq!((second.pci.as_str(), driver.version().as_str()), ("0000:5b:00.0", "12.4"));
    assert_eq!(second.uuid_text(), "GPU-01112131-4151-6171-8191-a1b1c1d1e1f1");
    assert!(first.can_do_rdma && first.exports_dmabuf);
    assert!(std::ptr::eq(Driver::get(Some(driver_path(driver))).unwrap(), driver), "it is opened once");
}

fn driver_path(driver: &Driver) -> &str {
    let text: &'static str = Box::leak(format!("{driver:?}").into_boxed_str());
    text.split('"').nth(1).unwrap()
}

#[test]
fn what_makes_writes_visible_is_the_drivers_word() {
    for (ordering, options, expected) in [
        (200, 0, Visibility::Ordered),
        (100, 1, Visibility::Ordered),
        (0, 1, Visibility::Flushed),
        (0, 3, Visibility::Flushed),
        (0, 2, Visibility::Never),
        (0, 0, Visibility::Never),
    ] {
        let (fake, driver) = open(|fake| (fake.ordering, fake.flush_options) = (ordering, options));
        let gpu = &driver.gpus()[1];
        assert_eq!(gpu.visibility, expected, "{ordering} {options}");
        let flushed = gpu.flush();
        assert_eq!(flushed.is_ok(), expected != Visibility::Never);
        let seen = fake.get();
        assert_eq!((seen.flushes, seen.unbalanced), (i64::from(expected == Visibility::Flushed), 0));
        assert_eq!(seen.retained, seen.flushes, "no context is made where none is needed");
    }
    // The context is retained once; a flush that fails says so, and leaves the thread's contexts as they were.
    let (fake, driver) = open(|fake| fake.ordering = 0);
    let gpu = &driver.gpus()[0];
    (0..3).for_each(|_| gpu.flush().unwrap());
    fake.get().flush_code = LAUNCH_FAILED;
    assert!(matches!(gpu.flush(), Err(CudaError::Lost(why)) if why.contains("unspecified launch failure")));
    assert_eq!((fake.get().flushes, fake.get().retained, fake.get().unbalanced), (3, 1, 0));
}

#[test]
fn a_range_is_exported_in_whole_pages() {
    let (fake, driver) = open(|_| {});
    for (offset, nbytes) in [(0, 4096_u64), (0, 10_000), (512, 64), (4095, 2), (777, 70_000)] {
        fake.align(offset);
        let address = fake.alloc(nbytes, Kind::Device, 1);
        assert_eq!(address % 4096, offset);
        let bytes: Vec<u8> = (0..nbytes).map(|idx| (idx * 7 + offset) as u8).collect();
        fake.write(address, &bytes);
        let memory = GpuMemory::find(driver, address, nbytes).unwrap();
        assert_eq!((memory.gpu().ordinal, memory.address(), memory.nbytes()), (1, address, nbytes));
        let exported = memory.dmabuf().unwrap();
        assert_eq!(exported.offset, offset);
        let file = std::fs::File::from(exported.fd);
        let mut seen = vec![0; bytes.len()];
        file.read_exact_at(&mut seen, exported.offset).unwrap();
        assert_eq!(seen, bytes);
        assert_eq!(file.metadata().unwrap().len(), (offset + nbytes).div_ceil(4096) * 4096);
    }
    assert_eq!((fake.get().exports, fake.get().synced), (5, 5));
}

#[test]
fn a_range_over_several_allocations_must_be_whole_and_of_one_gpu() {
    let (fake, driver) = open(|_| {});
    let first = fake.alloc(8192, Kind::Device, 0);
    let second = fake.alloc(8192, Kind::Device, 0);
    let other = fake.alloc(8192, Kind::Device, 1);
    assert_eq!((second, other), (first + 8192, second + 8192));
    assert!(GpuMemory::find(driver, first + 100, 16_000).unwrap().dmabuf().is_ok());
    let refused = |nbytes: u64, words: &str| {
        let error = GpuMemory::find(driver, first, nbytes).unwrap_err();
        assert!(matches!(&error, CudaError::Memory(why) if why.contains(words)), "{error}");
    };
    refused(16_385, "more than one GPU");
    refused(0, "no bytes");
    refused(u64::MAX, "more than there are addresses");
    fake.free(second);
    refused(16_384, "there is no memory of a GPU");

    // What is mapped of a reservation, in two parts; the rest is not there yet.
    fake.align(0);
    let first = fake.alloc(8192, Kind::Reserved, 0);
    fake.alloc(8192, Kind::Reserved, 0);
    assert!(GpuMemory::find(driver, first, 16_384).unwrap().dmabuf().is_ok());
    let error = GpuMemory::find(driver, first, 16_385).unwrap_err();
    assert!(error.to_string().contains("no memory of a GPU"), "{error}");
}

#[test]
fn other_memory_is_refused_by_what_it_is() {
    let (fake, driver) = open(|_| {});
    let refused = |address: u64, words: &str| {
        let error = GpuMemory::find(driver, address, 64).unwrap_err();
        assert!(matches!(&error, CudaError::Memory(why) if why.contains(words)), "{error}");
        assert!(error.to_string().contains(&format!("{address:#x}")), "{error}");
    };
    refused(fake.alloc(64, Kind::Managed, 0), "managed memory");
    refused(fake.alloc(64, Kind::Host, 0), "no memory of a GPU");
    refused(fake.alloc(64, Kind::Device, 7), "the driver knows no GPU 7");
    refused([0_u8; 64].as_ptr() as u64, "no memory of a GPU");
    refused(8, "no memory of a GPU");
}

#[test]
fn a_driver_that_exports_nothing_says_what_is_missing() {
    // Of a pool: a dmabuf is the only way to it.
    let (fake, driver) = open(|_| {});
    assert!(GpuMemory::find(driver, fake.alloc(64, Kind::Incapable, 0), 64).unwrap().dmabuf().is_ok());
    let (fake, driver) = open(|fake| fake.exports_dmabuf = 0);
    let error = GpuMemory::find(driver, fake.alloc(64, Kind::Incapable, 0), 64).unwrap_err();
    assert!(matches!(&error, CudaError::Memory(why) if why.contains("gpuDirectRDMACapable")), "{error}");
    let memory = GpuMemory::find(driver, fake.alloc(64, Kind::Device, 0), 64).unwrap();
    assert!(matches!(memory.dmabuf(), Err(CudaError::Unsupported(why)) if why.contains("open kernel modules")));

    let fake = FakeCuda::new(Age::Before11_7);
    fake.get().ordering = 0;
    let driver = Driver::get(Some(fake.path())).unwrap();
    let memory = GpuMemory::find(driver, fake.alloc(64, Kind::Device, 0), 64).unwrap();
    assert!(matches!(memory.dmabuf(), Err(CudaError::Unsupported(why)) if why.contains("older than CUDA 11.7")));
    assert!(!memory.gpu().exports_dmabuf);
    assert_eq!(memory.gpu().visibility, Visibility::Never, "it has no function to flush with");
}

#[test]
fn a_driver_that_cannot_be_used_says_why() {
    let missing = |path: &str, words: &str| match Driver::get(Some(path)) {
        Err(CudaError::Missing(why)) => assert!(why.contains(words), "{why}"),
        other => panic!("{other:?}"),
    };
    missing("/nowhere/libcuda.so", "install the NVIDIA driver");
    missing("no\0path", "cannot be a path");
    missing(FakeCuda::new(Age::Ancient).path(), "has no cuDeviceGetUuid_v2");
    let fake = FakeCuda::new(Age::Recent);
    fake.get().init_code = 100;
    missing(fake.path(), "cuInit: as the test wants it");
    // What is mended is not remembered as broken.
    fake.get().init_code = 0;
    assert_eq!(Driver::get(Some(fake.path())).unwrap().gpus().len(), 2);
}

#[test]
fn a_lost_gpu_and_a_forked_child_are_told_apart_from_bad_memory() {
    let (fake, driver) = open(|_| {});
    let address = fake.alloc(64, Kind::Device, 0);
    let memory = GpuMemory::find(driver, address, 64).unwrap();
    fake.get().pointer_code = LAUNCH_FAILED;
    assert!(matches!(GpuMemory::find(driver, address, 64), Err(CudaError::Lost(why)) if why.contains("LAUNCH_FAILED")));
    fake.get().pointer_code = 3;
    assert!(matches!(GpuMemory::find(driver, address, 64), Err(CudaError::Unsupported(why)) if why.contains("fork")));
    fake.get().export_code = 1;
    assert!(matches!(memory.dmabuf(), Err(CudaError::Call(why)) if why.starts_with("cuMemGetHandleForAddressRange")));
}

#[test]
fn the_modules_of_peer_memory_are_found_by_name() {
    let root = std::env::temp_dir().join(format!("anyfabric-modules-{}", std::process::id()));
    assert_eq!(peer_memory_module(&root), None);
    std::fs::create_dir_all(root.join("sys/module/nvidia_peermem")).unwrap();
    assert_eq!(peer_memory_module(&root), Some("nvidia_peermem"));
    std::fs::remove_dir_all(&root).unwrap();
}

/// The premise of the tests that use the fake: its memory cannot be touched.
#[test]
fn the_memory_of_the_fake_cannot_be_read() {
    let (fake, _) = open(|_| {});
    let address = fake.alloc(4096, Kind::Device, 0);
    let (mut reader, writer) = std::io::pipe().unwrap();
    use std::os::fd::AsRawFd;
    // SAFETY: the kernel checks the address, and that is what is asked.
    let written = unsafe { libc::write(writer.as_raw_fd(), address as *const libc::c_void, 1) };
    assert_eq!((written, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

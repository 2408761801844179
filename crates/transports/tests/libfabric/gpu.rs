//! GPU memory over the fake provider and a libcuda without a GPU: which way it is registered, and what is said where
//! none is open.

use anyfabric_cuda::{Driver, GpuMemory};
use anyfabric_transports::libfabric::{FabricDomain, FabricMemory};
use anyfabric_transports::rdma::{Domain, Nic, NicError};

use crate::cuda::{Age, FakeCuda, Kind};
use crate::fake::{Copy, Fake};
use crate::support::Pair;

const OFFSET: u64 = 768;
const WORD: u64 = 0x0807_0605_0403_0201;

fn with(change: impl FnOnce(&mut Fake), test: impl FnOnce(&FakeCuda, Copy, Pair, GpuMemory)) {
    let cuda = FakeCuda::new(Age::Recent);
    let driver = Driver::get(Some(cuda.path())).unwrap();
    cuda.align(OFFSET);
    let address = cuda.alloc(10_000, Kind::Device, 1);
    cuda.write(address, &WORD.to_le_bytes());
    let memory = GpuMemory::find(driver, address, 10_000).unwrap();
    let Some(mut copy) = Copy::new(change) else { return };
    let pair = copy.pair();
    test(&cuda, copy, pair, memory);
}

fn register(pair: &Pair, memory: &GpuMemory) -> Result<FabricMemory, NicError> {
    // SAFETY: the fake's memory is there for ever.
    unsafe { pair.here.domain().register_gpu(memory, true) }
}

#[test]
fn it_is_registered_as_a_dmabuf_of_its_gpu() {
    let change = |fake: &mut Fake| (fake.has_hmem, fake.mr_mode) = (1, 1 << 4);
    with(change, |cuda, mut copy, pair, memory| {
        assert!(pair.here.about().reaches_gpus);
        let registered = register(&pair, &memory).unwrap();
        let seen = copy.get();
        assert_eq!((seen.dmabufs, seen.gpu_memories, seen.device), (1, 0, 1));
        assert_eq!((seen.dmabuf_offset, seen.dmabuf_word), (OFFSET, WORD));
        assert_eq!(FabricDomain::remote(&registered).base, memory.address());
        assert_eq!(cuda.get().exports, 1);
    });
}

/// Providers that bind memory to an endpoint register it again for the next.
#[test]
fn it_is_exported_again_for_another_endpoint() {
    let change = |fake: &mut Fake| (fake.has_hmem, fake.mr_mode) = (1, 1 << 9);
    with(change, |cuda, mut copy, mut pair, memory| {
        let _registered = register(&pair, &memory).unwrap();
        let rail = pair.rail;
        pair.here.close(rail);
        pair.here.open().unwrap();
        assert_eq!((cuda.get().exports, copy.get().dmabufs), (2, 2));
    });
}

#[test]
fn by_address_where_the_library_or_the_driver_is_too_old_for_dmabuf() {
    for version in [1 << 16 | 18, 1 << 16 | 22] {
        let change = |fake: &mut Fake| (fake.has_hmem, fake.version) = (1, version);
        with(change, |cuda, mut copy, pair, memory| {
            cuda.get().export_code = 801;
            register(&pair, &memory).unwrap();
            assert_eq!((copy.get().dmabufs, copy.get().gpu_memories), (0, 1));
        });
    }
}

#[test]
fn neither_way_says_what_is_missing_for_each() {
    let change = |fake: &mut Fake| {
        (fake.has_hmem, fake.no_dmabuf, fake.no_address) = (1, libc::ENOSYS as u64, libc::EFAULT as u64);
    };
    with(change, |_, _, pair, memory| {
        let Err(NicError::Unsupported(why)) = register(&pair, &memory) else { panic!("registered") };
        for word in ["by dmabuf: fi_mr_regattr: Function not implemented", "by address: ", "modprobe nvidia-peermem"] {
            assert!(why.contains(word), "{word:?}: {why}");
        }
    });
    with(
        |fake| (fake.has_hmem, fake.version, fake.no_address) = (1, 1 << 16 | 19, libc::EFAULT as u64),
        |_, _, pair, memory| {
            let why = register(&pair, &memory).unwrap_err().to_string();
            assert!(why.contains("is libfabric 1.19, and it came with 1.20"), "{why}");
        },
    );
}

/// Its own CPU would copy the bytes.
#[test]
fn a_provider_for_host_memory_is_never_given_a_gpus() {
    with(
        |_| {},
        |cuda, mut copy, pair, memory| {
            assert!(!pair.here.about().reaches_gpus);
            let Err(NicError::Unsupported(why)) = register(&pair, &memory) else { panic!("registered") };
            assert!(why.contains("provider fake of libfabric 1.22") && why.contains("host memory only"), "{why}");
            assert_eq!((copy.get().dmabufs, copy.get().gpu_memories, cuda.get().exports), (0, 0, 0));
        },
    );
}

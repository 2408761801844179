//! GPU memory given to the verbs NIC, over a libcuda without a GPU and a libibverbs without a NIC. The NIC's knobs are
//! the process's, so this is one test that goes through its chapters. The CPU cannot touch the memory: where it does,
//! the test dies.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../cuda/tests/fake/mod.rs"]
mod fake;
mod null_nic;

use anyfabric_cuda::{Driver, GpuMemory};
use anyfabric_plan::Extent;
use anyfabric_transports::rdma::{Batch, Domain, Marks, Nic, NicChoice, NicError, RemoteMemory};
use anyfabric_transports::verbs::{open, VerbsDomain, VerbsNic, VerbsSettings};
use fake::{Age, FakeCuda, Kind};
use null_nic::{knob, library, Knob};

const WRITABLE: i64 = 1 | 2;
const RELAXED: i64 = 1 << 20;

struct Bed {
    cuda: FakeCuda,
    driver: &'static Driver,
    nic: VerbsNic,
}

fn bed(age: Age, relaxed_ordering: bool) -> Bed {
    let cuda = FakeCuda::new(age);
    let driver = Driver::get(Some(cuda.path())).unwrap();
    let settings = VerbsSettings { library: Some(library().to_owned()), relaxed_ordering, ..VerbsSettings::default() };
    let nic = open(NicChoice::Named(&["null0".to_owned()]), &settings).unwrap().remove(0);
    Bed { cuda, driver, nic }
}

impl Bed {
    fn memory(&self, offset: u64, nbytes: u64) -> GpuMemory {
        self.cuda.align(offset);
        let address = self.cuda.alloc(nbytes, Kind::Device, 0);
        GpuMemory::find(self.driver, address, nbytes).unwrap()
    }

    fn register(&self, memory: &GpuMemory, writable: bool) -> Result<<VerbsDomain as Domain>::Memory, NicError> {
        // SAFETY: the fake's memory is there for ever.
        unsafe { self.nic.domain().register_gpu(memory, writable) }
    }
}

#[test]
fn gpu_memory_and_the_verbs_nic() {
    the_kernel_is_handed_the_right_part_of_a_dmabuf();
    by_address_where_there_is_no_dmabuf();
    neither_way_says_what_is_missing_for_each();
    small_writes_from_a_gpu_are_not_read_by_the_cpu();
    a_lost_gpu_is_no_reason_to_try_another_way();
}

fn the_kernel_is_handed_the_right_part_of_a_dmabuf() {
    for relaxed in [false, true] {
        let bed = bed(Age::Recent, relaxed);
        for (offset, nbytes, writable) in [(0, 8192, true), (768, 100_000, true), (4000, 200, false), (1, 1, true)] {
            let memory = bed.memory(offset, nbytes);
            let word = [1, 2, 3, 4, 5, 6, 7, 8];
            let shown = &word[..word.len().min(nbytes as usize)];
            bed.cuda.write(memory.address(), shown);
            let before = knob(Knob::LiveMemories, None);
            let registered = bed.register(&memory, writable).unwrap();
            assert_eq!(knob(Knob::DmabufOffset, None) as u64, offset);
            assert_eq!(knob(Knob::DmabufLength, None) as u64, nbytes);
            assert_eq!(knob(Knob::DmabufIova, None) as u64, memory.address());
            assert_eq!(&knob(Knob::DmabufWord, None).to_le_bytes()[..shown.len()], shown);
            let access = if writable { WRITABLE } else { 0 } | if relaxed { RELAXED } else { 0 };
            assert_eq!(knob(Knob::DmabufAccess, None), access);
            assert_eq!(VerbsDomain::remote(&registered).base, memory.address(), "peers use the GPU's addresses");
            drop(registered);
            assert_eq!(knob(Knob::LiveMemories, None), before);
        }
        assert_eq!(bed.cuda.get().exports, 4);
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let dmabufs = open.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    assert_eq!(dmabufs.filter(|to| to.to_string_lossy().contains("fake-dmabuf")).count(), 0, "descriptors stay open");
}

/// Of the driver, of the kernel, and of a library that is too old.
fn by_address_where_there_is_no_dmabuf() {
    let bed = bed(Age::Before11_7, true);
    let memory = bed.memory(512, 4096);
    let registered = bed.register(&memory, true).unwrap();
    assert_eq!(VerbsDomain::remote(&registered).base, memory.address());
    let bed = self::bed(Age::Recent, true);
    bed.cuda.get().export_code = 801;
    bed.register(&bed.memory(0, 4096), true).unwrap();
    bed.cuda.get().export_code = 0;
    knob(Knob::NoDmabuf, Some(libc::EOPNOTSUPP.into()));
    bed.register(&bed.memory(0, 4096), true).unwrap();
    knob(Knob::NoDmabuf, Some(0));
}

fn neither_way_says_what_is_missing_for_each() {
    let fails = |bed: &Bed, words: &[&str]| {
        knob(Knob::NoAddress, Some(libc::EFAULT.into()));
        let Err(NicError::Unsupported(why)) = bed.register(&bed.memory(0, 4096), true) else { panic!("registered") };
        assert!(!why.contains("  "), "{why}");
        let mend = ["null0", "4096 bytes of cuda:0", "Bad address", "modprobe nvidia-peermem", "Linux 5.12"];
        words.iter().chain(&mend).for_each(|word| assert!(why.contains(word), "{word:?}: {why}"));
        knob(Knob::NoAddress, Some(0));
    };
    fails(&bed(Age::Before11_7, true), &["older than CUDA 11.7"]);
    let bed = bed(Age::Recent, true);
    bed.cuda.get().export_code = 801;
    fails(&bed, &["cuMemGetHandleForAddressRange", "801"]);
    bed.cuda.get().export_code = 0;
    knob(Knob::NoDmabuf, Some(libc::EOPNOTSUPP.into()));
    fails(&bed, &["the kernel or the NIC's driver refuses it: Operation not supported"]);
    knob(Knob::NoDmabuf, Some(0));
}

/// A write of a few bytes travels in the work request, which the CPU fills; not from a GPU.
fn small_writes_from_a_gpu_are_not_read_by_the_cpu() {
    let mut bed = bed(Age::Recent, true);
    let memory = bed.register(&bed.memory(0, 4096), false).unwrap();
    let rail = bed.nic.open().unwrap();
    let address = bed.nic.address(rail);
    bed.nic.connect(rail, &address).unwrap();
    let before = knob(Knob::NumRequests, None);
    for nbytes in [1, 8, 64, 4096] {
        let writes = [Extent { src: 0, dst: 0, nbytes }];
        let target = RemoteMemory { base: 0, key: 1 };
        let batch = Batch { source: &memory, target, writes: &writes, marks: Marks::Each(1), token: 0 };
        assert_eq!(bed.nic.post(rail, &batch), Ok(1));
        bed.nic.flush(rail).unwrap();
    }
    assert_eq!(knob(Knob::NumRequests, None) - before, 4);
}

fn a_lost_gpu_is_no_reason_to_try_another_way() {
    let bed = bed(Age::Recent, true);
    let memory = bed.memory(0, 4096);
    bed.cuda.get().export_code = 719;
    assert!(matches!(bed.register(&memory, true), Err(NicError::DeviceLost(why)) if why.contains("LAUNCH_FAILED")));
}

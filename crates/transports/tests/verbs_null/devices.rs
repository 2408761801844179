//! Devices: which are opened, what is wrong with them, and what peers get at.

use crate::locked::lock_at_most;
use crate::*;

pub(crate) fn devices_and_what_is_wrong_with_them() {
    let opened = |choice: NicChoice<'_>| -> Vec<String> {
        open(choice, &settings()).unwrap().iter().map(|nic| nic.about().name.clone()).collect()
    };
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    assert_eq!(opened(NicChoice::Near(&[], 4)), ["null0", "null1", "null2", "null3"]);
    assert_eq!(opened(NicChoice::Named(&list(&["null2", "null0"]))), ["null2", "null0"], "in the order given");
    assert_eq!(opened(NicChoice::Near(&list(&["null6", "hidden", "null2", "null1"]), 2)), ["null6", "null2"]);
    assert_eq!(opened(NicChoice::Near(&list(&["hidden"]), 1)), ["null0"], "what there is");
    let about = one("null1").unwrap().about().clone();
    assert_eq!((about.gbps, about.manner.as_str()), (200, "RoCE v1, GID 0 (10.0.0.1)"));

    let why = |name: &str| one(name).err().unwrap().to_string();
    let known = "null0, null1, null2, null3, null4, null5, null6, null7, null8";
    assert_eq!(why("mlx5_7"), format!("there is no NIC mlx5_7; this host has {known}"));
    assert_eq!(why("null0:9"), "null0: no active port: it has no such port");
    assert!(why("null0:x").contains("is no NIC"));
    knob(Knob::PortIsDown, Some(1));
    assert_eq!(why("null0"), "null0: no active port: port 1 is down");
    assert!(open(NicChoice::Near(&[], 4), &settings()).is_err());
    knob(Knob::PortIsDown, Some(0));
    let wrong_gid = VerbsSettings { gid_index: Some(3), ..settings() };
    let why_gid = open(NicChoice::Named(&["null0".into()]), &wrong_gid).err().unwrap().to_string();
    assert_eq!(why_gid, "null0: port 1 has no GID at index 3; there are: 0");
    knob(Knob::PortWithoutGid, Some(1));
    assert_eq!(opened(NicChoice::Near(&[], 4)), ["null8:2"], "the only port that has one");
    assert_eq!(opened(NicChoice::Named(&list(&["null8"]))), ["null8:2"]);
    assert_eq!(why("null8:1"), "null8: port 1 has no GID; there are: none");
    knob(Knob::PortWithoutGid, Some(0));
    let missing = VerbsSettings { library: Some("/nowhere/libibverbs.so.1".into()), ..settings() };
    assert!(
        matches!(open(NicChoice::Near(&[], 1), &missing), Err(NicError::Library(why)) if why.contains("install libibverbs1"))
    );

    let (mut nic, _, _) = nic(1);
    knob(Knob::NoQueuePairs, Some(1));
    assert!(nic.open().unwrap_err().to_string().starts_with("null0: no queue pair is left (it has 65536)"));
    knob(Knob::NoQueuePairs, Some(0));
    knob(Knob::NoMemory, Some(1));
    let mut bytes = [0_u8; 64];
    let given = lock_at_most(1 << 20);
    // SAFETY: nothing is registered.
    let refused = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap_err().to_string();
    assert!(refused.contains("1048576") && refused.contains("ulimit -l"), "{refused}");
    lock_at_most(given);
    knob(Knob::NoMemory, Some(0));
}

/// Every setting, each with a value of its own, and a GID that is not the first.
pub(crate) fn settings_reach_the_queue_pair() {
    knob(Knob::GidIndex, Some(5));
    let settings = VerbsSettings {
        gid_index: Some(5),
        traffic_class: 106,
        service_level: 3,
        pkey_index: 517,
        timeout: 19,
        retry_count: 4,
        rnr_retry: 2,
        rnr_timer: 21,
        ..settings()
    };
    let mut nic = open(NicChoice::Named(&["null0".into()]), &settings).unwrap().remove(0);
    let rail = nic.open().unwrap();
    let address = nic.address(rail);
    nic.connect(rail, &address).unwrap();
    let told = [
        (Knob::SgidIndex, 5),
        (Knob::TrafficClass, 106),
        (Knob::ServiceLevel, 3),
        (Knob::PkeyIndex, 517),
        (Knob::Timeout, 19),
        (Knob::RetryCount, 4),
        (Knob::RnrRetry, 2),
        (Knob::RnrTimer, 21),
    ];
    for (of, value) in told {
        assert_eq!(knob(of, None), value, "{of:?}");
    }
    knob(Knob::GidIndex, Some(0));
}

/// Nobody named it; the others serve. Whoever names one wants that one.
pub(crate) fn one_that_cannot_be_opened_is_left_out() {
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    let opened = |near: &[&str], max_nics| -> Result<Vec<String>, NicError> {
        let nics = open(NicChoice::Near(&list(near), max_nics), &settings())?;
        Ok(nics.iter().map(|nic| nic.about().name.clone()).collect())
    };
    for knob_of in [Knob::Shut, Knob::NoQueues] {
        knob(knob_of, Some(1 << 0 | 1 << 2));
        assert_eq!(opened(&["null0", "null1", "null2", "null3", "null4"], 3).unwrap(), ["null1", "null3", "null4"]);
        assert_eq!(opened(&[], 2).unwrap(), ["null1", "null3"]);
        assert_eq!(opened(&["null2", "null0"], 1).unwrap(), ["null1"], "none that is near can be opened");
        knob(Knob::Narrow, Some(!(1 << 0 | 1 << 2 | 1 << 5)));
        assert_eq!(opened(&[], 4).unwrap(), ["null5"], "the fastest of those that can be opened");
        knob(Knob::Narrow, Some(!(1 << 0 | 1 << 2)));
        assert_eq!(opened(&[], 1).unwrap(), ["null1"]);
        knob(Knob::Narrow, Some(0));
        let named = open(NicChoice::Named(&list(&["null1", "null2"])), &settings());
        assert!(named.err().unwrap().to_string().starts_with("null2"));
        let why = open(NicChoice::Named(&list(&["null2"])), &settings()).err().unwrap().to_string();
        assert_eq!(why.contains("/dev/infiniband"), matches!(knob_of, Knob::Shut), "{why}");
        knob(knob_of, Some(i64::MAX));
        assert!(opened(&["null3", "null1"], 2).unwrap_err().to_string().starts_with("null3"), "the first error");
        assert!(opened(&[], 2).unwrap_err().to_string().starts_with("null0"), "the first error");
        knob(knob_of, Some(1));
        assert!(matches!(without_descriptors(|| opened(&["null0", "null1"], 2)), Err(NicError::Descriptors(_))));
        knob(knob_of, Some(0));
    }
}

/// Keys can be guessed, and messages are read where they were received.
pub(crate) fn peers_may_write_into_no_buffer_of_ours() {
    let before = knob(Knob::NumWritable, None);
    let nic = one("null0").unwrap();
    assert_eq!(knob(Knob::NumWritable, None), before);
    let mut bytes = [0_u8; 64];
    // SAFETY: the null NIC touches no memory.
    let _memory = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap();
    assert_eq!(knob(Knob::NumWritable, None), before + 1);
}

/// Calls it while no descriptor is left.
fn without_descriptors<R>(call: impl FnOnce() -> R) -> R {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the calls; no other thread opens anything meanwhile.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let none = libc::rlimit { rlim_cur: 0, ..limit };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const none);
        let result = call();
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        result
    }
}

/// A network gives a port another place in its table while it is down; ends of different networks say so.
pub(crate) fn networks_and_their_names() {
    let mut nic = one("null0").unwrap();
    knob(Knob::GidIndex, Some(5));
    let moved = nic.open().unwrap();
    let address = nic.address(moved);
    nic.connect(moved, &address).unwrap();
    assert_eq!(knob(Knob::SgidIndex, None), 5);
    knob(Knob::GidIndex, Some(77));
    assert!(nic.open().unwrap_err().to_string().contains("no GID"), "it is not there yet");
    knob(Knob::GidIndex, Some(0));

    let rail = nic.open().unwrap();
    let with = |at: usize, value: u8| {
        let mut theirs = address.clone();
        theirs[at] = value;
        theirs
    };
    let refused = |nic: &mut VerbsNic, theirs: &[u8]| nic.connect(rail, theirs).unwrap_err().to_string();
    assert!(refused(&mut nic, &with(1, 0)).contains("Ethernet and InfiniBand"));
    let error = refused(&mut nic, &with(3, 1));
    assert!(error.contains("null0 uses RoCE v1 and the peer's NIC RoCE v2") && error.contains("gid_index"), "{error}");
}

/// InfiniBand: the LID reaches a peer of the same subnet, and the GID one of another, or where there are no LIDs.
pub(crate) fn lids_and_gids() {
    const OF_THE_PEER: u16 = 0x1209;
    knob(Knob::IsInfiniband, Some(1));
    for (lid, is_same_subnet, is_global) in [(7, true, 0), (7, false, 1), (0, true, 1)] {
        knob(Knob::Lid, Some(lid));
        let mut nic = one("null0").unwrap();
        assert_eq!(nic.about().manner, format!("InfiniBand, LID {lid}"));
        let rail = nic.open().unwrap();
        let mut theirs = nic.address(rail);
        assert_eq!(i64::from(theirs[4]), lid);
        theirs[4..6].copy_from_slice(&OF_THE_PEER.to_le_bytes());
        if !is_same_subnet {
            theirs[6 + 7] ^= 1;
        }
        nic.connect(rail, &theirs).unwrap();
        let told = (knob(Knob::Dlid, None), knob(Knob::IsGlobal, None));
        assert_eq!(told, (OF_THE_PEER.into(), is_global), "LID {lid}, same subnet: {is_same_subnet}");
    }
    knob(Knob::IsInfiniband, Some(0));
    knob(Knob::Lid, Some(0));
    rail(&mut one("null0").unwrap());
    assert_eq!(knob(Knob::IsGlobal, None), 1, "Ethernet has no LIDs");
}

/// Asked for where the library knows it, and left out where the kernel does not, or a setting says so.
pub(crate) fn relaxed_ordering() {
    const RELAXED: i64 = 1 << 20;
    const WRITABLE: i64 = 1 | 1 << 1;
    let cases = [(true, 0, WRITABLE | RELAXED), (true, libc::EINVAL, WRITABLE), (false, 0, WRITABLE)];
    for (relaxed_ordering, refusal, access) in cases {
        knob(Knob::NoRelaxed, Some(refusal.into()));
        let settings = VerbsSettings { relaxed_ordering, ..settings() };
        let nic = open(NicChoice::Named(&["null0".into()]), &settings).unwrap().remove(0);
        let mut bytes = [0_u8; 64];
        // SAFETY: the null NIC touches no memory.
        let _memory = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap();
        assert_eq!(knob(Knob::Access, None), access, "relaxed_ordering={relaxed_ordering}, errno {refusal}");
    }
    knob(Knob::NoRelaxed, Some(0));
}

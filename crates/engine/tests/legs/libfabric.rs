//! Over a libfabric without hardware. A process uses one, so this is one test that goes through its chapters.

use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyfabric_engine::transports::libfabric::FabricSettings;
use anyfabric_engine::{Code, Config};

use crate::fake::{Copy, Fake};
use crate::star::{Star, ALL, IMM, LONG, NBYTES, NUM_PEERS, OTHER_IMM};

/// Long enough for what must come before rails are given up.
const PATIENT: Duration = Duration::from_secs(3);
const IMPATIENT: Duration = Duration::from_millis(500);
const EIO: u64 = 5;

#[test]
fn legs_over_a_fake_libfabric() {
    let Some(copy) = Copy::new(|fake| (fake.has_fd, fake.has_trywait) = (1, 1)) else { return };
    let library = Library(copy);
    every_leg_counts_once(&library);
    a_request_fails(&library);
    nothing_is_taken(&library);
    given_up_half_way(&library);
    a_peer_is_lost_half_way(&library);
    a_region_is_revoked_half_way(&library);
}

struct Library(Copy);

impl Library {
    fn star(&self, answer_timeout: Duration, max_endpoints: usize) -> Star {
        let library = Some(self.0.path().to_str().unwrap().to_owned());
        let libfabric = FabricSettings { provider: Some("fake".into()), library, answer_timeout, max_endpoints };
        Star::new(&Config { transports: vec!["libfabric".into()], libfabric, ..Config::default() })
    }

    /// Sets a number of [`Fake`] by its offset.
    fn set(&self, field: usize, value: u64) {
        self.0.field(field).store(value, Ordering::SeqCst);
    }

    fn get(&self, field: usize) -> u64 {
        self.0.field(field).load(Ordering::SeqCst)
    }
}

/// Whatever the provider makes of them.
fn every_leg_counts_once(library: &Library) {
    let providers: [&[(usize, u64, u64)]; 5] = [
        &[],
        &[(offset_of!(Fake, again_every), 3, 0)],
        &[(offset_of!(Fake, order), 2, 0)],
        &[(offset_of!(Fake, cq_data_size), 4, 8)],
        &[(offset_of!(Fake, has_write_data), 0, 1), (offset_of!(Fake, cq_data_size), 0, 8)],
    ];
    for odd in providers {
        odd.iter().for_each(|(field, value, _)| library.set(*field, *value));
        let star = library.star(PATIENT, 256);
        for round in 0..10 {
            star.scatter(IMM, LONG).wait(None).unwrap();
            star.barrier(IMM).wait(None).unwrap();
            star.expect([1 + 2 * (round + 1); NUM_PEERS]);
        }
        assert_eq!(star.used(), [[21, 11 * NBYTES, 0, 21, 0]; NUM_PEERS], "{odd:?}");
        drop(star);
        odd.iter().for_each(|(field, _, usual)| library.set(*field, *usual));
    }
}

/// The transfer fails, that receiver is told, and the others have what was sent to them; also where the rails of all end
/// with the one.
fn a_request_fails(library: &Library) {
    for (max_endpoints, is_scatter) in [(256, true), (256, false), (1, true), (1, false)] {
        let star = library.star(PATIENT, max_endpoints);
        library.set(offset_of!(Fake, fail_with), EIO);
        library.set(offset_of!(Fake, fail_nth), library.get(offset_of!(Fake, writes)) + 3);
        let transfer = if is_scatter { star.scatter(IMM, LONG) } else { star.barrier(IMM) };
        let error = transfer.wait(None).unwrap_err();
        assert_eq!(error.code, Code::ConnectionBroken, "{error}");
        transfer.wait_quiesced(Some(LONG)).unwrap();
        let named = error.context.peer.as_ref().unwrap();
        let culprit = star.addresses().iter().position(|address| address.to_string() == *named).unwrap();
        let used = star.used();
        for (idx, used) in used.iter().enumerate() {
            assert_eq!((used[2], used[4]), (u64::from(idx == culprit), 1), "peer {idx}: {used:?}");
        }
        star.recovers(&[culprit]);
        for (idx, peer) in star.peers.iter().enumerate().filter(|(idx, _)| *idx != culprit) {
            assert_eq!(peer.counter.value(), 2, "peer {idx}");
        }
    }
}

/// The provider takes none of the requests, and rails are made again and again: what was not posted waits for one.
fn nothing_is_taken(library: &Library) {
    let star = library.star(IMPATIENT, 256);
    let before = library.get(offset_of!(Fake, writes));
    library.set(offset_of!(Fake, again_every), 1);
    let (given_up, waits) = (star.scatter(IMM, 2 * IMPATIENT), star.barrier(OTHER_IMM));
    let error = given_up.wait(None).unwrap_err();
    assert_eq!(error.code, Code::TransferTimeout, "{error}");
    given_up.wait_quiesced(Some(LONG)).unwrap();
    assert_eq!(library.get(offset_of!(Fake, writes)), before, "some of it was posted");
    library.set(offset_of!(Fake, again_every), 0);
    waits.wait(None).unwrap();
    star.recovers(&ALL);
}

/// What the provider has taken is not taken back: the transfer ends at once, and quiesces when the endpoints are closed.
fn given_up_half_way(library: &Library) {
    for is_cancelled in [true, false] {
        let star = library.star(IMPATIENT, 256);
        library.set(offset_of!(Fake, swallow), 1);
        let transfer = star.give_up(is_cancelled);
        transfer.wait_quiesced(Some(LONG)).unwrap();
        library.set(offset_of!(Fake, swallow), 0);
        star.recovers(&ALL);
    }
}

fn a_peer_is_lost_half_way(library: &Library) {
    let mut star = library.star(PATIENT, 256);
    library.set(offset_of!(Fake, swallow), 1);
    let transfer = star.scatter(IMM, LONG);
    let lost = star.peers.remove(1);
    let address = lost.engine.address().to_string();
    let closes = std::thread::spawn(move || drop(lost));
    let error = transfer.wait(None).unwrap_err();
    assert_eq!((error.code, error.context.peer), (Code::PeerLost, Some(address)));
    assert!(!transfer.is_quiesced(), "the provider has the other legs");
    transfer.wait_quiesced(Some(LONG)).unwrap();
    closes.join().unwrap();
    library.set(offset_of!(Fake, swallow), 0);
    star.recovers(&[0, 1, 2, 3]);
}

/// The owner has its region back when no leg can touch it any more, and the next is refused.
fn a_region_is_revoked_half_way(library: &Library) {
    let star = library.star(IMPATIENT, 256);
    library.set(offset_of!(Fake, swallow), 1);
    let transfer = star.scatter(IMM, LONG);
    star.peers[2].region.revoke(Some(star.here.address()), LONG).unwrap();
    assert!(transfer.is_done(), "a leg was under way");
    // Of what was closed for it, or of the key that is gone: whichever comes first.
    let error = transfer.wait(None).unwrap_err();
    assert!(matches!(error.code, Code::ConnectionBroken | Code::Refused), "{error}");
    transfer.wait_quiesced(Some(LONG)).unwrap();
    library.set(offset_of!(Fake, swallow), 0);
    let error = star.scatter(OTHER_IMM, LONG).wait(None).unwrap_err();
    assert_eq!((error.code, error.context.peer), (Code::Refused, Some(star.addresses()[2].to_string())));
}

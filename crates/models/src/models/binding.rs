//! Memory is the owner's again when nothing is under way, and nothing will be.

use anyfabric_wire::Refusal;
use loom::thread;

use crate::stand_ins::lock;
use crate::sync::{Arc, Mutex};
use crate::{Binding, Region, Target};

/// Once a refused binding is idle nobody writes to the region.
pub fn fence() {
    let (binding, region) = (ready(), Arc::new(Region::default()));
    let writer = thread::spawn({
        let (binding, region) = (Arc::clone(&binding), Arc::clone(&region));
        move || {
            if binding.enter().is_ok() {
                region.write(1);
                binding.leave();
            }
        }
    });
    binding.refuse(Refusal::Revoked);
    if binding.is_idle() {
        region.write(2);
    }
    writer.join().expect("a thread of the model");
    assert!(binding.is_idle(), "an operation that was turned away is still counted");
}

/// So it is for what is carried out at once, under a lock.
pub fn fence_by_lock() {
    let (binding, region, out) = (ready(), Arc::new(Region::default()), Arc::new(Mutex::new(())));
    let writer = thread::spawn({
        let (binding, region, out) = (Arc::clone(&binding), Arc::clone(&region), Arc::clone(&out));
        move || {
            let _out = lock(&out);
            if binding.check().is_ok() {
                region.write(1);
            }
        }
    });
    binding.refuse(Refusal::Revoked);
    drop(lock(&out));
    region.write(2);
    writer.join().expect("a thread of the model");
}

fn ready() -> Arc<Binding> {
    Arc::new(Binding::ready(1, 2, 3, Target::Owner))
}

//! The verbs NIC over a libibverbs without hardware: every way in which a post or a completion can fail, and what it
//! may not cost. The knobs are the process's, so this is one test that goes through its chapters.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../common/allocations.rs"]
mod allocations;
mod devices;
mod faults;
#[path = "../common/locked.rs"]
mod locked;
mod messages;
#[path = "../null_nic/mod.rs"]
mod null_nic;
mod posting;
mod queues;
#[path = "../common/seen.rs"]
mod seen;

use anyfabric_plan::Extent;
use anyfabric_transports::rdma::{
    Batch, Completions, Domain, Fault, Marks, Nic, NicChoice, NicError, One, RailIdx, RemoteMemory,
};
use anyfabric_transports::verbs::{open, VerbsMemory, VerbsNic, VerbsSettings};
use null_nic::{announce, arrive, knob, library, message, say, Knob};
use seen::Seen;

fn settings() -> VerbsSettings {
    VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() }
}

fn one(name: &str) -> Result<VerbsNic, NicError> {
    open(NicChoice::Named(&[name.to_owned()]), &settings()).map(|mut nics| nics.remove(0))
}

/// A NIC with `num_rails` rails, each connected to itself, and memory.
fn nic(num_rails: usize) -> (VerbsNic, Vec<RailIdx>, VerbsMemory) {
    let mut nic = one("null0").unwrap();
    let rails = (0..num_rails).map(|_| rail(&mut nic)).collect();
    static mut BYTES: [u8; 4096] = [0; 4096];
    // SAFETY: the null NIC touches no memory, and the array is there for ever.
    let memory = unsafe { nic.domain().register((&raw mut BYTES).cast(), 4096, true) }.unwrap();
    (nic, rails, memory)
}

fn rail(nic: &mut VerbsNic) -> RailIdx {
    let rail = nic.open().unwrap();
    let address = nic.address(rail);
    nic.connect(rail, &address).unwrap();
    rail
}

const WRITES: [Extent; 7] = [Extent { src: 0, dst: 0, nbytes: 512 }; 7];
const TARGET: RemoteMemory = RemoteMemory { base: 0x1000, key: 7 };
const FULL: usize = 128;

/// Where in a rail's address the number of each queue pair is.
const WRITES_AT: usize = 22;
const MESSAGES_AT: usize = 30;

fn number(nic: &VerbsNic, rail: RailIdx, at: usize) -> u32 {
    u32::from_le_bytes(nic.address(rail)[at..at + 4].try_into().unwrap())
}

#[test]
fn the_verbs_nic_without_hardware() {
    devices::devices_and_what_is_wrong_with_them();
    devices::one_that_cannot_be_opened_is_left_out();
    devices::peers_may_write_into_no_buffer_of_ours();
    devices::networks_and_their_names();
    devices::settings_reach_the_queue_pair();
    devices::lids_and_gids();
    devices::relaxed_ordering();
    faults::every_failure_at_every_place();
    faults::what_the_device_does_not_take();
    faults::held_back_until_closed();
    faults::what_arrived_counts_when_the_rail_is_closed();
    faults::a_device_that_is_gone_is_fenced_all_the_same();
    faults::a_queue_pair_that_is_kept();
    queues::a_queue_that_breaks_ends_every_rail_and_is_renewed();
    queues::a_broken_queue_is_told_of_a_rail_that_is_closed();
    queues::what_a_device_announces();
    messages::messages_arrive_whole_and_in_order();
    messages::a_message_finds_no_receive();
    messages::a_receive_fails();
    messages::receives_that_are_refused_are_posted_later();
    messages::receives_come_back_when_none_is_left();
    faults::a_nic_that_talks_nonsense();
    queues::a_short_queue_of_completions_is_shared();
    posting::chains_are_posted_at_once();
    posting::one_goes_past_the_chain();
    posting::nothing_is_allocated();
}

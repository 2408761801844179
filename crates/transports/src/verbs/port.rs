//! A port of a device: its state, and the GID to use.

use std::ffi::c_int;
use std::path::Path;
use std::sync::Arc;

use super::device::{listed, VerbsDomain};
use super::sys::{self, Gid, GidEntry, PortAttr};
use super::VerbsSettings;
use crate::rdma::NicError;
use crate::sys::port_gbps;

/// A port as it was found, and the GID to use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) lid: u16,
    pub(super) mtu: u8,
    pub(super) max_message: u32,
    pub(super) is_ethernet: bool,
    pub(super) gbps: u32,
    pub(super) gid: Gid,
    pub(super) gid_index: u8,
    pub(super) gid_type: u32,
}

impl Port {
    /// Whether it wraps packets in UDP, as routers know them.
    pub(super) const fn is_roce_v2(&self) -> bool {
        self.is_ethernet && self.gid_type == sys::GID_TYPE_ROCE_V2
    }
}

impl VerbsDomain {
    /// The port asked for, or all with 0, of those that are active and have a GID.
    pub(super) fn ports(
        self: Arc<Self>,
        asked: u8,
        settings: &VerbsSettings,
    ) -> Result<Vec<(Arc<Self>, Port)>, NicError> {
        let mut active = Vec::new();
        let mut states = Vec::new();
        let mut failed = None;
        for number in 1..=self.attributes.phys_port_cnt {
            if asked != 0 && asked != number {
                continue;
            }
            let port = self.query_port(number)?;
            if port.state != sys::PORT_ACTIVE {
                states.push(format!("port {number} is {}", state_name(port.state)));
                continue;
            }
            match self.describe(number, &port, settings) {
                Ok(port) => active.push((Arc::clone(&self), port)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) if active.is_empty() => return Err(error),
            Some(error) => log::warn!("a port is not used: {error}"),
            None => {}
        }
        if active.is_empty() {
            let states = if states.is_empty() { "it has no such port".into() } else { states.join(", ") };
            return Err(NicError::Device(format!("{}: no active port: {states}", self.name)));
        }
        Ok(active)
    }

    pub(super) fn query_port(&self, number: u8) -> Result<PortAttr, NicError> {
        // SAFETY: plain numbers, all of which may be zero.
        let mut port: PortAttr = unsafe { std::mem::zeroed() };
        // SAFETY: an open device; fills at most what `PortAttr` has.
        let failed = unsafe { (self.library.query_port)(self.context, number, &raw mut port) };
        if failed != 0 {
            let error = std::io::Error::from_raw_os_error(failed);
            return Err(NicError::Device(format!("{}: port {number} cannot be queried: {error}", self.name)));
        }
        Ok(port)
    }

    /// A port as it is now: the network may have given it another LID or GID since
    /// it was last up, and the system moves GIDs in its table.
    pub(super) fn port(&self, number: u8, settings: &VerbsSettings) -> Result<Port, NicError> {
        self.describe(number, &self.query_port(number)?, settings)
    }

    fn describe(&self, number: u8, port: &PortAttr, settings: &VerbsSettings) -> Result<Port, NicError> {
        let is_ethernet = port.link_layer == sys::LINK_LAYER_ETHERNET;
        let gids = self.gids(number, port.gid_tbl_len);
        let chosen = match settings.gid_index {
            Some(index) => gids.iter().find(|gid| gid.gid_index == u32::from(index)),
            None => best_gid(&gids, is_ethernet),
        };
        let Some(gid) = chosen else {
            let given = settings.gid_index.map_or("no GID".into(), |index| format!("no GID at index {index}"));
            let known: Vec<_> = gids.iter().map(|gid| gid.gid_index.to_string()).collect();
            let message = format!("{}: port {number} has {given}; there are: {}", self.name, listed(&known));
            return Err(NicError::Device(message));
        };
        let rate = port_gbps(Path::new(&format!("/sys/class/infiniband/{}/ports/{number}", self.name)));
        Ok(Port {
            number,
            lid: port.lid,
            mtu: port.active_mtu.clamp(1, 5) as u8,
            max_message: port.max_msg_sz,
            is_ethernet,
            gbps: gbps(port.active_width, port.active_speed, rate),
            gid: gid.gid,
            gid_index: gid.gid_index as u8,
            gid_type: gid.gid_type,
        })
    }

    /// The port's GIDs that are not empty.
    fn gids(&self, port: u8, len: c_int) -> Vec<GidEntry> {
        let len = usize::try_from(len).unwrap_or(0).min(MAX_GIDS);
        if let Some(query) = self.library.query_gid_table {
            let mut entries = vec![GidEntry::default(); MAX_GIDS];
            // SAFETY: an open device; fills at most MAX_GIDS entries of the size given.
            let count =
                unsafe { query(self.context, entries.as_mut_ptr(), MAX_GIDS, 0, std::mem::size_of::<GidEntry>()) };
            if let Ok(count) = usize::try_from(count) {
                entries.truncate(count);
                entries.retain(|entry| entry.port_num == u32::from(port) && entry.gid_index <= u8::MAX.into());
                return entries;
            }
        }
        let mut entries = Vec::new();
        for index in 0..len {
            let mut gid = Gid::default();
            // SAFETY: an open device; fills the GID.
            let failed = unsafe { (self.library.query_gid)(self.context, port, index as c_int, &raw mut gid) };
            if failed == 0 && gid != Gid::default() {
                let path = format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs/types/{index}", self.name);
                let kind = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
                let gid_type = if kind.trim() == "RoCE v2" { sys::GID_TYPE_ROCE_V2 } else { 0 };
                let (gid_index, port_num) = (index as u32, port.into());
                entries.push(GidEntry { gid, gid_index, port_num, gid_type, ndev_ifindex: 0 });
            }
        }
        entries
    }
}

/// The GID that most networks route: see [`VerbsSettings::gid_index`].
fn best_gid(gids: &[GidEntry], is_ethernet: bool) -> Option<&GidEntry> {
    let rank = |entry: &GidEntry| {
        let raw = &entry.gid.raw;
        let is_v2 = entry.gid_type == sys::GID_TYPE_ROCE_V2;
        let is_ipv4 = raw[..10] == [0; 10] && raw[10..12] == [0xff; 2];
        let is_link_local = raw[..2] == [0xfe, 0x80];
        match (is_ethernet, is_v2) {
            // InfiniBand: the first is the port's own.
            (false, _) => 0,
            (true, true) if is_ipv4 => 0,
            (true, true) if !is_link_local => 1,
            (true, true) => 2,
            (true, false) if is_ipv4 => 3,
            (true, false) if !is_link_local => 4,
            (true, false) => 5,
        }
    };
    gids.iter().min_by_key(|entry| (rank(entry), entry.gid_index))
}

/// Link speed from the codes of the InfiniBand specification; never 0. The kernel tells programs no faster lane than
/// those of NDR, and sysfs the rate of any.
fn gbps(width: u8, speed: u8, rate: u32) -> u32 {
    let lanes = match width {
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 1,
    };
    // In tenths, for the slow ones.
    let lane = match speed {
        2 => 50,
        4 | 8 => 100,
        16 => 140,
        32 => 250,
        64 => 500,
        128 => 1000,
        _ => 25,
    };
    (lanes * lane / 10).max(rate)
}

const fn state_name(state: u32) -> &'static str {
    match state {
        1 => "down",
        2 => "initialising (is a subnet manager running?)",
        3 => "armed",
        5 => "active, deferred",
        _ => "in an unknown state",
    }
}

/// GIDs of one device that are looked at.
const MAX_GIDS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(gid_index: u32, gid_type: u32, start: &[u8]) -> GidEntry {
        let mut raw = [7; 16];
        raw[..start.len()].copy_from_slice(start);
        GidEntry { gid: Gid::new(raw), gid_index, port_num: 1, gid_type, ndev_ifindex: 0 }
    }

    /// The best of those that there are, wherever it stands in the table.
    #[test]
    fn the_gid_that_most_networks_route() {
        let (v1, v2, link_local, routed) = (1, sys::GID_TYPE_ROCE_V2, [0xfe, 0x80], [0x20, 0x01]);
        let ipv4 = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let worst_first = [
            gid(0, v1, &link_local),
            gid(2, v1, &routed),
            gid(4, v1, &ipv4),
            gid(1, v2, &link_local),
            gid(3, v2, &routed),
            gid(5, v2, &ipv4),
        ];
        let chosen = |gids: &[GidEntry], is_ethernet| best_gid(gids, is_ethernet).map(|gid| gid.gid_index);
        for num in 1..=worst_first.len() {
            let mut gids = worst_first[..num].to_vec();
            let best = gids[num - 1].gid_index;
            assert_eq!(chosen(&gids, true), Some(best));
            gids.reverse();
            assert_eq!(chosen(&gids, true), Some(best));
            assert_eq!(chosen(&gids, false), Some(0), "InfiniBand: the port's own");
        }
        assert_eq!(chosen(&[gid(9, v2, &ipv4), gid(6, v2, &ipv4)], true), Some(6), "the first of its kind");
        assert_eq!(chosen(&[], true), None);
    }

    /// ConnectX-8 at 800 Gbit/s has the code of one at 400.
    #[test]
    fn a_speed_beyond_the_codes_is_the_system_s() {
        let (four_lanes, ndr, edr) = (2, 128, 32);
        assert_eq!(gbps(four_lanes, ndr, 800), 800);
        assert_eq!(gbps(four_lanes, ndr, 400), 400);
        assert_eq!(gbps(four_lanes, edr, 0), 100, "a container that hides it");
        assert_eq!(gbps(0, 0, 0), 2);
    }
}

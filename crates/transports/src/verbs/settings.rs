//! What may be chosen about verbs.

/// Settings of the verbs transport; the defaults suit most networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerbsSettings {
    /// libibverbs; found by its name when `None`. Tests put another in its place.
    pub library: Option<String>,
    /// Index in the port's GID table; chosen when `None`: RoCE v2 with an IPv4
    /// address first, then any other RoCE v2, then what there is.
    pub gid_index: Option<u8>,
    /// Traffic class: DSCP times 4 on RoCE.
    pub traffic_class: u8,
    /// Service level, 0 to 15.
    pub service_level: u8,
    /// Index in the port's partition key table.
    pub pkey_index: u16,
    /// Until an unanswered packet is sent again: 4.096 µs × 2^timeout, 1 to 31.
    pub timeout: u8,
    /// Times that it is sent again, 0 to 7.
    pub retry_count: u8,
    /// Times that a peer without receives is asked again, 0 to 6: 7 would mean
    /// for ever.
    pub rnr_retry: u8,
    /// How long such a peer asks to be left alone, in the code of the
    /// InfiniBand specification: 0 to 31.
    pub rnr_timer: u8,
    /// Whether writes to memory may pass one another on the bus, where the
    /// device and the library know how.
    pub relaxed_ordering: bool,
}

impl Default for VerbsSettings {
    fn default() -> Self {
        Self {
            library: None,
            gid_index: None,
            traffic_class: 0,
            service_level: 0,
            pkey_index: 0,
            // 268 ms: 7 attempts take 1.9 s. As much of the 3 s that a silent peer is given as a power of two leaves,
            // for a counted write that was given up cannot be repeated; a port that is down is told sooner.
            timeout: 16,
            // Soft-RoCE takes 7 for ever, as the specification means it of `rnr_retry` only.
            retry_count: 6,
            rnr_retry: 6,
            // 82 ms: 7 attempts take about half a second.
            rnr_timer: 26,
            relaxed_ordering: true,
        }
    }
}

impl VerbsSettings {
    /// The first value out of its range, and what was expected.
    pub fn fault(&self) -> Option<String> {
        let limits = [
            ("service_level", u16::from(self.service_level), 0, 15),
            ("timeout", u16::from(self.timeout), 1, 31),
            ("retry_count", u16::from(self.retry_count), 0, 7),
            ("rnr_retry", u16::from(self.rnr_retry), 0, 6),
            ("rnr_timer", u16::from(self.rnr_timer), 0, 31),
        ];
        let (name, value, least, most) =
            limits.into_iter().find(|(_, value, least, most)| !(least..=most).contains(&value))?;
        Some(format!("{name} of verbs is {value}, expected {least} to {most}"))
    }
}

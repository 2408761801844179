//! What went over a link: cheap enough to be always on.
//!
//! ORDERING: every counter is relaxed. They are read for people, and no
//! decision hangs on two of them agreeing.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Latencies in powers of two, each split in four.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], max_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Adds one latency.
    #[inline]
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].fetch_add(1, Relaxed);
        if ns > self.max_ns.load(Relaxed) {
            self.max_ns.fetch_max(ns, Relaxed);
        }
    }

    /// As [`Histogram::record`], for the only thread that adds any just now: a
    /// store costs a fraction of an atomic addition.
    #[inline]
    pub fn record_alone(&self, ns: u64) {
        add_alone(&self.buckets[bucket_of(ns)], 1);
        if ns > self.max_ns.load(Relaxed) {
            self.max_ns.store(ns, Relaxed);
        }
    }

    /// Number of latencies.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// The longest.
    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Relaxed)
    }

    /// Upper bound of the bucket that holds quantile `q`, 0 to 1.
    pub fn quantile_ns(&self, q: f64) -> u64 {
        let rank = (self.count() as f64 * q).ceil() as u64;
        let mut seen = 0;
        for (idx, bucket) in self.buckets.iter().enumerate() {
            seen += bucket.load(Relaxed);
            if seen >= rank.max(1) {
                return upper_bound(idx).min(self.max_ns());
            }
        }
        self.max_ns()
    }
}

/// The operations of a user with one peer: each once, whatever carried it. Those that a link carried out in the thread
/// that asked for them are the link's to count, see [`PeerStats::inline_operations`].
#[derive(Debug, Default)]
pub struct OperationStats {
    /// Payload bytes of those that ended well.
    pub bytes: AtomicU64,
    /// Operations that ended in an error.
    pub errors: AtomicU64,
    /// Latencies of operations that a link counts.
    num_samples: AtomicU64,
    /// From submission to end, of those that ended well.
    pub latency: Histogram,
}

impl OperationStats {
    /// One ended well, so long after its submission.
    #[inline]
    pub fn done(&self, nbytes: u64, ns: u64) {
        if nbytes > 0 {
            self.bytes.fetch_add(nbytes, Relaxed);
        }
        self.latency.record(ns);
    }

    /// One ended in an error.
    pub fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// Adds the latency of an operation that a link counts.
    pub fn sample(&self, ns: u64) {
        self.latency.record(ns);
        self.num_samples.fetch_add(1, Relaxed);
    }

    /// Those that have ended, well or not.
    pub fn num_ended(&self) -> u64 {
        let num_samples = self.num_samples.load(Relaxed);
        self.latency.count().saturating_sub(num_samples) + self.errors.load(Relaxed)
    }
}

/// One NIC's share.
#[derive(Debug, Default)]
pub struct NicStats {
    /// Payload bytes sent. What is one request to a NIC is added when that has ended,
    /// here and to `parts`.
    pub bytes: AtomicU64,
    /// Parts of operations sent; a small operation is one part.
    pub parts: AtomicU64,
    /// Parts that failed.
    pub errors: AtomicU64,
    /// Times that a full ring or socket made an operation wait.
    pub retries: AtomicU64,
    /// From submission to end; of inline writes every sixteenth is timed.
    pub latency: Histogram,
}

impl NicStats {
    /// Counts a part that was sent.
    #[inline]
    pub fn sent(&self, nbytes: u64) {
        self.bytes.fetch_add(nbytes, Relaxed);
        self.parts.fetch_add(1, Relaxed);
    }

    /// As [`NicStats::sent`], for the only thread that counts just now.
    #[inline]
    pub fn sent_alone(&self, nbytes: u64) {
        add_alone(&self.bytes, nbytes);
        add_alone(&self.parts, 1);
    }
}

/// All NICs of a link.
#[derive(Debug)]
pub struct PeerStats {
    nics: Vec<NicStats>,
    /// Operations that ended well in the thread that asked for them.
    pub inline_operations: AtomicU64,
    /// Their payload bytes.
    pub inline_bytes: AtomicU64,
}

impl PeerStats {
    /// For `num_nics` NICs, at least one.
    pub fn new(num_nics: usize) -> Self {
        let nics = (0..num_nics.max(1)).map(|_| NicStats::default()).collect();
        Self { nics, inline_operations: AtomicU64::new(0), inline_bytes: AtomicU64::new(0) }
    }

    /// One NIC's share.
    #[inline]
    pub fn nic(&self, nic_idx: usize) -> &NicStats {
        &self.nics[nic_idx.min(self.nics.len() - 1)]
    }

    /// Every NIC's share.
    pub fn nics(&self) -> &[NicStats] {
        &self.nics
    }
}

#[inline]
fn add_alone(to: &AtomicU64, more: u64) {
    to.store(to.load(Relaxed).wrapping_add(more), Relaxed);
}

fn bucket_of(ns: u64) -> usize {
    if ns < 4 {
        return ns as usize;
    }
    let exponent = 63 - ns.leading_zeros() as usize;
    let quarter = (ns >> (exponent - 2)) as usize & 3;
    (((exponent - 1) << 2) | quarter).min(BUCKETS - 1)
}

fn upper_bound(idx: usize) -> u64 {
    if idx < 4 {
        return idx as u64;
    }
    let (exponent, quarter) = ((idx >> 2) + 1, idx as u64 & 3);
    ((4 + quarter + 1) << (exponent - 2)) - 1
}

const BUCKETS: usize = 160;

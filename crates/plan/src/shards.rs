//! How one operation is spread over the NICs of a group.
//!
//! Whatever the number of NICs, one write counts once and one page counts
//! once. A write that is split carries its count in quarters, at least one on
//! each part, four in all; that is why at most four NICs serve one operation.
//! Pages are never split, so each carries a whole count.

/// Most parts of one operation.
pub const MAX_SHARDS: usize = 4;

/// One NIC's part of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which NIC, below the number of NICs.
    pub nic_idx: usize,
    /// First byte (of a write) or page (of pages).
    pub start: u64,
    /// Bytes or pages.
    pub len: u64,
    /// Weight of the part's immediate, in quarters of a count.
    pub quarters: u8,
}

/// The weights of `num_parts` parts, 1 to 4: each at least one, four in all.
pub const fn quarters(num_parts: usize) -> &'static [u8] {
    match num_parts {
        0 | 1 => &[4],
        2 => &[2, 2],
        3 => &[1, 1, 2],
        _ => &[1, 1, 1, 1],
    }
}

/// Splits `nbytes` over the NICs in proportion to their speeds.
///
/// Writes shorter than `min_bytes` a part use fewer NICs; `turn` rotates the
/// NIC a short write uses, and which four serve a long one. Parts begin at
/// multiples of [`ALIGN`] from the start. A NIC of speed 0 is down and gets
/// nothing; no shards means that every NIC is down.
pub fn shard_bytes(nbytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Vec<Shard> {
    let wanted = (nbytes / min_bytes.max(1)).clamp(1, MAX_SHARDS as u64) as usize;
    let nics = pick(speeds, wanted, turn);
    let total: u64 = nics.iter().map(|&nic| u64::from(speeds[nic])).sum();
    let mut shards = Vec::with_capacity(nics.len());
    let (mut start, mut speed_before) = (0, 0);
    for (&nic_idx, &weight) in nics.iter().zip(quarters(nics.len())) {
        speed_before += u64::from(speeds[nic_idx]);
        // 128 bits: bytes times speed may pass 2^64.
        let end = (u128::from(nbytes) * u128::from(speed_before) / u128::from(total.max(1))) as u64;
        let end = if speed_before == total { nbytes } else { (end / ALIGN * ALIGN).max(start) };
        shards.push(Shard { nic_idx, start, len: end - start, quarters: weight });
        start = end;
    }
    shards
}

/// Splits `num_pages` pages into contiguous runs, one a NIC, in proportion to
/// their speeds; each page carries a whole count.
pub fn shard_pages(num_pages: usize, page_bytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Vec<Shard> {
    let nbytes = page_bytes.saturating_mul(num_pages as u64);
    let wanted = (nbytes / min_bytes.max(1)).clamp(1, num_pages.clamp(1, MAX_SHARDS) as u64) as usize;
    let nics = pick(speeds, wanted, turn);
    let total: u64 = nics.iter().map(|&nic| u64::from(speeds[nic])).sum();
    let (mut start, mut speed_before) = (0, 0);
    let mut shards = Vec::with_capacity(nics.len());
    for &nic_idx in &nics {
        speed_before += u64::from(speeds[nic_idx]);
        let end = (num_pages as u128 * u128::from(speed_before) / u128::from(total.max(1))) as u64;
        if end > start || num_pages == 0 {
            shards.push(Shard { nic_idx, start, len: end - start, quarters: 4 });
        }
        start = end;
        if num_pages == 0 {
            break;
        }
    }
    shards
}

/// `wanted` NICs that are up, beginning with the `turn`-th of them.
fn pick(speeds: &[u32], wanted: usize, turn: usize) -> Vec<usize> {
    let up: Vec<usize> = (0..speeds.len()).filter(|&nic| speeds[nic] > 0).collect();
    let wanted = wanted.min(up.len());
    (0..wanted).map(|idx| up[(turn + idx) % up.len()]).collect()
}

/// Parts of a split write begin at multiples of this: whole pages and cache
/// lines for whoever copies them.
const ALIGN: u64 = 4096;

//! How one operation is spread over the NICs of a group.
//!
//! Whatever the number of NICs, one write counts once and one page counts
//! once. A write that is split carries its count in quarters, at least one on
//! each part, four in all; that is why at most four NICs serve one operation.
//! Pages are never split, so each carries a whole count.

use arrayvec::ArrayVec;

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

/// The parts of one operation; made for every operation, so nothing is allocated.
pub type Shards = ArrayVec<Shard, MAX_SHARDS>;

/// The weights of `num_parts` parts, 1 to 4: each at least one, four in all.
pub const fn quarters(num_parts: usize) -> &'static [u8] {
    match num_parts {
        0 | 1 => &[4],
        2 => &[2, 2],
        3 => &[1, 1, 2],
        _ => &[1, 1, 1, 1],
    }
}

/// How many NICs an operation is worth that gives each `min_bytes` on average.
pub fn num_shards(nbytes: u64, min_bytes: u64) -> usize {
    (nbytes / min_bytes.max(1)).clamp(1, MAX_SHARDS as u64) as usize
}

/// Splits `nbytes` over the NICs in proportion to their speeds.
///
/// A write uses as many NICs as give each `min_bytes` on average; `turn` rotates
/// the NIC a short write uses, and which four serve a long one. Parts begin at
/// multiples of 4096 from the start, and only a write of no bytes has an empty
/// one. A NIC of speed 0 is down and gets nothing; no shards means that every
/// NIC is down.
pub fn shard_bytes(nbytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Shards {
    let mut shards = split(nbytes, ALIGN, speeds, num_shards(nbytes, min_bytes), turn);
    let num_parts = shards.len();
    for (shard, &weight) in shards.iter_mut().zip(quarters(num_parts)) {
        shard.quarters = weight;
    }
    shards
}

/// Splits `num_pages` pages into contiguous runs, one a NIC, in proportion to
/// their speeds; each page carries a whole count. Only no pages give an empty
/// run, and no runs mean that every NIC is down.
pub fn shard_pages(num_pages: usize, page_bytes: u64, speeds: &[u32], min_bytes: u64, turn: usize) -> Shards {
    let nbytes = page_bytes.saturating_mul(num_pages as u64);
    let wanted = num_shards(nbytes, min_bytes).min(num_pages.max(1));
    split(num_pages as u64, 1, speeds, wanted, turn)
}

/// Splits `len` over the `wanted` NICs that are up, beginning with the `turn`-th
/// of them, at multiples of `align` and without empty parts, but for the one of a
/// `len` of 0, for which one NIC is wanted; each part weighs a whole count.
fn split(len: u64, align: u64, speeds: &[u32], wanted: usize, turn: usize) -> Shards {
    let up = || speeds.iter().enumerate().filter(|(_, &speed)| speed > 0);
    let num_up = up().count();
    let wanted = wanted.min(num_up);
    // `num_up` is 0 only when nothing is taken below.
    let nics = || up().cycle().skip(turn.checked_rem(num_up).unwrap_or(0)).take(wanted);
    let total: u64 = nics().map(|(_, &speed)| u64::from(speed)).sum();

    let mut shards = Shards::new();
    let (mut start, mut speed_so_far) = (0, 0);
    for (nic_idx, &speed) in nics() {
        speed_so_far += u64::from(speed);
        let end = if speed_so_far == total {
            len
        } else {
            // 128 bits: a length times a speed may pass 2^64. The quotient does
            // not, for `speed_so_far` is below `total`.
            (u128::from(len) * u128::from(speed_so_far) / u128::from(total)) as u64 / align * align
        };
        if end > start || len == 0 {
            shards.push(Shard { nic_idx, start, len: end - start, quarters: 4 });
        }
        start = end;
    }
    shards
}

/// Parts of a split write begin at multiples of this: whole pages and cache
/// lines for whoever copies them.
const ALIGN: u64 = 4096;

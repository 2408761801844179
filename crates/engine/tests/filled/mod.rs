//! Contents for tests that compare bytes.

use anyfabric_engine::Region;

/// Fills a region that nobody uses yet; returns its bytes, which differ from place to place.
pub(crate) fn fill(region: &Region) -> Vec<u8> {
    let bytes: Vec<u8> = (0..region.nbytes()).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    // SAFETY: as long as the region.
    unsafe { region.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    bytes
}

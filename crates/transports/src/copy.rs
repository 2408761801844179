//! Copies between mapped memory.

use std::ptr::copy_nonoverlapping;

/// Copies of this many bytes and more bypass the cache.
///
/// MEASURED: non-temporal stores overtake memcpy once source and destination
/// exceed the L2 cache together; benchmarks/records, perf baseline rows.
pub const NON_TEMPORAL_BYTES: usize = 1 << 20;

/// Copies `nbytes` bytes as fast as this machine does for that length.
///
/// A non-temporal copy ends with a store fence: a later release store
/// publishes these bytes too.
///
/// # Safety
/// `src` is readable and `dst` writable for `nbytes`; they do not overlap.
#[inline]
pub unsafe fn copy(src: *const u8, dst: *mut u8, nbytes: usize) {
    if nbytes < NON_TEMPORAL_BYTES {
        // SAFETY: as promised by the caller.
        unsafe { copy_nonoverlapping(src, dst, nbytes) };
    } else {
        // SAFETY: as promised by the caller.
        unsafe { copy_large(src, dst, nbytes) };
    }
}

/// Brings the beginning of what is copied soon into the cache: pages at random
/// places miss there, and in the table of pages. Stores wait for nobody, so the
/// destination is not asked for.
#[inline]
pub(crate) fn prefetch(src: *const u8, nbytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let mut at = 0;
        while at < nbytes.min(PREFETCH_BYTES) {
            // SAFETY: a prefetch reads nothing and faults nowhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(at).cast()) };
            at += 64;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (src, nbytes);
}

/// Asks for a cache line that is written soon.
#[inline]
pub(crate) fn prefetch_for_write(dst: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch faults nowhere.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) dst, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = dst;
}

/// Copies without pulling the destination into the cache, whatever the length.
///
/// # Safety
/// As for [`copy`].
pub unsafe fn copy_large(src: *const u8, dst: *mut u8, nbytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there; the rest as promised by the caller.
            return unsafe { x86::copy_avx512(src, dst, nbytes) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there; the rest as promised by the caller.
            return unsafe { x86::copy_avx2(src, dst, nbytes) };
        }
    }
    // SAFETY: as promised by the caller.
    unsafe { copy_nonoverlapping(src, dst, nbytes) };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512i, _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
        _mm_prefetch, _mm_sfence, _MM_HINT_T0,
    };
    use std::ptr::copy_nonoverlapping;

    /// # Safety
    /// As for `copy`, and the CPU has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn copy_avx512(src: *const u8, dst: *mut u8, nbytes: usize) {
        let head = dst.align_offset(64).min(nbytes);
        let blocks = (nbytes - head) / 256;
        // SAFETY: head, blocks and tail lie inside the `nbytes` the caller vouches for; the streamed stores are
        // 64-byte aligned because `head` bytes were skipped. Prefetching past the end is harmless.
        unsafe {
            copy_nonoverlapping(src, dst, head);
            let (mut from, mut to) = (src.add(head), dst.add(head));
            for _ in 0..blocks {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(2048).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(2048 + 64).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(2048 + 128).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(2048 + 192).cast());
                let a = _mm512_loadu_si512(from.cast::<__m512i>());
                let b = _mm512_loadu_si512(from.add(64).cast::<__m512i>());
                let c = _mm512_loadu_si512(from.add(128).cast::<__m512i>());
                let d = _mm512_loadu_si512(from.add(192).cast::<__m512i>());
                _mm512_stream_si512(to.cast::<__m512i>(), a);
                _mm512_stream_si512(to.add(64).cast::<__m512i>(), b);
                _mm512_stream_si512(to.add(128).cast::<__m512i>(), c);
                _mm512_stream_si512(to.add(192).cast::<__m512i>(), d);
                from = from.add(256);
                to = to.add(256);
            }
            copy_nonoverlapping(from, to, nbytes - head - blocks * 256);
            // ORDERING: streamed stores are not ordered by a release store; this fence orders them before it.
            _mm_sfence();
        }
    }

    /// # Safety
    /// As for `copy`, and the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy_avx2(src: *const u8, dst: *mut u8, nbytes: usize) {
        let head = dst.align_offset(32).min(nbytes);
        let blocks = (nbytes - head) / 128;
        // SAFETY: as in `copy_avx512`, with 32-byte alignment.
        unsafe {
            copy_nonoverlapping(src, dst, head);
            let (mut from, mut to) = (src.add(head), dst.add(head));
            for _ in 0..blocks {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(1024).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(1024 + 64).cast());
                for lane in 0..4 {
                    let block = _mm256_loadu_si256(from.add(lane * 32).cast::<__m256i>());
                    _mm256_stream_si256(to.add(lane * 32).cast::<__m256i>(), block);
                }
                from = from.add(128);
                to = to.add(128);
            }
            copy_nonoverlapping(from, to, nbytes - head - blocks * 128);
            // ORDERING: as in `copy_avx512`.
            _mm_sfence();
        }
    }
}

/// How much of a page that comes soon is asked for.
///
/// MEASURED: crates/engine/examples/pair.rs, pages among 64 MiB.
const PREFETCH_BYTES: usize = 512;

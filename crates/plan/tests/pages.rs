//! Pages and extents: bounds that hold for every page, and walks that agree
//! with the plain definition.

use std::sync::Arc;

use anyfabric_plan::{shard_bytes, shard_pages, Extent, Extents, PageError, PageList};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// A failure prints its seed and keeps it beside the test; PROPTEST_RNG_SEED
/// repeats a run.
fn config() -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases: 2048, failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::default() }
}

fn list(indices: &[u32], page_bytes: u64, stride: u64, offset: u64) -> PageList {
    PageList::new(Arc::from(indices), page_bytes, stride, offset)
}

/// Ordinary, and what overflows.
fn any_number() -> impl Strategy<Value = u64> {
    prop_oneof![0..10_000_u64, any::<u64>(), (0..64_u32).prop_map(|bit| 1 << bit), Just(u64::MAX)]
}

fn any_indices() -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![vec(0..64_u32, 0..50), vec(any::<u32>(), 0..5)]
}

proptest! {
    #![proptest_config(config())]

    /// `check` looks at one index only; this looks at all, in 128 bits.
    #[test]
    fn bounds_are_those_of_every_page(
        indices in any_indices(),
        page_bytes in any_number(),
        stride in any_number(),
        offset in any_number(),
        nbytes in any_number(),
    ) {
        let pages = list(&indices, page_bytes, stride, offset);
        let begin = |index: u32| u128::from(index) * u128::from(stride) + u128::from(offset);
        let fits = |index: &u32| begin(*index) + u128::from(page_bytes) <= u128::from(nbytes);
        prop_assert_eq!(pages.check(nbytes).is_ok(), indices.iter().all(fits));
        if pages.check(nbytes).is_ok() {
            for (page_idx, index) in indices.iter().enumerate() {
                prop_assert_eq!(u128::from(pages.offset_of(page_idx)), begin(*index));
            }
        }
        prop_assert_eq!(u128::from(pages.nbytes()), (u128::from(page_bytes) * indices.len() as u128).min(u64::MAX.into()));
        prop_assert_eq!(pages.num_pages(), indices.len());
        prop_assert_eq!(pages.page_bytes(), page_bytes);
    }

    /// Shards of pages, walked one after the other, are the operation.
    #[test]
    fn shards_of_pages_walk_every_page_in_order(
        pairs in vec((0..1000_u32, 0..1000_u32), 0..200),
        page_bytes in 0..5000_u64,
        speeds in vec(0..4_u32, 1..=8),
        turn: usize,
    ) {
        let (src, dst): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let (src, dst) = (list(&src, page_bytes, 8192, 16), list(&dst, page_bytes, 5000, 7));
        prop_assert_eq!(src.check_alike(&dst), Ok(()));
        let all = Extents::pages(src.clone(), dst.clone());
        prop_assert_eq!(all.num_extents(), src.num_pages());
        prop_assert_eq!(all.nbytes(), src.nbytes());

        let shards = shard_pages(src.num_pages(), page_bytes, &speeds, 1, turn);
        prop_assume!(!shards.is_empty());
        let walked: Vec<_> = shards
            .iter()
            .map(|shard| all.slice(shard.start, shard.len))
            .flat_map(|part| (0..part.num_extents()).map(|idx| part.nth(idx)).collect::<Vec<_>>())
            .collect();
        let expected: Vec<_> = (0..src.num_pages())
            .map(|idx| Extent { src: src.offset_of(idx), dst: dst.offset_of(idx), nbytes: page_bytes })
            .collect();
        prop_assert_eq!(walked, expected);
    }

    #[test]
    fn shards_of_bytes_are_ranges_of_the_extent(
        src in 0..1_u64 << 40,
        dst in 0..1_u64 << 40,
        nbytes in 0..1_u64 << 40,
        speeds in vec(1..4_u32, 1..=8),
        turn: usize,
    ) {
        let whole = Extents::One(Extent { src, dst, nbytes });
        prop_assert_eq!((whole.num_extents(), whole.nbytes()), (1, nbytes));
        let mut at = 0;
        for shard in shard_bytes(nbytes, &speeds, 1, turn) {
            let part = whole.slice(shard.start, shard.len);
            prop_assert_eq!(part.nth(0), Extent { src: src + at, dst: dst + at, nbytes: shard.len });
            at += part.nbytes();
        }
        prop_assert_eq!(at, nbytes);
    }

    /// Slices of slices are slices of the whole.
    #[test]
    fn slices_nest(num_pages in 1..100_usize, cuts in any::<[prop::sample::Index; 4]>()) {
        let indices: Vec<u32> = (0..num_pages as u32).rev().collect();
        let all = Extents::pages(list(&indices, 8, 16, 0), list(&indices, 8, 8, 0));
        let first = cuts[0].index(num_pages);
        let len = cuts[1].index(num_pages - first + 1);
        let inner_first = cuts[2].index(len + 1);
        let inner_len = cuts[3].index(len - inner_first + 1);
        let nested = all.slice(first as u64, len as u64).slice(inner_first as u64, inner_len as u64);
        prop_assert_eq!(nested, all.slice((first + inner_first) as u64, inner_len as u64));
    }
}

#[test]
fn indexed_and_strided() {
    let indexed = list(&[3, 0, 3], 100, 128, 1000);
    assert_eq!((0..3).map(|idx| indexed.offset_of(idx)).collect::<Vec<_>>(), [1384, 1000, 1384]);
    assert_eq!(indexed.nbytes(), 300);
    assert_eq!(indexed.check(1484), Ok(()));
    assert_eq!(indexed.check(1483), Err(PageError::OutOfBounds { index: 3, end: 1484, nbytes: 1483 }));
    // A column of heads: every row, one piece of it.
    let column = list(&[0, 1, 2], 16, 64, 48);
    assert_eq!((0..3).map(|idx| column.offset_of(idx)).collect::<Vec<_>>(), [48, 112, 176]);
    assert_eq!(column.check(192), Ok(()));
    // No pages fit anywhere.
    assert_eq!(list(&[], u64::MAX, u64::MAX, u64::MAX).check(0), Ok(()));
    // Pages of nothing may begin at the very end, not past it.
    assert_eq!(list(&[1], 0, 64, 0).check(64), Ok(()));
    assert!(list(&[1], 0, 64, 0).check(63).is_err());
}

#[test]
fn overflow_is_out_of_bounds() {
    for (index, page_bytes, stride, offset) in
        [(2, 1, 1 << 63, 0), (1, 1, u64::MAX, 1), (1, 2, u64::MAX - 1, 0), (u32::MAX, u64::MAX, u64::MAX, u64::MAX)]
    {
        let error = list(&[index], page_bytes, stride, offset).check(u64::MAX).unwrap_err();
        assert_eq!(error, PageError::OutOfBounds { index, end: u64::MAX, nbytes: u64::MAX });
    }
    // One page, listed often, of a region that may well exist.
    let often = list(&[0; 1 << 10], 1 << 54, 0, 0);
    assert_eq!(often.check(1 << 54), Ok(()));
    assert_eq!(often.nbytes(), u64::MAX);
    assert_eq!(Extents::pages(often.clone(), often).nbytes(), u64::MAX);
}

#[test]
fn lists_that_differ_are_named() {
    let three = list(&[0, 1, 2], 8, 8, 0);
    let error = three.check_alike(&list(&[0, 1], 8, 8, 0)).unwrap_err();
    assert_eq!(error.to_string(), "source has 3 pages, destination has 2");
    let error = three.check_alike(&list(&[0, 1, 2], 9, 9, 0)).unwrap_err();
    assert_eq!(error.to_string(), "source has 8 bytes a page, destination has 9");
    let error = three.check(23).unwrap_err();
    assert_eq!(error.to_string(), "page index 2 ends at byte 24, but the region has 23 bytes");
    // Other places in the region are what page lists are for.
    assert_eq!(three.check_alike(&list(&[9, 9, 9], 8, 1000, 7)), Ok(()));
}

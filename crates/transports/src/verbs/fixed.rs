//! Arrays that other structures point into.

use std::ptr::NonNull;

/// An array that stays where it is for as long as this lives, however this moves.
/// A `Box` would claim that nobody else has a pointer to it.
pub(super) struct Fixed<T, const N: usize> {
    items: NonNull<[T; N]>,
}

impl<T, const N: usize> Fixed<T, N> {
    pub(super) fn new(items: [T; N]) -> Self {
        Self { items: NonNull::from(Box::leak(Box::new(items))) }
    }

    /// Where an item is; valid for as long as this is, and checked.
    #[inline]
    pub(super) fn at(&self, idx: usize) -> *mut T {
        assert!(idx < N);
        // SAFETY: inside the array.
        unsafe { self.items.cast::<T>().as_ptr().add(idx) }
    }
}

impl<T, const N: usize> Drop for Fixed<T, N> {
    fn drop(&mut self) {
        // SAFETY: leaked in `new`, and dropped once.
        drop(unsafe { Box::from_raw(self.items.as_ptr()) });
    }
}

//! Numbered places that are used again.

/// Items by number; inserting allocates only while the slab grows.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    #[inline]
    pub(super) fn insert(&mut self, item: T) -> u32 {
        if let Some(idx) = self.free.pop() {
            self.items[idx as usize] = Some(item);
            return idx;
        }
        self.items.push(Some(item));
        self.items.len() as u32 - 1
    }

    /// The number of the next item.
    #[inline]
    pub(super) fn next(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.items.len() as u32)
    }

    #[inline]
    pub(super) fn get(&self, idx: u32) -> Option<&T> {
        self.items.get(idx as usize)?.as_ref()
    }

    #[inline]
    pub(super) fn get_mut(&mut self, idx: u32) -> Option<&mut T> {
        self.items.get_mut(idx as usize)?.as_mut()
    }

    #[inline]
    pub(super) fn remove(&mut self, idx: u32) -> Option<T> {
        let item = self.items.get_mut(idx as usize)?.take()?;
        self.free.push(idx);
        Some(item)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut().flatten()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(idx, item)| Some((idx as u32, item.as_ref()?)))
    }
}

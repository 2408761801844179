//! Items whose numbers outlive them: a slot map. Those of the libraries have numbers of 64 bits, and a path's goes with
//! every leg and every part.
//!
//! A place is used again and its number is not: the number says how often the place was given, too. Whoever still has the
//! number of an item that is gone finds nothing, as long as it is not kept over thousands of later ones in the same place.
//!
//! ```text
//! number  31..18  turn    how often the place was given, modulo 2^14
//!         17..0   place
//! ```

use std::collections::VecDeque;

/// Items by number.
#[derive(Debug)]
pub(super) struct Roll<T> {
    places: Vec<Place<T>>,
    /// The one that has been free for longest is given first.
    free: VecDeque<u32>,
}

#[derive(Debug)]
struct Place<T> {
    /// Of its item; while it is free, of the next.
    number: u32,
    item: Option<T>,
}

impl<T> Default for Roll<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: VecDeque::new() }
    }
}

impl<T> Roll<T> {
    /// Gives an item a number.
    pub(super) fn insert(&mut self, item: T) -> u32 {
        if let Some(place) = self.free.pop_front().and_then(|place| self.places.get_mut(place as usize)) {
            place.item = Some(item);
            return place.number;
        }
        // An engine has fewer peers than there are places.
        let number = self.places.len() as u32;
        self.places.push(Place { number, item: Some(item) });
        number
    }

    #[inline]
    pub(super) fn get(&self, number: u32) -> Option<&T> {
        let place = self.places.get((number & PLACE) as usize)?;
        place.item.as_ref().filter(|_| place.number == number)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let place = self.places.get_mut((number & PLACE) as usize)?;
        place.item.as_mut().filter(|_| place.number == number)
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        let place = self.places.get_mut((number & PLACE) as usize).filter(|place| place.number == number)?;
        let item = place.item.take()?;
        place.number = number.wrapping_add(PLACE + 1);
        self.free.push_back(number & PLACE);
        Some(item)
    }
}

/// Bits of a number that name the place.
const PLACE: u32 = (1 << 18) - 1;

#[cfg(test)]
mod tests {
    use super::*;

    /// Peers come and go for weeks; some are always there.
    #[test]
    fn places_are_used_again_and_numbers_are_not() {
        let mut roll = Roll::default();
        let staying: Vec<_> = (0..3).map(|item| roll.insert(item)).collect();
        let mut gone = vec![u32::MAX];
        for item in 1000..4000 {
            let number = roll.insert(item);
            assert_eq!(roll.get(number), Some(&item));
            assert_eq!(roll.get_mut(number), Some(&mut { item }));
            assert!(gone.iter().all(|gone| roll.get(*gone).is_none()), "{item} is taken for another");
            assert_eq!(roll.remove(number), Some(item));
            assert_eq!(roll.remove(number), None);
            gone.push(number);
        }
        assert_eq!(roll.places.len(), 4);
        assert!(staying.iter().zip(0..).all(|(number, item)| roll.get(*number) == Some(&item)));
    }
}

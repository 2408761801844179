//! Quarters come to wholes, whichever threads are told of them.

use loom::thread;

use crate::fractions::Places;
use crate::sync::Arc;
use crate::Region;

/// Of two halves one thread makes a whole, and sees the bytes of both.
pub fn a_whole_is_made_once() {
    let (places, halves) = (Arc::new(Places::new()), Arc::new([Region::default(), Region::default()]));
    let bring = |half: usize| {
        let (places, halves) = (Arc::clone(&places), Arc::clone(&halves));
        move || {
            halves[half].write(1);
            let whole = places.whole(7, 2).expect("a place");
            if whole > 0 {
                assert_eq!(halves.iter().map(Region::read).sum::<u64>(), 2);
            }
            whole
        }
    };
    let other = thread::spawn(bring(0));
    let wholes = bring(1)() + other.join().expect("a thread of the model");
    assert_eq!(wholes, 4);
}

/// Two peers that choose the same place get one each.
pub fn peers_have_places_of_their_own() {
    const NUM_PLACES: u32 = 64;
    let places = Arc::new(Places::new());
    let other = thread::spawn({
        let places = Arc::clone(&places);
        move || places.whole(1, 2)
    });
    assert_eq!(places.whole(1 + NUM_PLACES, 3), Some(0));
    assert_eq!(other.join().expect("a thread of the model"), Some(0));
    assert_eq!((places.whole(1, 2), places.whole(1 + NUM_PLACES, 1)), (Some(4), Some(4)));
}

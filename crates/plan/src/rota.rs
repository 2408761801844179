//! Which rails of a path serve the next operation.
//!
//! A path may have more rails than one operation can use, and all are to be
//! used. A small operation goes whole over one rail, the next over the next.
//! Any other takes as many as it is worth, of those that are owed most: what
//! others serve, a rail is owed in proportion to its speed. So of eight equal
//! rails four serve one operation and the other four the next; of unequal ones
//! each carries its share in the long run; and what was long ago, or while a
//! rail was down, is not made up for.

use arrayvec::ArrayVec;

use crate::{RailPlan, MAX_NICS, MAX_SHARDS};

/// Speed of each rail beside the others; 0 for one that has no part in the operation.
pub type Speeds = [u32; MAX_NICS];

/// The rails of a path, and whose turn it is.
#[derive(Debug, Clone, Default)]
pub struct Rota {
    rails: Vec<RailPlan>,
    /// Where the next small operation goes, if that is up.
    turn: usize,
    /// Operations' worth that each is owed, in Gbit/s. Those of the rails that are up keep their sum.
    owed: [i64; MAX_NICS],
}

impl Rota {
    /// Of the rails that [`join_nics`](crate::join_nics) made.
    pub fn new(mut rails: Vec<RailPlan>) -> Self {
        rails.truncate(MAX_NICS);
        Self { rails, ..Self::default() }
    }

    /// The rail whose turn it is among those that are up.
    #[inline]
    pub fn next(&self, is_up: impl Fn(usize) -> bool) -> Option<usize> {
        // Mostly it is up.
        if self.turn < self.rails.len() && is_up(self.turn) {
            return Some(self.turn);
        }
        (self.turn..self.rails.len()).chain(0..self.turn).find(|rail| is_up(*rail))
    }

    /// A small operation goes over this rail.
    #[inline]
    pub fn took(&mut self, rail: usize) {
        self.turn = if rail + 1 < self.rails.len() { rail + 1 } else { 0 };
    }

    /// The rails that serve an operation worth `wanted` of them, at most
    /// [`MAX_SHARDS`], and how fast each is meanwhile: those that share a NIC share
    /// its speed, and what one cannot use is the others'. None when no rail is up.
    pub fn serve(&mut self, wanted: usize, is_up: impl Fn(usize) -> bool) -> Speeds {
        let mut rails: ArrayVec<usize, MAX_NICS> = (0..self.rails.len()).filter(|rail| is_up(*rail)).collect();
        let wanted = wanted.clamp(1, MAX_SHARDS);
        if rails.len() > wanted {
            self.choose(&mut rails, wanted);
        }
        let mut speeds = [0; MAX_NICS];
        match rails[..] {
            [only] => speeds[only] = 1,
            _ => self.divide(rails, &mut speeds),
        }
        speeds
    }

    /// Leaves those of the rails that are owed most, and notes what they are about to carry.
    fn choose(&mut self, rails: &mut ArrayVec<usize, MAX_NICS>, wanted: usize) {
        let speed = |rail: usize| i64::from(self.rails[rail].our_gbps.min(self.rails[rail].their_gbps));
        let whole: i64 = rails.iter().map(|rail| speed(*rail)).sum();
        for rail in &*rails {
            self.owed[*rail] += speed(*rail);
        }
        rails.sort_unstable_by_key(|rail| (-self.owed[*rail], *rail));
        rails.truncate(wanted);
        // By what is left, so that the parts add up to the whole.
        let (mut left, mut speed_left) = (whole, rails.iter().map(|rail| speed(*rail)).sum::<i64>());
        for rail in &*rails {
            let part = left * speed(*rail) / speed_left;
            (left, speed_left) = (left - part, speed_left - speed(*rail));
            self.owed[*rail] -= part;
        }
    }

    /// Divides the speeds of the NICs among the rails, in twelfths of a Gbit/s and at least 1 each: those get theirs first
    /// whose NIC has least for each of its rails, and the others divide what is left.
    fn divide(&self, mut rails: ArrayVec<usize, MAX_NICS>, speeds: &mut Speeds) {
        let mut settled = ArrayVec::<usize, MAX_NICS>::new();
        while !rails.is_empty() {
            let share = |gbps: u32, is_shared: &dyn Fn(&RailPlan) -> bool| {
                let taken: u32 =
                    settled.iter().filter(|rail| is_shared(&self.rails[**rail])).map(|rail| speeds[*rail]).sum();
                let num_sharing = rails.iter().filter(|rail| is_shared(&self.rails[**rail])).count().max(1) as u32;
                (gbps * TWELFTHS).saturating_sub(taken) / num_sharing
            };
            let shares: ArrayVec<u32, MAX_NICS> = rails
                .iter()
                .map(|rail| {
                    let RailPlan { ours, theirs, our_gbps, their_gbps } = self.rails[*rail];
                    share(our_gbps, &|other| other.ours == ours).min(share(their_gbps, &|other| other.theirs == theirs))
                })
                .collect();
            let least = shares.iter().copied().min().unwrap_or(0);
            let mut shares = shares.into_iter();
            rails.retain(|rail| {
                let is_least = shares.next() == Some(least);
                if is_least {
                    speeds[*rail] = least.max(1);
                    settled.push(*rail);
                }
                !is_least
            });
        }
    }
}

/// Divided by 1, 2, 3 and 4 alike.
const TWELFTHS: u32 = 12;

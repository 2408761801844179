//! Where inputs come from: samples, mutated.

use anyfabric_wire::handshake::{Side, MAX_BODY, SEAL_BYTES};
use anyfabric_wire::Frame;

use crate::decoders::{body_of, Decoder};
use crate::samples;

/// Inputs worth mutating: the samples, and some of what was accepted.
pub(crate) struct Corpus {
    samples: Vec<(Decoder, Vec<u8>)>,
    kept: Vec<(Decoder, Vec<u8>)>,
}

impl Corpus {
    const MAX_KEPT: usize = 512;
    const MAX_INPUT: usize = MAX_BODY + 64;

    pub(crate) fn new() -> Self {
        let mut samples = Vec::new();
        let mut add = |decoder, bytes: Vec<u8>| samples.push((decoder, bytes));
        samples::descriptors().iter().for_each(|it| add(Decoder::Descriptor, it.encode()));
        samples::controls().iter().for_each(|it| add(Decoder::Control, it.encode()));
        samples::locals().iter().for_each(|it| add(Decoder::Local, it.encode()));
        samples::frames().iter().for_each(|it| add(Decoder::Frame, it.encode().to_vec()));
        samples::answers().iter().for_each(|it| add(Decoder::Answer, it.encode().to_vec()));
        samples::hellos().iter().for_each(|it| add(Decoder::Hello, body_of(it)));
        samples::welcomes().iter().for_each(|it| add(Decoder::Welcome, body_of(it)));
        add(Decoder::Ack, Frame::encode_ack(7, Ok(())).to_vec());
        add(Decoder::Call, samples::call().encode().to_vec());
        add(Decoder::Body, samples::seal().seal(Side::Caller, &samples::hellos()[0])[..SEAL_BYTES].to_vec());
        add(Decoder::Address, samples::address().to_string().into());
        add(Decoder::EngineId, samples::address().engine.to_string().into());
        Self { samples, kept: Vec::new() }
    }

    /// An input that is nearly, mostly, something valid.
    pub(crate) fn mutant(&self, rng: &mut Rng) -> (Decoder, Vec<u8>) {
        // By decoder first: those with few samples are not to starve.
        let decoder = *rng.pick(&Decoder::ALL);
        let pool = if !self.kept.is_empty() && rng.one_in(3) { &self.kept } else { &self.samples };
        let of_decoder: Vec<_> = pool.iter().filter(|(of, _)| *of == decoder).collect();
        let mut input = match &of_decoder[..] {
            [] => {
                self.samples.iter().find(|(of, _)| *of == decoder).map(|(_, input)| input.clone()).unwrap_or_default()
            }
            some => rng.pick(some).1.clone(),
        };
        if rng.one_in(32) {
            input = (0..rng.below(200)).map(|_| rng.next() as u8).collect();
        }
        for _ in 0..rng.below(6) {
            let other = &rng.pick(&self.samples).1;
            mutate(rng, &mut input, other);
        }
        input.truncate(Self::MAX_INPUT);
        if let Some(nbytes) = decoder.exact_bytes() {
            input.resize(nbytes, 0);
        }
        if !rng.one_in(8) {
            decoder.repair(&mut input);
        }
        (decoder, input)
    }

    pub(crate) fn keep(&mut self, rng: &mut Rng, decoder: Decoder, input: Vec<u8>) {
        if self.kept.len() < Self::MAX_KEPT {
            self.kept.push((decoder, input));
        } else if rng.one_in(16) {
            let idx = rng.below(self.kept.len());
            self.kept[idx] = (decoder, input);
        }
    }
}

/// One change: to a bit, a number, or a range.
fn mutate(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8]) {
    let at = rng.below(input.len() + 1);
    let end = at + rng.below((input.len() - at).min(64) + 1);
    match rng.below(9) {
        0 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.below(8)),
        1 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte = rng.next() as u8),
        2 => {
            let width = *rng.pick(&[1, 2, 4, 8]);
            let number = rng.number().to_le_bytes();
            input.iter_mut().skip(at).zip(&number[..width]).for_each(|(byte, new)| *byte = *new);
        }
        3 => drop(input.splice(at..(at + 1).min(input.len()), varint(rng.number()))),
        4 => drop(input.splice(at..at, varint(rng.number()))),
        5 => drop(input.drain(at..end)),
        6 => {
            let range = input[at..end].to_vec();
            let times = 1 + rng.below(40);
            drop(input.splice(at..at, range.repeat(times)));
        }
        7 => input.truncate(at),
        _ => {
            let from = rng.below(other.len());
            let len = 1 + rng.below(other.len() - from);
            drop(input.splice(at..end, other[from..from + len].iter().copied()));
        }
    }
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// SplitMix64: small, and good enough to pick mutations.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `bound`; 0 when that is 0.
    fn below(&mut self, bound: usize) -> usize {
        self.next().checked_rem(bound as u64).unwrap_or(0) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// A number near a power of two, where limits are.
    fn number(&mut self) -> u64 {
        (1_u64 << self.below(64)).wrapping_add(self.below(3) as u64).wrapping_sub(self.below(3) as u64)
    }
}

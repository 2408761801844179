//! A ring in shared memory, one per sending process and receiver.
//!
//! ```text
//! 0        4096   header: head (consumer), fenced (consumer), beats (producer)
//! 4096     +E     ENTRIES entries of 64 bytes
//! 4096+E   +AREA  bounce area: payload of messages and bounced writes
//! ```
//!
//! An entry, little endian, one cache line:
//!
//! ```text
//! 0   4  stamp    the entry's turn plus one; written last
//! 4   1  kind     see `Entry`
//! 5   3  zero
//! 8   4  imm      with weight
//! 12  4  count    how often to count
//! 16  8  op       operation at the sender
//! 24  8  region   bounced write: at the receiver
//! 32  8  key
//! 40  8  offset   bounced write: into the region
//! 48  4  start    of the payload in the bounce area
//! 52  4  nbytes   of the payload
//! 56  4  status   answer: refusal or zero
//! 60  4  zero
//! ```
//!
//! The consumer polls the stamp of the entry that comes next, so one cache line
//! carries the news. A producer that dies between copying and stamping leaves
//! an entry that is never seen, and as every process has a ring of its own it
//! holds up nobody. The producer may be hostile: the consumer copies an entry
//! out before it looks at it, checks every number, and keeps its own head.

use std::sync::OnceLock;

use anyfabric_wire::{Refusal, WireImm};

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::Arc;
use crate::sys::Mapping;

/// Entries of a ring.
pub const ENTRIES: u32 = 1024;
/// Bytes of the bounce area.
pub const AREA: usize = 1 << 20;
/// Bytes of the whole thing.
pub const BYTES: usize = HEADER + ENTRIES as usize * ENTRY + AREA;

/// What the sender tells the receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Count `imm`, `count` times its weight.
    Arrival {
        /// What to count.
        imm: WireImm,
        /// How often.
        count: u32,
    },
    /// A message of `nbytes` bytes in the bounce area.
    Message {
        /// Echoed by the answer.
        op: u64,
        /// Where it begins.
        start: u32,
        /// Its length.
        nbytes: u32,
    },
    /// Copy bytes of the bounce area into a region.
    Bounce {
        /// Echoed by the answer.
        op: u64,
        /// At the receiver.
        region: u64,
        /// Its key.
        key: u64,
        /// Into the region.
        offset: u64,
        /// Where the bytes begin.
        start: u32,
        /// How many.
        nbytes: u32,
    },
    /// All bytes of a bounced operation have been sent: answer, and count if
    /// none was refused.
    BounceEnd {
        /// Echoed by the answer.
        op: u64,
        /// What to count, and how often.
        imm: Option<(WireImm, u32)>,
    },
    /// How an operation of the receiver's ended here.
    Answer {
        /// Of the operation.
        op: u64,
        /// Its end.
        result: Result<(), Refusal>,
    },
}

/// The sending side.
#[derive(Debug)]
pub struct Producer {
    memory: Arc<Mapping>,
    /// Entries published.
    tail: u32,
    /// Entries the consumer is known to have taken.
    head: u32,
    /// Where the next payload begins, and the oldest that is still in use,
    /// both counted without wrapping.
    area_tail: u64,
    area_head: u64,
    /// Ends of payloads by entry, to free them when the entry was taken.
    area_ends: std::collections::VecDeque<(u32, u64)>,
    beats: u32,
}

impl Producer {
    /// Over a mapping of [`BYTES`] zeroed bytes.
    pub fn new(memory: Arc<Mapping>) -> Self {
        assert!(memory.len() >= BYTES, "a ring needs {BYTES} bytes");
        Self { memory, tail: 0, head: 0, area_tail: 0, area_head: 0, area_ends: Default::default(), beats: 0 }
    }

    /// Whether the consumer has given us up: nothing we publish is read.
    #[inline]
    pub fn is_fenced(&self) -> bool {
        // ORDERING: a late look costs an entry nobody reads.
        word(&self.memory, FENCED).load(Ordering::Relaxed) != 0
    }

    /// Whether so many entries wait that the consumer should look.
    #[inline]
    pub fn is_half_full(&mut self) -> bool {
        if self.tail.wrapping_sub(self.head) < ENTRIES / 2 {
            return false;
        }
        self.refresh();
        self.tail.wrapping_sub(self.head) >= ENTRIES / 2
    }

    /// Room for an entry.
    #[inline]
    pub fn has_room(&mut self) -> bool {
        if self.tail.wrapping_sub(self.head) < ENTRIES {
            return true;
        }
        self.refresh();
        self.tail.wrapping_sub(self.head) < ENTRIES
    }

    /// Shows the consumer that this process lives.
    pub fn beat(&mut self) {
        // 0 is left to those who show it otherwise.
        self.beats = self.beats.wrapping_add(1).max(1);
        // ORDERING: it announces nothing; partner: `Consumer::beats`.
        word(&self.memory, BEATS).store(self.beats, Ordering::Relaxed);
    }

    /// Publishes an entry; false when the ring is full.
    ///
    /// Everything this thread wrote before, to any mapped memory, is visible
    /// to who sees the entry.
    pub fn push(&mut self, entry: &Entry) -> bool {
        self.publish(&encode(entry)[1..])
    }

    /// As [`Producer::push`], of the news that is hurried for.
    #[inline]
    pub fn push_arrival(&mut self, imm: WireImm, count: u32) -> bool {
        self.publish(&[ARRIVAL, imm.encode(), count])
    }

    #[inline]
    fn publish(&mut self, words: &[u32]) -> bool {
        if !self.has_room() {
            return false;
        }
        let [stamp, rest @ ..] = entry_at(&self.memory, self.tail);
        for (to, value) in rest.iter().zip(words) {
            // ORDERING: published by the stamp; the consumer has read what was there, see `refresh`.
            to.store(*value, Ordering::Relaxed);
        }
        // ORDERING: release the entry and all copied bytes; partner: the acquire in `Consumer::pop`. A swap and not a
        // store, for it is also the full fence between this news and the look for sleepers in `Doorbell`.
        stamp.swap(self.tail.wrapping_add(1), Ordering::SeqCst);
        self.tail = self.tail.wrapping_add(1);
        true
    }

    /// Reserves `nbytes` contiguous bytes of the bounce area for the entry that
    /// is pushed next; `None` when there is no room yet.
    pub fn reserve(&mut self, nbytes: usize) -> Option<(u32, *mut u8)> {
        if !self.has_room() || nbytes > AREA {
            return None;
        }
        self.refresh();
        let at = (self.area_tail % AREA as u64) as usize;
        // A payload does not wrap: skip the rest of the area when it is too short.
        let skip = if at + nbytes > AREA { AREA - at } else { 0 };
        let end = self.area_tail + (skip + nbytes) as u64;
        if end - self.area_head > AREA as u64 {
            return None;
        }
        let start = if skip > 0 { 0 } else { at };
        self.area_tail = end;
        self.area_ends.push_back((self.tail, end));
        // SAFETY: `start + nbytes` lies inside the area, which lies inside the mapping.
        Some((start as u32, unsafe { self.memory.as_ptr().add(AREA_AT + start) }))
    }

    /// Most bytes that can be reserved at this moment.
    pub fn room(&mut self) -> usize {
        self.refresh();
        let free = AREA as u64 - (self.area_tail - self.area_head);
        let at = self.area_tail % AREA as u64;
        let to_end = AREA as u64 - at;
        // Either what is left up to the end, or what is left behind it.
        free.min(to_end.max(free.saturating_sub(to_end))) as usize
    }

    /// Lets go of the ring, which is full and fenced from now on.
    pub fn end(&mut self) {
        if let Some(memory) = ended() {
            (self.tail, self.head) = (ENTRIES, 0);
            self.memory = memory;
        }
    }

    fn refresh(&mut self) {
        // ORDERING: acquire: the consumer has read what it took; partner: `Consumer::publish_head`.
        let head = word(&self.memory, HEAD).load(Ordering::Acquire);
        // A hostile consumer may claim anything; believe only what can be.
        if head.wrapping_sub(self.head) <= self.tail.wrapping_sub(self.head) {
            self.head = head;
        }
        while let Some(&(entry, end)) = self.area_ends.front() {
            if self.head.wrapping_sub(entry).wrapping_sub(1) >= ENTRIES * 2 {
                break;
            }
            self.area_head = end;
            self.area_ends.pop_front();
        }
        if self.area_ends.is_empty() {
            // From the start again: the longest payload fits nowhere else, and would wait for ever.
            self.area_tail = self.area_tail.next_multiple_of(AREA as u64);
            self.area_head = self.area_tail;
        }
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct Consumer {
    memory: Arc<Mapping>,
    head: u32,
    published: u32,
}

impl Consumer {
    /// Over a mapping of [`BYTES`] bytes.
    pub fn new(memory: Arc<Mapping>) -> Self {
        assert!(memory.len() >= BYTES, "a ring needs {BYTES} bytes");
        Self { memory, head: 0, published: 0 }
    }

    /// How often the producer has shown that it lives, modulo 2³²; 0 when it
    /// never did.
    pub fn beats(&self) -> u32 {
        // ORDERING: see `Producer::beat`.
        word(&self.memory, BEATS).load(Ordering::Relaxed)
    }

    /// Whether an entry waits.
    #[inline]
    pub fn has_news(&self) -> bool {
        // ORDERING: acquire the entry and the bytes it announces; partner: `Producer::push`.
        entry_at(&self.memory, self.head)[0].load(Ordering::Acquire) == self.head.wrapping_add(1)
    }

    /// The next entry: `None` when there is none, an error when it makes no
    /// sense and the producer must be given up.
    #[inline]
    pub fn pop(&mut self) -> Option<Result<Entry, &'static str>> {
        if !self.has_news() {
            return None;
        }
        let entry = entry_at(&self.memory, self.head);
        self.head = self.head.wrapping_add(1);
        let mut words = [0; ENTRY / 4];
        // ORDERING: acquired with the stamp. A hostile producer may change it meanwhile; we look only at our copy.
        let read = |idx: usize| entry[idx].load(Ordering::Relaxed);
        (1..4).for_each(|idx| words[idx] = read(idx));
        if words[1] == ARRIVAL {
            return Some(Ok(Entry::Arrival { imm: WireImm::decode(words[2]), count: words[3] }));
        }
        (4..words.len()).for_each(|idx| words[idx] = read(idx));
        Some(decode(&words))
    }

    /// Lets the producer reuse the entries taken so far; done now and then, for
    /// every time costs the producer a cache miss.
    #[inline]
    pub fn publish_head(&mut self, now: bool) {
        let taken = self.head.wrapping_sub(self.published);
        if taken >= ENTRIES / 4 || (now && taken > 0) {
            // ORDERING: release our reads of entries and payloads; partner: `Producer::refresh`.
            word(&self.memory, HEAD).store(self.head, Ordering::Release);
            self.published = self.head;
        }
    }

    /// Payload bytes of an entry; they may change while they are read.
    pub fn payload(&self, start: u32, nbytes: u32) -> Option<*const u8> {
        let (start, nbytes) = (start as usize, nbytes as usize);
        if start.checked_add(nbytes)? > AREA {
            return None;
        }
        // SAFETY: checked above.
        Some(unsafe { self.memory.as_ptr().add(AREA_AT + start) })
    }

    /// Lets go of the ring, which is empty from now on.
    pub fn end(&mut self) {
        if let Some(memory) = ended() {
            (self.head, self.published) = (0, 0);
            self.memory = memory;
        }
    }

    /// Tells the producer that it is given up.
    pub fn fence(&self) {
        // ORDERING: nothing depends on when it is seen; partner: `is_fenced`.
        word(&self.memory, FENCED).store(1, Ordering::Relaxed);
    }
}

/// A ring for all that have ended: fenced, and nothing is ever taken from it or published in it. `None`: no memory, and
/// who wants to let go of his own keeps it.
fn ended() -> Option<Arc<Mapping>> {
    static ENDED: OnceLock<Option<Arc<Mapping>>> = OnceLock::new();
    let ended = ENDED.get_or_init(|| {
        let memory = Arc::new(Mapping::anonymous(BYTES).ok()?);
        // ORDERING: before anybody else has it.
        word(&memory, FENCED).store(1, Ordering::Relaxed);
        Some(memory)
    });
    ended.clone()
}

const HEADER: usize = 4096;
const ENTRY: usize = 64;
const AREA_AT: usize = HEADER + ENTRIES as usize * ENTRY;
const HEAD: usize = 0;
const FENCED: usize = 64;
const BEATS: usize = 128;

const ARRIVAL: u32 = 1;
const MESSAGE: u32 = 2;
const BOUNCE: u32 = 3;
const BOUNCE_END: u32 = 4;
const BOUNCE_END_COUNTED: u32 = 5;
const ANSWER: u32 = 6;

#[inline]
fn encode(entry: &Entry) -> [u32; ENTRY / 4] {
    let mut words = [0; ENTRY / 4];
    let split = |words: &mut [u32; ENTRY / 4], at: usize, value: u64| {
        words[at] = value as u32;
        words[at + 1] = (value >> 32) as u32;
    };
    match *entry {
        Entry::Arrival { imm, count } => {
            words[1] = ARRIVAL;
            words[2] = imm.encode();
            words[3] = count;
        }
        Entry::Message { op, start, nbytes } => {
            words[1] = MESSAGE;
            split(&mut words, 4, op);
            words[12] = start;
            words[13] = nbytes;
        }
        Entry::Bounce { op, region, key, offset, start, nbytes } => {
            words[1] = BOUNCE;
            split(&mut words, 4, op);
            split(&mut words, 6, region);
            split(&mut words, 8, key);
            split(&mut words, 10, offset);
            words[12] = start;
            words[13] = nbytes;
        }
        Entry::BounceEnd { op, imm } => {
            words[1] = BOUNCE_END;
            if let Some((imm, count)) = imm {
                words[1] = BOUNCE_END_COUNTED;
                words[2] = imm.encode();
                words[3] = count;
            }
            split(&mut words, 4, op);
        }
        Entry::Answer { op, result } => {
            words[1] = ANSWER;
            split(&mut words, 4, op);
            words[14] = result.err().map_or(0, |refusal| refusal.code().into());
        }
    }
    words
}

#[inline]
fn decode(words: &[u32; ENTRY / 4]) -> Result<Entry, &'static str> {
    let join = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
    let op = join(4);
    Ok(match words[1] {
        ARRIVAL => Entry::Arrival { imm: WireImm::decode(words[2]), count: words[3] },
        MESSAGE => Entry::Message { op, start: words[12], nbytes: words[13] },
        BOUNCE => {
            Entry::Bounce { op, region: join(6), key: join(8), offset: join(10), start: words[12], nbytes: words[13] }
        }
        BOUNCE_END => Entry::BounceEnd { op, imm: None },
        BOUNCE_END_COUNTED => Entry::BounceEnd { op, imm: Some((WireImm::decode(words[2]), words[3])) },
        ANSWER => {
            let result = match words[14] {
                0 => Ok(()),
                code => {
                    let refusal = u8::try_from(code).ok().and_then(Refusal::from_code);
                    Err(refusal.ok_or("an answer with an unknown refusal")?)
                }
            };
            Entry::Answer { op, result }
        }
        _ => return Err("an entry of unknown kind"),
    })
}

/// The words of that turn's entry, the stamp first.
#[inline]
fn entry_at(memory: &Mapping, turn: u32) -> &[AtomicU32; ENTRY / 4] {
    // SAFETY: an entry, aligned, of a mapping of BYTES; every access to it is atomic.
    unsafe { memory.words(HEADER + (turn % ENTRIES) as usize * ENTRY) }
}

/// A word of the header.
#[inline]
fn word(memory: &Mapping, at: usize) -> &AtomicU32 {
    // SAFETY: aligned, inside the header, and every access to these words is atomic.
    let [word] = unsafe { memory.words(at) };
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever came before it: nothing waits for room that is there.
    #[test]
    fn an_empty_area_takes_the_longest_payload() {
        let memory = Arc::new(Mapping::anonymous(BYTES).unwrap());
        let (mut producer, mut consumer) = (Producer::new(Arc::clone(&memory)), Consumer::new(memory));
        for before in [1, AREA / 3, AREA / 2 + 1, AREA - 1] {
            for nbytes in [before, AREA] {
                assert!(producer.room() >= nbytes, "{nbytes} bytes after {before}");
                let (start, _) = producer.reserve(nbytes).unwrap();
                assert!(producer.push(&Entry::Message { op: 1, start, nbytes: nbytes as u32 }));
                assert!(producer.reserve(AREA).is_none());
                let Some(Ok(Entry::Message { start, nbytes, .. })) = consumer.pop() else { panic!("no message") };
                assert!(consumer.payload(start, nbytes).is_some());
                consumer.publish_head(true);
            }
        }
    }
}

//! Messages over rails: their form, and the answers that they are owed.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | 0: a message, 1: the answer to one |
//! | 1 | of an answer: 0, or the code of the refusal |
//! | 2..8 | 0 |
//! | 8..16 | number, of the sender's choice; its answer has the same |
//! | 16..24 | key of the path: what knows only where a NIC is cannot send for a peer |
//! | 24.. | the message |
//!
//! A NIC says that a message was taken, and its engine that it was queued. Done means queued, so every message is
//! answered, over the rail on which it came. What a rail had when it broke fails and is not sent again: it may have
//! arrived, and nothing arrives twice.

use anyfabric_wire::Refusal;

use super::book::{Book, Rail};
use super::group::State;
use super::nic::Nic;
use crate::{Failure, Sink};

/// Bytes before a message.
pub(super) const HEADER: usize = 24;

/// The answer to a message, until it is posted.
pub(super) struct Answer {
    path: u32,
    rail: usize,
    bytes: [u8; HEADER],
}

/// Writes a message in its form.
pub(super) fn frame(into: &mut Vec<u8>, number: u64, key: u64, message: &[u8]) {
    into.clear();
    into.extend_from_slice(&header(MESSAGE, 0, number, key));
    into.extend_from_slice(message);
}

impl Book {
    /// A message has come, or an answer: what a peer sends may be anything.
    pub(super) fn came(&mut self, (path_idx, rail): (u32, usize), bytes: &[u8], sink: &dyn Sink, now_ns: u64) {
        let Some(path) = self.paths.get(path_idx) else { return };
        let Some((header, message)) = bytes.split_first_chunk::<HEADER>() else { return };
        let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (number, key) = (word(8), path.key);
        if word(16) != key {
            return log::warn!("a message over a rail of peer {} is not of that peer", path.peer);
        }
        match (header[0], header[1]) {
            (MESSAGE, _) => {
                let code = sink.message(path.peer, message.to_vec()).map_or_else(Refusal::code, |()| 0);
                if self.answers.len() < MAX_ANSWERS {
                    let bytes = self::header(ANSWER, code, number, key);
                    self.answers.push_back(Answer { path: path_idx, rail, bytes });
                }
            }
            (ANSWER, code) => self.answered(path_idx, number, code, now_ns),
            _ => log::warn!("a message over a rail of peer {} is neither message nor answer", path.peer),
        }
    }

    fn answered(&mut self, path: u32, number: u64, code: u8, now_ns: u64) {
        let part_idx = self.paths.get_mut(path).and_then(|path| path.unanswered.remove(&number));
        let Some((part_idx, part)) = part_idx.and_then(|idx| Some((idx, self.parts.get_mut(idx)?))) else { return };
        part.awaits_answer = false;
        let flight = part.flight;
        match (code, Refusal::from_code(code)) {
            (0, _) => {}
            (_, Some(refusal)) => self.fail_flight(flight, |_| Failure::Refused(refusal)),
            _ => {
                self.fail_flight(flight, |_| Failure::ConnectionBroken(format!("refused with the unknown code {code}")))
            }
        }
        self.settle_part(part_idx, now_ns);
    }

    /// The peer's NIC has an answer, or never will.
    pub(super) fn answer_ended(&mut self, (path, rail): (u32, usize)) {
        if let Some(rail) = self.rail(path, rail) {
            // Those of a rail that broke were forgotten with it, and may end late.
            rail.answers = rail.answers.saturating_sub(1);
        }
    }

    /// Whether an answer waits to be posted, or to end, on a path.
    pub(super) fn owes_answers(&self, path: u32) -> bool {
        let waits = || self.answers.iter().any(|answer| answer.path == path);
        let is_under_way = |rail: &Rail| rail.answers > 0 && rail.stage.stands();
        self.paths.get(path).is_some_and(|path| path.rails.iter().any(is_under_way)) || waits()
    }

    /// A rail has stopped: whether its messages were queued will not be known.
    pub(super) fn lose_answers(&mut self, path_idx: u32, rail_no: usize, why: &str, now_ns: u64) {
        let Some(path) = self.paths.get(path_idx) else { return };
        let is_of = |part: u32| self.parts.get(part).is_some_and(|part| part.rail == rail_no);
        let lost: Vec<u32> = path.unanswered.values().copied().filter(|part| is_of(*part)).collect();
        for part in lost {
            self.drop_part(part, why, now_ns);
        }
    }
}

impl<N: Nic> State<N> {
    /// Posts the answers that are due, as far as there is room.
    pub(super) fn answer(&mut self) {
        for _ in 0..self.book.answers.len() {
            let Some(Answer { path, rail, bytes }) = self.book.answers.pop_front() else { break };
            // A message may overtake the word that its rail stands: it came, so the rail does.
            let Some(standing) = self.book.rail(path, rail).filter(|rail| rail.stage.stands()) else { continue };
            let (nic, Some(idx)) = (standing.nic, standing.idx) else { continue };
            // A rail that is broken says so in a poll; only an engine that closes waits for the end of an answer.
            match self.nics[nic].send(idx, &bytes, ANSWER_TOKEN) {
                Ok(true) => standing.answers += 1,
                Ok(false) => self.book.answers.push_back(Answer { path, rail, bytes }),
                Err(_) => {}
            }
        }
    }
}

fn header(kind: u8, code: u8, number: u64, key: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    (header[0], header[1]) = (kind, code);
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&key.to_le_bytes());
    header
}

const MESSAGE: u8 = 0;
const ANSWER: u8 = 1;
/// The token of every answer; no batch has it.
pub(super) const ANSWER_TOKEN: u32 = u32::MAX;
/// Answers that wait at most; a peer whose messages get none sees them time out.
const MAX_ANSWERS: usize = 4096;

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};
    use std::sync::{Arc, Mutex};

    use anyfabric_plan::Rota;
    use anyfabric_wire::NicLibrary;

    use super::*;
    use crate::rdma::book::Path;
    use crate::rdma::slab::Slab;
    use crate::tcp::TcpLink;
    use crate::{lock, Clock, PeerIdx, PeerStats, RegionTable, Splits};

    /// Keeps messages, and refuses those of three bytes.
    #[derive(Default)]
    struct Inbox(Mutex<Vec<Vec<u8>>>);

    impl Sink for Inbox {
        fn message(&self, _: PeerIdx, bytes: Vec<u8>) -> Result<(), Refusal> {
            if bytes.len() == 3 {
                return Err(Refusal::Full);
            }
            lock(&self.0).push(bytes);
            Ok(())
        }
    }

    const KEY: u64 = 0x0123_4567_89ab_cdef;

    fn book() -> Book {
        let control = TcpLink::new(1, Arc::<RegionTable>::default(), 1 << 16, 1, Clock::Real);
        let mut book = Book::default();
        book.paths.insert(Path {
            peer: 1,
            rails: Vec::new(),
            waiting: VecDeque::new(),
            stranded: VecDeque::new(),
            unanswered: HashMap::new(),
            key: KEY,
            rota: Rota::default(),
            held: Slab::default(),
            stats: Arc::new(PeerStats::new(1)),
            splits: Splits::default(),
            control: Arc::new(control),
            library: NicLibrary::Libfabric,
            is_caller: true,
            why: String::new(),
            is_stuck: false,
        });
        book
    }

    #[test]
    fn a_message_is_queued_and_answered() {
        let (mut book, inbox, mut bytes) = (book(), Inbox::default(), Vec::new());
        for message in [&b"hello"[..], b"", b"333"] {
            frame(&mut bytes, 7, KEY, message);
            book.came((0, 2), &bytes, &inbox, 0);
        }
        assert_eq!(*lock(&inbox.0), [b"hello".to_vec(), Vec::new()]);
        let answers: Vec<_> = book.answers.iter().map(|answer| (answer.path, answer.rail, answer.bytes)).collect();
        let answer = |code| (0, 2, header(ANSWER, code, 7, KEY));
        assert_eq!(answers, [answer(0), answer(0), answer(Refusal::Full.code())]);
    }

    #[test]
    fn what_is_not_of_the_peer_or_makes_no_sense_is_dropped() {
        let (mut book, inbox) = (book(), Inbox::default());
        let mut came = |path, bytes: &[u8]| book.came((path, 0), bytes, &inbox, 0);
        came(0, b"");
        came(0, &header(MESSAGE, 0, 1, KEY)[..HEADER - 1]);
        came(0, &header(MESSAGE, 0, 1, KEY ^ 1));
        came(0, &header(9, 0, 1, KEY));
        // An answer to what was never sent, and one that no refusal has.
        came(0, &header(ANSWER, 0, 1, KEY));
        came(0, &header(ANSWER, 255, 1, KEY));
        came(5, &header(MESSAGE, 0, 1, KEY));
        assert!(lock(&inbox.0).is_empty() && book.answers.is_empty());
    }

    #[test]
    fn answers_that_cannot_be_sent_do_not_pile_up() {
        let (mut book, inbox) = (book(), Inbox::default());
        for number in 0..MAX_ANSWERS as u64 + 10 {
            book.came((0, 0), &header(MESSAGE, 0, number, KEY), &inbox, 0);
        }
        assert_eq!(book.answers.len(), MAX_ANSWERS);
    }
}

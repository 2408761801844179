//! What must hold, whatever was done and whatever went wrong.

use std::collections::{BTreeMap, BTreeSet};

use anyfabric_engine::{Code, RemoteSlice, Slice, WriteOptions};

use crate::chaos::{open_counter, Chaos, Sent, Unit, IMMS, REGION};
use crate::world::{code, ms, outcome, peek, World, NOTICED};

impl Chaos {
    /// An operation is refused at once only because a peer is lost.
    pub(super) fn check_lost(&self, from: usize, tos: &[usize], code: Code) {
        assert_eq!(code, Code::PeerLost);
        let sound = self.nodes[from].is_sound && tos.iter().all(|to| self.nodes[*to].is_sound);
        assert!(!sound, "a peer was lost that nothing happened to");
    }

    pub(super) fn check_never_ahead(&mut self) {
        for idx in self.awake() {
            for (imm, counter) in &self.nodes[idx].counters {
                let value = counter.value();
                let mut placed = 0;
                for unit in self.sent.iter_mut().filter(|sent| sent.imm == Some(*imm)).flat_map(|sent| &mut sent.units)
                {
                    if unit.to == idx {
                        let nbytes = unit.bytes.len() as u64;
                        unit.placed = unit.placed || peek(&self.nodes[idx].target, unit.at, nbytes) == unit.bytes;
                        placed += u64::from(unit.placed);
                    }
                }
                assert!(value <= placed, "engine {idx} counted {value} of imm {imm}, but {placed} are placed");
            }
        }
    }

    pub(super) fn settle(&mut self, world: &mut World) {
        if world.random.one_in(2) {
            self.go_on(world);
        }
        for _ in 0..20 {
            world.run(ms(500));
            self.take_messages();
            self.check_never_ahead();
        }
        assert!(world.simulation.is_idle());
        for idx in self.awake() {
            for imm in 1..=IMMS {
                if !self.nodes[idx].counters.contains_key(&imm) {
                    open_counter(&mut self.nodes, idx, imm);
                }
            }
        }
        self.check_transfers();
        self.check_bytes();
        self.check_counts();
        self.check_messages();
        self.check_losses(world);
    }

    fn check_transfers(&self) {
        for sent in self.sent.iter().filter(|sent| self.nodes[sent.from].is_awake()) {
            let ended = outcome(&sent.transfer).unwrap_or_else(|| panic!("not ended: {:?}", sent.transfer));
            let tos = sent.units.iter().map(|unit| unit.to).chain(sent.message.iter().map(|(to, _)| *to));
            let ends = (sent.from, tos.clone().collect::<Vec<_>>());
            assert!(sent.transfer.is_quiesced(), "{ends:?}, {ended:?} and not quiesced: {:?}", sent.transfer);
            let sound = self.nodes[sent.from].is_sound && tos.into_iter().all(|to| self.nodes[to].is_sound);
            if let Err(code) = ended {
                assert!(!sound, "{code:?} between engines that nothing happened to: {:?}", sent.transfer);
                let expected = [Code::PeerLost, Code::ConnectionBroken, Code::TransferTimeout, Code::Refused];
                assert!(expected.contains(&code), "{code:?}");
            }
        }
    }

    fn check_bytes(&self) {
        let mut expected: Vec<BTreeMap<u64, (&Unit, bool)>> = self.nodes.iter().map(|_| BTreeMap::new()).collect();
        for sent in &self.sent {
            let is_done = outcome(&sent.transfer) == Some(Ok(()));
            for unit in sent.units.iter().filter(|unit| !unit.bytes.is_empty()) {
                expected[unit.to].insert(unit.at, (unit, is_done));
            }
        }
        for (node, units) in self.nodes.iter().zip(expected) {
            let found = peek(&node.target, 0, REGION);
            let mut at = 0;
            for (start, (unit, is_done)) in units {
                assert_eq!(found[at..start as usize], node.before[at..start as usize], "bytes beside a write changed");
                at = start as usize + unit.bytes.len();
                let found = &found[start as usize..at];
                if is_done {
                    assert!(found == unit.bytes, "done, and not the bytes that were sent");
                }
                let before = &node.before[start as usize..at];
                let intact =
                    found.iter().zip(&unit.bytes).zip(before).all(|((byte, sent), old)| byte == sent || byte == old);
                assert!(intact, "bytes that nobody sent");
            }
            assert_eq!(found[at..], node.before[at..], "bytes behind the last write changed");
        }
    }

    fn check_counts(&self) {
        for idx in self.awake() {
            let node = &self.nodes[idx];
            let gave_up = |from: usize| node.engine.path(self.nodes[from].engine.address()).state == "lost";
            for (imm, counter) in &node.counters {
                let counted = || self.sent.iter().filter(|sent| sent.imm == Some(*imm));
                let units = |sent: &Sent| sent.units.iter().filter(|unit| unit.to == idx).count() as u64;
                let value = counter.value();
                let total: u64 = counted().map(units).sum();
                let sure = |sent: &&Sent| outcome(&sent.transfer) == Some(Ok(())) && !gave_up(sent.from);
                let done: u64 = counted().filter(sure).map(units).sum();
                assert!((done..=total).contains(&value), "imm {imm}: {value}, of {done} done and {total} asked for");
                // Who never met the sender, or has given it up, cannot be told.
                let meets = |from: usize| {
                    let state = node.engine.path(self.nodes[from].engine.address()).state;
                    ["ready", "degraded"].contains(&&*state)
                };
                let reports = |sent: &Sent| self.nodes[sent.from].is_awake() && meets(sent.from);
                if value < total && counted().filter(|sent| units(sent) > 0).all(reports) {
                    let error = code(counter.wait(total, Some(ms(0))));
                    assert!(matches!(error, Code::TransferFailed | Code::PeerLost), "imm {imm}: {error:?}");
                }
            }
        }
    }

    fn check_messages(&self) {
        for (idx, node) in self.nodes.iter().enumerate() {
            let taken = self.messages_taken.get(&idx).cloned().unwrap_or_default();
            let unique: BTreeSet<&Vec<u8>> = taken.iter().collect();
            assert_eq!(unique.len(), taken.len(), "a message came twice");
            for sent in &self.sent {
                if let Some((_, message)) = sent.message.as_ref().filter(|(to, _)| *to == idx) {
                    let came = unique.contains(message);
                    if outcome(&sent.transfer) == Some(Ok(())) && node.is_awake() {
                        assert!(came, "a message that was sent never came");
                    }
                }
            }
            assert!(taken.iter().all(|message| self
                .sent
                .iter()
                .any(|sent| { sent.message.as_ref().is_some_and(|(to, sent)| *to == idx && sent == message) })));
        }
    }

    /// Who is dead is known to be, everybody else is still reached.
    fn check_losses(&mut self, world: &mut World) {
        let awake = self.awake();
        for &from in &awake {
            for to in 0..self.nodes.len() {
                let (node, peer) = (&self.nodes[from], &self.nodes[to]);
                let path = node.engine.path(peer.engine.address());
                if from == to || path.state == "new" {
                    continue;
                }
                if peer.is_dead {
                    assert!(!["ready", "degraded"].contains(&&*path.state), "{path:?} to a dead engine");
                } else if node.is_sound && peer.is_sound {
                    let nothing: (Slice, RemoteSlice) =
                        (node.source.slice(0..0).unwrap(), peer.remote.slice(0..0).unwrap());
                    let write = node.engine.write(&nothing.0, &nothing.1, WriteOptions::default()).unwrap();
                    write.wait(None).unwrap();
                }
            }
        }
        world.run(NOTICED);
    }
}

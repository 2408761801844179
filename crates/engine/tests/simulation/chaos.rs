//! Everything at once: random engines, operations and faults. After every step
//! no count is ahead of its bytes; in the end every transfer has ended, what is
//! done is there byte for byte, and nothing else was touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyfabric_engine::transports::loopback::Fault;
use anyfabric_engine::{
    Address, Counter, Engine, Operation, PageList, Region, Remote, ScatterTarget, Transfer, Watcher, WriteOptions,
};

use crate::world::{for_seeds, id, outcome, peek, poke, remote, World};

#[test]
fn without_faults_everything_arrives_exactly() {
    for_seeds(150, |world| {
        let mut chaos = Chaos::new(world);
        chaos.play(world, 60, false);
        chaos.settle(world);
        assert!(chaos.sent.iter().all(|sent| outcome(&sent.transfer) == Some(Ok(()))), "no fault, and a failure");
    });
}

#[test]
fn with_faults_nothing_is_wrong_and_everything_ends() {
    for_seeds(200, |world| {
        let mut chaos = Chaos::new(world);
        chaos.play(world, 80, true);
        chaos.settle(world);
    });
}

#[test]
fn the_same_seed_is_the_same_run() {
    for_seeds(20, |world| {
        let trace = |world: &mut World| {
            let mut chaos = Chaos::new(world);
            chaos.play(world, 60, true);
            chaos.settle(world);
            world.simulation.trace()
        };
        let first = trace(world);
        let mut again = World::new(world.seed, anyfabric_engine::transports::loopback::Fabric::random);
        assert_eq!(first, trace(&mut again));
    });
}

/// Several engines, and what they have been asked to do.
pub(super) struct Chaos {
    pub(super) nodes: Vec<Node>,
    pub(super) sent: Vec<Sent>,
    pub(super) messages_taken: BTreeMap<usize, Vec<Vec<u8>>>,
}

pub(super) struct Node {
    pub(super) engine: Engine,
    pub(super) source: Region,
    pub(super) target: Region,
    pub(super) remote: Remote,
    pub(super) watcher: Watcher,
    /// What the target held before anybody wrote.
    pub(super) before: Vec<u8>,
    pub(super) source_used: u64,
    pub(super) target_used: u64,
    pub(super) counters: BTreeMap<u32, Counter>,
    /// Nothing ever went wrong with it.
    pub(super) is_sound: bool,
    pub(super) is_dead: bool,
    pub(super) is_stopped: bool,
}

/// One submitted operation.
pub(super) struct Sent {
    pub(super) from: usize,
    pub(super) transfer: Transfer,
    pub(super) imm: Option<u32>,
    pub(super) units: Vec<Unit>,
    pub(super) message: Option<(usize, Vec<u8>)>,
    /// Where it reads; scribbled over when it has quiesced.
    pub(super) source: (u64, u64),
    pub(super) scribbled: bool,
}

/// What counts once.
pub(super) struct Unit {
    pub(super) to: usize,
    pub(super) at: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) placed: bool,
}

impl Chaos {
    fn new(world: &mut World) -> Self {
        let num_nodes = world.random.between(2, 5);
        let mut nodes: Vec<Node> = (0..num_nodes)
            .map(|_| {
                let engine = world.engine();
                let (source, target) = (world.region(&engine, REGION), world.region(&engine, REGION));
                let (remote, before) = (remote(&target), peek(&target, 0, REGION).to_vec());
                let watcher = engine.watch().unwrap();
                Node {
                    engine,
                    source,
                    target,
                    remote,
                    watcher,
                    before,
                    source_used: 0,
                    target_used: 0,
                    counters: BTreeMap::new(),
                    is_sound: true,
                    is_dead: false,
                    is_stopped: false,
                }
            })
            .collect();
        for idx in 0..nodes.len() {
            // Some counters are opened before anything arrives, the others after.
            for imm in 1..=IMMS {
                if world.random.one_in(2) {
                    open_counter(&mut nodes, idx, imm);
                }
            }
        }
        Self { nodes, sent: Vec::new(), messages_taken: BTreeMap::new() }
    }

    fn play(&mut self, world: &mut World, num_turns: u64, faults: bool) {
        for _ in 0..num_turns {
            match world.random.below(10) {
                0..=4 => self.submit(world),
                5 if faults => self.fault(world),
                6 => self.open_some_counter(world),
                _ => {}
            }
            for _ in 0..world.random.below(12) {
                world.simulation.step();
                self.check_never_ahead();
            }
            self.take_messages();
            self.scribble();
        }
    }

    // ---- what is done --------------------------------------------------------------------------

    pub(super) fn awake(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|idx| self.nodes[*idx].is_awake()).collect()
    }

    fn submit(&mut self, world: &mut World) {
        let awake = self.awake();
        if awake.is_empty() {
            return;
        }
        let from = *world.random.pick(&awake);
        let others: Vec<usize> = (0..self.nodes.len()).filter(|to| *to != from).collect();
        let to = *world.random.pick(&others);
        let imm = (!world.random.one_in(4)).then(|| world.random.between(1, IMMS.into()) as u32);
        match world.random.below(6) {
            0 | 1 => self.write(world, from, to, imm),
            2 => self.write_pages(world, from, to, imm),
            3 => self.scatter(world, from, &others, imm),
            4 => self.barrier(world, from, &others, imm.unwrap_or(1)),
            _ => self.send(world, from, to),
        }
    }

    /// A length that is zero, tiny, odd or long.
    fn length(world: &mut World) -> u64 {
        let longest = *world.random.pick(&[0, 1, 9, 5_000, 24_000]);
        world.random.between(longest / 2, longest)
    }

    fn room(&self, from: usize, to: usize, nbytes: u64) -> bool {
        self.nodes[from].source_used + nbytes <= REGION && self.nodes[to].target_used + nbytes + GAP <= REGION
    }

    /// Bytes of the source that nobody else uses, and room for them at a target.
    fn unit(&mut self, from: usize, to: usize, nbytes: u64) -> (u64, Unit) {
        let src = self.nodes[from].source_used;
        self.nodes[from].source_used += nbytes;
        let at = self.nodes[to].target_used;
        self.nodes[to].target_used += nbytes + GAP;
        let bytes = peek(&self.nodes[from].source, src, nbytes).to_vec();
        (src, Unit { to, at, bytes, placed: nbytes == 0 })
    }

    fn push(&mut self, from: usize, transfer: Transfer, imm: Option<u32>, units: Vec<Unit>, source: (u64, u64)) {
        self.sent.push(Sent { from, transfer, imm, units, message: None, source, scribbled: false });
    }

    fn write(&mut self, world: &mut World, from: usize, to: usize, imm: Option<u32>) {
        let nbytes = Self::length(world);
        if !self.room(from, to, nbytes) {
            return;
        }
        let (src, unit) = self.unit(from, to, nbytes);
        let node = &self.nodes[from];
        let slice = node.source.slice(src..src + nbytes).unwrap();
        let dst = self.nodes[to].remote.slice(unit.at..unit.at + nbytes).unwrap();
        let transfer = if world.random.one_in(4) {
            let due = node.watcher.value() + 1;
            let transfer = node.watcher.at(due, Operation::Write { src: slice, dst }, imm);
            node.watcher.add(1).unwrap();
            transfer
        } else {
            let verify = world.random.one_in(4);
            node.engine.write(&slice, &dst, WriteOptions { imm, verify, timeout: None })
        };
        match transfer {
            Ok(transfer) => self.push(from, transfer, imm, vec![unit], (src, nbytes)),
            Err(error) => self.check_lost(from, &[to], error.code),
        }
    }

    fn write_pages(&mut self, world: &mut World, from: usize, to: usize, imm: Option<u32>) {
        let (page_bytes, num_pages) = (*world.random.pick(&[1, 7, 64, 1024, 5000]), world.random.between(1, 12));
        if !self.room(from, to, num_pages * (page_bytes + GAP)) {
            return;
        }
        let mut units = Vec::new();
        let src = self.nodes[from].source_used;
        for _ in 0..num_pages {
            units.push(self.unit(from, to, page_bytes).1);
        }
        // The source's pages are neighbours, the target's lie apart and are listed backwards.
        let first = units[0].at;
        let forward: Vec<u32> = (0..num_pages as u32).collect();
        let backward: Vec<u32> = forward.iter().rev().copied().collect();
        let src_pages = PageList::new(Arc::from(backward.clone()), page_bytes, page_bytes, src);
        let dst_pages = PageList::new(Arc::from(backward), page_bytes, page_bytes + GAP, first);
        let node = &self.nodes[from];
        let options = WriteOptions { imm, ..WriteOptions::default() };
        match node.engine.write_pages((&node.source, src_pages), (&self.nodes[to].remote, dst_pages), options) {
            Ok(transfer) => self.push(from, transfer, imm, units, (src, num_pages * page_bytes)),
            Err(error) => self.check_lost(from, &[to], error.code),
        }
    }

    fn scatter(&mut self, world: &mut World, from: usize, others: &[usize], imm: Option<u32>) {
        let nbytes = Self::length(world);
        let num_targets = world.random.between(1, 6);
        let tos: Vec<usize> = (0..num_targets).map(|_| *world.random.pick(others)).collect();
        if self.nodes[from].source_used + nbytes * num_targets > REGION
            || tos.iter().any(|to| self.nodes[*to].target_used + num_targets * (nbytes + GAP) > REGION)
        {
            return;
        }
        let (start, mut units, mut targets) = (self.nodes[from].source_used, Vec::new(), Vec::new());
        for &to in &tos {
            let (src_offset, unit) = self.unit(from, to, nbytes);
            let remote = self.nodes[to].remote.clone();
            targets.push(ScatterTarget { remote, src_offset, dst_offset: unit.at, nbytes });
            units.push(unit);
        }
        let node = &self.nodes[from];
        let options = WriteOptions { imm, ..WriteOptions::default() };
        match node.engine.scatter(&node.source, &targets, None, options) {
            Ok(transfer) => self.push(from, transfer, imm, units, (start, nbytes * num_targets)),
            Err(error) => self.check_lost(from, &tos, error.code),
        }
    }

    fn barrier(&mut self, world: &mut World, from: usize, others: &[usize], imm: u32) {
        let mut tos: Vec<usize> = others.iter().copied().filter(|_| !world.random.one_in(3)).collect();
        let mut peers: Vec<Address> = tos.iter().map(|to| self.nodes[*to].engine.address().clone()).collect();
        // Oneself is left out.
        peers.push(self.nodes[from].engine.address().clone());
        match self.nodes[from].engine.barrier(&peers, imm, None) {
            Ok(transfer) => {
                let units = tos.drain(..).map(|to| Unit { to, at: 0, bytes: Vec::new(), placed: true }).collect();
                self.push(from, transfer, Some(imm), units, (0, 0));
            }
            Err(error) => self.check_lost(from, &tos, error.code),
        }
    }

    fn send(&mut self, world: &mut World, from: usize, to: usize) {
        let mut message = (self.sent.len() as u64).to_le_bytes().to_vec();
        message.resize(8 + world.random.below(200) as usize, from as u8);
        match self.nodes[from].engine.send(self.nodes[to].engine.address(), message.clone(), None) {
            Ok(transfer) => {
                self.push(from, transfer, None, Vec::new(), (0, 0));
                self.sent.last_mut().unwrap().message = Some((to, message));
            }
            Err(error) => self.check_lost(from, &[to], error.code),
        }
    }

    fn open_some_counter(&mut self, world: &mut World) {
        let awake = self.awake();
        if !awake.is_empty() {
            let idx = *world.random.pick(&awake);
            let imm = world.random.between(1, IMMS.into()) as u32;
            if !self.nodes[idx].counters.contains_key(&imm) {
                open_counter(&mut self.nodes, idx, imm);
            }
        }
    }

    fn fault(&mut self, world: &mut World) {
        let living: Vec<usize> = (0..self.nodes.len()).filter(|idx| !self.nodes[*idx].is_dead).collect();
        let idx = *world.random.pick(&living);
        let other = *world.random.pick(&living);
        let engine = id(&self.nodes[idx].engine);
        match world.random.below(12) {
            0 if living.len() > 2 => {
                self.nodes[idx].is_dead = true;
                let fault = if world.random.one_in(2) { Fault::Kill(engine) } else { Fault::Exit(engine) };
                world.inject(&fault);
            }
            1 | 2 if living.len() > 1 && !self.nodes[idx].is_stopped => {
                self.nodes[idx].is_stopped = true;
                world.inject(&Fault::Stop(engine));
            }
            3..=5 => self.go_on(world),
            6..=9 => {
                let (nic_idx, up) = (world.random.below(8) as usize, world.random.one_in(2));
                world.inject(&Fault::Nic { engine, nic_idx, up });
            }
            _ if idx != other => {
                self.nodes[other].is_sound = false;
                world.inject(&Fault::Cut(engine, id(&self.nodes[other].engine)));
            }
            _ => return,
        }
        self.nodes[idx].is_sound = false;
    }

    pub(super) fn go_on(&mut self, world: &World) {
        for node in self.nodes.iter_mut().filter(|node| node.is_stopped && !node.is_dead) {
            node.is_stopped = false;
            world.inject(&Fault::Continue(id(&node.engine)));
        }
    }

    pub(super) fn take_messages(&mut self) {
        for idx in self.awake() {
            while let Some(message) = self.nodes[idx].engine.try_receive().unwrap() {
                self.messages_taken.entry(idx).or_default().push(message.data);
            }
        }
    }

    /// A source may be reused once its transfer is done, or has quiesced.
    fn scribble(&mut self) {
        for sent in self.sent.iter_mut().filter(|sent| !sent.scribbled && self.nodes[sent.from].is_awake()) {
            if sent.transfer.is_quiesced() || outcome(&sent.transfer) == Some(Ok(())) {
                sent.scribbled = true;
                let (at, nbytes) = sent.source;
                poke(&self.nodes[sent.from].source, at, &vec![0xee; nbytes as usize]);
            }
        }
    }
}

impl Node {
    pub(super) fn is_awake(&self) -> bool {
        !self.is_dead && !self.is_stopped
    }
}

pub(super) fn open_counter(nodes: &mut [Node], idx: usize, imm: u32) {
    let sources: Vec<Address> =
        if imm == 1 { nodes.iter().map(|node| node.engine.address().clone()).collect() } else { Vec::new() };
    let counter = nodes[idx].engine.counter(Some(imm), &sources).unwrap();
    nodes[idx].counters.insert(imm, counter);
}

pub(super) const REGION: u64 = 256 << 10;
/// Bytes between two targets that nobody may touch.
const GAP: u64 = 3;
pub(super) const IMMS: u32 = 3;

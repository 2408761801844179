//! Two processes, and what a write between them costs. Prints one JSON line per measurement.
//!
//! `cargo run --release -p anyfabric-engine --example pair -- [shm|tcp] [busy|adaptive]`
//!
//! The process starts itself once more as the peer; the two exchange addresses and descriptors over pipes.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_engine::transports::shm::ring::{Consumer, Entry, Producer, BYTES as RING_BYTES};
use anyfabric_engine::transports::sys::{memfd, Mapping};
use anyfabric_engine::{
    Address, Config, Engine, PageList, Polling, Region, Remote, RemoteSlice, Slice, WireImm, WriteOptions,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let transport = args.next().unwrap_or_else(|| "shm".into());
    let polling = args.next().unwrap_or_else(|| "busy".into());
    let is_peer = args.next().is_some();
    if is_peer && transport == "ring" {
        return ring_peer(&read_line(&mut std::io::stdin().lock())?);
    }
    let config = Config {
        transports: vec![transport.clone()],
        polling: if polling == "busy" { Polling::Busy } else { Polling::Adaptive },
        ..Config::default()
    };
    if transport == "ring" {
        return ring();
    }
    let engine = Engine::new(config)?;
    let region = engine.allocate(BYTES)?;
    let hello = hex(&region.descriptor()?.encode());
    if is_peer {
        println!("{hello}");
        let remote = engine.import(&unhex(&read_line(&mut std::io::stdin().lock())?)?)?;
        return peer(&engine, &region, &remote);
    }
    let mut child = Command::new(std::env::current_exe()?)
        .args([&transport, &polling, "peer"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = BufReader::new(child.stdout.take().ok_or("no stdout")?);
    let remote = engine.import(&unhex(&read_line(&mut output)?)?)?;
    writeln!(child.stdin.as_mut().ok_or("no stdin")?, "{hello}")?;
    let started = Instant::now();
    engine.connect(remote.address(), Some(Duration::from_secs(5)))?;
    println!("{{\"connect_us\": {}}}", started.elapsed().as_micros());
    println!("{{\"path\": \"{:?}\"}}", engine.path(remote.address()));
    let bench = Bench { engine: &engine, region: &region, remote: &remote, transport: &transport, polling: &polling };
    bench.ping(8)?;
    bench.ping(4096)?;
    for nbytes in [64 << 10, 1 << 20, 32 << 20] {
        bench.write(nbytes)?;
    }
    for (page_bytes, among) in [(1 << 10, 4 << 20), (1 << 10, BYTES), (8 << 10, BYTES)] {
        bench.pages(page_bytes, 4096, among)?;
    }
    bench.done()?;
    child.wait()?;
    engine.close(Duration::from_secs(1));
    Ok(())
}

struct Bench<'a> {
    engine: &'a Engine,
    region: &'a Region,
    remote: &'a Remote,
    transport: &'a str,
    polling: &'a str,
}

impl Bench<'_> {
    fn report(&self, op: &str, nbytes: u64, mut samples: Vec<f64>, total_bytes: u64) {
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| samples[((samples.len() - 1) as f64 * q) as usize];
        println!(
            "{{\"transport\": \"{}\", \"polling\": \"{}\", \"op\": \"{op}\", \"size_bytes\": {nbytes}, \
             \"p50_us\": {:.3}, \"p99_us\": {:.3}, \"max_us\": {:.1}, \"gb_per_s\": {:.2}}}",
            self.transport,
            self.polling,
            at(0.5),
            at(0.99),
            at(1.0),
            total_bytes as f64 / at(0.5) / 1e3
        );
    }

    fn ping(&self, nbytes: u64) -> Result<(), Box<dyn Error>> {
        let counter = self.engine.counter(Some(PING), &[self.remote.address().clone()])?;
        // The source is not where the reply lands, or every round would fetch that line once more.
        let (src, dst) = (self.region.slice(HALF..HALF + nbytes)?, self.remote.slice(0..nbytes)?);
        let mut samples = Vec::with_capacity(ROUNDS as usize);
        send_size(self, nbytes)?;
        for round in 1..=ROUNDS {
            let started = Instant::now();
            self.engine.write(&src, &dst, WriteOptions::counted(PING))?;
            counter.wait(round, Some(Duration::from_secs(10)))?;
            samples.push(started.elapsed().as_nanos() as f64 / 2e3);
        }
        self.report("write", nbytes, samples, nbytes);
        Ok(())
    }

    fn write(&self, nbytes: u64) -> Result<(), Box<dyn Error>> {
        let rounds = ((1 << 30) / nbytes).clamp(20, 2000);
        let mut samples = Vec::new();
        for round in 0..rounds {
            let at = round * nbytes % (BYTES - nbytes + 1) / 4096 * 4096;
            let (src, dst) = (self.region.slice(at..at + nbytes)?, self.remote.slice(at..at + nbytes)?);
            let started = Instant::now();
            self.engine.write(&src, &dst, WriteOptions::counted(DATA))?.wait(None)?;
            samples.push(started.elapsed().as_nanos() as f64 / 1e3);
        }
        self.report("write", nbytes, samples, nbytes);
        Ok(())
    }

    /// `num_pages` pages to random places among `among` bytes, beside a loop of copies over the same permutation.
    fn pages(&self, page_bytes: u64, num_pages: u32, among: u64) -> Result<(), Box<dyn Error>> {
        let mut seed = 12345_u64;
        let mut permutation = |len: u32| {
            let mut indices: Vec<u32> = (0..len).collect();
            for idx in (1..indices.len()).rev() {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                indices.swap(idx, (seed >> 33) as usize % (idx + 1));
            }
            indices
        };
        let all = (among / page_bytes) as u32;
        let (from, to) = (permutation(all), permutation(all));
        let local = self.engine.allocate(BYTES)?;
        let total = page_bytes * u64::from(num_pages);
        let (mut samples, mut baseline) = (Vec::new(), Vec::new());
        for round in 0..100 {
            let first = (round * num_pages as usize) % from.len();
            let window = first..first + num_pages as usize;
            let src = PageList::new(Arc::from(&from[window.clone()]), page_bytes, page_bytes, 0);
            let dst = PageList::new(Arc::from(&to[window.clone()]), page_bytes, page_bytes, 0);
            let started = Instant::now();
            for (src, dst) in from[window.clone()].iter().zip(&to[window]) {
                let (src, dst) = (u64::from(*src) * page_bytes, u64::from(*dst) * page_bytes);
                // SAFETY: both lie inside their regions, and nobody else uses `local`.
                unsafe {
                    let (src, dst) = (self.region.as_ptr().add(src as usize), local.as_ptr().add(dst as usize));
                    std::ptr::copy_nonoverlapping(src, dst, page_bytes as usize);
                }
            }
            baseline.push(started.elapsed().as_nanos() as f64 / 1e3);
            let started = Instant::now();
            self.engine.write_pages((self.region, src), (self.remote, dst), WriteOptions::counted(DATA))?.wait(None)?;
            samples.push(started.elapsed().as_nanos() as f64 / 1e3);
        }
        println!("{{\"among\": {among}}}");
        self.report("copies", page_bytes, baseline, total);
        self.report("pages", page_bytes, samples, total);
        Ok(())
    }

    fn done(&self) -> Result<(), Box<dyn Error>> {
        self.engine.send(self.remote.address(), b"done".to_vec(), None)?.wait(None)?;
        Ok(())
    }
}

/// The least that two processes can do: 8 bytes into shared memory, and an entry of a polled ring.
fn ring() -> Result<(), Box<dyn Error>> {
    let fd = memfd(c"ring-baseline", 2 * RING_BYTES + 4096)?;
    let memory = Arc::new(Mapping::shared(&fd, 2 * RING_BYTES + 4096, true)?);
    let mut child = Command::new(std::env::current_exe()?)
        .args(["ring", "busy", "peer"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&fd));
    writeln!(child.stdin.as_mut().ok_or("no stdin")?, "{path}")?;
    let mut output = BufReader::new(child.stdout.take().ok_or("no stdout")?);
    read_line(&mut output)?;
    let mut words = RingEnds::new(&fd, &memory, 0)?;
    let mut samples = Vec::new();
    for round in 0..ROUNDS {
        let started = Instant::now();
        words.send(round);
        words.receive();
        samples.push(started.elapsed().as_nanos() as f64 / 2e3);
    }
    child.wait()?;
    samples.sort_by(f64::total_cmp);
    println!(
        "{{\"transport\": \"bare ring\", \"op\": \"write\", \"size_bytes\": 8, \"p50_us\": {:.3}}}",
        samples[samples.len() / 2]
    );
    Ok(())
}

fn ring_peer(path: &str) -> Result<(), Box<dyn Error>> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let memory = Arc::new(Mapping::shared(&file, 2 * RING_BYTES + 4096, true)?);
    let mut words = RingEnds::new(&file, &memory, 1)?;
    println!("ready");
    for round in 0..ROUNDS {
        words.receive();
        words.send(round);
    }
    Ok(())
}

/// One side's rings and its eight bytes.
struct RingEnds {
    producer: Producer,
    consumer: Consumer,
    memory: Arc<Mapping>,
    side: usize,
}

impl RingEnds {
    fn new(fd: &impl std::os::fd::AsRawFd, memory: &Arc<Mapping>, side: usize) -> Result<Self, Box<dyn Error>> {
        // Two rings in one mapping: each end maps the whole and takes its part.
        let at = |idx: usize| -> Result<Arc<Mapping>, Box<dyn Error>> {
            Ok(Arc::new(Mapping::shared_at(fd, idx * RING_BYTES, RING_BYTES)?))
        };
        Ok(Self {
            producer: Producer::new(at(side)?),
            consumer: Consumer::new(at(1 - side)?),
            memory: Arc::clone(memory),
            side,
        })
    }

    fn send(&mut self, value: u64) {
        // SAFETY: the last page of the mapping holds both sides' words, 64 bytes apart.
        unsafe { self.memory.as_ptr().add(2 * RING_BYTES + self.side * 64).cast::<u64>().write_volatile(value) };
        self.producer.push(&Entry::Arrival { imm: WireImm::decode(1), count: 1 });
    }

    fn receive(&mut self) {
        while self.consumer.pop().is_none() {
            std::hint::spin_loop();
        }
        self.consumer.publish_head(false);
    }
}

fn send_size(bench: &Bench, nbytes: u64) -> Result<(), Box<dyn Error>> {
    bench.engine.send(bench.remote.address(), nbytes.to_le_bytes().to_vec(), None)?.wait(None)?;
    Ok(())
}

fn peer(engine: &Engine, region: &Region, remote: &Remote) -> Result<(), Box<dyn Error>> {
    // One counter for all runs: closing it would discard what the next run has already sent.
    let counter = engine.counter(Some(PING), &[Address::clone(remote.address())])?;
    let mut counted = 0;
    loop {
        let message = engine.receive(Some(Duration::from_secs(60)))?.data;
        let Ok(size) = <[u8; 8]>::try_from(message.as_slice()) else {
            std::thread::sleep(Duration::from_millis(50));
            return Ok(());
        };
        let nbytes = u64::from_le_bytes(size);
        let (src, dst): (Slice, RemoteSlice) = (region.slice(HALF..HALF + nbytes)?, remote.slice(0..nbytes)?);
        for _ in 0..ROUNDS {
            counted += 1;
            counter.wait(counted, Some(Duration::from_secs(10)))?;
            engine.write(&src, &dst, WriteOptions::counted(PING))?;
        }
    }
}

fn read_line(input: &mut impl BufRead) -> Result<String, Box<dyn Error>> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    (0..text.len() / 2).map(|idx| Ok(u8::from_str_radix(&text[idx * 2..idx * 2 + 2], 16)?)).collect()
}

const BYTES: u64 = 64 << 20;
const HALF: u64 = BYTES / 2;
const ROUNDS: u64 = 20_000;
const PING: u32 = 1;
const DATA: u32 = 2;

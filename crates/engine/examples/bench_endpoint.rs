//! The Rust contender of `benchmarks/peers`: one process of a pair that a driver measures.
//!
//! `bench_endpoint TRANSPORT allocated|registered adaptive|busy STREAMS`
//!
//! Speaks the line protocol of `benchmarks/peers/endpoint.py` on stdin and stdout, and must stay equal to
//! `benchmarks/peers/workload.py` in what it puts where: contents, placement of pages, check of the target.
//!
//! The one region of a process holds the data area, then the word that goes out while bouncing, and 64 bytes
//! behind that the word that comes in.

use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_engine::{Config, Counter, Engine, PageList, Polling, Region, Remote, WriteOptions};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    // SAFETY: the call only sets which signal this process gets when its parent ends.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [transport, memory, polling, streams] = args.as_slice() else {
        return Err("usage: bench_endpoint TRANSPORT allocated|registered adaptive|busy STREAMS".into());
    };
    let engine = Engine::new(Config {
        transports: vec![transport.clone()],
        polling: if polling == "busy" { Polling::Busy } else { Polling::Adaptive },
        tcp_streams: streams.parse()?,
        ..Config::default()
    })?;
    let allocates = memory == "allocated";
    let mut endpoint = Endpoint { engine: Arc::new(engine), allocates, local: None, bench: None };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line == "quit" {
            break;
        }
        let answer = match endpoint.answer(&line) {
            Ok(answer) => format!("ok {answer}"),
            Err(error) => format!("error {error}"),
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The engine, and what the driver has asked for so far.
struct Endpoint {
    engine: Arc<Engine>,
    allocates: bool,
    local: Option<Arc<Local>>,
    bench: Option<Bench>,
}

impl Endpoint {
    fn answer(&mut self, line: &str) -> Outcome<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), &self.local, &mut self.bench) {
            (["version"], ..) => Ok(env!("CARGO_PKG_VERSION").to_owned()),
            (["setup", role, data_bytes], None, _) => {
                let local = Local::new(&self.engine, self.allocates, *role == "source", data_bytes.parse()?)?;
                let hello = hex(&local.region.descriptor()?.encode());
                self.local = Some(Arc::new(local));
                Ok(hello)
            }
            (["connect", hello], Some(local), None) => {
                let bench = Bench::new(Arc::clone(local), hello)?;
                let path = self.engine.path(bench.remote.address()).transport;
                self.bench = Some(bench);
                Ok(path)
            }
            (["fill", seed], Some(local), _) => {
                local.fill(seed.parse()?);
                Ok(String::new())
            }
            (["run", load @ ..], _, Some(bench)) => {
                let durations = bench.run(&Load::parse(load)?)?;
                Ok(durations.iter().map(u64::to_string).collect::<Vec<_>>().join(" "))
            }
            (["verify", load @ ..], _, Some(bench)) => Ok(bench.num_wrong(&Load::parse(load)?).to_string()),
            _ => Err(format!("cannot do {line:.40} now").into()),
        }
    }
}

/// What both sides do in one round; `Load` and `Shape` of workload.py in one.
struct Load {
    op: String,
    size_bytes: u64,
    num_pages: u64,
    span_bytes: u64,
    num_calls: u64,
    num_warmup: u64,
    seed: u64,
}

impl Load {
    fn parse(words: &[&str]) -> Outcome<Self> {
        let [op, numbers @ ..] = words else { return Err("an empty load".into()) };
        let numbers = numbers.iter().map(|word| word.parse()).collect::<Result<Vec<u64>, _>>()?;
        let [size_bytes, num_pages, span_bytes, num_calls, num_warmup, seed] = numbers[..] else {
            return Err("a load has six numbers".into());
        };
        Ok(Self { op: (*op).to_owned(), size_bytes, num_pages, span_bytes, num_calls, num_warmup, seed })
    }

    fn total_calls(&self) -> u64 {
        self.num_calls + self.num_warmup
    }

    fn num_slots(&self) -> u64 {
        self.span_bytes / self.size_bytes
    }

    fn bounces(&self) -> bool {
        self.op == "notify"
    }
}

/// This process's engine and memory.
struct Local {
    engine: Arc<Engine>,
    region: Region,
    is_source: bool,
    data_bytes: u64,
}

impl Local {
    fn new(engine: &Arc<Engine>, allocates: bool, is_source: bool, data_bytes: u64) -> Outcome<Self> {
        let nbytes = data_bytes + MAIL_BYTES;
        let region = if allocates { engine.allocate(nbytes)? } else { register(engine, nbytes)? };
        Ok(Self { engine: Arc::clone(engine), region, is_source, data_bytes })
    }

    /// The data area as words; peers write there only between the driver's `run` and its answer.
    fn data(&self) -> &[AtomicU64] {
        // SAFETY: the region is aligned to pages, at least this long, and lives as long as `self`; words that
        // a peer may write are only touched as atomics.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().cast(), (self.data_bytes / 8) as usize) }
    }

    fn mail(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: the mail lies behind the data area, inside the region, at a multiple of 64 bytes.
        unsafe { &*self.region.as_ptr().add((self.data_bytes + offset) as usize).cast() }
    }

    fn fill(&self, seed: u64) {
        let start = mix(seed);
        for (idx, word) in self.data().iter().enumerate() {
            word.store(if self.is_source { mix(start.wrapping_add(idx as u64)) } else { CLEAR }, Ordering::Relaxed);
        }
        self.mail(OUT_OFFSET).store(0, Ordering::Relaxed);
        self.mail(IN_OFFSET).store(0, Ordering::Relaxed);
    }
}

struct Bench {
    local: Arc<Local>,
    remote: Remote,
    words: Counter,
    ends: Counter,
    num_words: u64,
    num_ends: u64,
    bad_words: u64,
}

impl Bench {
    fn new(local: Arc<Local>, hello: &str) -> Outcome<Self> {
        let remote = local.engine.import(&unhex(hello)?)?;
        let sources = [remote.address().clone()];
        local.engine.connect(&sources[0], Some(DEADLINE))?;
        let words = local.engine.counter(Some(WORD_IMM), &sources)?;
        let ends = local.engine.counter(Some(END_IMM), &sources)?;
        Ok(Self { local, remote, words, ends, num_words: 0, num_ends: 0, bad_words: 0 })
    }

    /// Durations of the timed calls in nanoseconds at the source, nothing at the target.
    fn run(&mut self, load: &Load) -> Outcome<Vec<u64>> {
        let mut durations = match load.op.as_str() {
            "notify" => self.bounce(load)?,
            "write" | "pages" if !self.local.is_source => {
                self.num_ends += 1;
                self.ends.wait(self.num_ends, Some(DEADLINE))?;
                Vec::new()
            }
            "write" => self.write_all(load)?,
            "pages" => self.page_all(load)?,
            other => return Err(format!("this contender does not measure {other}").into()),
        };
        if self.local.is_source && !load.bounces() {
            self.local.engine.barrier(&[self.remote.address().clone()], END_IMM, None)?.wait(Some(DEADLINE))?;
        }
        Ok(durations.split_off(durations.len().min(load.num_warmup as usize)))
    }

    fn write_all(&self, load: &Load) -> Outcome<Vec<u64>> {
        let mut durations = Vec::with_capacity(load.total_calls() as usize);
        for call in 0..load.total_calls() {
            let at = call % load.num_slots() * load.size_bytes;
            let started = Instant::now();
            let range = at..at + load.size_bytes;
            let (src, dst) = (self.local.region.slice(range.clone())?, self.remote.slice(range)?);
            self.local.engine.write(&src, &dst, WriteOptions::default())?.wait(Some(DEADLINE))?;
            durations.push(started.elapsed().as_nanos() as u64);
        }
        Ok(durations)
    }

    fn page_all(&self, load: &Load) -> Outcome<Vec<u64>> {
        let source = slot_order(load, SOURCE_SALT);
        let target = slot_order(load, TARGET_SALT);
        let mut durations = Vec::with_capacity(load.total_calls() as usize);
        for call in 0..load.total_calls() {
            let first = (call * load.num_pages % load.num_slots()) as usize;
            let cut = first..first + load.num_pages as usize;
            let started = Instant::now();
            let size = load.size_bytes;
            let src = PageList::new(Arc::from(&source[cut.clone()]), size, size, 0);
            let dst = PageList::new(Arc::from(&target[cut]), size, size, 0);
            self.local
                .engine
                .write_pages((&self.local.region, src), (&self.remote, dst), WriteOptions::default())?
                .wait(Some(DEADLINE))?;
            durations.push(started.elapsed().as_nanos() as u64);
        }
        Ok(durations)
    }

    fn bounce(&mut self, load: &Load) -> Outcome<Vec<u64>> {
        let (out, incoming) = (self.local.mail(OUT_OFFSET), self.local.mail(IN_OFFSET));
        let (from, to) = (self.local.data_bytes + OUT_OFFSET, self.local.data_bytes + IN_OFFSET);
        let (src, dst) = (self.local.region.slice(from..from + 8)?, self.remote.slice(to..to + 8)?);
        let mut durations = Vec::with_capacity(load.total_calls() as usize);
        self.bad_words = 0;
        for call in 0..load.total_calls() {
            let word = mix(load.seed.wrapping_add(call));
            self.num_words += 1;
            // ORDERING: relaxed suffices for both words: the engine orders the counted arrival behind the bytes it
            // counts, and a write behind the stores of the thread that submits it. The transfer is not waited
            // for: the peer's answer proves that the word was placed.
            if self.local.is_source {
                out.store(word, Ordering::Relaxed);
                let started = Instant::now();
                self.local.engine.write(&src, &dst, WriteOptions::counted(WORD_IMM))?;
                self.words.wait(self.num_words, Some(DEADLINE))?;
                durations.push(started.elapsed().as_nanos() as u64 / 2);
                self.bad_words += u64::from(incoming.load(Ordering::Relaxed) != word);
            } else {
                self.words.wait(self.num_words, Some(DEADLINE))?;
                let received = incoming.load(Ordering::Relaxed);
                out.store(received, Ordering::Relaxed);
                self.local.engine.write(&src, &dst, WriteOptions::counted(WORD_IMM))?;
                self.bad_words += u64::from(received != word);
            }
        }
        Ok(durations)
    }

    /// Bytes of the data area, or bounced words, that `load` should have left otherwise.
    fn num_wrong(&self, load: &Load) -> u64 {
        if load.bounces() {
            return self.bad_words;
        }
        if !self.local.is_source {
            return wrong_bytes(self.local.data(), load);
        }
        0
    }
}

fn wrong_bytes(data: &[AtomicU64], load: &Load) -> u64 {
    let num_slots = load.num_slots() as usize;
    let mut origins: Vec<Option<u64>> = vec![None; num_slots];
    if load.op == "pages" {
        let (source, target) = (slot_order(load, SOURCE_SALT), slot_order(load, TARGET_SALT));
        for (src, dst) in source.iter().zip(&target).take((load.total_calls() * load.num_pages) as usize) {
            origins[*dst as usize] = Some(u64::from(*src));
        }
    } else {
        for (slot, origin) in origins.iter_mut().enumerate().take(load.total_calls() as usize) {
            *origin = Some(slot as u64);
        }
    }
    let words = load.size_bytes as usize / 8;
    let start = mix(load.seed);
    let mut num_wrong = 0;
    for (idx, have) in data.iter().enumerate() {
        let origin = origins.get(idx / words).copied().flatten();
        let want = origin.map_or(CLEAR, |slot| mix(start.wrapping_add(slot * words as u64 + (idx % words) as u64)));
        let differ = (want ^ have.load(Ordering::Relaxed)).to_ne_bytes();
        num_wrong += differ.iter().filter(|byte| **byte != 0).count() as u64;
    }
    num_wrong
}

/// The permutation of a load's slots that its seed and `salt` name.
fn slot_order(load: &Load, salt: u64) -> Vec<u32> {
    let start = mix(load.seed ^ salt);
    let mut order: Vec<u32> = (0..load.num_slots() as u32).collect();
    order.sort_by_key(|slot| mix(start.wrapping_add(u64::from(*slot))));
    order
}

/// splitmix64's output for the state `value`.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Memory of the process, in huge pages where the kernel grants them, as numpy asks for them too.
fn register(engine: &Engine, nbytes: u64) -> Outcome<Region> {
    let mut memory = vec![0_u8; (nbytes + HUGE_BYTES) as usize];
    let start = memory.as_ptr().align_offset(HUGE_BYTES as usize);
    let address = memory[start..].as_mut_ptr();
    // SAFETY: the range lies inside `memory`; the advice changes no contents.
    unsafe { libc::madvise(address.cast(), nbytes as usize, libc::MADV_HUGEPAGE) };
    memory.fill(0);
    // SAFETY: the range lies inside `memory`, whose buffer does not move and which the region owns from here on.
    Ok(unsafe { engine.register(address, nbytes, true, Box::new(memory)) }?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Outcome<Vec<u8>> {
    (0..text.len() / 2).map(|idx| Ok(u8::from_str_radix(&text[idx * 2..idx * 2 + 2], 16)?)).collect()
}

const MAIL_BYTES: u64 = 4096;
const OUT_OFFSET: u64 = 0;
const IN_OFFSET: u64 = 64;
const CLEAR: u64 = 0xA5A5_A5A5_A5A5_A5A5;
const SOURCE_SALT: u64 = 0x534F_5552_4345;
const TARGET_SALT: u64 = 0x5441_5247_4554;
const HUGE_BYTES: u64 = 2 << 20;
const WORD_IMM: u32 = 1;
const END_IMM: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(60);

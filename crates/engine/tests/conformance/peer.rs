//! The peer's side: an engine or several, and a loop that does what it is told.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyfabric_engine::{
    Address, Code, Counter, Engine, Error, PageList, Region, Remote, Result, Transfer, WriteOptions,
};

use crate::ask::{hear, tell, Answer, Ask, Fault, How};
use crate::fabric::new_region;
use crate::pattern;

/// Set in peers: the process that started them.
pub(crate) const ROLE: &str = "ANYFABRIC_CONFORMANCE_PARENT";

/// Not a test: what [`crate::harness::Peer`] executes.
#[test]
#[ignore = "the peers' side of the harness"]
fn process() {
    let Some(parent) = std::env::var(ROLE).ok().and_then(|pid| pid.parse::<i32>().ok()) else { return };
    // SAFETY: only asks the kernel to end this process with its parent.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // A parent outside of our pid namespace has no number here.
        if ![parent, 0].contains(&libc::getppid()) {
            return;
        }
    }
    // SAFETY: the harness made standard input one end of a socket pair, for us alone.
    let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let mut state = State::default();
    while let Ok(ask) = hear::<Ask>(&mut stream) {
        if matches!(ask, Ask::Exit) {
            break;
        }
        let answer = state.answer(ask).unwrap_or_else(|error| Answer::Failed(Fault::from(error)));
        if tell(&mut stream, &answer).is_err() {
            break;
        }
    }
    // SAFETY: ends the process as a killed one would end: no destructor runs.
    unsafe { libc::_exit(0) };
}

#[derive(Default)]
struct State {
    engines: Vec<Arc<Engine>>,
    regions: Vec<(usize, Arc<Region>)>,
    remotes: RefCell<HashMap<Vec<u8>, Remote>>,
    counters: Vec<Counter>,
    transfers: Vec<Transfer>,
    stop: Arc<AtomicBool>,
    hammers: Vec<JoinHandle<u64>>,
    files: Vec<std::fs::File>,
}

impl State {
    fn answer(&mut self, ask: Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Start(settings) => {
                let engine = Engine::new(settings.config())?;
                let address = engine.address().to_string();
                self.engines.push(Arc::new(engine));
                Answer::Text(address)
            }
            Ask::Connect { engine, address } => {
                self.engines[engine].connect(&parse(&address)?, None)?;
                Answer::Done
            }
            Ask::Receive { engine, timeout } => Answer::Bytes(self.engines[engine].receive(Some(timeout))?.data),
            Ask::Wait { transfer, timeout } => {
                self.transfers[transfer].wait(Some(timeout))?;
                Answer::Done
            }
            Ask::State { transfer } => {
                let transfer = &self.transfers[transfer];
                let error = transfer.error().map(Fault::from);
                Answer::State { done: transfer.is_done(), quiesced: transfer.is_quiesced(), error }
            }
            Ask::Open { engine, imm, sources } => {
                let sources: Vec<Address> = sources.iter().map(|text| parse(text)).collect::<Result<_>>()?;
                let counter = self.engines[engine].counter(imm, &sources)?;
                self.counters.push(counter);
                Answer::Id(self.counters.len() - 1)
            }
            Ask::WaitCount { counter, n, timeout } => {
                self.counters[counter].wait(n, Some(timeout))?;
                Answer::Done
            }
            Ask::Count { counter } => Answer::Count(self.counters[counter].value()),
            Ask::CloseCounter { counter } => {
                self.counters[counter].close();
                Answer::Done
            }
            Ask::CloseEngine { engine, timeout } => {
                self.engines[engine].close(timeout);
                Answer::Done
            }
            Ask::Hammer { region, nbytes, to, to_at, imm, num_threads } => {
                self.hammer((region, nbytes), (&to, to_at), imm, num_threads)?;
                Answer::Done
            }
            Ask::HammerEnd => {
                // ORDERING: a flag that is looked at again and again.
                self.stop.store(true, Ordering::Relaxed);
                Answer::Count(self.hammers.drain(..).map(|thread| thread.join().unwrap_or(0)).sum())
            }
            Ask::Flood { region, to, first_imm, num_imms } => {
                self.flood(region, &to, first_imm..first_imm + num_imms)?
            }
            Ask::Fork { engine, region } => self.fork(engine, region),
            Ask::Path { engine, address } => {
                let path = self.engines[engine].path(&parse(&address)?);
                Answer::Text(format!("{}|{}|{}", path.transport, path.nics.join(","), path.reason))
            }
            Ask::Exit => Answer::Done,
            other => self.answer_of_memory(other)?,
        })
    }

    fn answer_of_memory(&mut self, ask: Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Allocate { engine, nbytes, memory } => {
                let region = new_region(&self.engines[engine], nbytes, memory);
                let descriptor = region.descriptor().map(|descriptor| descriptor.encode()).unwrap_or_default();
                self.regions.push((engine, Arc::new(region)));
                Answer::Region(self.regions.len() - 1, descriptor)
            }
            Ask::Fill { region, at, nbytes, seed } => {
                pattern::fill(self.bytes(region, at, nbytes), seed, at);
                Answer::Done
            }
            Ask::Check { region, at, nbytes, seed, base } => {
                Answer::Checked(pattern::mismatch(self.bytes(region, at, nbytes), seed, base))
            }
            Ask::CheckPages { region, pages, nbytes, seed } => {
                let wrong =
                    |&(at, base): &(u64, u64)| pattern::mismatch(self.bytes(region, at, nbytes), seed, base).is_some();
                Answer::Checked(pages.iter().find(|page| wrong(page)).map(|page| page.0))
            }
            Ask::Read { region, at, nbytes } => Answer::Bytes(self.bytes(region, at, nbytes).to_vec()),
            Ask::Revoke { region, timeout } => {
                self.regions[region].1.revoke(None, timeout)?;
                Answer::Done
            }
            Ask::CloseRegion { region, timeout } => {
                self.regions[region].1.close(timeout);
                Answer::Done
            }
            other => self.answer_of_process(other)?,
        })
    }

    fn answer_of_process(&mut self, ask: Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Forbid(what) => {
                crate::forbid::forbid(what).expect("a right is given up");
                Answer::Done
            }
            Ask::LimitMemory { nbytes } => limit_memory(nbytes),
            Ask::TryAllocate { engine, nbytes } => {
                drop(self.engines[engine].allocate(nbytes)?);
                Answer::Done
            }
            Ask::LimitFiles { soft } => limit_files(soft),
            Ask::TakeFiles => {
                while let Ok(file) = std::fs::File::open("/dev/null") {
                    self.files.push(file);
                }
                Answer::Count(self.files.len() as u64)
            }
            Ask::GiveFiles => {
                self.files.clear();
                Answer::Done
            }
            Ask::NumFiles => Answer::Count(std::fs::read_dir("/proc/self/fd").map_or(0, |list| list.count() as u64)),
            Ask::NumStrangers { engine } => {
                let peers = self.engines[engine].info().peers;
                Answer::Count(peers.iter().filter(|peer| peer.state == "new").count() as u64)
            }
            Ask::NumPackets => Answer::Count(num_packets()),
            operation => self.submit(operation)?,
        })
    }

    /// The operations that return a transfer.
    fn submit(&mut self, ask: Ask) -> Result<Answer> {
        let transfer = match ask {
            Ask::Write { region, at, nbytes, to, to_at, how } => {
                let (engine, region) = self.region(region);
                let remote = self.remote(&to)?;
                let (src, dst) = (region.slice(at..at + nbytes)?, remote.slice(to_at..to_at + nbytes)?);
                engine.write(&src, &dst, options(how))?
            }
            Ask::WritePages { region, pages, to, to_pages, page_bytes, how } => {
                let (engine, region) = self.region(region);
                let list = |indices: Vec<u32>| PageList::new(indices.into(), page_bytes, page_bytes, 0);
                let remote = self.remote(&to)?;
                engine.write_pages((region, list(pages)), (&remote, list(to_pages)), options(how))?
            }
            Ask::Barrier { engine, peers, imm } => {
                let peers: Vec<Address> = peers.iter().map(|text| parse(text)).collect::<Result<_>>()?;
                self.engines[engine].barrier(&peers, imm, None)?
            }
            Ask::Send { engine, to, bytes } => self.engines[engine].send(&parse(&to)?, bytes, None)?,
            other => return Err(Error::invalid(format!("not an operation: {other:?}"))),
        };
        self.transfers.push(transfer);
        Ok(Answer::Id(self.transfers.len() - 1))
    }

    /// The same for the same descriptor, so that its route is found once.
    fn remote(&self, descriptor: &[u8]) -> Result<Remote> {
        if let Some(remote) = self.remotes.borrow().get(descriptor) {
            return Ok(remote.clone());
        }
        let remote = Remote::decode(descriptor)?;
        self.remotes.borrow_mut().insert(descriptor.to_vec(), remote.clone());
        Ok(remote)
    }

    fn region(&self, region: usize) -> (&Engine, &Region) {
        let (engine, region) = &self.regions[region];
        (&self.engines[*engine], region)
    }

    #[allow(clippy::mut_from_ref, reason = "the memory is the region's, and races on it are what is tested")]
    fn bytes(&self, region: usize, at: u64, nbytes: u64) -> &mut [u8] {
        let region = &self.regions[region].1;
        assert!(at + nbytes <= region.nbytes(), "the test asks for bytes outside the region");
        // SAFETY: inside the region, which `self` keeps.
        unsafe { std::slice::from_raw_parts_mut(region.as_ptr().add(at as usize), nbytes as usize) }
    }

    fn hammer(
        &mut self,
        (region, nbytes): (usize, u64),
        (to, to_at): (&[u8], u64),
        imm: Option<u32>,
        num_threads: usize,
    ) -> Result<()> {
        let (engine, region) = &self.regions[region];
        let engine = Arc::clone(&self.engines[*engine]);
        let remote = self.remote(to)?;
        self.stop = Arc::default();
        for _ in 0..num_threads {
            let (engine, stop) = (Arc::clone(&engine), Arc::clone(&self.stop));
            let (src, dst) = (region.slice(0..nbytes)?, remote.slice(to_at..to_at + nbytes)?);
            let options = WriteOptions { imm, ..WriteOptions::default() };
            self.hammers.push(std::thread::spawn(move || {
                let mut done = 0;
                // ORDERING: see `HammerEnd`.
                while !stop.load(Ordering::Relaxed) {
                    match engine.write(&src, &dst, options).and_then(|transfer| transfer.wait(None)) {
                        Ok(()) => done += 1,
                        // Its target closes what it writes into, sooner or later.
                        Err(error) if error.code == Code::Refused => break,
                        Err(error) => {
                            eprintln!("hammering with imm {imm:?}: {error}");
                            break;
                        }
                    }
                }
                done
            }));
        }
        Ok(())
    }

    fn flood(&self, region: usize, to: &[u8], imms: std::ops::Range<u32>) -> Result<Answer> {
        let (engine, region) = self.region(region);
        let remote = self.remote(to)?;
        let (src, dst) = (region.slice(0..8)?, remote.slice(0..8)?);
        // Many under way, or a slow machine takes minutes; all have ended before the answer.
        let mut under_way = VecDeque::new();
        let mut refused = None;
        for imm in imms.clone() {
            match engine.write(&src, &dst, WriteOptions::counted(imm)) {
                Ok(transfer) => under_way.push_back((imm, transfer)),
                Err(error) => refused = refused.or(Some((imm, error))),
            }
            while under_way.len() >= FLOOD_DEPTH || refused.is_some() || imm + 1 == imms.end {
                let Some((imm, transfer)) = under_way.pop_front() else { break };
                if let Err(error) = transfer.wait(None) {
                    refused = refused.filter(|(first, _)| *first < imm).or(Some((imm, error)));
                }
            }
            if let Some((first, error)) = refused {
                return Ok(Answer::Flooded(first - imms.start, Some(error.into())));
            }
        }
        Ok(Answer::Flooded(u32::MAX, None))
    }

    fn fork(&self, engine: usize, region: usize) -> Answer {
        let (engine, region) = (&self.engines[engine], &self.regions[region].1);
        let mut pipe = [0; 2];
        // SAFETY: `pipe` has room for two descriptors.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0, "a pipe");
        // SAFETY: the child only uses the engine, which must cope, writes to the pipe and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let codes = [
                engine.allocate(64).map(drop),
                engine.counter(None, &[]).map(drop),
                engine.receive(None).map(drop),
                engine.watch().map(drop),
                engine.connect(engine.address(), None),
                region.descriptor().map(drop),
                region.revoke(None, std::time::Duration::ZERO),
            ];
            let mut text = String::new();
            for code in codes {
                text += code.map_or_else(|error| error.code.as_str(), |()| "ok");
                text += " ";
            }
            // Descriptors that an engine made: sockets, memfds, epoll, eventfd, pidfds. The harness's own socket is 0.
            let left = std::fs::read_dir("/proc/self/fd").map_or(0, |list| {
                let others = list.filter_map(std::result::Result::ok).filter(|entry| entry.file_name() != "0");
                others
                    .filter_map(|entry| std::fs::read_link(entry.path()).ok())
                    .filter(|link| {
                        let link = link.to_string_lossy();
                        ["socket:", "anon_inode:", "/memfd:anyfabric"].iter().any(|kind| link.starts_with(kind))
                    })
                    .count()
            });
            engine.close(std::time::Duration::ZERO);
            text += &left.to_string();
            // SAFETY: the pipe is ours; `_exit` runs no destructor.
            unsafe {
                libc::write(pipe[1], text.as_ptr().cast(), text.len());
                libc::_exit(0);
            }
        }
        let mut text = [0; 512];
        // SAFETY: our own pipe and child.
        let nbytes = unsafe {
            libc::close(pipe[1]);
            let nbytes = libc::read(pipe[0], text.as_mut_ptr().cast(), text.len());
            libc::close(pipe[0]);
            libc::waitpid(child, std::ptr::null_mut(), 0);
            nbytes
        };
        Answer::Text(String::from_utf8_lossy(&text[..usize::try_from(nbytes).unwrap_or(0)]).into_owned())
    }
}

/// Writes of a flood that are under way at once.
const FLOOD_DEPTH: usize = 64;

fn limit_files(soft: u64) -> Answer {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a query and a change of this process's own limit.
    let result = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = soft.min(limit.rlim_max);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
    };
    assert_eq!(result, 0, "setrlimit");
    Answer::Count(limit.rlim_cur)
}

fn limit_memory(nbytes: u64) -> Answer {
    let status = std::fs::read_to_string("/proc/self/statm").expect("our size");
    let pages: u64 = status.split(' ').next().and_then(|pages| pages.parse().ok()).expect("our size");
    let limit = pages * 4096 + nbytes;
    // SAFETY: a change of this process's own limit.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: limit, rlim_max: limit }) };
    assert_eq!(result, 0, "setrlimit");
    Answer::Done
}

/// Packets with data that came to any TCP socket of this process.
fn num_packets() -> u64 {
    // `struct tcp_info` up to tcpi_data_segs_in, which the libc crate does not know.
    const DATA_SEGMENTS_IN: usize = 152;
    let files = std::fs::read_dir("/proc/self/fd").expect("our descriptors").filter_map(std::result::Result::ok);
    let counts = files.filter_map(|entry| {
        let fd: i32 = entry.file_name().to_str()?.parse().ok()?;
        let mut info = [0_u8; DATA_SEGMENTS_IN + 4];
        let mut len = info.len() as libc::socklen_t;
        // SAFETY: `info` is `len` bytes long; what is no TCP socket is refused.
        let got =
            unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len) };
        let count = info.last_chunk::<4>().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        (got == 0 && len as usize == info.len()).then_some(u64::from(count))
    });
    counts.sum()
}

fn parse(address: &str) -> Result<Address> {
    address.parse().map_err(|_| Error::invalid(format!("{address} is no address")))
}

fn options(how: How) -> WriteOptions {
    WriteOptions { imm: how.imm, verify: how.verify, timeout: how.timeout }
}

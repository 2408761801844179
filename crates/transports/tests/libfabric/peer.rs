//! A peer process: this binary again, told what to do over its standard input.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;

use anyfabric_transports::libfabric::FabricDomain;
use anyfabric_transports::rdma::{Domain, Nic, RailIdx, RemoteMemory};

use crate::support::{library, tcp_nic, Region, Seen};

/// A process with a NIC, a rail and a region of [`REGION_BYTES`] zeroes.
pub(crate) struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    /// Of its rail.
    pub(crate) address: Vec<u8>,
    pub(crate) target: RemoteMemory,
}

impl Peer {
    pub(crate) fn start(library: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peer::process", "--ignored", "--nocapture", "--test-threads=1", "--quiet"])
            .env(ROLE, library)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let target = RemoteMemory { base: 0, key: 0 };
        let mut peer = Self { child, to, from, address: Vec::new(), target };
        let words = peer.answer();
        peer.address = from_hex(&words[0]);
        peer.target = RemoteMemory { base: words[1].parse().unwrap(), key: words[2].parse().unwrap() };
        peer
    }

    pub(crate) fn connect(&mut self, address: &[u8]) {
        assert_eq!(self.ask(&format!("connect {}", to_hex(address))), ["connected"]);
    }

    /// Immediates that have arrived, all of `imm`.
    pub(crate) fn num_arrived(&mut self, imm: u32) -> usize {
        self.ask(&format!("arrived {imm}"))[0].parse().unwrap()
    }

    /// Bytes of the region that are `byte`.
    pub(crate) fn num_bytes(&mut self, byte: u8) -> usize {
        self.ask(&format!("bytes {byte}"))[0].parse().unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn ask(&mut self, line: &str) -> Vec<String> {
        writeln!(self.to, "{line}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> Vec<String> {
        loop {
            let mut line = String::new();
            assert_ne!(self.from.read_line(&mut line).unwrap(), 0, "the peer is gone");
            // The harness prints lines of its own.
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.split_whitespace().map(str::to_owned).collect();
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the peer of other tests"]
fn process() {
    let Ok(name) = std::env::var(ROLE) else { return };
    let mut nic = tcp_nic(library(&name).unwrap(), "127.0.0.2");
    let region = Region::new(&nic, REGION_BYTES, 0);
    let (mut seen, rail) = (Seen::default(), nic.open().unwrap());
    let RemoteMemory { base, key } = FabricDomain::remote(&region.memory);
    println!("{ANSWER}{} {base} {key}", to_hex(&nic.address(rail)));
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| send.send(line).map_err(drop))
    });
    loop {
        nic.poll(&mut seen);
        match receive.try_recv() {
            Ok(line) => println!("{ANSWER}{}", obey(&line, (&mut nic, rail), &region, &seen)),
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return,
        }
    }
}

fn obey(line: &str, (nic, rail): (&mut impl Nic, RailIdx), region: &Region, seen: &Seen) -> String {
    let (verb, value) = line.split_once(' ').unwrap();
    match verb {
        "connect" => {
            nic.connect(rail, &from_hex(value)).unwrap();
            "connected".into()
        }
        "arrived" => {
            let imm = value.parse().unwrap();
            assert!(seen.arrived.iter().all(|arrived| *arrived == (rail, imm)), "{:?}", seen.arrived);
            seen.arrived.len().to_string()
        }
        "bytes" => {
            let byte: u8 = value.parse().unwrap();
            (0..region.bytes.len()).filter(|idx| region.at(*idx) == byte).count().to_string()
        }
        verb => panic!("{verb}"),
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|idx| u8::from_str_radix(&text[idx * 2..idx * 2 + 2], 16).unwrap()).collect()
}

pub(crate) const REGION_BYTES: usize = 1 << 20;
const ROLE: &str = "ANYFABRIC_LIBFABRIC_PEER";
const ANSWER: &str = "answer: ";

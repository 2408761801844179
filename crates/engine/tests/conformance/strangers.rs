//! Peers that look near and are not: filters and rights that forbid what the same host seems to allow, other
//! namespaces, another user, and another host, as far as one kernel can play two.
//!
//! Every pair must find a path that works, and say why it is not a faster one.

use std::ffi::CString;
use std::io;
use std::process::Command;

use anyfabric_engine::{Code, Config, Engine, PageList, WriteOptions};

use crate::ask::{Answer, Ask, Forbidden, How, Memory, Settings};
use crate::fabric::{new_region, on_fabrics, Fabric};
use crate::harness::{assert_code, bytes, fill, Peer, LONG};
use crate::pattern;

on_fabrics! {
    [foreign_memory_forbidden, other_user, other_pid_namespace, other_network_namespace, other_host] [shm SHM_FOREIGN]
}

/// One side may not touch the other's memory: that direction goes through the bounce ring, and both know.
fn foreign_memory_forbidden(fabric: &Fabric) {
    for forbidden in [Forbidden::Write, Forbidden::ReadAndWrite, Forbidden::Trace] {
        // SAFETY: geteuid cannot fail.
        if forbidden == Forbidden::Trace && unsafe { libc::geteuid() } != 0 {
            println!("skipped: {forbidden:?}: only root has a right more than its peers");
            continue;
        }
        let mut peer = Peer::bare();
        peer.ask(Ask::Forbid(forbidden));
        let mut met = Met::new(fabric, peer, |_| {});
        for round in 0..2 {
            met.exchange(round);
        }
        let (here, there) = (met.path(), met.path_of_peer());
        assert_eq!(here, "shm|mapped memory; other memory by process_vm_writev|", "{forbidden:?}");
        let ring = "bounce ring (process_vm_writev is not allowed)";
        assert_eq!(there, format!("shm|mapped memory; other memory by {ring}|"), "{forbidden:?}");
        assert_eq!(met.engine.info().peers[0].foreign_memory.as_deref(), Some("process_vm_writev"));
        met.ends_with_its_peer();
    }
}

fn other_user(fabric: &Fabric) {
    const NOBODY: u32 = 65534;
    let become_nobody = || {
        // SAFETY: changes this process only.
        if unsafe { libc::setgid(NOBODY) != 0 || libc::setuid(NOBODY) != 0 } {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    let Ok(peer) = Peer::bare_after(become_nobody) else {
        return println!("skipped: this user may not become another");
    };
    let mut met = Met::new(fabric, peer, |_| {});
    met.exchange(1);
    assert!(met.path_of_either().contains("runs as another user"), "{}", met.path_of_either());
    met.goes_over_tcp(fabric);
    met.ends_with_its_peer();
}

fn other_pid_namespace(fabric: &Fabric) {
    let enter = || {
        // SAFETY: system calls on this process only; the one between only waits, and holds no descriptor open.
        unsafe {
            if libc::unshare(libc::CLONE_NEWPID) != 0 {
                return Err(io::Error::last_os_error());
            }
            let child = libc::fork();
            if child > 0 {
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
                libc::waitpid(child, std::ptr::null_mut(), 0);
                libc::_exit(0);
            }
            Ok(())
        }
    };
    let Ok(peer) = Peer::bare_after(enter) else {
        return println!("skipped: this user may not make pid namespaces");
    };
    let mut met = Met::new(fabric, peer, |_| {});
    met.exchange(1);
    assert!(met.path_of_either().contains("another pid namespace?"), "{}", met.path_of_either());
    met.goes_over_tcp(fabric);
    met.ends_with_its_peer();
}

fn other_network_namespace(fabric: &Fabric) {
    let enter = || {
        // SAFETY: this process only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    let Some((peer, listen)) = Peer::bare_after(enter).ok().and_then(wire_up) else {
        return println!("skipped: this user may not make network namespaces, or `ip` is missing");
    };
    let mut met = Met::new(fabric, peer, |settings| settings.listen.clone_from(&listen));
    met.exchange(1);
    assert!(met.path().contains("not in this network namespace"), "{}", met.path());
    met.goes_over_tcp(fabric);
    met.ends_with_its_peer();
}

/// Another network and another boot of the kernel, which a file mounted over its own tells.
fn other_host(fabric: &Fabric) {
    let boot_id = std::env::temp_dir().join(format!("anyfabric-boot-id-{}", std::process::id()));
    std::fs::write(&boot_id, "01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
    let from = CString::new(boot_id.to_str().unwrap()).unwrap();
    let enter = move || {
        let (to, root) = (c"/proc/sys/kernel/random/boot_id", c"/");
        let nothing = std::ptr::null();
        // SAFETY: mounts in a namespace of this process's own.
        let entered = unsafe {
            libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) == 0
                && libc::mount(nothing, root.as_ptr(), nothing, libc::MS_REC | libc::MS_PRIVATE, nothing.cast()) == 0
                && libc::mount(from.as_ptr(), to.as_ptr(), nothing, libc::MS_BIND, nothing.cast()) == 0
        };
        if entered {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    let peer = Peer::bare_after(enter);
    let wired = peer.ok().and_then(wire_up);
    let _ = std::fs::remove_file(&boot_id);
    let Some((peer, listen)) = wired else {
        return println!("skipped: this user may not make namespaces, or `ip` is missing");
    };
    let mut met = Met::new(fabric, peer, |settings| settings.listen.clone_from(&listen));
    met.exchange(1);
    for path in [met.path(), met.path_of_peer()] {
        assert!(path.contains("the peer is on another host"), "{path}");
    }
    met.goes_over_tcp(fabric);
    met.ends_with_its_peer();
}

/// A cable between us and the network namespace of a peer; returns where the peer listens.
fn wire_up(peer: Peer) -> Option<(Peer, String)> {
    let pid = peer.pid();
    let run = |line: &str| {
        let mut words = line.split(' ');
        let output = Command::new(words.next()?).args(words).output().ok()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            println!("{line}: {said}");
        }
        output.status.success().then_some(())
    };
    // A network of four addresses for each process, so that tests do not meet.
    let host = (pid as u32 & 0x3fff) << 2;
    let ip = |last: u32| std::net::Ipv4Addr::from(0x0ad5_0000 | host | last);
    run(&format!("ip link add af{pid} type veth peer name af0 netns {pid}"))?;
    run(&format!("ip address add {}/30 dev af{pid}", ip(1)))?;
    run(&format!("ip link set af{pid} up"))?;
    run(&format!("nsenter --target {pid} --net ip address add {}/30 dev af0", ip(2)))?;
    run(&format!("nsenter --target {pid} --net ip link set af0 up"))?;
    Some((peer, format!("{}:0", ip(2))))
}

/// Two that have met over whatever they found.
struct Met {
    engine: Engine,
    peer: Peer,
}

impl Met {
    /// `change`: the peer's settings. Both have a secret, so that they may listen anywhere.
    fn new(fabric: &Fabric, mut peer: Peer, change: impl Fn(&mut Settings)) -> Self {
        let mut settings = fabric.settings(1);
        settings.transports = vec!["shm".into(), "tcp".into()];
        settings.secret = Some(b"strangers".to_vec());
        let engine = Engine::new(settings.config()).unwrap();
        change(&mut settings);
        peer.address = peer.start_engine(&settings);
        engine.connect(&peer.address, Some(LONG)).unwrap();
        Self { engine, peer }
    }

    /// Every operation, both ways, with memory of both kinds.
    fn exchange(&mut self, round: u64) {
        const BYTES: u64 = 3 << 20;
        for (idx, memory) in [Memory::Allocated, Memory::Foreign].into_iter().enumerate() {
            let (seed, imm) = (10 * round + idx as u64 + 1, 10 * round as u32 + idx as u32);
            let region = new_region(&self.engine, BYTES, memory);
            let there = self.peer.region(BYTES, memory);
            let remote = there.remote();
            fill(&region, seed);
            let counter = self.peer.open(imm, &[]);
            for nbytes in [64, 100_000, BYTES] {
                let (src, dst) = (region.slice(0..nbytes).unwrap(), remote.slice(0..nbytes).unwrap());
                let write = self.engine.write(&src, &dst, WriteOptions::counted(imm)).unwrap();
                write.wait(Some(LONG)).unwrap();
            }
            self.peer.wait_count(counter, 3).unwrap();
            assert_eq!(self.peer.mismatch(&there, (0, BYTES), seed, 0), None, "{memory:?}: to the peer");
            let pages = |indices: Vec<u32>| PageList::new(indices.into(), 4096, 4096, 0);
            let (from, to) = ((0..300).collect(), (300..600).rev().collect());
            let write =
                self.engine.write_pages((&region, pages(from)), (&remote, pages(to)), WriteOptions::counted(imm));
            write.unwrap().wait(Some(LONG)).unwrap();
            self.peer.wait_count(counter, 303).unwrap();
            let placed = (0..300).map(|page| ((599 - page) * 4096, page * 4096)).collect();
            assert_eq!(self.peer.page_mismatch(&there, placed, 4096, seed), None, "{memory:?}: pages");
            self.peer.fill(&there, (0, BYTES), seed + 5);
            let counter = self.engine.counter(Some(imm), &[]).unwrap();
            for nbytes in [64, 100_000, BYTES] {
                let write = self.peer.write(&there, (0, nbytes), &region, 0, How::counted(imm)).unwrap();
                self.peer.wait(write).unwrap();
            }
            counter.wait(3, Some(LONG)).unwrap();
            assert_eq!(pattern::mismatch(bytes(&region), seed + 5, 0), None, "{memory:?}: from the peer");
            self.peer.send(self.engine.address(), b"hello").unwrap();
            assert_eq!(self.engine.receive(Some(LONG)).unwrap().data, b"hello");
            region.revoke(None, LONG).unwrap();
        }
    }

    fn path(&self) -> String {
        let path = self.engine.path(&self.peer.address);
        format!("{}|{}|{}", path.transport, path.nics.join(","), path.reason)
    }

    fn path_of_peer(&mut self) -> String {
        let address = self.engine.address().to_string();
        match self.peer.ask(Ask::Path { engine: 0, address }) {
            Answer::Text(path) => path,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// One of the two sees the reason, the other that there is one.
    fn path_of_either(&mut self) -> String {
        format!("{}\n{}", self.path(), self.path_of_peer())
    }

    /// Not only says so: who insists on shared memory is refused, and told why.
    fn goes_over_tcp(&mut self, fabric: &Fabric) {
        for path in [self.path(), self.path_of_peer()] {
            assert!(path.starts_with("tcp|") && path.contains("shm: "), "{path}");
        }
        let mut settings = fabric.settings(1);
        settings.secret = Some(b"strangers".to_vec());
        let strict = Engine::new(Config { require: Some("shm".into()), ..settings.config() }).unwrap();
        let error = assert_code(strict.connect(&self.peer.address, Some(LONG)), Code::Unsupported);
        assert!(error.message.contains("shm: "), "{error}");
    }

    fn ends_with_its_peer(mut self) {
        let counter = self.engine.counter(Some(1000), std::slice::from_ref(&self.peer.address)).unwrap();
        self.peer.kill();
        // Heartbeats are the slowest way to notice: five of a second.
        assert_code(counter.wait(1, Some(LONG)), Code::PeerLost);
        assert!(self.engine.info().quarantine.is_empty());
    }
}

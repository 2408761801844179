//! A cable that can be cut, or damaged: forwards bytes between a socket of ours and a peer's listener, one connection at
//! a time.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyfabric_engine::transports::lock;
use anyfabric_engine::Address;

/// Forwards every connection to one address, until it is told otherwise.
pub(crate) struct Proxy {
    /// Where to connect instead.
    pub(crate) address: Address,
    shared: Arc<Shared>,
}

struct Shared {
    /// Both ends of each connection, in the order in which they were made.
    connections: Mutex<Vec<(TcpStream, TcpStream)>>,
    /// Nothing passes, nothing is closed: a cable that is unplugged.
    silent: AtomicBool,
    /// New connections are closed at once.
    refusing: AtomicBool,
    /// One bit of every stretch of [`MARK`]s that passes is another.
    corrupting: AtomicBool,
    num_corrupted: AtomicUsize,
    over: AtomicBool,
}

impl Proxy {
    pub(crate) fn before(address: &Address) -> Self {
        let to = address.sockets[0];
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let ours = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            connections: Mutex::default(),
            silent: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            corrupting: AtomicBool::new(false),
            num_corrupted: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accepting.accept(&listener, to));
        Self { address: Address { engine: address.engine, sockets: vec![ours] }, shared }
    }

    pub(crate) fn num_connections(&self) -> usize {
        self.shared.connections().len()
    }

    /// Ends a connection, both ways.
    pub(crate) fn cut(&self, connection: usize) {
        let connections = self.shared.connections();
        let (ours, theirs) = &connections[connection];
        let _ = (ours.shutdown(Shutdown::Both), theirs.shutdown(Shutdown::Both));
    }

    /// From now on whatever comes to us over a connection is lost on its way, and not even confirmed.
    pub(crate) fn lose_what_comes(&self, connection: usize) {
        lose_what_comes(&self.shared.connections()[connection].0);
    }

    pub(crate) fn silence(&self) {
        self.shared.silent.store(true, Ordering::SeqCst);
    }

    pub(crate) fn corrupt(&self, corrupting: bool) {
        self.shared.corrupting.store(corrupting, Ordering::SeqCst);
    }

    /// Bits that were turned so far.
    pub(crate) fn num_corrupted(&self) -> usize {
        self.shared.num_corrupted.load(Ordering::SeqCst)
    }

    pub(crate) fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; the forwarding ones end with their connections.
        let _ = TcpStream::connect(self.address.sockets[0]);
        for connection in 0..self.num_connections() {
            self.cut(connection);
        }
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<(TcpStream, TcpStream)>> {
        lock(&self.connections)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener, to: SocketAddr) {
        while let Ok((ours, _)) = listener.accept() {
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            if self.refusing.load(Ordering::SeqCst) {
                continue;
            }
            let Ok(theirs) = TcpStream::connect(to) else { continue };
            let _ = (ours.set_nodelay(true), theirs.set_nodelay(true));
            for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
                let (from, to) = (from.try_clone().expect("a clone"), to.try_clone().expect("a clone"));
                let shared = Arc::clone(&self);
                std::thread::spawn(move || shared.forward(from, to));
            }
            self.connections().push((ours, theirs));
        }
    }

    /// Payload, and nothing that keeps a stream going: no header has so many equal bytes.
    fn corrupt(&self, bytes: &mut [u8]) {
        if let Some(at) = bytes.windows(64).position(|window| window.iter().all(|byte| *byte == MARK)) {
            bytes[at + 32] ^= 0x10;
            self.num_corrupted.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 256 << 10];
        loop {
            let nbytes = from.read(&mut bytes).unwrap_or(0);
            while self.silent.load(Ordering::SeqCst) && !self.over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            if self.corrupting.load(Ordering::SeqCst) {
                self.corrupt(&mut bytes[..nbytes]);
            }
            if nbytes == 0 || to.write_all(&bytes[..nbytes]).is_err() {
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                return;
            }
        }
    }
}

/// The system drops what comes to the stream before it looks at it.
fn lose_what_comes(stream: &TcpStream) {
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    let (value, len) = ((&raw const program).cast(), size_of_val(&program) as libc::socklen_t);
    // SAFETY: an option of our own socket, of `len` bytes; the system copies the program.
    let result = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, len) };
    assert_eq!(result, 0, "a filter");
}

/// What a payload consists of that the proxy shall find.
pub(crate) const MARK: u8 = 0xa7;

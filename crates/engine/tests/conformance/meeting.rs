//! Peers that vanish while they meet, and connections that end as soon as they are made.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyfabric_engine::{Address, Code, Engine, EngineId, Remote, WriteOptions};
use anyfabric_transports::loopback::Random;
use anyfabric_transports::shm::{ring_memory, LocalChannel};
use anyfabric_transports::sys::{abstract_listener, accept, connect_local, memfd, send_with_fds, Fd};
use anyfabric_transports::Doorbell;
use anyfabric_wire::handshake::{
    Accepted, Answer, Call, Hello, Host, Purpose, Rejection, Resume, Seal, Side, Verdict, Welcome, CALL_BYTES,
    SEAL_BYTES,
};
use anyfabric_wire::{Control, Local, OLDEST_VERSION};

use crate::ask::Ask;
use crate::fabric::{on_fabrics, random, Fabric};
use crate::harness::{assert_code, eventually, Peer, LONG};
use crate::intruder::{dial, dial_and_call, send_control, this_host, Intro, Intruder, Knock};

on_fabrics! { [broken_while_a_caller_joins, broken_while_it_joins, lost_while_it_joins, unix_socket_is_full] [shm SHM] }
on_fabrics! { [killed_while_it_calls, killed_while_it_is_called] [shm SHM, tcp_1 TCP_1] }
on_fabrics! { [strangers_are_summed_up, a_crowd_calls_at_once, a_refused_stream_is_no_loss, a_flapping_caller_is_asked_for_once, reconnects_less_and_less_often, silence_is_waited_out, final_answers_end_it] [tcp_1 TCP_1] }

/// Whoever calls and is gone before he can be welcomed was never here: he is neither listed nor counted.
fn killed_while_it_calls(fabric: &Fabric) {
    const CALLERS: usize = 20;
    let mut random = random();
    let mut hub = Peer::start(&fabric.settings(1));
    let knock = |random: &mut Random| Knock::new(&hub.address, random, &Intro::default()).unwrap();
    let knocks: Vec<_> = (0..CALLERS).map(|_| knock(&mut random)).collect();
    // It finds who he is and that he is gone at once.
    hub.stop();
    knocks.into_iter().for_each(|knock| knock.introduce_and_vanish().unwrap());
    hub.go_on();
    // By the end of a call that began later it has seen to those that came before.
    let guest = Intruder::meet(&hub.address, &mut random);
    // The guest is one itself for a moment; the others would stay.
    eventually("none of those that were never here is listed", || hub.count(Ask::NumStrangers { engine: 0 }) == 0);
    drop(guest);
}

/// More callers than handshakes are kept: those beyond wait until others are through, and nobody is sent away for them.
fn a_crowd_calls_at_once(fabric: &Fabric) {
    const CALLERS: usize = 300;
    let mut random = random();
    let hub = Peer::start(&fabric.settings(1));
    let intro = Intro::default();
    let calls: Vec<_> = (0..CALLERS).map(|_| dial_and_call(&hub.address, &mut random, &intro).unwrap()).collect();
    let mut met = Vec::new();
    for (idx, (stream, call)) in calls.into_iter().enumerate() {
        let knock = Knock::answered(stream, &call, &hub.address, &mut random, &intro);
        let mut knock = knock.unwrap_or_else(|error| panic!("caller {idx} was not answered: {error}"));
        let welcome = knock.introduce().unwrap_or_else(|error| panic!("caller {idx} was not welcomed: {error}"));
        assert!(matches!(welcome, Welcome::Accepted(_)), "caller {idx}: {welcome:?}");
        met.push(knock);
    }
}

/// Strangers fill no log, however many come; all of them are counted.
fn strangers_are_summed_up(fabric: &Fabric) {
    const STRANGERS: u64 = 400;
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let began = Instant::now();
    for _ in 0..STRANGERS {
        dial(engine.address()).write_all(b"GET / HTTP/1.1\r\n").unwrap();
    }
    let (mut lines, mut counted) = (0, 0);
    eventually("each is counted", || {
        for (_, line) in engine.take_log() {
            let words: Vec<_> = line.split(' ').collect();
            assert_eq!(words[0], "dropped", "{line}");
            lines += 1;
            counted += words[1].parse().unwrap_or(1);
        }
        counted == STRANGERS
    });
    // One a tick, and ticks are 25 ms apart.
    let (limit, took) = (5 + began.elapsed().as_millis() as u64 / 20, began.elapsed());
    assert!(lines <= limit, "{lines} lines in {took:?}");
}

/// Of peers that could not be met the last are remembered, as of those that were lost. What was taken back from one of
/// them stays so.
fn killed_while_it_is_called(fabric: &Fabric) {
    const CALLS: u32 = 300;
    const REMEMBERED: usize = 256;
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let region = fabric.region(&engine, 64);
    // Somebody who holds a descriptor, and whom this engine has not met.
    let guest = Engine::new(fabric.settings(1).config()).unwrap();
    let to = Remote::from(region.descriptor().unwrap());
    region.revoke(Some(guest.address()), LONG).unwrap();
    let callee = Callee::new();
    let dies = std::thread::spawn({
        let listener = callee.listener.try_clone().unwrap();
        move || {
            for _ in 0..CALLS {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read_exact(&mut [0; CALL_BYTES]);
            }
        }
    });
    let mut last = None;
    for number in 0..CALLS {
        let mut id = EngineId([0x11; 16]);
        id.0[..4].copy_from_slice(&number.to_le_bytes());
        let address = Address { engine: id, sockets: callee.address().sockets };
        assert_code(engine.connect(&address, Some(LONG)), Code::ConnectionBroken);
        last = Some(address);
    }
    dies.join().unwrap();
    let peers = engine.info().peers;
    assert!((1..=REMEMBERED + 1).contains(&peers.len()), "{} peers are listed", peers.len());
    assert!(peers.iter().any(|peer| peer.address == last.as_ref().unwrap().to_string()), "the last is forgotten");
    let source = guest.allocate(64).unwrap();
    let (src, dst) = (source.slice(0..64).unwrap(), to.slice(0..64).unwrap());
    let write = guest.write(&src, &dst, WriteOptions::default()).unwrap();
    assert_code(write.wait(Some(LONG)), Code::Refused);
    // A later descriptor is another matter.
    let to = Remote::from(region.descriptor().unwrap());
    let dst = to.slice(0..64).unwrap();
    guest.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
}

/// The time between two attempts at the callee is never shorter than what the caller waits, however busy the machine.
fn reconnects_less_and_less_often(fabric: &Fabric) {
    let mut settings = fabric.settings(1);
    // As long as the test goes on the peer is not given up.
    (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(640), 200);
    let first = settings.heartbeat / 64;
    let longest = Duration::from_millis(250);
    let engine = Engine::new(settings.config()).unwrap();
    let mut callee = Callee::new();
    let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
    let stream = callee.session().welcome(&callee).unwrap();
    connect.wait(None).unwrap();
    drop(stream);
    // At once, and then after twice the time of the wait before.
    let mut before = callee.session().end();
    for factor in [1, 2, 4, 8, 16, 32, 64] {
        let attempt = callee.session();
        let (waited, least) = (before.elapsed(), (first * factor).min(longest));
        assert!(waited >= least, "called again after {waited:?}, not {least:?}");
        before = attempt.end();
    }
    // A connection that ends as soon as it is made is no success.
    for _ in 0..2 {
        let stream = callee.session().welcome(&callee).unwrap();
        assert!(before.elapsed() >= longest, "called again after {:?}", before.elapsed());
        before = Instant::now();
        drop(stream);
    }
    // One that lasts is: then the waits begin anew. A busy machine may make one seem long, but not again and again.
    for round in 1.. {
        let stream = callee.session().welcome(&callee).unwrap();
        std::thread::sleep(settings.heartbeat * 3 / 2);
        drop(stream);
        callee.session().end();
        let before = callee.session().end();
        let attempt = callee.session();
        let waited = before.elapsed();
        assert!(waited >= first * 2, "called again after {waited:?}");
        if waited < longest {
            break;
        }
        assert!(round < 20, "the waits do not begin anew");
        attempt.end();
    }
}

/// Whether a caller of this host still listens is asked when his connection breaks, and others wait meanwhile. Where one
/// after the other breaks as soon as it is made, that is not asked again and again.
fn a_flapping_caller_is_asked_for_once(fabric: &Fabric) {
    let mut settings = fabric.settings(1);
    settings.heartbeat = LONG;
    let engine = Engine::new(settings.config()).unwrap();
    let (listener, mut random) = (TcpListener::bind("127.0.0.1:0").unwrap(), random());
    listener.set_nonblocking(true).unwrap();
    let mut knock = Knock::new(engine.address(), &mut random, &Intro::default()).unwrap();
    knock.hello.address.sockets.push(listener.local_addr().unwrap());
    let Welcome::Accepted(accepted) = knock.introduce().unwrap() else { panic!("no session") };
    let (resume, mut num_broken) = (Resume { token: accepted.token, received: 0 }, 0);
    for time in 1..=20 {
        let address = knock.hello.address.clone();
        drop(knock);
        eventually("it breaks", || {
            num_broken += engine.take_log().iter().filter(|(_, line)| line.contains("stream 0 broke")).count();
            num_broken == time
        });
        knock = Knock::new(engine.address(), &mut random, &Intro::default()).unwrap();
        knock.hello.address = address;
        knock.hello.purpose = Purpose::Session { callee: engine.address().engine, resume: Some(resume) };
        assert!(matches!(knock.introduce().unwrap(), Welcome::Accepted(_)));
    }
    assert_eq!(std::iter::from_fn(|| listener.accept().ok()).count(), 1);
}

/// Whoever says nothing at first, as a process that is stopped or starved, is called again while something that waits
/// for him has time left.
fn silence_is_waited_out(fabric: &Fabric) {
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let mut callees = [Callee::new(), Callee::new()];
    let mut addresses = [callees[0].address(), callees[1].address()];
    // One is listed with another address too, of a machine where nobody listens.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    (addresses[1].engine, addresses[1].sockets) =
        (OTHER, [&*addresses[1].sockets, &[nobody.local_addr().unwrap()]].concat());
    drop(nobody);
    callees[1].id = OTHER;
    let patient = addresses.each_ref().map(|address| engine.start_connect(address, Some(LONG)).unwrap());
    let impatient = engine.send(&addresses[0], vec![1], Some(Duration::from_secs(1))).unwrap();
    // The first call is taken, and neither answered nor ended.
    let first = callees.each_ref().map(|callee| callee.listener.accept().unwrap());
    assert_code(impatient.wait(None), Code::TransferTimeout);
    for (callee, (address, patient)) in callees.iter_mut().zip(addresses.iter().zip(&patient)) {
        let second = callee.session();
        let path = engine.path(address);
        assert_eq!((&*path.state, &*path.reason), ("connecting", "no answer to the handshake; it is called again"));
        let stream = second.welcome(callee).unwrap();
        patient.wait(None).unwrap();
        let path = engine.path(address);
        assert!(path.state == "ready" && !path.reason.contains("handshake"), "{path:?}");
        drop(stream);
    }
    drop(first);
}

/// An engine that closes may refuse a stream before its goodbye is read: the goodbye tells what became of it.
fn a_refused_stream_is_no_loss(fabric: &Fabric) {
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let mut callee = Callee::new();
    let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
    let mut control = callee.session().welcome(&callee).unwrap();
    connect.wait(None).unwrap();
    let (stream, _) = callee.listener.accept().unwrap();
    let (mut attempt, purpose) = Attempt::hear(stream).unwrap();
    assert!(matches!(purpose, Purpose::Lane { .. }), "{purpose:?}");
    attempt.answer(&Welcome::Rejected(Rejection::NoSession)).unwrap();
    let told = |text: &str, log: &[(u8, String)]| log.iter().any(|(_, line)| line.ends_with(text));
    let mut log = Vec::new();
    eventually("the refusal is read", || {
        log.extend(engine.take_log());
        told("its session has ended", &log)
    });
    assert_eq!(engine.path(&callee.address()).state, "ready", "{log:#?}");
    send_control(&mut control, 1, &Control::Goodbye).unwrap();
    eventually("the goodbye is read", || {
        log.extend(engine.take_log());
        told("it has closed its engine", &log)
    });
}

/// The control connection breaks before it is known what carries the data, and the caller's Unix socket never comes: what
/// waits ends all the same.
fn broken_while_a_caller_joins(fabric: &Fabric) {
    let mut random = random();
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let intro = Intro { transport: "shm", ..Intro::default() };
    let mut first = Intruder::try_meet(engine.address(), &mut random, &intro).unwrap();
    let peer = Address { engine: first.engine, sockets: vec![] };
    let connect = engine.start_connect(&peer, Some(LONG)).unwrap();
    first.control(&Control::Heartbeat { received: 0 }).unwrap();
    let mut again = Knock::new(engine.address(), &mut random, &intro).unwrap();
    let resume = Some(Resume { token: first.accepted.token, received: 0 });
    again.hello.address.engine = first.engine;
    again.hello.purpose = Purpose::Session { callee: engine.address().engine, resume };
    drop(first);
    assert!(matches!(again.introduce(), Ok(Welcome::Accepted(_))));
    // Its heartbeats keep the peer; it has nothing else to say.
    let mut control = again.stream;
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| assert_code(connect.wait(None), Code::Unsupported));
        for sequence in 2.. {
            send_control(&mut control, sequence, &Control::Heartbeat { received: 0 }).unwrap();
            if wait.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}

/// The same at the caller, whose Unix socket ends while its call to restore the connection is under way: that call is not
/// in vain.
fn broken_while_it_joins(fabric: &Fabric) {
    let mut settings = fabric.settings(1);
    settings.transports.push("tcp".into());
    let engine = Engine::new(settings.config()).unwrap();
    let (mut callee, local) = Callee::on_this_host(0x24);
    let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
    let control = callee.session().welcome(&callee).unwrap();
    let socket = next_caller(&local);
    drop(control);
    let attempt = callee.session();
    drop(socket);
    // Time enough to see that it has ended.
    std::thread::sleep(Duration::from_millis(200));
    let control = attempt.welcome(&callee).unwrap();
    connect.wait(None).unwrap();
    let path = engine.path(&callee.address());
    assert_eq!((&*path.transport, &*path.state), ("tcp", "ready"));
    drop(control);
}

/// A crowd on the Unix socket leaves no room for a while: who comes then waits too, and takes nothing slower.
fn unix_socket_is_full(fabric: &Fabric) {
    let mut settings = fabric.settings(1);
    settings.transports.push("tcp".into());
    let engine = Engine::new(settings.config()).unwrap();
    let (mut callee, local) = Callee::on_this_host(0x25);
    // SAFETY: our own socket; from now on it lets one wait.
    assert_eq!(unsafe { libc::listen(local.as_raw_fd(), 0) }, 0);
    let crowd: Vec<_> = std::iter::from_fn(|| connect_local(&callee.local_name()).ok()).collect();
    let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
    let control = callee.session().welcome(&callee).unwrap();
    // Time enough to be turned away.
    std::thread::sleep(Duration::from_millis(200));
    assert!(!connect.is_done(), "{:?}", engine.path(&callee.address()));
    let mut taken = Vec::new();
    eventually("it comes when there is room", || {
        taken.extend(accept(&local).ok().map(LocalChannel::new));
        taken.iter().any(|channel| matches!(channel.receive(), Ok(Some((Local::Join { .. }, _)))))
    });
    drop((control, crowd));
}

/// Who is lost while he joins gets no path any more, and nothing of ours over it.
fn lost_while_it_joins(fabric: &Fabric) {
    let engine = Engine::new(fabric.settings(1).config()).unwrap();
    let (mut callee, local) = Callee::on_this_host(0x26);
    let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
    let mut control = callee.session().welcome(&callee).unwrap();
    let socket = next_caller(&local);
    send_control(&mut control, 1, &Control::Goodbye).unwrap();
    assert_code(connect.wait(None), Code::PeerLost);
    let (ring, _mapping) = ring_memory().unwrap();
    let doorbell = memfd(c"doorbell", Doorbell::BYTES).unwrap();
    let joined = Local::Joined { probe: (0, 0), foreign: false };
    send_with_fds(&socket, &joined.encode(), &[ring.as_raw_fd(), doorbell.as_raw_fd()]).unwrap();
    let channel = LocalChannel::new(socket);
    eventually("it turns its back", || match channel.receive() {
        Ok(Some((Local::Join { .. }, _)) | None) => false,
        Ok(Some((other, _))) => panic!("{other:?}"),
        Err(error) => error.kind() == io::ErrorKind::UnexpectedEof || error.kind() == io::ErrorKind::ConnectionReset,
    });
}

/// An answer that no later one will contradict ends all that waits at once.
fn final_answers_end_it(fabric: &Fabric) {
    for verdict in [Verdict::Secret, Verdict::Version, Verdict::Busy] {
        let engine = Engine::new(fabric.settings(1).config()).unwrap();
        let callee = Callee::new();
        let connect = engine.start_connect(&callee.address(), Some(LONG)).unwrap();
        let (mut stream, _) = callee.listener.accept().unwrap();
        stream.read_exact(&mut [0; CALL_BYTES]).unwrap();
        let version = if verdict == Verdict::Version { u16::MAX } else { OLDEST_VERSION };
        let answer = Answer { verdict, version, oldest: version, nonce: [0; 32], proof: [0; 32] };
        stream.write_all(&answer.encode()).unwrap();
        let began = Instant::now();
        assert_code(connect.wait(None), Code::ConnectionBroken);
        assert!(began.elapsed() < LONG / 2, "{verdict:?}: told after {:?}", began.elapsed());
    }
}

/// An engine's listener, made by hand, on another host as far as it says.
pub(crate) struct Callee {
    id: EngineId,
    host: Host,
    transports: Vec<String>,
    listener: TcpListener,
    lanes: Vec<TcpStream>,
}

/// The next that comes to a Unix socket.
fn next_caller(local: &Fd) -> Fd {
    let mut caller = None;
    eventually("it comes to the Unix socket", || {
        caller = accept(local).ok();
        caller.is_some()
    });
    caller.unwrap()
}

/// A call that has not been answered.
pub(crate) struct Attempt {
    stream: TcpStream,
    seal: Seal,
}

impl Callee {
    pub(crate) fn new() -> Self {
        Self {
            id: EngineId([0x22; 16]),
            host: Host { boot_id: [0x44; 16], pid: 1, name: "elsewhere".into() },
            transports: vec!["tcp".into()],
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            lanes: Vec::new(),
        }
    }

    /// One on this host, and its Unix socket.
    fn on_this_host(number: u8) -> (Self, Fd) {
        let mut this = Self { id: EngineId([number; 16]), host: this_host(), ..Self::new() };
        this.transports.push("shm".into());
        let local = abstract_listener(&this.local_name()).unwrap();
        (this, local)
    }

    fn local_name(&self) -> String {
        format!("anyfabric/{}", self.id)
    }

    pub(crate) fn address(&self) -> Address {
        Address { engine: self.id, sockets: vec![self.listener.local_addr().unwrap()] }
    }

    /// The next call, which must be for a stream.
    pub(crate) fn lane(&self) -> TcpStream {
        let (stream, _) = self.listener.accept().unwrap();
        let (attempt, purpose) = Attempt::hear(stream).unwrap();
        assert!(matches!(purpose, Purpose::Lane { .. }), "{purpose:?}");
        attempt.welcome(self).unwrap()
    }

    /// The next call for a control connection; streams are accepted, and kept.
    pub(crate) fn session(&mut self) -> Attempt {
        loop {
            let (stream, _) = self.listener.accept().unwrap();
            let (attempt, purpose) = Attempt::hear(stream).unwrap();
            match purpose {
                Purpose::Session { .. } => return attempt,
                Purpose::Lane { .. } => {
                    let stream = attempt.welcome(self).unwrap();
                    self.lanes.push(stream);
                }
            }
        }
    }
}

impl Attempt {
    fn hear(mut stream: TcpStream) -> io::Result<(Self, Purpose)> {
        let mut bytes = [0; CALL_BYTES];
        stream.read_exact(&mut bytes)?;
        let call = Call::decode(&bytes).map_err(io::Error::other)?;
        let version = call.agree().map_err(io::Error::other)?;
        let nonce = [0x33; 32];
        let seal = Seal::new(b"", &call, version, &nonce);
        let answer = Answer { verdict: Verdict::Ok, version, oldest: OLDEST_VERSION, nonce, proof: seal.proof() };
        stream.write_all(&answer.encode())?;
        let mut header = [0; SEAL_BYTES];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; Seal::body_bytes(&header).map_err(io::Error::other)?];
        stream.read_exact(&mut body)?;
        let hello: Option<Hello> = seal.open(Side::Caller, &header, &body).map_err(io::Error::other)?;
        let purpose = hello.ok_or(io::ErrorKind::InvalidData)?.purpose;
        Ok((Self { stream, seal }, purpose))
    }

    pub(crate) fn welcome(mut self, callee: &Callee) -> io::Result<TcpStream> {
        let accepted = Accepted {
            address: callee.address(),
            host: callee.host.clone(),
            transports: callee.transports.clone(),
            max_message_bytes: 1 << 16,
            token: [0x55; 16],
            received: 0,
        };
        self.answer(&Welcome::Accepted(Box::new(accepted)))?;
        Ok(self.stream)
    }

    fn answer(&mut self, welcome: &Welcome) -> io::Result<()> {
        self.stream.write_all(&self.seal.seal(Side::Listener, welcome))
    }

    /// Ends the connection instead of an answer; returns when.
    fn end(self) -> Instant {
        let now = Instant::now();
        drop(self.stream);
        now
    }
}

const OTHER: EngineId = EngineId([0x23; 16]);

//! Meeting on the Unix socket: two engines of one host exchange rings and
//! doorbells, and find out whether they may write to each other's memory.
//!
//! Same host means the same boot id and that this worked, nothing else: two
//! containers with different network namespaces, users or pid namespaces fail
//! here and use tcp, and the path says why.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::shm::{ring, ring_memory, LocalChannel, ShmLink, ShmOptions};
use anyfabric_transports::sys::{self, Fd, Interest, Mapping};
use anyfabric_transports::Doorbell;
use anyfabric_wire::Local;

use crate::driver::{join_token, link_token, Driver};
use crate::inner::{nanos, Inner};
use crate::listeners::local_name;
use crate::peer::{Peer, Phase};

/// A Unix socket whose ends do not know each other yet.
pub(crate) struct Join {
    channel: LocalChannel,
    /// Our ring to the peer and the peer; `None` on the listening side.
    caller: Option<(Arc<Peer>, Arc<Mapping>)>,
    pub(crate) deadline_ns: u64,
}

impl Join {
    /// Whether we have called, and not the peer.
    pub(crate) const fn is_ours(&self) -> bool {
        self.caller.is_some()
    }
}

impl Inner {
    pub(crate) fn start_join(&self, driver: &mut Driver, peer: &Arc<Peer>, token: [u8; 16]) {
        driver.turned_away.retain(|(other, _)| other.idx != peer.idx);
        let result = sys::connect_local(&local_name(peer.address.engine)).and_then(|socket| {
            let (ring_fd, ring) = ring_memory()?;
            let join = Local::Join { engine: self.address.engine, token, probe: self.probe_word() };
            let fds = [&ring_fd, &*self.doorbell_fd].map(std::os::fd::AsRawFd::as_raw_fd);
            sys::send_with_fds(&socket, &join.encode(), &fds)?;
            Ok((socket, ring))
        });
        match result {
            Ok((socket, ring)) => self.add_join(driver, socket, Some((Arc::clone(peer), ring))),
            // A crowd is there: until the time for it is over.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                driver.turned_away.push((Arc::clone(peer), token));
            }
            Err(error) => {
                let why = match error.kind() {
                    std::io::ErrorKind::ConnectionRefused => "its Unix socket is not in this network namespace".into(),
                    _ => format!("no Unix socket to it: {error}"),
                };
                self.settle_path(peer, Some(why));
            }
        }
    }

    /// Tries those again whose Unix socket was full, for as long as both have time for it.
    pub(crate) fn join_again(&self, driver: &mut Driver, now_ns: u64) {
        for (peer, token) in std::mem::take(&mut driver.turned_away) {
            match peer.phase() {
                Phase::Joining { until_ns } if now_ns + nanos(JOIN_TIME) <= until_ns => {
                    self.start_join(driver, &peer, token);
                }
                Phase::Joining { .. } => self.settle_path(&peer, Some("its Unix socket was full".into())),
                Phase::Broken { .. } => driver.turned_away.push((peer, token)),
                _ => {}
            }
        }
    }

    pub(crate) fn accept_join(&self, driver: &mut Driver, socket: Fd) {
        self.add_join(driver, socket, None);
    }

    fn add_join(&self, driver: &mut Driver, socket: Fd, caller: Option<(Arc<Peer>, Arc<Mapping>)>) {
        let id = driver.next_id();
        let deadline_ns = self.clock.now_ns() + nanos(JOIN_TIME);
        if self.poller.add(&socket, join_token(id), Interest::Read).is_ok() {
            driver.joins.insert(id, Join { channel: LocalChannel::new(socket), caller, deadline_ns });
        }
    }

    pub(crate) fn step_join(&self, driver: &mut Driver, id: u32) {
        let Some(join) = driver.joins.get(&id) else { return };
        match join.channel.receive() {
            Ok(None) => {}
            Ok(Some((message, fds))) => {
                let Some(join) = driver.joins.remove(&id) else { return };
                self.poller.remove(join.channel.socket());
                self.joined(join, message, fds);
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.join_failed(driver, id, "it turned its Unix socket down: its own path says why");
            }
            Err(error) => self.join_failed(driver, id, &format!("its Unix socket: {error}")),
        }
    }

    pub(crate) fn join_failed(&self, driver: &mut Driver, id: u32, why: &str) {
        let Some(join) = driver.joins.remove(&id) else { return };
        if let Some((peer, _)) = join.caller {
            self.settle_path(&peer, Some(why.to_owned()));
        }
    }

    fn joined(&self, join: Join, message: Local, fds: Vec<Fd>) {
        let caller = join.caller.as_ref().map(|(peer, _)| Arc::clone(peer));
        if caller.as_ref().is_some_and(|peer| peer.lost().is_some()) {
            // Nobody would close its link.
            return;
        }
        let (peer, probe, peer_writes_foreign) = match (message, caller) {
            (Local::Join { engine, token, probe }, None) => {
                let Some(peer) = self.find_peer(engine).filter(|peer| is_expected(peer, &token)) else { return };
                (peer, probe, None)
            }
            (Local::Joined { probe, foreign }, Some(peer)) => (peer, probe, Some(foreign)),
            (_, Some(peer)) => return self.settle_path(&peer, Some("it sent something else than it should".into())),
            (_, None) => return,
        };
        if let Err(why) = self.make_link(&peer, join, (probe, peer_writes_foreign), fds) {
            self.settle_path(&peer, Some(why));
        }
    }

    /// The link to a peer that has said where its probe lies, and whether it writes into foreign memory here if it
    /// was called and so has tried.
    fn make_link(
        &self,
        peer: &Arc<Peer>,
        join: Join,
        (probe, peer_writes_foreign): ((u64, u64), Option<bool>),
        fds: Vec<Fd>,
    ) -> Result<(), String> {
        let failed = |what| move |error: std::io::Error| format!("{what}: {error}");
        let [ring_fd, doorbell_fd] =
            <[Fd; 2]>::try_from(fds).map_err(|fds| format!("{} descriptors came, expected 2", fds.len()))?;
        let credentials = sys::peer_credentials(join.channel.socket()).map_err(failed("its credentials"))?;
        // SAFETY: geteuid cannot fail.
        if credentials.uid != unsafe { libc::geteuid() } {
            return Err(format!("it runs as another user ({})", credentials.uid));
        }
        let pid_fd =
            sys::pid_fd(credentials.pid).map_err(failed("its process is not visible here (another pid namespace?)"))?;
        let incoming = map_received(&ring_fd, ring::BYTES).map_err(failed("its ring"))?;
        let doorbell = map_received(&doorbell_fd, Doorbell::BYTES).map_err(failed("its doorbell"))?;
        let foreign = !self.config.isolate && self.may_write(credentials.pid, probe);
        let is_ours = join.is_ours();
        let outgoing = match join.caller {
            Some((_, ring)) => ring,
            None => {
                let (fd, ring) = ring_memory().map_err(failed("no memory for a ring"))?;
                let joined = Local::Joined { probe: self.probe_word(), foreign };
                let fds = [&fd, &*self.doorbell_fd].map(std::os::fd::AsRawFd::as_raw_fd);
                sys::send_with_fds(join.channel.socket(), &joined.encode(), &fds).map_err(failed("its Unix socket"))?;
                ring
            }
        };
        let link = Arc::new(ShmLink::new(ShmOptions {
            peer: peer.idx,
            pid: credentials.pid,
            pid_fd,
            channel: join.channel,
            outgoing,
            incoming: Arc::new(incoming),
            doorbell: Doorbell::new(doorbell),
            regions: Arc::clone(&self.regions),
            isolate: self.config.isolate,
            writes_foreign: foreign,
            peer_writes_foreign,
        }));
        self.use_link(peer, link, is_ours.then_some(foreign)).map_err(failed("its Unix socket"))
    }

    fn use_link(&self, peer: &Arc<Peer>, link: Arc<ShmLink>, tell: Option<bool>) -> std::io::Result<()> {
        link.watch(&self.poller, |channel| link_token(peer.idx, channel))?;
        if let Some(foreign) = tell {
            link.tell_probed(foreign)?;
        }
        if self.config.require.as_deref().is_none_or(|required| required == "shm") {
            peer.use_shm(link);
        }
        self.settle_path(peer, None);
        Ok(())
    }

    /// Who isolates shows no address: a peer's probe fails, and it knows.
    fn probe_word(&self) -> (u64, u64) {
        if self.config.isolate {
            return (0, 0);
        }
        (std::ptr::from_ref(&*self.probe) as u64, *self.probe)
    }

    /// Whether process_vm_writev into that process is allowed. The word shows
    /// that it is the right process; then it is written as it is, for a filter of
    /// system calls may allow to read and not to write.
    fn may_write(&self, pid: u32, (address, content): (u64, u64)) -> bool {
        let mut word = [0; 8];
        if sys::foreign_read(pid, address, &mut word).is_err() || u64::from_ne_bytes(word) != content {
            return false;
        }
        let same = sys::ForeignWrite { src: word.as_ptr(), dst: address, nbytes: word.len() };
        // SAFETY: the word is ours, and lives through the call.
        unsafe { sys::foreign_write(pid, &mut sys::Foreign::default(), std::iter::once(same)) }.is_ok()
    }
}

/// Whether a peer that has this token may join: it has met us, and has no path yet.
fn is_expected(peer: &Peer, token: &[u8; 16]) -> bool {
    let state = peer.state();
    let is_waited_for = match state.phase {
        Phase::Joining { .. } => true,
        // It found no path at first and tries again, or the control connection broke meanwhile.
        Phase::Up | Phase::Broken { .. } => peer.link().is_none(),
        _ => false,
    };
    is_waited_for && state.session.as_ref().is_some_and(|session| session.token == *token)
}

/// Maps memory that a peer sent, once it is known that it cannot shrink.
fn map_received(fd: &Fd, len: usize) -> std::io::Result<Mapping> {
    sys::check_memfd(fd, len)?;
    Mapping::shared(fd, len, false)
}

/// How long both have for it: half of what they have to introduce themselves.
pub(crate) const JOIN_TIME: Duration = Duration::from_millis(2500);

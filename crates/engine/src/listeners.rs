//! Where an engine is called, and how many that call at once it takes in.
//!
//! Callers beyond [`MAX_CALLERS`] wait in the kernel's queue until others are
//! through. Who has said nothing for [`FIRST_WORD`], or is not through after
//! [`CHANCE`], makes way for them, so that a flood of connections displaces
//! itself.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::sys::{self, Fd, Interest, Poller};
use anyfabric_wire::EngineId;
use socket2::SockRef;

use crate::driver::{meet_token, Driver, HANDSHAKE, LISTENER, LOCAL_LISTENER};
use crate::inner::{nanos, Inner};
use crate::join::JOIN_TIME;
use crate::meet::{Meet, MeetError};
use crate::{Error, Result};

/// A TCP listener for control connections and streams, and a Unix socket for
/// engines of this host.
pub(crate) struct Listeners {
    control: Fd,
    local: Fd,
    /// Not watched until the next tick, instead of waking us again and again: a
    /// caller cannot be taken in, or there is no place for him.
    rest: bool,
    /// That the last one could not be taken in was said.
    is_stuck: bool,
}

/// Connections of callers that came to nothing, until the log is told: one line a
/// tick, for strangers make as many as they like.
#[derive(Default)]
pub(crate) struct Dropped {
    num: u64,
    last: String,
}

impl Dropped {
    pub(crate) fn add(&mut self, why: &MeetError) {
        self.num += 1;
        self.last = why.to_string();
    }

    pub(crate) fn take_line(&mut self) -> Option<String> {
        let Self { num, last } = std::mem::take(self);
        match num {
            0 => None,
            1 => Some(format!("dropped a connection: {last}")),
            num => Some(format!("dropped {num} connections, of the last: {last}")),
        }
    }
}

/// One whose handshake is under way.
struct Caller {
    id: u32,
    came_ns: u64,
    has_spoken: bool,
}

/// What becomes of one more caller.
#[derive(Debug, PartialEq, Eq)]
enum Room {
    Free,
    /// In the place of this one.
    InsteadOf(u32),
    NotYet,
}

impl Listeners {
    /// Binds both; returns also where the first is.
    pub(crate) fn bind(to: &str, id: EngineId, poller: &Poller) -> Result<(SocketAddr, Self)> {
        let system = |what: &'static str| move |error: std::io::Error| Error::system(what, &error).during("start");
        let listener = TcpListener::bind(to)
            .map_err(|error| Error::system(&format!("cannot listen on {to}"), &error).during("start"))?;
        // Once more, for the standard library lets 128 wait: the kernel asks others again after a second.
        SockRef::from(&listener).listen(sys::BACKLOG).map_err(system("the listener"))?;
        listener.set_nonblocking(true).map_err(system("the listener"))?;
        let bound = listener.local_addr().map_err(system("the listener"))?;
        let local = sys::abstract_listener(&local_name(id)).map_err(system("the Unix socket"))?;
        let mut listeners = Self { control: Fd::new(listener), local, rest: true, is_stuck: false };
        listeners.resume(poller).map_err(system("epoll"))?;
        Ok((bound, listeners))
    }

    /// Looks for callers again.
    pub(crate) fn resume(&mut self, poller: &Poller) -> std::io::Result<()> {
        if self.rest {
            poller.add(&self.control, LISTENER, Interest::Read)?;
            let both = poller.add(&self.local, LOCAL_LISTENER, Interest::Read);
            both.inspect_err(|_| poller.remove(&self.control))?;
            self.rest = false;
        }
        Ok(())
    }

    fn rest(&mut self, poller: &Poller) {
        poller.remove(&self.control);
        poller.remove(&self.local);
        self.rest = true;
    }
}

impl Inner {
    pub(crate) fn accept_calls(&self, driver: &mut Driver) {
        for _ in 0..ACCEPTS {
            // Our own calls do not count: connecting to many peers must not turn callers away.
            let callers = driver.meets.iter().filter(|(_, meet)| meet.call.is_none());
            let room = self.room_among(callers.map(|(id, meet)| Caller {
                id: *id,
                came_ns: meet.deadline_ns - nanos(HANDSHAKE),
                has_spoken: meet.has_heard(),
            }));
            let Some(stream) = self.accept(driver, &room, |listeners| &listeners.control) else { return };
            if let Room::InsteadOf(id) = room {
                driver.meets.remove(&id);
            }
            let deadline_ns = self.clock.now_ns() + nanos(HANDSHAKE);
            if let Ok(meet) = Meet::accept(stream, Arc::clone(&self.secret), deadline_ns) {
                let id = driver.next_id();
                if self.poller.add(meet.stream(), meet_token(id), Interest::Read).is_ok() {
                    driver.meets.insert(id, meet);
                }
            }
        }
    }

    pub(crate) fn accept_joins(&self, driver: &mut Driver) {
        for _ in 0..ACCEPTS {
            let callers = driver.joins.iter().filter(|(_, join)| !join.is_ours());
            // A word is all that is waited for.
            let room = self.room_among(callers.map(|(id, join)| Caller {
                id: *id,
                came_ns: join.deadline_ns - nanos(JOIN_TIME),
                has_spoken: false,
            }));
            let Some(socket) = self.accept(driver, &room, |listeners| &listeners.local) else { return };
            if let Room::InsteadOf(id) = room {
                driver.joins.remove(&id);
            }
            self.accept_join(driver, socket);
        }
    }

    /// The next that waits at a listener, if there is room.
    fn accept(&self, driver: &mut Driver, room: &Room, at: fn(&Listeners) -> &Fd) -> Option<Fd> {
        let listeners = driver.listeners.as_mut()?;
        if *room == Room::NotYet {
            listeners.rest(&self.poller);
            driver.hurry(self.clock.now_ns());
            return None;
        }
        let accepted = sys::accept(at(listeners));
        match &accepted {
            Ok(_) => listeners.is_stuck = false,
            // Nobody waits any more.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                listeners.rest(&self.poller);
                if !std::mem::replace(&mut listeners.is_stuck, true) {
                    let is_full = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
                    let what_to_try = if is_full { "; raise the limit (ulimit -n)" } else { "" };
                    self.log(40, format!("cannot accept a peer: {error}{what_to_try}"));
                }
            }
        }
        accepted.ok()
    }

    /// Beside those that are here.
    fn room_among(&self, callers: impl Iterator<Item = Caller> + Clone) -> Room {
        if callers.clone().count() < MAX_CALLERS {
            return Room::Free;
        }
        let now_ns = self.clock.now_ns();
        let had_chance = |caller: &Caller| {
            let chance = if caller.has_spoken { CHANCE } else { FIRST_WORD };
            now_ns.saturating_sub(caller.came_ns) >= nanos(chance)
        };
        let first = callers.filter(had_chance).min_by_key(|caller| (caller.has_spoken, caller.came_ns));
        first.map_or(Room::NotYet, |caller| Room::InsteadOf(caller.id))
    }
}

/// Name of an engine's Unix socket.
pub(crate) fn local_name(engine: EngineId) -> String {
    format!("anyfabric/{engine}")
}

/// Callers taken in between two looks at what else there is to do.
const ACCEPTS: usize = 64;
/// Handshakes of callers under way at most, and as many on the Unix socket.
const MAX_CALLERS: usize = 256;
/// How long each of them is safe from those that come later. Whoever waited at the listener has spoken when he comes in.
const FIRST_WORD: Duration = Duration::from_millis(100);
/// The same once he has spoken: a busy machine keeps a process waiting as long.
const CHANCE: Duration = Duration::from_secs(1);

//! Paths over NICs: which groups an engine has, and how a path is made.
//!
//! A group is opened at its first use, so that an engine that needs no NIC
//! opens no library. The caller of a session tries the libraries in the order
//! of their speed; the listener follows.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyfabric_plan::MAX_SHARDS;
use anyfabric_transports::rdma::{NicChoice, NicError, NicGroup, PathOptions, RailGroup, Standing};
use anyfabric_transports::sys::{Interest, Poller, Ready};
use anyfabric_transports::{libfabric, verbs, Clock, ControlPath, Failure, Sink};
use anyfabric_wire::{NicLibrary, Rails};

use crate::arrivals::Arrivals;
use crate::base::Base;
use crate::driver::{Driver, HANDSHAKE, NICS, NIC_ANNOUNCEMENTS};
use crate::inner::{lock, nanos, Inner};
use crate::peer::{Peer, Phase};
use crate::placement::Placement;
use crate::{Code, Config, Error, Result};

/// The groups of NICs of an engine.
#[derive(Default)]
pub(crate) struct Groups {
    slots: [OnceLock<std::result::Result<Arc<dyn NicGroup>, NicError>>; 2],
    placement: OnceLock<Placement>,
    opening: Mutex<()>,
    must_be_polled: AtomicBool,
}

/// Libraries, fastest first.
pub(crate) const LIBRARIES: [NicLibrary; 2] = [NicLibrary::Verbs, NicLibrary::Libfabric];

/// Name of the transport in the API.
pub(crate) const fn name_of(library: NicLibrary) -> &'static str {
    match library {
        NicLibrary::Verbs => "verbs",
        NicLibrary::Libfabric => "libfabric",
    }
}

impl Groups {
    /// Opens at once what was asked for by name, so that a mistake is an error:
    /// a transport that is the only one, or NICs, which any of the transports may
    /// have.
    pub(crate) fn new(config: &Config, poller: &Poller) -> Result<Self> {
        let this = Self::default();
        if !config.devices.is_empty() {
            let placement = Placement::of(config).map_err(|why| Error::invalid(why).during("start"))?;
            let _ = this.placement.set(placement);
        }
        let is_enabled = |name: &str| config.transports.iter().any(|enabled| enabled == name);
        let is_excluded = |name: &str| config.require.as_deref().is_some_and(|required| required != name);
        let mut failures = Vec::new();
        let mut code = if config.nics.is_empty() { Code::Unsupported } else { Code::InvalidArgument };
        for library in LIBRARIES {
            let name = name_of(library);
            let is_only = config.require.as_deref() == Some(name) || config.transports == [name];
            if !is_enabled(name) || is_excluded(name) || !is_only && config.nics.is_empty() {
                continue;
            }
            match this.open(library, config, poller) {
                Ok(_) => return Ok(this),
                Err(error) => {
                    if matches!(error, NicError::Descriptors(_)) {
                        code = Code::ResourceExhausted;
                    }
                    failures.push(format!("{name}: {error}"));
                }
            }
        }
        if failures.is_empty() {
            return Ok(this);
        }
        Err(Error::new(code, failures.join("; ")).during("start"))
    }

    /// The group of a library, opened now if it was not. What failed is not tried again, unless descriptors were short.
    pub(crate) fn open(
        &self,
        library: NicLibrary,
        config: &Config,
        poller: &Poller,
    ) -> std::result::Result<&Arc<dyn NicGroup>, NicError> {
        let slot = &self.slots[library as usize];
        let opening = slot.get().is_none().then(|| lock(&self.opening));
        if opening.is_some() && slot.get().is_none() {
            let opened = self.open_now(library, config, poller);
            if let Err(error @ NicError::Descriptors(_)) = opened {
                return Err(error);
            }
            let _ = slot.set(opened);
        }
        match slot.get() {
            Some(found) => found.as_ref().map_err(Clone::clone),
            None => Err(NicError::Device("it could not be opened".into())),
        }
    }

    fn open_now(
        &self,
        library: NicLibrary,
        config: &Config,
        poller: &Poller,
    ) -> std::result::Result<Arc<dyn NicGroup>, NicError> {
        let group = open(library, config, self.placement(config))?;
        for fd in group.event_fds() {
            let Some(fd) = fd else {
                // ORDERING: see `must_be_polled`.
                self.must_be_polled.store(true, Ordering::Relaxed);
                continue;
            };
            watch(poller, fd, NICS)?;
        }
        group.announcements().into_iter().try_for_each(|fd| watch(poller, fd, NIC_ANNOUNCEMENTS))?;
        Ok(group)
    }

    /// What the engine takes of its machine.
    pub(crate) fn placement(&self, config: &Config) -> &Placement {
        // Only names that are wrong fail, and those were looked at when the engine started.
        self.placement.get_or_init(|| Placement::of(config).unwrap_or_default())
    }

    /// Groups that are open.
    #[inline]
    pub(crate) fn opened(&self) -> impl Iterator<Item = &Arc<dyn NicGroup>> {
        self.slots.iter().filter_map(|slot| slot.get()?.as_ref().ok())
    }

    /// Whether somebody must poll: a NIC has no descriptor to wait on.
    #[inline]
    pub(crate) fn must_be_polled(&self) -> bool {
        // ORDERING: set while the group is opened, before any path uses it.
        self.must_be_polled.load(Ordering::Relaxed)
    }

    /// Asks every NIC for an event, before somebody blocks: false when that may not
    /// be for long, as [`NicGroup::arm`] says.
    #[inline]
    pub(crate) fn arm(&self, sink: &dyn Sink) -> bool {
        // If one is not, nobody blocks, and the others need not be asked.
        self.opened().all(|group| group.arm(sink))
    }

    /// Why a library certainly drives no NIC here; nothing is opened for that.
    pub(crate) fn obstacle(&self, library: NicLibrary, config: &Config) -> Option<String> {
        match self.slots[library as usize].get() {
            Some(Ok(_)) => None,
            Some(Err(why)) => Some(why.to_string()),
            None => match library {
                NicLibrary::Verbs if config.verbs.library.is_some() => None,
                NicLibrary::Verbs => verbs::no_device(),
                NicLibrary::Libfabric => libfabric::no_device(&config.libfabric),
            },
        }
    }

    /// The transports of those enabled that may work here: what peers are told.
    pub(crate) fn available(&self, config: &Config) -> Vec<String> {
        let is_excluded = |name: &&String| config.require.as_ref().is_some_and(|required| required != *name);
        let works = |name: &&String| {
            LIBRARIES
                .into_iter()
                .find(|library| name_of(*library) == name.as_str())
                .is_none_or(|library| self.obstacle(library, config).is_none())
        };
        config.transports.iter().filter(|name| !is_excluded(name)).filter(works).cloned().collect()
    }
}

fn open(
    library: NicLibrary,
    config: &Config,
    placement: &Placement,
) -> std::result::Result<Arc<dyn NicGroup>, NicError> {
    let near = placement.nics(library);
    let choice = if config.nics.is_empty() {
        let max_nics = if near.is_empty() { config.nics_per_device.unwrap_or(MAX_SHARDS) } else { near.len() };
        NicChoice::Near(&near, max_nics)
    } else {
        NicChoice::Named(&config.nics)
    };
    Ok(match library {
        NicLibrary::Verbs => RailGroup::new(library, verbs::open(choice, &config.verbs)?, Clock::Real),
        NicLibrary::Libfabric => RailGroup::new(library, libfabric::open(choice, &config.libfabric)?, Clock::Real),
    })
}

/// Watches a descriptor of a group, for what it tells.
fn watch(poller: &Poller, fd: RawFd, what: u64) -> std::result::Result<(), NicError> {
    let token = (fd as u64) << 8 | what;
    // SAFETY: the group keeps it open for as long as the engine lives.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    poller.add(&fd, token, Interest::Read).map_err(|error| NicError::Device(format!("epoll: {error}")))
}

impl Inner {
    /// A descriptor of a group is ready. For completions nothing is to do: whoever drives polls them.
    pub(crate) fn on_nics(&self, event: Ready) {
        if event.token & 0xff == NIC_ANNOUNCEMENTS {
            let now_ns = self.clock.now_ns();
            self.groups.opened().for_each(|group| group.hear(now_ns));
        }
        if event.is_over {
            // A device that is gone has nothing more to say, and its descriptors would be ready for ever.
            // SAFETY: the group keeps it open for as long as the engine lives.
            self.poller.remove(&unsafe { BorrowedFd::borrow_raw((event.token >> 8) as RawFd) });
        }
    }

    /// From now on descriptors announce what comes; false when some NIC promises no event.
    pub(crate) fn arm_nics(&self, driver: &Driver) -> bool {
        self.groups.arm(&Arrivals { inner: self, at_hand: &driver.at_hand })
    }

    /// Begins to make a path over NICs, by the first library that may serve;
    /// false when none is left to try.
    pub(crate) fn try_rails(&self, peer: &Arc<Peer>) -> bool {
        let Some(session) = peer.state().session.clone() else { return false };
        let has = |list: &[String], name: &str| list.iter().any(|listed| listed == name);
        for library in LIBRARIES {
            let name = name_of(library);
            if self.revive_rails(peer, library) {
                return false;
            }
            if peer.state().obstacle(name).is_some() {
                continue;
            }
            let required = self.config.require.as_deref().filter(|required| *required != name);
            let obstacle = match () {
                () if self.simulated.is_some() => Some("simulated".to_owned()),
                () if !has(&self.config.transports, name) => Some("not enabled here".into()),
                () if required.is_some() => required.map(|required| format!("{required} is required")),
                () => self.groups.obstacle(library, &self.config).or_else(|| {
                    (!has(&session.transports, name)).then(|| "not enabled, or no NIC, at the peer".to_owned())
                }),
            };
            let obstacle = obstacle.or_else(|| self.make_rails(peer, library, session.is_caller).err());
            match obstacle {
                Some(why) => peer.state().obstacles.push((name, why)),
                None => {
                    let patience = nanos(HANDSHAKE) * if session.is_caller { 1 } else { 2 };
                    peer.state().phase = Phase::Joining { until_ns: self.clock.now_ns() + patience };
                    return true;
                }
            }
        }
        false
    }

    fn make_rails(&self, peer: &Arc<Peer>, library: NicLibrary, is_caller: bool) -> std::result::Result<(), String> {
        if peer.rails(library).is_none() {
            let opened = self.groups.open(library, &self.config, &self.poller);
            let group = opened.map_err(|error| error.to_string())?;
            self.pin_worker();
            let Base::Tcp(control) = &peer.base else { return Err("simulated".into()) };
            let control = Arc::clone(control) as Arc<dyn ControlPath>;
            let session = peer.state().session.clone();
            // Half of what the two were given when they met.
            let key = session.and_then(|session| session.token.first_chunk().copied()).map_or(0, u64::from_le_bytes);
            let regions = Arc::clone(&self.regions);
            let (log, address) = (Arc::clone(&self.log), peer.address.to_string());
            let tell = Arc::new(move |line: &str| log.add(40, format!("{address}: {line}")));
            let options = PathOptions { peer: peer.idx, regions, control, is_caller, key, tell };
            peer.set_rails(library, Arc::clone(group).path(options));
            if is_caller {
                peer.rails(library).into_iter().for_each(|path| path.begin());
            }
        }
        Ok(())
    }

    /// A message about rails.
    pub(crate) fn on_rails(&self, peer: &Arc<Peer>, library: NicLibrary, message: Rails) {
        if peer.lost().is_some() {
            // What it said before is read to the end, and nobody would close its rails.
            return;
        }
        let is_offer = matches!(message, Rails::Offer { .. });
        let is_caller = peer.state().session.as_ref().is_some_and(|session| session.is_caller);
        if is_offer && !is_caller {
            // The caller has given up what is faster.
            let why = match peer.link() {
                Some(link) => Err(format!("{} is in use already", link.transport())),
                None if peer.shm().is_none() => {
                    let mut state = peer.state();
                    if state.obstacle("shm").is_none() {
                        state.obstacles.push(("shm", "the peer could not meet on the Unix socket".into()));
                    }
                    drop(state);
                    self.make_rails(peer, library, false)
                }
                None => Err("shm is in use already".into()),
            };
            if let Err(why) = why {
                return self.end_rails(peer, library, &why);
            }
            peer.state().phase = Phase::Joining { until_ns: self.clock.now_ns() + 2 * nanos(HANDSHAKE) };
            peer.rails(library).into_iter().for_each(|path| path.begin());
        }
        if let Some(path) = peer.rails(library) {
            path.on_message(message);
            self.settle_rails(peer, library, false);
        }
    }

    fn end_rails(&self, peer: &Peer, library: NicLibrary, why: &str) {
        let message = Rails::End { why: Rails::reason(why) };
        peer.base.send_control(anyfabric_wire::Control::Rails { library, message }.encode());
    }

    /// Looks whether the rails that are being made have come to something;
    /// `is_late`: what is not there now is not waited for.
    pub(crate) fn settle_rails(&self, peer: &Arc<Peer>, library: NicLibrary, is_late: bool) {
        let Some(path) = peer.rails(library) else { return };
        if matches!(peer.phase(), Phase::Up) && self.revive_rails(peer, library) {
            return self.finish_path(peer);
        }
        if !matches!(peer.phase(), Phase::Joining { .. }) || peer.state().obstacle(name_of(library)).is_some() {
            return;
        }
        let is_caller = peer.state().session.as_ref().is_some_and(|session| session.is_caller);
        let standing = path.standing();
        let has_ended = matches!(standing, Standing::Ended(_));
        let why = match standing {
            Standing::Ready => {
                peer.use_rails(library);
                return self.finish_path(peer);
            }
            Standing::Making if !is_late => return,
            Standing::Making => "its rails were not made in time".to_owned(),
            Standing::Ended(why) => why,
            Standing::Failed(why) if is_caller || is_late => why,
            // The caller decides: it may yet reach us over another rail.
            Standing::Failed(_) => return,
        };
        // What nothing else can serve instead is tried further, for a port that is down may come up.
        if has_ended || self.has_other_path(peer, library) {
            if is_caller {
                self.end_rails(peer, library, &why);
            }
            path.close(&Failure::ConnectionBroken(why.clone()));
        }
        peer.state().obstacles.push((name_of(library), why));
        if !self.try_rails(peer) {
            self.finish_path(peer);
        }
    }

    /// Whether something else than this library may yet serve the peer.
    fn has_other_path(&self, peer: &Peer, library: NicLibrary) -> bool {
        let state = peer.state();
        let is_other = |name: &str| name == "tcp" || LIBRARIES.iter().any(|library| name_of(*library) == name);
        let theirs = state.session.iter().flat_map(|session| &session.transports);
        let mut others = theirs.filter(|name| is_other(name) && *name != name_of(library));
        let ours = self.groups.available(&self.config);
        others.any(|name| ours.contains(name) && state.obstacle(name).is_none())
    }

    /// Takes rails into use that could not be made at first, when one stands by now and nothing else serves.
    fn revive_rails(&self, peer: &Peer, library: NicLibrary) -> bool {
        let name = name_of(library);
        let is_ready = || peer.rails(library).is_some_and(|path| path.standing() == Standing::Ready);
        if peer.link().is_some() || peer.state().obstacle(name).is_none() || !is_ready() {
            return false;
        }
        peer.state().obstacles.retain(|(tried, _)| *tried != name);
        peer.use_rails(library);
        true
    }

    /// The time for making a path is over: which library was being tried?
    pub(crate) fn rails_are_late(&self, peer: &Arc<Peer>) -> bool {
        let tried = LIBRARIES
            .into_iter()
            .find(|library| peer.rails(*library).is_some() && peer.state().obstacle(name_of(*library)).is_none());
        if let Some(library) = tried {
            self.settle_rails(peer, library, true);
        }
        tried.is_some()
    }
}

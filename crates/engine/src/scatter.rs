//! Operations with several peers: scatter and barrier.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_plan::Extent;
use anyfabric_transports::{Failure, Recipients, Ticket};
use anyfabric_wire::{Address, Imm};
use arc_swap::Guard;
use arrayvec::ArrayVec;

use crate::checks::{check_imm, check_target, fits};
use crate::peer::Peer;
use crate::peers::Known;
use crate::remote::Route;
use crate::submit::{LegsOf, Order, Towards};
use crate::transfer::{About, Transfer};
use crate::{Engine, PeerGroup, Region, Remote, Result, WriteOptions};

/// One range of a scatter, and where it goes.
#[derive(Debug, Clone)]
pub struct ScatterTarget {
    /// A peer's region.
    pub remote: Remote,
    /// First byte in the source region.
    pub src_offset: u64,
    /// First byte in the peer's region.
    pub dst_offset: u64,
    /// Length in bytes.
    pub nbytes: u64,
}

impl ScatterTarget {
    #[inline]
    pub(crate) const fn extent(&self) -> Extent {
        Extent { src: self.src_offset, dst: self.dst_offset, nbytes: self.nbytes }
    }
}

impl Engine {
    /// Writes one range of `src` to each target; counts once a target, at its
    /// owner.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn scatter(
        &self,
        src: &Region,
        targets: &[ScatterTarget],
        group: Option<&PeerGroup>,
        options: WriteOptions,
    ) -> Result<Transfer> {
        const OPERATION: &str = "scatter";
        self.inner.check_source((&src.inner, &src.memory), OPERATION)?;
        let imm = check_imm(options.imm, OPERATION)?;
        let inner = &self.inner;
        let mut entry = inner.rings.draft();
        let nbytes = self.name_targets(src, (targets, group), imm, &mut entry.recipients)?;
        let peer = entry.recipients.only().and_then(|peer| inner.peer(peer));
        let about = About { operation: OPERATION, peer, region: Some(src.id()), nbytes };
        if targets.is_empty() {
            return Ok(Transfer::done(0, None));
        }
        let source = Some(Arc::clone(&src.memory));
        let num_parts = targets.len() as u32;
        let order = Order { num_parts, nbytes, source, imm, timeout: options.timeout, is_probe: false };
        let ticket = inner.begin(entry, order).map_err(|error| about.name(inner, error))?;
        let of = LegsOf { ticket: &ticket, source: Some(&src.memory), imm, verify: options.verify, num: targets.len() };
        let known = OnceCell::new();
        let towards = targets.iter().filter_map(|target| {
            let route = target.remote.shared.route(inner, imm.is_some());
            let peer = match route {
                Some(route) => &route.peer,
                None => self.find_anew(&known, target.remote.address(), imm, &ticket)?,
            };
            Some(Towards { peer, target: Some((target, route)) })
        });
        inner.submit_legs(towards, &of);
        Ok(Transfer::pending(Arc::clone(inner), about, ticket))
    }

    /// Checks every target, and names its peer; the sum of their bytes.
    fn name_targets(
        &self,
        src: &Region,
        (targets, group): (&[ScatterTarget], Option<&PeerGroup>),
        imm: Option<Imm>,
        recipients: &mut Recipients,
    ) -> Result<u64> {
        let mut nbytes = self.name_again(src, (targets, group), imm, recipients);
        for (idx, target) in targets.iter().enumerate().skip(recipients.num_targets()) {
            check_target(src, (idx, target), group)?;
            nbytes = nbytes.saturating_add(target.nbytes);
            match target.remote.shared.route(&self.inner, imm.is_some()) {
                Some(Route { peer, .. }) => recipients.add(peer.idx, &peer.operations, target.nbytes),
                None => self.name_anew(src, (targets, target), imm, recipients)?,
            }
        }
        Ok(nbytes)
    }

    /// As [`Engine::name_targets`], up to the first target with which something is wrong, or in whose place another peer
    /// was named before. The first post waits for this: it calls nothing, for that would take its registers.
    #[inline(never)]
    fn name_again(
        &self,
        src: &Region,
        (targets, group): (&[ScatterTarget], Option<&PeerGroup>),
        imm: Option<Imm>,
        recipients: &mut Recipients,
    ) -> u64 {
        let (limit, is_counted) = (src.nbytes(), imm.is_some());
        let mut nbytes = 0_u64;
        for (idx, target) in targets.iter().enumerate() {
            let ScatterTarget { remote, nbytes: of_it, .. } = target;
            let is_named = fits(limit, target)
                && group.is_none_or(|group| group.has_at(idx, remote.address()))
                && (remote.shared.route(&self.inner, is_counted))
                    .is_some_and(|route| recipients.add_again(&route.peer.operations, *of_it));
            if !is_named {
                break;
            }
            nbytes = nbytes.saturating_add(*of_it);
        }
        nbytes
    }

    /// Names the peer of a target whose route is not known.
    #[cold]
    fn name_anew(
        &self,
        src: &Region,
        (targets, target): (&[ScatterTarget], &ScatterTarget),
        imm: Option<Imm>,
        recipients: &mut Recipients,
    ) -> Result<()> {
        let nbytes = || targets.iter().fold(0, |sum: u64, target| sum.saturating_add(target.nbytes));
        let about = || About { operation: "scatter", peer: None, region: Some(src.id()), nbytes: nbytes() };
        let peer = self.inner.peer_for(target.remote.address(), imm, about)?;
        target.remote.shared.find_route(&self.inner, &peer);
        recipients.add(peer.idx, &peer.operations, target.nbytes);
        Ok(())
    }

    /// Sends one immediate to each peer, this engine excluded. It orders
    /// nothing: wait first for the writes that it announces.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn barrier(&self, peers: &[Address], imm: u32, timeout: Option<Duration>) -> Result<Transfer> {
        const OPERATION: &str = "barrier";
        self.inner.check_open_to(OPERATION)?;
        let imm = check_imm(Some(imm), OPERATION)?;
        let inner = &self.inner;
        let others = || peers.iter().filter(|address| address.engine != inner.address.engine);
        let mut about = About { operation: OPERATION, peer: None, region: None, nbytes: 0 };
        let mut entry = inner.rings.draft();
        let known = inner.peers.known();
        let mut found = ArrayVec::<&Arc<Peer>, MAX_FOUND>::new();
        self.name_peers_again(&known, peers, &mut found, &mut entry.recipients);
        for address in others().skip(found.len()) {
            match known.find(address.engine).filter(|peer| peer.takes(true)) {
                Some(peer) => {
                    let _ = found.try_push(peer);
                    entry.recipients.add(peer.idx, &peer.operations, 0);
                }
                None => {
                    let peer = inner.peer_for(address, imm, || about.clone())?;
                    entry.recipients.add(peer.idx, &peer.operations, 0);
                }
            }
        }
        about.peer = entry.recipients.only().and_then(|peer| inner.peer(peer));
        let num_parts = entry.recipients.num_targets();
        if num_parts == 0 {
            return Ok(Transfer::done(0, None));
        }
        let order = Order { num_parts: num_parts as u32, imm, timeout, ..Order::default() };
        let ticket = inner.begin(entry, order).map_err(|error| about.name(inner, error))?;
        let of = LegsOf { ticket: &ticket, source: None, imm, verify: false, num: num_parts };
        let signal = |peer| Towards { peer, target: None };
        if found.len() == num_parts {
            inner.submit_legs(found.into_iter().map(signal), &of);
        } else {
            let known = inner.peers.known();
            let find = |address| self.find(&known, address, imm, &ticket);
            inner.submit_legs(others().filter_map(find).map(signal), &of);
        }
        Ok(Transfer::pending(Arc::clone(inner), about, ticket))
    }

    /// Names the peers of a barrier up to the first that takes none, or in whose place another was named before; without
    /// a call, as [`Engine::name_again`].
    #[inline(never)]
    fn name_peers_again<'k>(
        &self,
        known: &'k Known,
        peers: &[Address],
        found: &mut ArrayVec<&'k Arc<Peer>, MAX_FOUND>,
        recipients: &mut Recipients,
    ) {
        let mut next = 0;
        for address in peers.iter().filter(|address| address.engine != self.inner.address.engine) {
            let Some(peer) = known.find_next(address.engine, &mut next).filter(|peer| peer.takes(true)) else { break };
            if found.is_full() || !recipients.add_again(&peer.operations, 0) {
                break;
            }
            found.push(peer);
        }
    }

    /// As [`Engine::find`], of a peer whose route is not known, or is lost by now.
    #[cold]
    fn find_anew<'p>(
        &self,
        known: &'p OnceCell<Guard<Arc<Known>>>,
        address: &Address,
        imm: Option<Imm>,
        to: &Ticket,
    ) -> Option<&'p Arc<Peer>> {
        self.find(known.get_or_init(|| self.inner.peers.known()), address, imm, to)
    }

    /// A peer that was met before; one that is being met anew this very moment fails
    /// its part.
    #[inline]
    fn find<'p>(&self, peers: &'p Known, address: &Address, imm: Option<Imm>, to: &Ticket) -> Option<&'p Arc<Peer>> {
        let found = peers.find(address.engine);
        if found.is_none() {
            self.fail_part(address, imm, to);
        }
        found
    }

    #[cold]
    fn fail_part(&self, address: &Address, imm: Option<Imm>, ticket: &Ticket) {
        let anew = self.inner.peer_at(address);
        imm.into_iter().for_each(|imm| anew.note_loss(imm));
        let failure = Failure::ConnectionBroken(format!("{address} called anew meanwhile"));
        ticket.fail_by(anew.idx, failure.clone());
        ticket.part_ended(Err(failure));
    }
}

/// Peers that are looked up once only.
const MAX_FOUND: usize = 256;

//! A NIC's queue of completions and its endpoints, without what they are used for.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;

use super::domain::{close, FabricDomain};
use super::library::FabricError;
use super::sys::*;
use crate::sys::{close_in_children, fork_generation};

/// The completion queue and the table of peers' addresses that all endpoints of a
/// NIC share.
pub(super) struct Queue {
    domain: Arc<FabricDomain>,
    cq: *mut fid_cq,
    av: *mut fid_av,
    /// Addresses in the table: the name of each, and the rails that have it. A peer may give a name
    /// that another gave; what the table does then differs from provider to provider.
    names: HashMap<fi_addr_t, (Vec<u8>, u32)>,
    event_fd: Option<RawFd>,
    depth: usize,
    with_source: bool,
    may_try: bool,
    /// Why it is of no more use.
    broken: Option<i32>,
    /// It was opened anew: whoever waits does so for the descriptor of another.
    is_renewed: bool,
    /// An endpoint that is not closed uses it.
    is_kept: bool,
    generation: u32,
}

/// What reading the queue gave.
pub(super) enum Read {
    /// So many entries.
    Some(usize),
    /// Nothing.
    Empty,
    /// An operation failed: its context, which may be null, and errors of the
    /// API's and the provider's.
    Failed(*mut c_void, i32, i32),
    /// The queue itself is broken.
    Broken(i32),
}

impl Queue {
    /// With a descriptor to wait for, if the provider has one. Room for so many
    /// completions: the first of `depths` that the provider grants.
    pub(super) fn open(
        domain: &Arc<FabricDomain>,
        depths: impl Iterator<Item = usize>,
        with_source: bool,
    ) -> Result<Self, FabricError> {
        let library = domain.library();
        let mut av = ptr::null_mut();
        // SAFETY: zeroes and null pointers are the defaults of every member.
        let mut av_attr: fi_av_attr = unsafe { std::mem::zeroed() };
        av_attr.r#type = FI_AV_TABLE;
        // SAFETY: the domain is open; `av` receives the object.
        let code = unsafe {
            ((*(*domain.as_ptr()).ops).av_open)(domain.as_ptr(), &raw mut av_attr, &raw mut av, ptr::null_mut())
        };
        library.check("fi_av_open", code)?;
        let mut opened = Err(library.error("fi_cq_open", libc::EINVAL.into()));
        for depth in depths {
            opened = open_cq(domain, depth).map(|opened| (opened, depth));
            if opened.is_ok() {
                break;
            }
        }
        match opened {
            Ok(((cq, event_fd), depth)) => Ok(Self {
                domain: Arc::clone(domain),
                cq,
                av,
                names: HashMap::new(),
                event_fd,
                depth,
                with_source,
                may_try: true,
                broken: None,
                is_renewed: false,
                is_kept: false,
                generation: fork_generation(),
            }),
            Err(error) => {
                close(av.cast(), fork_generation());
                Err(error)
            }
        }
    }

    /// Puts another in the place of one that is broken; no endpoint is open, but one that is not
    /// closed may use it (`is_used`).
    pub(super) fn renew(&mut self, is_used: bool) -> Result<(), FabricError> {
        let (cq, event_fd) = open_cq(&self.domain, self.depth)?;
        if !is_used {
            self.event_fd.into_iter().for_each(|fd| close_in_children(fd, false));
            close(self.cq.cast(), self.generation);
        }
        (self.cq, self.event_fd, self.broken, self.is_renewed) = (cq, event_fd, None, true);
        Ok(())
    }

    /// Never closes it: an endpoint that is not closed uses it.
    pub(super) fn keep(&mut self) {
        self.is_kept = true;
    }

    /// Why it is of no more use, if it is not.
    pub(super) const fn broken(&self) -> Option<i32> {
        self.broken
    }

    /// Completions that it holds.
    pub(super) const fn depth(&self) -> usize {
        self.depth
    }

    pub(super) const fn event_fd(&self) -> Option<RawFd> {
        self.event_fd
    }

    /// Whether there is nothing to read, so that the descriptor may be waited for.
    pub(super) fn may_wait(&self) -> bool {
        let mut fids = [self.cq.cast::<fid>()];
        // SAFETY: both objects are open.
        unsafe {
            let ops = (*self.domain.fabric()).ops;
            if self.is_renewed {
                return false;
            }
            if !self.may_try || !has((*ops).size, std::mem::offset_of!(fi_ops_fabric, trywait)) {
                return true;
            }
            (*ops).trywait.is_none_or(|trywait| trywait(self.domain.fabric(), fids.as_mut_ptr(), 1) == 0)
        }
    }

    /// An endpoint was closed.
    pub(super) fn closed_endpoint(&mut self) {
        self.may_try &= !self.domain.provider().quirks().crashes_after_close;
    }

    /// Takes completions; `sources` are known only where they were asked for.
    #[inline]
    pub(super) fn read(&mut self, entries: &mut [fi_cq_data_entry], sources: &mut [fi_addr_t]) -> Read {
        if let Some(error) = self.broken {
            return Read::Broken(error);
        }
        let (into, count) = (entries.as_mut_ptr().cast(), entries.len().min(sources.len()));
        // SAFETY: the queue is open, and both arrays have room for `count` entries of the format that was asked for.
        let result = unsafe {
            if self.with_source {
                ((*(*self.cq).ops).readfrom)(self.cq, into, count, sources.as_mut_ptr())
            } else {
                ((*(*self.cq).ops).read)(self.cq, into, count)
            }
        };
        match result {
            1.. => Read::Some((result as usize).min(count)),
            0 => Read::Empty,
            _ if -result == FI_EAGAIN => Read::Empty,
            _ if -result == FI_EAVAIL => self.read_error(),
            _ => self.is_over(-result as i32),
        }
    }

    #[cold]
    fn read_error(&mut self) -> Read {
        // SAFETY: zeroes and null pointers are what the call expects: it copies no error data then.
        let mut error: fi_cq_err_entry = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is open; the entry is as long as the newest API has it.
        let result = unsafe { ((*(*self.cq).ops).readerr)(self.cq, &raw mut error, 0) };
        match result {
            1.. if error.err == FI_EOVERRUN && error.op_context.is_null() => self.is_over(error.err),
            1.. => {
                log::debug!("libfabric: {}", self.describe(&error));
                Read::Failed(error.op_context, error.err, error.prov_errno)
            }
            0 => Read::Empty,
            _ if -result == FI_EAGAIN => Read::Empty,
            _ => self.is_over(-result as i32),
        }
    }

    /// Nothing is read from it any more.
    #[cold]
    fn is_over(&mut self, error: i32) -> Read {
        self.broken = Some(error);
        Read::Broken(error)
    }

    fn describe(&self, error: &fi_cq_err_entry) -> String {
        // SAFETY: the queue is open; without a buffer the provider returns a string of its own.
        let text =
            unsafe { ((*(*self.cq).ops).strerror)(self.cq, error.prov_errno, error.err_data, ptr::null_mut(), 0) };
        let text = super::library::text_of(text).unwrap_or_default();
        format!("{} ({}): {text} ({})", self.domain.library().describe(error.err.into()), error.err, error.prov_errno)
    }

    /// Makes a peer's endpoint known to one more rail by its name, of at most
    /// [`MAX_NAME_BYTES`]; `None` for a name that cannot be one.
    pub(super) fn insert(&mut self, name: &[u8]) -> Option<fi_addr_t> {
        let known = self.names.iter().find(|(_, (known, _))| known == name).map(|(address, _)| *address);
        let address = known.or_else(|| self.insert_new(name))?;
        self.names.entry(address).or_insert_with(|| (name.to_vec(), 0)).1 += 1;
        Some(address)
    }

    fn insert_new(&mut self, name: &[u8]) -> Option<fi_addr_t> {
        // Providers take the length from what the peer wrote: a family, or where a string ends.
        let mut padded = [0_u8; MAX_NAME_BYTES + 1];
        padded.get_mut(..name.len())?.copy_from_slice(name);
        let mut address = FI_ADDR_UNSPEC;
        // SAFETY: the table is open; no name that a provider knows is longer, and a string ends.
        let count = unsafe {
            ((*(*self.av).ops).insert)(self.av, padded.as_ptr().cast(), 1, &raw mut address, 0, ptr::null_mut())
        };
        (count == 1 && address != FI_ADDR_UNSPEC).then_some(address)
    }

    /// A rail needs the address no longer.
    pub(super) fn remove(&mut self, mut address: fi_addr_t) {
        let Some((_, num_rails)) = self.names.get_mut(&address) else { return };
        *num_rails -= 1;
        if *num_rails > 0 {
            return;
        }
        self.names.remove(&address);
        // SAFETY: the table is open; the address is one of its own.
        unsafe { ((*(*self.av).ops).remove)(self.av, &raw mut address, 1, 0) };
    }
}

/// A queue of completions, and its descriptor if the provider has one.
fn open_cq(domain: &FabricDomain, depth: usize) -> Result<(*mut fid_cq, Option<RawFd>), FabricError> {
    let mut cq = ptr::null_mut();
    let mut opened = Ok(0);
    for wait_obj in [FI_WAIT_FD, FI_WAIT_NONE] {
        // SAFETY: zeroes and null pointers are the defaults of every member.
        let mut cq_attr: fi_cq_attr = unsafe { std::mem::zeroed() };
        (cq_attr.size, cq_attr.format, cq_attr.wait_obj) = (depth, FI_CQ_FORMAT_DATA, wait_obj);
        // SAFETY: the domain is open; `cq` receives the object.
        let code = unsafe {
            ((*(*domain.as_ptr()).ops).cq_open)(domain.as_ptr(), &raw mut cq_attr, &raw mut cq, ptr::null_mut())
        };
        opened = domain.library().check("fi_cq_open", code);
        if opened.is_ok() {
            break;
        }
    }
    opened?;
    let mut fd: c_int = -1;
    // SAFETY: the queue is open; the command writes a descriptor, if the queue has one.
    let code = unsafe { ((*(*cq).fid.ops).control)(cq.cast(), FI_GETWAIT, (&raw mut fd).cast()) };
    let event_fd = (code == 0 && fd >= 0).then_some(fd);
    event_fd.into_iter().for_each(|fd| close_in_children(fd, true));
    Ok((cq, event_fd))
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Some(fd) = self.event_fd.filter(|_| self.generation == fork_generation()) {
            close_in_children(fd, false);
        }
        close(self.cq.cast(), self.generation);
        close(self.av.cast(), self.generation);
    }
}

// SAFETY: the objects belong to whoever has the NIC, one thread at a time, and no thread in particular.
unsafe impl Send for Queue {}

/// An endpoint. Once it is closed the library uses no buffer that was posted to it.
pub(super) struct Endpoint {
    ep: *mut fid_ep,
    life: Life,
    name: Vec<u8>,
    max_write_bytes: u64,
    generation: u32,
}

/// How far an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    Closed,
    /// The library refused to close it.
    Stuck,
}

// SAFETY: as for `Queue`.
unsafe impl Send for Endpoint {}

impl Endpoint {
    /// Opens one whose completions go to `queue`.
    pub(super) fn open(domain: &FabricDomain, queue: &Queue) -> Result<Self, FabricError> {
        let (library, info) = (domain.library(), domain.provider().info().as_ptr());
        let mut ep = ptr::null_mut();
        // SAFETY: the domain was opened from this entry; `ep` receives the object.
        let code = unsafe { ((*(*domain.as_ptr()).ops).endpoint)(domain.as_ptr(), info, &raw mut ep, ptr::null_mut()) };
        library.check("fi_endpoint", code)?;
        let mut this =
            Self { ep, life: Life::Open, name: Vec::new(), max_write_bytes: 0, generation: fork_generation() };
        for (option, value) in domain.provider().quirks().options {
            this.set_option(*option, *value);
        }
        library.check("fi_ep_bind", this.bind(queue.av.cast(), 0))?;
        library.check("fi_ep_bind", this.bind(queue.cq.cast(), FI_TRANSMIT | FI_RECV))?;
        // SAFETY: the endpoint is open and was given what it needs.
        let code = unsafe { ((*(*ep).fid.ops).control)(ep.cast(), FI_ENABLE, ptr::null_mut()) };
        library.check("fi_enable", code)?;
        this.name = this.read_name().map_err(|code| library.error("fi_getname", code.into()))?;
        // SAFETY: an entry has endpoint attributes for as long as it lives.
        let max_bytes = unsafe { (*(*info).ep_attr).max_msg_size };
        let max_bytes = this.option(FI_OPT_MAX_RMA_SIZE, library.version()).unwrap_or(max_bytes);
        this.max_write_bytes = max_bytes as u64;
        Ok(this)
    }

    /// Closes it, once, at its drop at the latest; false when the library refused, and
    /// may still use what was posted. Nothing may be posted any more.
    pub(super) fn close(&mut self) -> bool {
        if self.life == Life::Open {
            self.life = if close(self.ep.cast(), self.generation) { Life::Closed } else { Life::Stuck };
        }
        self.life == Life::Closed
    }

    /// Whether something may be posted.
    pub(super) fn is_open(&self) -> bool {
        self.life == Life::Open
    }

    /// What a peer's table of addresses takes.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    pub(super) const fn as_ptr(&self) -> *mut fid_ep {
        self.ep
    }

    pub(super) const fn max_write_bytes(&self) -> u64 {
        self.max_write_bytes
    }

    /// Longest message that the endpoint sends, where that differs from writes.
    pub(super) fn max_message_bytes(&self, library_version: u32) -> Option<usize> {
        self.option(FI_OPT_MAX_MSG_SIZE, library_version)
    }

    /// Posts a write; 0 or a negative error.
    ///
    /// # Safety
    /// The message is whole, and what it points to stays until its completion.
    #[inline]
    pub(super) unsafe fn write(&self, message: &fi_msg_rma, flags: u64) -> isize {
        // SAFETY: the endpoint is open; the rest is the caller's promise.
        unsafe { ((*(*self.ep).rma).writemsg)(self.ep, message, flags) }
    }

    /// Posts a message; 0 or a negative error.
    ///
    /// # Safety
    /// As [`Endpoint::write`].
    pub(super) unsafe fn send(&self, message: &fi_msg, flags: u64) -> isize {
        // SAFETY: as above.
        unsafe { ((*(*self.ep).msg).sendmsg)(self.ep, message, flags) }
    }

    /// Posts a receive; 0 or a negative error.
    ///
    /// # Safety
    /// As [`Endpoint::write`].
    pub(super) unsafe fn receive(&self, message: &fi_msg) -> isize {
        // SAFETY: as above.
        unsafe { ((*(*self.ep).msg).recvmsg)(self.ep, message, FI_COMPLETION) }
    }

    fn bind(&self, object: *mut fid, flags: u64) -> c_int {
        // SAFETY: both objects are open.
        unsafe { ((*(*self.ep).fid.ops).bind)(self.ep.cast(), object, flags) }
    }

    fn set_option(&self, option: c_int, value: bool) {
        // SAFETY: the endpoint is open; the options that we set are C booleans, which are Rust's.
        let code = unsafe {
            ((*(*self.ep).ops).setopt)(
                self.ep.cast(),
                FI_OPT_ENDPOINT,
                option,
                (&raw const value).cast(),
                size_of::<bool>(),
            )
        };
        if code != 0 {
            log::debug!("libfabric: option {option} is not known here ({code})");
        }
    }

    /// A length that the endpoint has, from 2.0 on.
    fn option(&self, option: c_int, library_version: u32) -> Option<usize> {
        let (mut value, mut len) = (0_usize, size_of::<usize>());
        // SAFETY: the endpoint is open; `value` has room for `len` bytes.
        let code = unsafe {
            if library_version < version(2, 0) {
                return None;
            }
            ((*(*self.ep).ops).getopt)(self.ep.cast(), FI_OPT_ENDPOINT, option, (&raw mut value).cast(), &raw mut len)
        };
        (code == 0 && value > 0).then_some(value)
    }

    fn read_name(&self) -> Result<Vec<u8>, c_int> {
        let mut name = vec![0; MAX_NAME_BYTES];
        let mut len = name.len();
        // SAFETY: the endpoint is enabled; `name` has room for `len` bytes.
        let code = unsafe { ((*(*self.ep).cm).getname)(self.ep.cast(), name.as_mut_ptr().cast(), &raw mut len) };
        if code != 0 || len > name.len() {
            return Err(code);
        }
        name.truncate(len);
        Ok(name)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
    }
}

/// Longest name of an endpoint: what a rail's address has room for.
pub(super) const MAX_NAME_BYTES: usize = 192;

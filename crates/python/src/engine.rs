//! `Engine`.

use std::time::{Duration, Instant};

use anyfabric_engine as native;
use native::{Code, QueueFull, WriteOptions};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::address::{Address, Peer, Peers};
use crate::arguments::{duration, wrong_kind, Imm, Number, Seconds};
use crate::counter::Counter;
use crate::descriptor::{destination, Descriptor};
use crate::error::{exception, OrRaise};
use crate::hooks;
use crate::message::Message;
use crate::notifier::Notifier;
use crate::pages::{nbytes_of, page_list, NativePages};
use crate::peer_group::PeerGroup;
use crate::region::{source, wrong_type, Region};
use crate::settings;
use crate::transfer::Transfer;
use crate::waiting::{wait, wait_outcome, wait_until};
use crate::watcher::Watcher;

/// Moves bytes between processes.
#[pyclass(frozen, subclass, module = "anyfabric._core")]
pub(crate) struct Engine {
    pub(crate) native: native::Engine,
    address: Py<Address>,
    /// Deadline of submissions that name none.
    timeout: Duration,
    /// Whether submissions wait for room.
    waits_for_room: bool,
}

/// `anyfabric.Target`.
struct Target<'py>(Bound<'py, Descriptor>, Number, Number, Number);

impl<'py> FromPyObject<'_, 'py> for Target<'py> {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match given.extract() {
            Ok((remote, src_offset, dst_offset, nbytes)) => Ok(Self(remote, src_offset, dst_offset, nbytes)),
            // Of another length; `InvalidArgument` is a ValueError too.
            Err(error) if error.get_type(given.py()).is(given.py().get_type::<PyValueError>()) => {
                Err(wrong_type("targets", "values of `Target`", &given))
            }
            Err(error) => Err(error),
        }
    }
}

impl Engine {
    /// Submits an operation of `nbytes` bytes. The call gets what is left of
    /// `timeout` after waiting for room.
    #[inline]
    fn submit(
        slf: &Bound<'_, Self>,
        nbytes: u64,
        timeout: Option<Seconds>,
        call: impl Fn(&native::Engine, Option<Duration>) -> native::Result<native::Transfer> + Send + Sync,
    ) -> PyResult<Transfer> {
        let (py, this) = (slf.py(), slf.get());
        let mut timeout = duration(timeout);
        loop {
            if this.waits_for_room && !this.native.has_room() {
                timeout = Some(this.wait_for_room(py, timeout.unwrap_or(this.timeout))?);
            }
            let result = if nbytes <= WITH_GIL_BYTES {
                call(&this.native, timeout)
            } else {
                py.detach(|| call(&this.native, timeout))
            };
            match result {
                // Somebody else took the room, be it while this thread waited for the GIL.
                Err(error)
                    if error.code == Code::QueueFull && this.waits_for_room && timeout != Some(Duration::ZERO) => {}
                result => return Ok(Transfer::new(result.or_raise(py)?, slf)),
            }
        }
    }

    /// Waits until the queue has room; returns what is left of the timeout.
    #[cold]
    fn wait_for_room(&self, py: Python<'_>, timeout: Duration) -> PyResult<Duration> {
        let began = Instant::now();
        self.native.check_open().or_raise(py)?;
        wait_until(py, Some(timeout), |slice| self.native.wait_for_room(slice))?;
        Ok(timeout.saturating_sub(began.elapsed()))
    }

    /// Waits for transfers that only this module knows of.
    fn wait_for(&self, py: Python<'_>, transfers: &[native::Transfer]) -> PyResult<()> {
        for transfer in transfers {
            wait_outcome(py, None, |slice| transfer.wait(Some(slice)))?.or_raise(py)?;
        }
        Ok(())
    }

    fn open(&self, py: Python<'_>) -> PyResult<&native::Engine> {
        self.native.check_open().or_raise(py)?;
        Ok(&self.native)
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new(config: &Bound<'_, PyDict>) -> PyResult<Self> {
        let py = config.py();
        hooks::find(py)?;
        let mut config = settings::config(config)?;
        let (timeout, waits_for_room) = (config.timeout, config.queue_full == QueueFull::Block);
        // It is waited for room here, without the GIL.
        config.queue_full = QueueFull::Raise;
        let native = py.detach(|| native::Engine::new(config)).or_raise(py)?;
        let address = Py::new(py, Address { native: native.address().clone() })?;
        Ok(Self { native, address, timeout, waits_for_room })
    }

    #[getter]
    fn address(&self, py: Python<'_>) -> Py<Address> {
        self.address.clone_ref(py)
    }

    #[getter]
    fn incarnation(&self) -> String {
        self.native.address().engine.to_string()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.native.is_closed()
    }

    fn allocate(slf: &Bound<'_, Self>, nbytes: Number) -> PyResult<Region> {
        let (py, engine) = (slf.py(), &slf.get().native);
        let region = py.detach(|| engine.allocate(nbytes.0)).or_raise(py)?;
        Ok(Region::new(region, None, slf))
    }

    fn _register(
        slf: &Bound<'_, Self>,
        address: usize,
        nbytes: Number,
        writable: bool,
        owner: Bound<'_, PyAny>,
    ) -> PyResult<Region> {
        let (py, engine) = (slf.py(), &slf.get().native);
        let owner = owner.unbind();
        let kept = Box::new(owner.clone_ref(py));
        // SAFETY: the contract of the stub: the bytes lie there for as long as the owner lives.
        let region = unsafe { engine.register(address as *mut u8, nbytes.0, writable, kept) }.or_raise(py)?;
        Ok(Region::new(region, Some(owner), slf))
    }

    fn _register_gpu(
        slf: &Bound<'_, Self>,
        address: u64,
        nbytes: Number,
        writable: bool,
        owner: Bound<'_, PyAny>,
    ) -> PyResult<Region> {
        let (py, engine) = (slf.py(), &slf.get().native);
        let owner = owner.unbind();
        let kept = Box::new(owner.clone_ref(py));
        // SAFETY: the contract of the stub, as above. The first call opens the driver, which takes a while.
        let region = py.detach(|| unsafe { engine.register_gpu(address, nbytes.0, writable, kept) }).or_raise(py)?;
        Ok(Region::new(region, Some(owner), slf))
    }

    #[pyo3(signature = (src, dst, *, imm=None, verify=false, timeout_s=None))]
    fn write(
        slf: &Bound<'_, Self>,
        src: &Bound<'_, PyAny>,
        dst: &Bound<'_, PyAny>,
        imm: Option<Imm>,
        verify: bool,
        timeout_s: Option<Seconds>,
    ) -> PyResult<Transfer> {
        let (src, dst) = (source(src)?, destination(dst)?);
        let imm = imm.map(|Imm(imm)| imm);
        Self::submit(slf, src.nbytes(), timeout_s, |engine, timeout| {
            engine.write(&src, &dst, WriteOptions { imm, verify, timeout })
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the contract of the stub; nobody else calls it")]
    #[pyo3(signature = (src, src_pages, dst, dst_pages, imm, verify, timeout_s))]
    fn _write_pages(
        slf: &Bound<'_, Self>,
        src: &Bound<'_, PyAny>,
        src_pages: NativePages,
        dst: &Bound<'_, PyAny>,
        dst_pages: NativePages,
        imm: Option<Imm>,
        verify: bool,
        timeout_s: Option<Seconds>,
    ) -> PyResult<Transfer> {
        let strange = |of: &Bound<'_, PyAny>, what| {
            wrong_kind(&format!("expected `Pages` of a whole {what}; `offset` says where the first one begins"), of)
        };
        let src = src.cast::<Region>().map_err(|_| strange(src, "Region"))?;
        let dst = dst.cast::<Descriptor>().map_err(|_| strange(dst, "Descriptor"))?;
        let region = src.get().open(slf.py(), "write_pages")?;
        let remote = &dst.get().native;
        let imm = imm.map(|Imm(imm)| imm);
        let cost = nbytes_of(&src_pages).saturating_add((src_pages.0.num as u64).saturating_mul(8));
        Self::submit(slf, cost, timeout_s, |engine, timeout| {
            // SAFETY: the contract of the stub: the caller holds both arrays through the call.
            let (src_pages, dst_pages) = unsafe { (page_list(src_pages), page_list(dst_pages)) };
            engine.write_pages((&region, src_pages), (remote, dst_pages), WriteOptions { imm, verify, timeout })
        })
    }

    #[pyo3(signature = (src, targets, imm, group, timeout_s))]
    fn _scatter(
        slf: &Bound<'_, Self>,
        src: &Bound<'_, Region>,
        targets: Vec<Target<'_>>,
        imm: Option<Imm>,
        group: Option<&Bound<'_, PeerGroup>>,
        timeout_s: Option<Seconds>,
    ) -> PyResult<Transfer> {
        let region = src.get().open(slf.py(), "scatter")?;
        let mut nbytes = 0_u64;
        let targets: Vec<_> = targets
            .into_iter()
            .map(|Target(remote, Number(src_offset), Number(dst_offset), Number(length))| {
                nbytes = nbytes.saturating_add(length);
                native::ScatterTarget { remote: remote.get().native.clone(), src_offset, dst_offset, nbytes: length }
            })
            .collect();
        let imm = imm.map(|Imm(imm)| imm);
        let group = group.map(|group| &group.get().native);
        Self::submit(slf, nbytes, timeout_s, |engine, timeout| {
            engine.scatter(&region, &targets, group, WriteOptions { imm, verify: false, timeout })
        })
    }

    #[pyo3(signature = (peers, *, imm, timeout_s=None))]
    fn barrier(
        slf: &Bound<'_, Self>,
        peers: &Bound<'_, PyAny>,
        imm: Imm,
        timeout_s: Option<Seconds>,
    ) -> PyResult<Transfer> {
        let group = peers.cast::<PeerGroup>();
        let listed;
        let addresses = match &group {
            Ok(group) => group.get().native.addresses(),
            Err(_) => {
                listed = peers.extract::<Peers<'_>>()?.native();
                &listed
            }
        };
        Self::submit(slf, 0, timeout_s, |engine, timeout| engine.barrier(addresses, imm.0, timeout))
    }

    #[pyo3(signature = (address, message, *, timeout_s=None))]
    fn send(
        slf: &Bound<'_, Self>,
        address: Peer<'_>,
        message: &Bound<'_, PyBytes>,
        timeout_s: Option<Seconds>,
    ) -> PyResult<Transfer> {
        let (address, bytes) = (address.native(), message.as_bytes());
        Self::submit(slf, 0, timeout_s, |engine, timeout| engine.send(address, bytes.to_vec(), timeout))
    }

    #[pyo3(signature = (*, timeout_s=None))]
    fn receive(&self, py: Python<'_>, timeout_s: Option<Seconds>) -> PyResult<Message> {
        if let Some(message) = self._try_receive(py)? {
            return Ok(message);
        }
        let late = |after: &str| format!("no message after {after}");
        let message = wait(py, duration(timeout_s), |slice| self.native.receive(Some(slice)), late)?;
        Message::new(py, message)
    }

    fn _try_receive(&self, py: Python<'_>) -> PyResult<Option<Message>> {
        let message = self.native.try_receive().or_raise(py)?;
        message.map(|message| Message::new(py, message)).transpose()
    }

    fn _notify_receive(&self, py: Python<'_>, notifier: &Notifier, token: Number) -> PyResult<(u64, u64)> {
        self.native.check_fork().or_raise(py)?;
        let queue = notifier.queue();
        Ok(self.native.on_message(Box::new(move || queue.deliver(token.0))).to_parts())
    }

    fn _give_up_receive(&self, waiter: (u64, u64)) {
        self.native.give_up_message(native::Waiter::from_parts(waiter));
    }

    #[pyo3(signature = (*, imm=None, sources=Peers(Vec::new())), text_signature = "($self, *, imm=None, sources=())")]
    fn counter(slf: &Bound<'_, Self>, imm: Option<Imm>, sources: Peers<'_>) -> PyResult<Counter> {
        let sources = sources.native();
        let counter = slf.get().native.counter(imm.map(|Imm(imm)| imm), &sources).or_raise(slf.py())?;
        Ok(Counter::new(counter, slf))
    }

    fn watch(slf: &Bound<'_, Self>) -> PyResult<Watcher> {
        let watcher = slf.get().native.watch().or_raise(slf.py())?;
        Ok(Watcher::new(watcher, slf))
    }

    fn peer_group(&self, py: Python<'_>, addresses: Peers<'_>) -> PyResult<PeerGroup> {
        let wanted = addresses.native();
        let (native, transfers) = py.detach(|| self.native.start_peer_group(&wanted)).or_raise(py)?;
        self.wait_for(py, &transfers)?;
        Ok(PeerGroup { native, addresses: addresses.0.into_iter().map(Into::into).collect() })
    }

    #[pyo3(signature = (address, *, timeout_s=None))]
    fn connect(&self, py: Python<'_>, address: Peer<'_>, timeout_s: Option<Seconds>) -> PyResult<()> {
        let address = address.native();
        let transfer = py.detach(|| self.native.start_connect(address, duration(timeout_s))).or_raise(py)?;
        self.wait_for(py, &[transfer])
    }

    fn _path_json(&self, py: Python<'_>, peer: Peer<'_>) -> PyResult<String> {
        json(py, &self.open(py)?.path(peer.native()))
    }

    fn _stats_json(&self, py: Python<'_>) -> PyResult<String> {
        json(py, &self.open(py)?.stats())
    }

    fn _info_json(&self, py: Python<'_>) -> PyResult<String> {
        json(py, &self.open(py)?.info())
    }

    fn _notify_events(&self, py: Python<'_>, notifier: &Notifier, token: Number) -> PyResult<()> {
        self.native.check_fork().or_raise(py)?;
        let queue = notifier.queue();
        crate::log::tell(&queue, token.0);
        self.native.on_log(Box::new(move || queue.deliver_once(token.0)));
        Ok(())
    }

    fn _take_events(&self, py: Python<'_>) -> PyResult<Vec<(u8, String)>> {
        self.native.check_fork().or_raise(py)?;
        Ok(self.native.take_log().into_iter().chain(crate::log::take()).collect())
    }

    fn _close(&self, py: Python<'_>, timeout_s: Seconds) {
        py.detach(|| self.native.close(timeout_s.0));
    }

    fn __repr__(&self) -> String {
        let closed = if self.native.is_closed() { ", closed" } else { "" };
        format!("Engine({}{closed})", self.native.address())
    }
}

/// What Python reads with `json.loads`.
pub(crate) fn json(py: Python<'_>, value: &impl serde::Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(|error| {
        let message = format!("no JSON can be made of it: {error}");
        exception(py, &native::Error::new(native::Code::Internal, message))
    })
}

/// Up to here a submission keeps the GIL: it takes less time than another
/// Python thread may keep it for once it has got it, which is 5 ms.
const WITH_GIL_BYTES: u64 = 64 << 10;

"""The engine: what moves tensors between processes.

Adds to the native engine what is decided in Python: settings, what counts as memory, page lists,
asyncio, callbacks. `write`, `barrier`, `send`, `receive`, `counter` and the rest that runs per operation
are native methods, documented in `_core.pyi`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import weakref
from typing import TYPE_CHECKING, Any, Literal

from anyfabric import _asyncio, _core, config, memory
from anyfabric._service import Service
from anyfabric.errors import ResourceExhausted
from anyfabric.pages import operands
from anyfabric.path import Path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from anyfabric.pages import Pages, Target

__all__ = ["Engine"]

EXIT_TIMEOUT_S = 1.0
"""How long transfers in flight may hold up the end of the interpreter."""


class Engine(_core.Engine):
    """One endpoint: reaches its peers by the fastest transport that both have.

    A context manager; leaving it closes the engine. Engines that are open when the interpreter ends
    are closed then.
    """

    _settings: dict[str, config.Resolved]
    _callback_service: Service

    def __new__(
        cls,
        *,
        transports: Sequence[str] | str | None = None,
        require: str | None = None,
        secret: str | bytes | None = None,
        listen: str | None = None,
        devices: Sequence[str] | str | None = None,
        nics: Sequence[str] | str | None = None,
        nics_per_device: int | None = None,
        pin_worker: bool | None = None,
        gid_index: int | None = None,
        traffic_class: int | None = None,
        service_level: int | None = None,
        pkey_index: int | None = None,
        ack_timeout: int | None = None,
        retry_count: int | None = None,
        rnr_retry: int | None = None,
        rnr_timer: int | None = None,
        relaxed_ordering: bool | None = None,
        verbs_library: str | None = None,
        libfabric_provider: str | None = None,
        libfabric_library: str | None = None,
        libfabric_answer_timeout_s: float | None = None,
        libfabric_max_endpoints: int | None = None,
        cuda_library: str | None = None,
        tcp_streams: int | None = None,
        polling: Literal["adaptive", "busy"] | None = None,
        isolate: bool | None = None,
        heartbeat_s: float | None = None,
        heartbeats_lost: int | None = None,
        timeout_s: float | None = None,
        queue_depth: int | None = None,
        queue_full: Literal["block", "raise"] | None = None,
        max_message_bytes: int | None = None,
    ) -> Self:
        """Start an engine.

        `None` takes a setting from the variable `ANYFABRIC_<NAME>`, else the default.

        Args:
            transports: Transports to consider, of `"shm"`, `"verbs"`, `"libfabric"` and `"tcp"`; a pair of
                engines uses the fastest that both have. Default: all of them.
            require: The only transport to use; a peer that it does not reach is refused.
            secret: Cluster secret that both sides of a connection must prove; set it wherever `listen` goes
                beyond loopback.
            listen: `HOST[:PORT]` of the control listener; port 0 lets the kernel choose. Peers on other hosts
                need an address of this host that they can reach. Default: "127.0.0.1:0".
            devices: Whose memory is moved: `"cuda:0"`, `"gpu:0000:53:00.0"` or `"cpu:0"` (the host memory of
                a NUMA node). Without it: the host memory of the node on which the NICs are opened.
            nics: 1 to 8 NICs to use, as `"mlx5_0"` or `"mlx5_0:2"`; for more open an engine for each device.
                At most 4 serve one operation, and all take turns. Without it: those near the devices, or
                where no place is known the fastest that are up.
            nics_per_device: NICs to take for each device, 1 to 8, and at most 8 in all. Without it: those
                nearest, divided among the GPUs that are as near, and no more than 4.
            pin_worker: Keep the worker on cores near the NICs, once it has some. Default: True.
            gid_index: Index in a port's GID table. Without it: a RoCE v2 one with an IPv4 address.
            traffic_class: Traffic class of verbs; on RoCE four times the DSCP. Default: 0.
            service_level: Service level of verbs. Default: 0.
            pkey_index: Index in a port's table of partition keys, for verbs. Default: 0.
            ack_timeout: Verbs sends an unanswered packet again after 4.096 us times 2 to this power.
                Default: 16.
            retry_count: Times that verbs sends an unanswered packet again. Default: 6.
            rnr_retry: Times that verbs asks again when a peer takes no more arrivals. Default: 6.
            rnr_timer: How long such a peer asks to be left alone, as InfiniBand encodes it; 26 is 82 ms.
                Default: 26.
            relaxed_ordering: Let a NIC's writes to memory pass one another on the bus. Default: True.
            verbs_library: Path of libibverbs. Without it: the one that the system finds.
            libfabric_provider: The only provider to use, which may be software (`"tcp"`). Without it:
                hardware.
            libfabric_library: Path of libfabric, of which a process has one.
            libfabric_answer_timeout_s: Seconds after which a rail is given up on which nothing completes,
                though it should. Default: 5.0.
            libfabric_max_endpoints: Endpoints of a NIC, 1 to 4096; peers beyond that share them, and break
                together. Default: 256.
            cuda_library: Path of libcuda. Without it: the driver's own.
            tcp_streams: Data streams for each tcp peer, 1 to 4, which count as its NICs. Default: 2.
            polling: How threads wait: `"adaptive"` spins briefly and then blocks, `"busy"` never blocks.
                Default: "adaptive".
            isolate: Neither use nor allow `process_vm_writev` into memory that the engine did not allocate.
                Default: False.
            heartbeat_s: Seconds between heartbeats to a peer that is silent otherwise. Default: 1.0.
            heartbeats_lost: Heartbeats missed in a row after which a peer is lost. Default: 3.
            timeout_s: Deadline in seconds of a submission that names none. Default: 30.0.
            queue_depth: Operations under way at most; a `connect` counts as none. Default: 1024.
            queue_full: What a submission to a full queue does: `"block"` until its deadline, or `"raise"`
                `QueueFull`. Default: "block".
            max_message_bytes: Largest message that `send` takes, in bytes. Default: 65536.

        Raises:
            InvalidArgument: A value is out of range; the message names its origin.
            Unsupported: `require` names a transport that this machine does not have.
            ResourceExhausted: No file descriptor, memory or thread was left.
        """
        settings = config.resolve({name: value for name, value in locals().items() if name in _SETTING_NAMES})
        self = super().__new__(cls, config.native_config(settings))
        self._settings = settings
        self._serve_callbacks()
        return self

    def _serve_callbacks(self) -> None:
        try:
            self._callback_service = Service(self)
        except RuntimeError as cause:  # what `threading` says when there is no room for a thread
            self._close(0.0)
            msg = f"the callback thread: {cause}: no thread is left, or no memory; see ulimit -u"
            raise ResourceExhausted(msg, operation="start") from cause
        weakref.finalize(self, self._callback_service.stop).atexit = False
        _close_at_exit(self)

    def register(self, array: object, *, writable: bool = True) -> _core.Region:
        """Register memory so that it can be written from and, if `writable`, into.

        Args:
            array: numpy array, torch tensor, or an object that speaks DLPack, the buffer protocol or
                `__cuda_array_interface__`; in host memory or on a CUDA GPU; C-contiguous. The region
                keeps it alive until it is closed and its last transfer has quiesced. Meanwhile the storage of
                a tensor must not be resized, nor the memory be taken away (the file of a mapping truncated,
                `mprotect`): where it is copied, that ends this process, as any access of its own would.
            writable: Whether peers may be allowed to write into it.

        Raises:
            InvalidArgument: Not such an object, not contiguous, read-only although `writable`, or GPU
                memory that NICs cannot be given (managed memory).
            Unsupported: The bytes are on another kind of device, or there is no CUDA driver.
            DeviceLost: The GPU cannot be used from this process any more.

        Ordering: NICs know nothing of CUDA streams. Before a transfer out of a GPU is submitted the work
            that fills the bytes must have ended (`torch.cuda.current_stream().synchronize()`, or wait for
            an event). What a peer wrote is visible to GPU work submitted after its count; work that was
            submitted earlier and still reads the old bytes is the caller's to wait for.
        """
        found = memory.memory_of(array, writable=writable)
        register = self._register_gpu if found.is_on_gpu else self._register
        return register(found.address, found.nbytes, writable, found.owner)

    def write_pages(
        self,
        src: Pages[_core.Region],
        dst: Pages[_core.Descriptor],
        *,
        imm: int | None = None,
        verify: bool = False,
        timeout_s: float | None = None,
    ) -> _core.Transfer:
        """Write page `i` of `src` into page `i` of `dst`; return before the bytes move.

        Args:
            src: Local pages; must not change until the transfer is done.
            dst: Pages of one peer's region: as many, and of the same size.
            imm: The receiver counts it once per page, whatever the transport.
            verify: Add an end-to-end checksum; a mismatch fails the transfer.
            timeout_s: Deadline of the transfer in seconds.

        Raises: As `write`; `InvalidArgument` also when numbers or sizes of pages differ, or a page leaves its
            region.

        Fails: As `write`.
        Ordering: none, neither between transfers nor between the pages of one.
        """
        return self._write_pages(*operands(src, dst), imm, verify, timeout_s)

    def scatter(
        self,
        src: _core.Region,
        targets: Sequence[Target],
        *,
        imm: int | None = None,
        group: _core.PeerGroup | None = None,
        timeout_s: float | None = None,
    ) -> _core.Transfer:
        """Write one range of `src` to each target, many peers in one call.

        Args:
            src: Local region.
            targets: What goes where; may be empty.
            imm: Counted once per target at its owner.
            group: A prepared group; every target must belong to one of its peers.
            timeout_s: Deadline of the transfer in seconds.

        Raises: As `write`. Fails with the error of the first target that failed.
        """
        return self._scatter(src, targets, imm, group, timeout_s)

    async def receive_async(self, *, timeout_s: float | None = None) -> _core.Message:
        """`receive`, awaited on the running loop; safe to cancel, no message is lost.

        Args:
            timeout_s: Longest wait in seconds; `None` waits until one comes.
        """
        return await _asyncio.message_received(self, timeout_s)

    def path(self, peer: _core.Address) -> Path:
        """Which way to a peer, and why not a faster one.

        Args:
            peer: Any address; for one never used the state is `"new"`.
        """
        found = json.loads(self._path_json(peer))
        return Path(found["transport"], tuple(found["nics"]), found["state"], found["reason"])

    def stats(self) -> dict[str, Any]:
        """What was done since the start, with each peer and over each NIC; JSON-able.

        Of a peer, the same on every transport: `operations` that have ended, each call once, a scatter or
        barrier once at each of its peers; of those `errors`, whichever peer made them fail; `bytes`, the
        payload of the others, and `latency_us`, from submission to end. Whoever has waited for a transfer
        finds it there. To connect is no operation.

        Of a NIC, what it carried: `parts` of operations and their `bytes`, and `errors`, the parts that
        failed. A small operation is one part, a large one may have a part on every NIC. `retries` is how
        often a part waited for room.

        Of writes that the caller's thread carries out every sixteenth below 4 KiB has a latency.
        """
        return json.loads(self._stats_json())

    def info(self) -> dict[str, Any]:
        """Address, transports and why not, peers, regions, quarantine, settings; JSON-able."""
        found = json.loads(self._info_json())
        found["settings"] = [entry.as_dict() for entry in self._settings.values()]
        found["unknown_variables"] = config.unknown_variables()
        return found

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Drain, fail what is left with `Closed`, run the callbacks that are due, free everything.

        Idempotent, from any thread and from callbacks. Registered memory that a stopped process may
        still write to is kept until that process has exited.

        Args:
            timeout_s: Longest time in seconds for transfers in flight.
        """
        self._close(timeout_s)
        self._callback_service.stop()

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine; after an exception without waiting for transfers in flight."""
        if exc_type is None:
            self.close()
        else:
            self.close(timeout_s=0.0)

    def _service(self) -> Service:
        return self._callback_service


_SETTING_NAMES = frozenset(setting.name for setting in config.SETTINGS)
_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_at_exit(engine: Engine) -> None:
    if not _open_engines:
        atexit.unregister(_close_open_engines)
        atexit.register(_close_open_engines)
    _open_engines.add(engine)


def _close_open_engines() -> None:
    for engine in list(_open_engines):
        with contextlib.suppress(Exception):
            engine.close(timeout_s=EXIT_TIMEOUT_S)

"""The native half of `anyfabric`: what runs per write, per completion or per byte.

This stub is the contract between `crates/python` and the Python package; `stubtest` and strict
pyright keep it true. It leaves out everything that is decided in Python: settings and their origins
(`anyfabric.config`), what counts as memory (`anyfabric.memory`), page lists (`anyfabric.pages`).

Conventions, said once and valid for every entry below:

- Names with a leading underscore are for this package only. Addresses of memory are plain integers
  and appear only there; whoever passes one keeps the memory alive for the time that is stated.
- `timeout_s`: seconds. On a submission it is the deadline of the transfer; `None` means the engine's
  `timeout_s`. On a wait it bounds only the waiting; `None` waits until the outcome is known.
- Every call that can block releases the GIL and looks for signals at least every 100 ms, so that
  Ctrl-C raises `KeyboardInterrupt`. What was submitted goes on.
- Errors are the classes of `anyfabric.errors`, looked up by code through `anyfabric._hooks`; the
  native module raises nothing else on purpose. A wrong Python type is a `TypeError`; a value that
  does not fit (negative, beyond 64 bits, NaN) is `InvalidArgument`.
- `anyfabric._hooks` also has the bodies of methods that are easier in Python, imported on first use:
  `Region.numpy`, `.torch`, `.revoke_async`, `Transfer.on_done`, `.__await__`, `Counter.reached`,
  `Watcher.numpy`, `.at`.
- Every method of an engine, and of what an engine made, raises `Closed` after its close and
  `EngineForked` in a forked child, unless it says otherwise. `close` raises neither: in a child it does
  nothing. Properties and `repr` never raise.
- Whatever an engine made keeps the engine; a view of memory (`numpy`, `torch`) keeps the memory, also
  past the close of its region.
- `imm`: an immediate in `[0, 2**29)`, or one that `Engine.counter()` handed out. `None`: no count.
- No operation is ordered after another one. An immediate is counted only after the bytes of its own
  operation are visible to the receiver.
- All classes are final except `Engine`, thread-safe, and cannot be made from Python unless
  `__new__` or a class method says how.
"""

from collections.abc import Callable, Coroutine, Generator, Sequence
from types import TracebackType
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

from anyfabric.errors import AnyFabricError
from anyfabric.pages import Write, WritePages
from anyfabric.watcher import Trigger

__version__: str
"""Version of the crate; equal to the version of the package."""
MAX_NICS: Final = 8
"""NICs of one engine, and of one device, at most."""

@disjoint_base
class Engine:
    """Moves bytes between processes; `anyfabric.Engine` is the public subclass.

    Owns the listener, the worker, every region, counter and watcher. Dropping it without `close`
    closes it with a timeout of 0.
    """

    def __new__(cls, config: dict[str, object]) -> Self:
        """Start an engine: bind the listener, start the worker.

        Args:
            config: Flat and complete, every value already parsed by `anyfabric.config`; the keys are
                the native names of its settings. An unknown or a missing key is `Internal`.

        Raises:
            InvalidArgument: A value is out of range, or `listen` cannot be parsed or bound.
            Unsupported: `require` names a transport that this machine does not have.
            ResourceExhausted: No file descriptor, memory or thread was left.
        """
    @property
    def address(self) -> Address:
        """Where this engine is reached; the same object for the engine's life."""
    @property
    def incarnation(self) -> str:
        """32 hexadecimal digits that no other life of any engine has."""
    @property
    def closed(self) -> bool:
        """True once `close` has begun."""
    def allocate(self, nbytes: int) -> Region:
        """Allocate zeroed memory that peers of this host can map: the fast path of `shm`.

        Args:
            nbytes: Size in bytes, 0 or more. The mapping is page-aligned and sealed against resizing.

        Raises:
            ResourceExhausted: The memory or a file descriptor could not be had.
        """
    def _register(self, address: int, nbytes: int, writable: bool, owner: object) -> Region:
        """Register memory that somebody else owns.

        Each call returns a region of its own; regions over the same bytes share what NICs made of them.

        Args:
            address: First byte.
            nbytes: Size in bytes, 0 or more.
            writable: False: peers may not write into it, `Region.descriptor` is `Unsupported`.
            owner: Kept alive until the region is closed and its last transfer has quiesced.
        """
    def _register_gpu(self, address: int, nbytes: int, writable: bool, owner: object) -> Region:
        """Register memory of a GPU, as `_register`; opens the driver at its first call.

        Args:
            address: First byte, in the GPU's address space.
            nbytes: Size in bytes, 1 or more.
            writable: As in `_register`.
            owner: As in `_register`.

        Raises:
            InvalidArgument: The bytes are not of one GPU, or NICs cannot be given them.
            Unsupported: There is no driver, or it is too old.
            DeviceLost: The GPU cannot be used from this process any more.
        """
    def write(
        self,
        src: Region | Slice,
        dst: Descriptor | RemoteSlice,
        *,
        imm: int | None = None,
        verify: bool = False,
        timeout_s: float | None = None,
    ) -> Transfer:
        """Write `src` into `dst`; return before the bytes move.

        Args:
            src: Local bytes; must not change until the transfer is done.
            dst: Remote bytes, same length.
            imm: The receiver counts it once, whatever the transport and the number of NICs.
            verify: Add an end-to-end checksum; a mismatch fails the transfer and is never counted.
            timeout_s: Deadline of the transfer.

        Returns:
            A transfer: done when `src` may be reused and the bytes lie at the target.

        Raises:
            InvalidArgument: The lengths differ, `src` is another engine's, or `dst` is this engine's own.
            QueueFull: The submission queue is full and `queue_full` is `"raise"`.
            ResourceExhausted: The peer keeps no more immediates without a counter, and `imm` is given.
            PeerLost: This incarnation of the peer is known to be dead. Until its death has been noticed a
                write may still succeed, into memory that this process has mapped.

        Fails: `PeerLost`, `ConnectionBroken` (what carried it broke, and the peer may live; over `tcp` and
            NICs a peer's end may be seen so first), `Refused` (revoked, unknown or out of bounds at the
            peer), `ResourceExhausted` (the peer keeps no more immediates without a counter, or no file
            descriptor is left), `Unsupported` (no transport in common, or none that reaches the GPU),
            `DeviceLost`, `TransferFailed`, `TransferTimeout`, `Cancelled`, `Closed`; `dst` is then undefined
            until the transfer has quiesced.
        Ordering: none between transfers.
        """
    def _write_pages(
        self,
        src: Region,
        src_pages: tuple[npt.NDArray[np.uint32], int, int, int],
        dst: Descriptor,
        dst_pages: tuple[npt.NDArray[np.uint32], int, int, int],
        imm: int | None,
        verify: bool,
        timeout_s: float | None,
    ) -> Transfer:
        """Write page `i` of `src_pages` into page `i` of `dst_pages`; `imm` counts once per page.

        Args:
            src: Local region.
            src_pages: `(indices, page_bytes, stride, offset)`. The indices are an array of contiguous,
                aligned, native-endian uint32; page `i` starts at byte `offset + indices[i] * stride`.
                They are copied before the call returns.
            dst: A peer's region.
            dst_pages: As `src_pages`, same number of pages and `page_bytes`.
            imm: As in `write`.
            verify: As in `write`; one checksum for the whole operation.
            timeout_s: As in `write`.

        Raises: As `write`; `InvalidArgument` names the first page that leaves its region. Sums and
            products are checked: an overflow is a page that leaves its region.
        """
    def _scatter(
        self,
        src: Region,
        targets: Sequence[tuple[Descriptor, int, int, int]],
        imm: int | None,
        group: PeerGroup | None,
        timeout_s: float | None,
    ) -> Transfer:
        """Write one range of `src` to each target; `imm` counts once per target, at its owner.

        Args:
            src: Local region.
            targets: `(descriptor, src_offset, dst_offset, nbytes)` each; may be empty.
            imm: As in `write`.
            group: A prepared group; every target must belong to one of its peers.
            timeout_s: As in `write`.

        Raises: As `write`. Fails with the error of the first target that failed.
        """
    def barrier(
        self, peers: Sequence[Address] | PeerGroup, *, imm: int, timeout_s: float | None = None
    ) -> Transfer:
        """Send one bare immediate to each peer, this engine excluded.

        It orders nothing: wait for the writes that it announces first.

        Args:
            peers: Addresses or a group; an address listed twice counts twice.
            imm: Counted once per participant at each peer.
            timeout_s: Deadline of the transfer.

        Fails: As `write`.
        """
    def send(self, address: Address, message: bytes, *, timeout_s: float | None = None) -> Transfer:
        """Send a message; done when the peer's engine has queued it.

        Args:
            address: The peer.
            message: At most `max_message_bytes` bytes, may be empty; copied before the call returns.
            timeout_s: Deadline of the transfer.

        Raises:
            InvalidArgument: The message is larger than the limit.

        Fails: As `write`; `ResourceExhausted` when the peer's queue of unread messages is full.
        """
    def receive(self, *, timeout_s: float | None = None) -> Message:
        """Take the oldest unread message, waiting for one if there is none.

        Args:
            timeout_s: Longest wait in seconds; 0 polls; `None` waits until one comes or the engine
                is closed.

        Raises:
            WaitTimeout: None came in time.
            Closed: The engine was closed, also while waiting.
        """
    def _try_receive(self) -> Message | None:
        """Take the oldest unread message, or return `None`; never blocks."""
    def _notify_receive(self, notifier: Notifier, token: int) -> tuple[int, int]:
        """Deliver `token` once as soon as a message can be taken or the engine is closed.

        Returns:
            What `_give_up_receive` takes.
        """
    def _give_up_receive(self, waiter: tuple[int, int]) -> None:
        """Forget what `_notify_receive` promised, unless it was delivered; in a forked child nothing."""
    def counter(self, *, imm: int | None = None, sources: Sequence[Address] = ()) -> Counter:
        """Open a counter of the arrivals of one immediate at this engine.

        A fresh immediate keeps requests apart: what arrives after its counter was closed is counted for
        nobody, and the immediate is not handed out again while any of its `sources` may still send it.
        One of your own is yours to keep apart: what arrives while no counter is open for it is kept for
        the next, even if it was meant for the one before. So before you give it another meaning, wait
        until every transfer that carries it has quiesced at its source.

        Args:
            imm: The immediate, or `None` for a fresh one of this engine (at least `2**29`).
            sources: Peers whose loss fails the counter's waiters with `PeerLost`. Unknown peers are
                connected to in the background.

        Raises:
            InvalidArgument: `imm` does not fit, or a counter for it is already open.
            ResourceExhausted: No fresh immediate is left.
        """
    def watch(self) -> Watcher:
        """Make a 64-bit word, 0 at first, that anything in this process may increment."""
    def peer_group(self, addresses: Sequence[Address]) -> PeerGroup:
        """Connect to every address and prepare its path; blocks at most the engine's `timeout_s`.

        Args:
            addresses: Ordered; duplicates are `InvalidArgument`; this engine's own is allowed.

        Raises:
            PeerLost: A peer could not be reached; the message names it.
        """
    def connect(self, address: Address, *, timeout_s: float | None = None) -> None:
        """Make the path to a peer now; otherwise the first use does.

        Args:
            address: The peer.
            timeout_s: Longest wait in seconds; `None` means the engine's `timeout_s`.

        Raises:
            PeerLost: It could not be reached, or another incarnation answered.
            ConnectionBroken: It answered, but the handshake failed (wrong secret, wire version).
            TransferTimeout: It said nothing until then, however often it was called.
            Unsupported: The two have no transport in common, or not the one that `require` names.
        """
    def _path_json(self, peer: Address) -> str:
        """Describe the path to a peer, as JSON.

        `{"transport": str, "nics": [str], "state": "new" | "connecting" | "ready" | "degraded" |
        "lost", "reason": str}`; `reason` says why each faster transport is not used.
        """
    def _stats_json(self) -> str:
        """Counters since the start, as JSON; cheap enough to call every second.

        `{"peers": {ADDRESS: {"transport": str, "bytes": int, "operations": int, "errors": int,
        "retries": int, "nics": {NAME: {"bytes": int, "parts": int, "errors": int, "retries": int,
        "latency_us": LATENCY}}, "latency_us": LATENCY}}, "messages": {"queued": int, "refused": int}}`;
        `Engine.stats` says what each means. LATENCY is `{"count": int, "p50": float, "p99": float, "p999":
        float, "max": float}`, from submission to end, the quantiles being upper bounds of histogram buckets.
        """
    def _info_json(self) -> str:
        """What this engine has, as JSON.

        `{"address": str, "incarnation": str, "devices": [{"device": str, "nics":
        [{"name": str, "distance": str}], "cpus": [int]}], "gpus": [as in `gpus_json`; none before GPU memory
        is registered], "worker": {"cpus": [int], "reason": str}, "transports": [{"name": str, "available":
        bool, "reason": str | null, "nics": [{"name": str, "state": "up" | "down", "gbps": float | null}],
        "abilities": {str: str}}], "peers": [{"address": str, "transport": str, "state": str, "reason": str,
        "foreign_memory": "process_vm_writev" | "bounce" | null}], "regions": [{"id": int, "nbytes": int,
        "kind": "allocated" | "registered", "device": str, "granted": int}], "quarantine": [{"region": int,
        "offset": int, "nbytes": int, "peer": str}], "limits": {str: int}}`. Transports are listed best first;
        `granted` is the number of peers that can write into a region without asking its owner.
        """
    def _notify_events(self, notifier: Notifier, token: int) -> None:
        """Deliver `token` whenever `_take_events` has something new; stays until the close."""
    def _take_events(self) -> list[tuple[int, str]]:
        """Take `(level, line)` pairs for the log, levels as in `logging`; at most 1024 are kept.

        Lines of the transports are of no engine: the first that asks takes them.
        """
    def _close(self, timeout_s: float) -> None:
        """Stop taking work, drain until the timeout, fail the rest with `Closed`, free everything.

        Idempotent, from any thread; a second caller waits for the first. Never raises: it alone does
        not look for signals.

        Args:
            timeout_s: Longest time for transfers in flight.
        """

@final
class Address:
    """Where an engine is reached, and which life of it; immutable, hashable, picklable."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read what `str(address)` printed.

        Raises:
            InvalidArgument: `text` is not an address; the message says where it stops being one.
        """
    @classmethod
    def from_bytes(cls, data: bytes) -> Address:
        """Read what `to_bytes` wrote.

        Raises:
            InvalidArgument: `data` is no address.
        """
    def to_bytes(self) -> bytes:
        """Serialise: the text of `str`, which every wire version reads."""
    @property
    def incarnation(self) -> str:
        """32 hexadecimal digits: the life of the engine that this address means."""
    @property
    def sockets(self) -> list[str]:
        """`HOST:PORT` of each control listener, best first."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Callable[[bytes], Address], tuple[bytes]]: ...

@final
class Region:
    """Memory registered with an engine; keeps its owner alive until closed and quiesced."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
    @property
    def id(self) -> int:
        """Number of the region in its engine, as in errors and `info`."""
    @property
    def writable(self) -> bool:
        """Whether peers may be allowed to write into it."""
    @property
    def device(self) -> str:
        """`"cpu"`, or the GPU that it lies on, as CUDA numbers it here: `"cuda:0"`."""
    @property
    def closed(self) -> bool:
        """True once `close` has begun, or the engine's."""
    @property
    def _address(self) -> int:
        """First byte; 0 when closed."""
    @property
    def _owner(self) -> object:
        """What `_register` was given; `None` for allocated memory, and when closed."""
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> Slice:
        """Slice like `bytes`, but a bound outside the region is `InvalidArgument`; step 1 only.

        A closed region can still be sliced; using the slice is refused.
        """
    def descriptor(self) -> Descriptor:
        """Make what a peer needs to write into this region.

        Raises:
            Unsupported: The region is not writable.
        """
    def numpy(
        self, dtype: npt.DTypeLike = "uint8", shape: int | Sequence[int] | None = None
    ) -> npt.NDArray[Any]:
        """View the bytes as an array that keeps the region alive.

        Args:
            dtype: Any fixed-size numpy dtype without objects.
            shape: Default: one dimension over all whole elements. Must not exceed the region; one length
                may be -1, as in numpy: then the array covers the region.

        Raises:
            InvalidArgument: Dtype or shape do not fit the region.
            Unsupported: The region lies on a GPU.
        """
    def torch(self, dtype: object = None, shape: int | Sequence[int] | None = None) -> Any:
        """View the bytes as a tensor on the region's device that keeps the region alive; imports torch.

        Args:
            dtype: A `torch.dtype`; default `torch.uint8`.
            shape: As in `numpy`.
        """
    def revoke(self, peer: Address | None = None, *, timeout_s: float = 1.0) -> None:
        """Fence writers out: return when none can touch the region any more.

        Descriptors made before stop working for that peer; new ones work. The writer drains and
        acknowledges; without an acknowledgement by the deadline this engine acts alone.

        Args:
            peer: One peer, or `None` for all of them.
            timeout_s: Longest wait in seconds.

        Raises:
            WaitTimeout: A writer could not be fenced yet; its bytes are quarantined, see `info`.
        """
    def revoke_async(
        self, peer: Address | None = None, *, timeout_s: float = 1.0
    ) -> Coroutine[Any, Any, None]:
        """`revoke`, awaited."""
    def close(self, *, timeout_s: float = 1.0) -> None:
        """Revoke for every peer and unregister; idempotent. Who closes while another thread does waits too.

        Bytes that a lost writer might still touch are quarantined: the owner stays alive and the
        memory is not handed out again until that writer is known to be gone.

        Args:
            timeout_s: Longest wait in seconds for transfers and writers.
        """

@final
class Slice:
    """A byte range of a region; holds the region."""

    @property
    def region(self) -> Region:
        """The region it lies in."""
    @property
    def offset(self) -> int:
        """First byte, from the start of the region."""
    @property
    def nbytes(self) -> int:
        """Size in bytes."""
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> Slice: ...

@final
class Descriptor:
    """What a peer needs to write into a region; immutable, hashable, picklable.

    It carries a random key: whoever holds it, and may talk to the engine, may write.
    """

    @classmethod
    def from_bytes(cls, data: bytes) -> Descriptor:
        """Read what `to_bytes` wrote.

        Raises:
            InvalidArgument: `data` is no descriptor, or one of another wire version.
        """
    def to_bytes(self) -> bytes:
        """Serialise; readable by wire versions N and N-1."""
    @property
    def address(self) -> Address:
        """The engine that owns the region."""
    @property
    def nbytes(self) -> int:
        """Size of the region in bytes."""
    @property
    def device(self) -> str:
        """`"cpu"`, or `"cuda:"` and the GPU's UUID in 32 hexadecimal digits, the same in every process."""
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> RemoteSlice:
        """Slice like `bytes`, but a bound outside the region is `InvalidArgument`; step 1 only."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Callable[[bytes], Descriptor], tuple[bytes]]: ...

@final
class RemoteSlice:
    """A byte range of a peer's region."""

    @property
    def descriptor(self) -> Descriptor:
        """The whole region."""
    @property
    def offset(self) -> int:
        """First byte, from the start of the region."""
    @property
    def nbytes(self) -> int:
        """Size in bytes."""
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> RemoteSlice: ...

@final
class Transfer:
    """A submitted operation: pending, then done, or failed with one error."""

    @property
    def done(self) -> bool:
        """True when the outcome is known: success or failure."""
    @property
    def failed(self) -> bool:
        """True when done with an error."""
    @property
    def quiesced(self) -> bool:
        """True when no byte of it can move any more; on success the same as `done`."""
    @property
    def error(self) -> AnyFabricError | None:
        """The error, once failed; the same object each time."""
    @property
    def nbytes(self) -> int:
        """Payload bytes of the operation."""
    @property
    def interval_ns(self) -> tuple[int, int] | None:
        """When it began and ended, on the clock of `time.monotonic_ns`; `None` while pending.

        It begins when submitted; under a watcher, when fired. `None` stays where nobody looked at the clock:
        the caller's thread carried out a write below 4 KiB, or refused it, or nothing was to be moved.
        """
    @property
    def _engine(self) -> Engine:
        """The engine it was submitted to."""
    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the outcome; `None` waits for it, which its own deadline bounds.

        Args:
            timeout_s: Longest wait in seconds; 0 polls.

        Raises:
            WaitTimeout: Still pending. The transfer goes on.
            AnyFabricError: The transfer failed; this is its `error`.
        """
    def wait_quiesced(self, timeout_s: float | None = None) -> None:
        """Wait until no byte can move any more; returns for a failed transfer too.

        Args:
            timeout_s: Longest wait in seconds; 0 polls.

        Raises:
            WaitTimeout: It has not quiesced.
        """
    def cancel(self) -> None:
        """Ask for it not to happen: a pending transfer then fails with `Cancelled`. Never blocks."""
    def on_done(self, callback: Callable[[Transfer], object]) -> None:
        """Call `callback(transfer)` once, on the engine's callback thread.

        At once if already done, still on that thread. What it raises is logged and goes no further.

        Raises:
            Closed: The engine is closed, and the thread has ended.
        """
    def _notify(self, notifier: Notifier, token: int) -> None:
        """Deliver `token` once when done; at once if it is."""
    def __await__(self) -> Generator[Any]:
        """Wait on the running asyncio loop; raises what `wait` does."""

@final
class Counter:
    """The arrivals of one immediate at one engine; a context manager that closes it."""

    @property
    def imm(self) -> int:
        """The immediate."""
    @property
    def value(self) -> int:
        """Arrivals since the first one, waited for or not."""
    @property
    def closed(self) -> bool:
        """True once closed."""
    def wait(self, n: int, timeout_s: float | None = None) -> None:
        """Wait until at least `n` arrivals were counted; the bytes of each are visible then.

        Args:
            n: Total since the first arrival, not since the last wait.
            timeout_s: Longest wait in seconds; 0 polls; `None` waits until the outcome is known.

        Raises:
            WaitTimeout: Fewer than `n` in time; the message says how many.
            PeerLost: One of `sources` died before `n` was reached.
            TransferFailed: A counted transfer of this immediate failed before `n` was reached, or came
                while too many others waited for a counter and was dropped.
            DeviceLost: The GPU's driver could not make the bytes of an arrival visible.
            Closed: The counter or the engine was closed, also while waiting.
        """
    def reached(self, n: int, *, timeout_s: float | None = None) -> Coroutine[Any, Any, None]:
        """`wait`, awaited."""
    def _notify(self, n: int, notifier: Notifier, token: int) -> tuple[int, int]:
        """Deliver `token` once when `wait(n, 0)` would not raise `WaitTimeout`.

        Returns:
            What `_give_up` takes.
        """
    def _give_up(self, waiter: tuple[int, int]) -> None:
        """Forget what `_notify` promised, unless it was delivered; in a forked child nothing."""
    def close(self) -> None:
        """Stop counting and fail the waiters with `Closed`; idempotent."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Watcher:
    """A 64-bit word and the operations that fire when it reaches a value; no Python on that path."""

    @property
    def value(self) -> int:
        """The word, read with acquire ordering."""
    @property
    def closed(self) -> bool:
        """True once closed."""
    @property
    def _address(self) -> int:
        """Where the word lies: 8 bytes, 64-byte aligned, freed when the watcher and its views are."""
    def set(self, value: int) -> None:
        """Store `value` with release ordering.

        Raises:
            InvalidArgument: `value` is smaller than the word, or beyond 64 bits.
        """
    def add(self, n: int = 1) -> int:
        """Add `n` with release ordering; return the new value.

        Raises:
            InvalidArgument: The sum is beyond 64 bits; the word stays as it is.
        """
    def numpy(self) -> npt.NDArray[Any]:
        """View the word as `[1] uint64`, keeping the watcher alive; stores are seen by polling."""
    def at(self, value: int, operation: Write | WritePages) -> Trigger:
        """Submit `operation` when the word is `value` or more; at once if it is.

        Source bytes are read when it fires, not now; its deadline starts then. Operations that are
        due together fire in the order of `value`, then of `at`.

        It takes no place in the queue until it fires, and fires whether there is room or not.
        Cancelled before that, its `imm` fails at the receiver as that of any failed transfer.

        Raises: As `Engine.write`, but for `QueueFull`: everything is checked now.
        """
    def _at_write(
        self, value: int, src: Region | Slice, dst: Descriptor | RemoteSlice, imm: int | None
    ) -> Transfer:
        """`at` for one write; the transfer is pending until fired and done."""
    def _at_write_pages(
        self,
        value: int,
        src: Region,
        src_pages: tuple[npt.NDArray[np.uint32], int, int, int],
        dst: Descriptor,
        dst_pages: tuple[npt.NDArray[np.uint32], int, int, int],
        imm: int | None,
    ) -> Transfer:
        """`at` for a list of pages, as in `Engine._write_pages`."""
    def close(self) -> None:
        """Fail what has not fired with `Cancelled`; idempotent."""

@final
class PeerGroup:
    """An ordered list of peers with prepared paths."""

    @property
    def addresses(self) -> list[Address]:
        """The peers, in the order given."""
    def __len__(self) -> int: ...

@final
class Message:
    """A received message."""

    @property
    def data(self) -> bytes:
        """The bytes; the same object each time."""
    @property
    def source(self) -> Address:
        """The engine that sent it."""

@final
class Notifier:
    """A queue of finished tokens behind an eventfd: how native code wakes Python without the GIL."""

    def __new__(cls) -> Self:
        """Make one.

        Raises:
            ResourceExhausted: No file descriptor was left.
        """
    def fileno(self) -> int:
        """Descriptor that is readable while tokens wait; -1 when closed.

        In a forked child every method does nothing: the descriptor belongs to the parent.
        """
    def drain(self) -> list[int]:
        """Take all tokens and make the descriptor unreadable; never blocks."""
    def wait(self, timeout_s: float | None = None) -> list[int]:
        """Block, without the GIL, until a token waits; empty after a timeout or a close."""
    def wake(self, token: int) -> None:
        """Deliver `token` from Python."""
    def close(self) -> None:
        """Wake the waiter and give the descriptor back; later deliveries are dropped; idempotent."""

def error_codes() -> list[str]:
    """Every code that the native module raises, in the order of its enum."""

def build_info() -> dict[str, str]:
    """`{"profile": "release" | "debug", "rustc": ..., "target": ..., "wire_version": ...}`."""

def topology_json(root: str, nics: list[str], nics_per_device: int | None) -> str:
    """The machine below `root` and its groups; see `anyfabric.topology`, which makes objects of it."""

def gpus_json(library: str | None) -> str:
    """The GPUs of this process, as their driver describes them; `anyfabric.gpu` makes objects of it.

    Initialises CUDA, after which children made by fork cannot use it.

    Args:
        library: Path of libcuda; `None` for the driver's own.

    Raises:
        Unsupported: There is no driver that can be used.
    """

# Baselines of `anyfabric perf`: the least that the hardware and the kernel allow, with nothing of the
# engine on the way. They take addresses, check nothing, release the GIL and return the nanoseconds of
# each round. Index arrays are contiguous, aligned, native-endian uint32.

def baseline_memcpy(dst: int, src: int, nbytes: int, rounds: int) -> list[int]:
    """Time libc's `memcpy` of one range."""

def baseline_copy_pages(
    dst: int, src: int, indices: tuple[int, int, int], page_bytes: int, rounds: int
) -> list[int]:
    """Time a loop of `memcpy`, page by page.

    `indices` is `(dst_indices_address, src_indices_address, num_pages)`, here and below.
    """

def baseline_process_vm_writev(
    pid: int, dst: int, src: int, indices: tuple[int, int, int], page_bytes: int, rounds: int
) -> list[int]:
    """Time full batches (IOV_MAX) of `process_vm_writev` into another process.

    Raises:
        Unsupported: The kernel refused it; the message has its errno.
    """

def baseline_ring_ping(memory: int, rounds: int) -> list[int]:
    """Time half the round trip of 8 bytes through two polled words; the peer runs `baseline_ring_pong`.

    `memory`: 128 zeroed bytes, 64-byte aligned, shared by both. Gives up after 10 s without an answer.

    Raises:
        WaitTimeout: The other side did not answer.
    """

def baseline_ring_pong(memory: int, rounds: int) -> None:
    """Answer `baseline_ring_ping`."""

def baseline_socket_source(
    fds: Sequence[int],
    src: int,
    indices: tuple[int, int, int],
    page_bytes: int,
    rounds: int,
    *,
    timeout_s: float,
) -> list[int]:
    """Time batched `sendmsg` of the source pages over connected stream sockets that block, which take turns.

    The pages are dealt out in equal runs; a single page is cut into equal parts. A round ends when one
    byte has come back on the first socket.

    Raises:
        ConnectionBroken: A socket failed, or nothing moved for `timeout_s`.
    """

def baseline_socket_sink(
    fds: Sequence[int],
    dst: int,
    indices: tuple[int, int, int],
    page_bytes: int,
    rounds: int,
    *,
    timeout_s: float,
) -> None:
    """Read what `baseline_socket_source` sends into the destination pages with batched `readv`.

    Raises:
        ConnectionBroken: A socket failed, or nothing moved for `timeout_s`.
    """

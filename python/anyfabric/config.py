"""The one home of every setting: name, environment variable, default, meaning, parser.

An engine takes each setting from its argument, else from the environment, else from the default, and
remembers which of them it was. Nothing else in the package reads `ANYFABRIC_*`. `anyfabric info` and the
native configuration are made from `SETTINGS`; a test compares it with the arguments of `Engine`, their
documentation and their defaults.
"""

from __future__ import annotations

import math
import operator
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from anyfabric import _core
from anyfabric.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["SETTINGS", "Resolved", "Setting", "native_config", "parse_size", "resolve", "unknown_variables"]

Origin = Literal["argument", "environment", "default"]
PREFIX = "ANYFABRIC_"
TRANSPORTS = ("shm", "verbs", "libfabric", "tcp")
"""Transports of this build that connect processes; `loopback` is for the Rust tests alone."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: Argument of `Engine`, and key of the native configuration.
        env: Environment variable.
        default: Value when neither is given, already parsed.
        doc: One line for `anyfabric info`.
        parse: Turns an argument or the text of the variable into the value; raises `ValueError` with
            what was expected.
        secret: Whether the value must never be shown.
    """

    name: str
    env: str
    default: object
    doc: str
    parse: Callable[[object], object]
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setting with its value and where the value comes from."""

    setting: Setting
    value: object
    origin: Origin

    def __repr__(self) -> str:
        """Never show a secret."""
        return f"Resolved({self.setting.name}={self.shown()!r}, origin={self.origin!r})"

    def shown(self) -> object:
        """The value as it may be printed, JSON-able; a secret only as set or not."""
        if self.setting.secret:
            return None if self.value is None else "(set)"
        return list(cast("tuple[object, ...]", self.value)) if isinstance(self.value, tuple) else self.value

    def as_dict(self) -> dict[str, object]:
        """One row of `Engine.info()["settings"]`."""
        return {
            "name": self.setting.name,
            "value": self.shown(),
            "origin": self.origin,
            "variable": self.setting.env,
            "doc": self.setting.doc,
        }


def resolve(
    arguments: Mapping[str, object], environment: Mapping[str, str] | None = None
) -> dict[str, Resolved]:
    """Find the value and the origin of every setting.

    Args:
        arguments: By name; `None` means not given.
        environment: Default: `os.environ`. An empty variable means not given.

    Returns:
        Every setting by name, in the order of `SETTINGS`.

    Raises:
        InvalidArgument: A value cannot be parsed; the message names its origin. Or a name is unknown.
    """
    environment = os.environ if environment is None else environment
    unknown = arguments.keys() - {setting.name for setting in SETTINGS}
    if unknown:
        msg = f"unknown settings {sorted(unknown)}; known are {[s.name for s in SETTINGS]}"
        raise InvalidArgument(msg, operation="configure")
    return {s.name: _resolve_one(s, arguments.get(s.name), environment) for s in SETTINGS}


def native_config(resolved: Mapping[str, Resolved]) -> dict[str, object]:
    """Flatten for `_core.Engine`: value by name."""
    return {name: entry.value for name, entry in resolved.items()}


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that begin with `ANYFABRIC_` and mean nothing: most likely misspelt."""
    environment = os.environ if environment is None else environment
    known = {setting.env for setting in SETTINGS}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def parse_size(text: str) -> int | None:
    """Bytes of `"4096"`, `"64K"` or `"1 MiB"`: K, M and G are powers of 1024; `None` for anything else."""
    match = re.fullmatch(r"(\d+)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]] if match else None


def _resolve_one(setting: Setting, argument: object, environment: Mapping[str, str]) -> Resolved:
    text = environment.get(setting.env, "")
    origin: Origin
    if argument is not None:
        given, origin, source = argument, "argument", f"`{setting.name}`"
    elif text:
        given, origin, source = text, "environment", setting.env
    else:
        return Resolved(setting, setting.default, "default")
    try:
        value = setting.parse(given)
        _check_encodable(value)
        return Resolved(setting, value, origin)
    except (ValueError, TypeError, OverflowError) as cause:
        what = "a secret that cannot be used" if setting.secret else repr(given)
        doc = setting.doc if setting.doc[:2].isupper() else setting.doc[0].lower() + setting.doc[1:]
        msg = f"{source} was given {what}; expected {cause} ({doc})"
        raise InvalidArgument(msg, operation="configure") from None


def _check_encodable(value: object) -> None:
    """Native code takes text as UTF-8; variables that are none reach Python as lone surrogates."""
    try:
        for text in value if isinstance(value, tuple) else (value,):  # pyright: ignore[reportUnknownVariableType] - of anything
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        msg = "text in UTF-8"
        raise ValueError(msg) from None


def _choice(*options: str) -> Callable[[object], str]:
    def parse(given: object) -> str:
        if isinstance(given, str) and given.strip() in options:
            return given.strip()
        msg = "one of " + ", ".join(options)
        raise ValueError(msg)

    return parse


def _integer(least: int, most: int) -> Callable[[object], int]:
    def parse(given: object) -> int:
        try:
            value = int(given) if isinstance(given, str) else operator.index(given)  # pyright: ignore[reportArgumentType] - what has none says so
        except (TypeError, ValueError):
            value = None
        if value is None or isinstance(given, bool) or not least <= value <= most:
            msg = f"a whole number from {least} to {most}"
            raise ValueError(msg)
        return value

    return parse


def _bytes_size(least: int, most: int) -> Callable[[object], int]:
    within = _integer(least, most)

    def parse(given: object) -> int:
        try:
            return within(parse_size(given) if isinstance(given, str) else given)
        except ValueError as cause:
            msg = f"{cause} bytes; K, M and G stand for powers of 1024"
            raise ValueError(msg) from None

    return parse


def _seconds(least: float, most: float) -> Callable[[object], float]:
    def parse(given: object) -> float:
        try:
            value = math.nan if isinstance(given, bool) else float(given)  # pyright: ignore[reportArgumentType] - what is none says so
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not least <= value <= most:
            msg = f"seconds from {least:g} to {most:g}"
            raise ValueError(msg)
        return value

    return parse


def _flag(given: object) -> bool:
    if isinstance(given, bool):
        return given
    text = str(given).strip().lower()
    if isinstance(given, str) and text in {"1", "true", "yes", "on"}:
        return True
    if isinstance(given, str) and text in {"0", "false", "no", "off"}:
        return False
    msg = "a flag: 1, true, yes, on or 0, false, no, off"
    raise ValueError(msg)


def _transports(given: object) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else given
    names: list[str] = []
    if isinstance(parts, (list, tuple, set, frozenset)):
        names = [str(name).strip() for name in cast("Iterable[object]", parts)]
    if not names or len(set(names)) != len(names) or not set(names) <= set(TRANSPORTS):
        msg = f"some of {', '.join(TRANSPORTS)}, each once, separated by commas"
        raise ValueError(msg)
    return tuple(names)


def _names(given: object) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else given
    names: list[str] = []
    if isinstance(parts, (list, tuple)):
        names = [str(name).strip() for name in cast("Iterable[object]", parts)]
    if not 1 <= len(names) <= _core.MAX_NICS or len(set(names)) != len(names) or not all(names):
        more = "for more open an engine for each device"
        msg = f"1 to {_core.MAX_NICS} names, each once, separated by commas; {more}"
        raise ValueError(msg)
    return tuple(names)


def _path(given: object) -> str:
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        msg = "a path"
        raise ValueError(msg)
    return given.strip()


def _secret(given: object) -> bytes:
    try:
        # Bytes of the environment that are no UTF-8 reach Python as surrogates.
        data = given.encode(errors="surrogateescape") if isinstance(given, str) else given
    except UnicodeEncodeError:
        data = None
    if not isinstance(data, (bytes, bytearray)) or not data:
        msg = "text or bytes, not empty"
        raise ValueError(msg)
    return bytes(data)


def _listen(given: object) -> str:
    expected = "HOST, HOST:PORT or [IPV6]:PORT, with a port from 0 to 65535"
    if not isinstance(given, str):
        raise ValueError(expected)  # noqa: TRY004 - resolve() turns it into InvalidArgument
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\s\[\]]+))(?::(\d{1,5}))?", given.strip())
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError(expected)
    host = f"[{match[1]}]" if match[1] else match[2]
    return f"{host}:{int(match[3] or 0)}"


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "transports",
        "ANYFABRIC_TRANSPORTS",
        TRANSPORTS,
        "Transports to consider; every pair of engines uses the fastest that both have",
        _transports,
    ),
    Setting(
        "require",
        "ANYFABRIC_REQUIRE",
        None,
        "The only transport to use; a peer that it does not reach is refused",
        _choice(*TRANSPORTS),
    ),
    Setting(
        "secret",
        "ANYFABRIC_SECRET",
        None,
        "Cluster secret that both sides of a connection must prove",
        _secret,
        secret=True,
    ),
    Setting(
        "listen",
        "ANYFABRIC_LISTEN",
        "127.0.0.1:0",
        "Where the control listener binds; port 0 lets the kernel choose",
        _listen,
    ),
    Setting(
        "devices",
        "ANYFABRIC_DEVICES",
        None,
        "Devices near which NICs are taken: cuda:0, gpu:0000:53:00.0, cpu:0; else the host memory here",
        _names,
    ),
    Setting(
        "nics",
        "ANYFABRIC_NICS",
        None,
        "1 to 8 NICs to use, as mlx5_0; without it those near the devices",
        _names,
    ),
    Setting(
        "nics_per_device",
        "ANYFABRIC_NICS_PER_DEVICE",
        None,
        "NICs to take for each device, at most 8 in all; without it those nearest, divided among equal GPUs",
        _integer(1, _core.MAX_NICS),
    ),
    Setting(
        "pin_worker",
        "ANYFABRIC_PIN_WORKER",
        True,  # noqa: FBT003 - a value like the others
        "Whether the worker stays on cores near the NICs, once it has some",
        _flag,
    ),
    Setting(
        "gid_index",
        "ANYFABRIC_GID_INDEX",
        None,
        "Index in a port's GID table, instead of the one that most networks route",
        _integer(0, 255),
    ),
    Setting(
        "traffic_class",
        "ANYFABRIC_TRAFFIC_CLASS",
        0,
        "Traffic class of verbs; on RoCE four times the DSCP",
        _integer(0, 255),
    ),
    Setting(
        "service_level",
        "ANYFABRIC_SERVICE_LEVEL",
        0,
        "Service level of verbs",
        _integer(0, 15),
    ),
    Setting(
        "pkey_index",
        "ANYFABRIC_PKEY_INDEX",
        0,
        "Index in a port's table of partition keys",
        _integer(0, 65535),
    ),
    Setting(
        "ack_timeout",
        "ANYFABRIC_ACK_TIMEOUT",
        16,
        "Verbs sends an unanswered packet again after 4.096 us times 2 to this power",
        _integer(1, 31),
    ),
    Setting(
        "retry_count",
        "ANYFABRIC_RETRY_COUNT",
        6,
        "Times that verbs sends an unanswered packet again",
        _integer(0, 7),
    ),
    Setting(
        "rnr_retry",
        "ANYFABRIC_RNR_RETRY",
        6,
        "Times that verbs asks again when a peer takes no more arrivals",
        _integer(0, 6),
    ),
    Setting(
        "rnr_timer",
        "ANYFABRIC_RNR_TIMER",
        26,
        "How long a verbs peer that takes no more arrivals asks to be left alone, as InfiniBand encodes it",
        _integer(0, 31),
    ),
    Setting(
        "relaxed_ordering",
        "ANYFABRIC_RELAXED_ORDERING",
        True,  # noqa: FBT003 - a value like the others
        "Whether a NIC's writes to memory may pass one another on the bus, where NIC and library know how",
        _flag,
    ),
    Setting(
        "verbs_library",
        "ANYFABRIC_VERBS_LIBRARY",
        None,
        "Path of libibverbs, instead of the one that the system finds",
        _path,
    ),
    Setting(
        "libfabric_provider",
        "ANYFABRIC_LIBFABRIC_PROVIDER",
        None,
        "The only provider of libfabric to use, which may be software, as tcp; without it hardware",
        _path,
    ),
    Setting(
        "libfabric_library",
        "ANYFABRIC_LIBFABRIC_LIBRARY",
        None,
        "Path of libfabric, instead of the one that is loaded or installed",
        _path,
    ),
    Setting(
        "libfabric_answer_timeout_s",
        "ANYFABRIC_LIBFABRIC_ANSWER_TIMEOUT_S",
        5.0,
        "Seconds after which a rail of libfabric is given up on which nothing completes, though it should",
        _seconds(0.01, 3600.0),
    ),
    Setting(
        "libfabric_max_endpoints",
        "ANYFABRIC_LIBFABRIC_MAX_ENDPOINTS",
        256,
        "Endpoints of a libfabric NIC; peers beyond that share them, and break together",
        _integer(1, 4096),
    ),
    Setting(
        "cuda_library",
        "ANYFABRIC_CUDA_LIBRARY",
        None,
        "Path of libcuda, instead of the driver's own; opened when GPU memory is first registered",
        _path,
    ),
    Setting(
        "tcp_streams",
        "ANYFABRIC_TCP_STREAMS",
        2,
        "Data streams for each tcp peer, which count as its NICs",
        _integer(1, 4),
    ),
    Setting(
        "polling",
        "ANYFABRIC_POLLING",
        "adaptive",
        "How threads wait: adaptive spins briefly and then blocks, busy never blocks",
        _choice("adaptive", "busy"),
    ),
    Setting(
        "isolate",
        "ANYFABRIC_ISOLATE",
        False,  # noqa: FBT003 - a value like the others
        "Neither use nor allow process_vm_writev into memory that the engine did not allocate",
        _flag,
    ),
    Setting(
        "heartbeat_s",
        "ANYFABRIC_HEARTBEAT_S",
        1.0,
        "Seconds between heartbeats to a peer that is silent otherwise",
        _seconds(0.01, 3600.0),
    ),
    Setting(
        "heartbeats_lost",
        "ANYFABRIC_HEARTBEATS_LOST",
        3,
        "Heartbeats missed in a row after which a peer is lost",
        _integer(1, 1000),
    ),
    Setting(
        "timeout_s",
        "ANYFABRIC_TIMEOUT_S",
        30.0,
        "Deadline in seconds of a submission that does not name one",
        _seconds(0.001, 86400.0),
    ),
    Setting(
        "queue_depth",
        "ANYFABRIC_QUEUE_DEPTH",
        1024,
        "Operations under way at most; a connect counts as none",
        _integer(1, 1 << 20),
    ),
    Setting(
        "queue_full",
        "ANYFABRIC_QUEUE_FULL",
        "block",
        "What a submission to a full queue does: block until its deadline, or raise QueueFull",
        _choice("block", "raise"),
    ),
    Setting(
        "max_message_bytes",
        "ANYFABRIC_MAX_MESSAGE_BYTES",
        65536,
        "Largest message that send takes",
        _bytes_size(0, 1 << 20),
    ),
)
"""Every setting, in the order in which `anyfabric info` lists them."""

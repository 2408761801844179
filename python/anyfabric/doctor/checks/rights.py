"""What the process may do: lock memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, broken, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System

__all__ = ["RIGHTS_CHECKS"]

MIB = 1 << 20
# Queues and a staging buffer fit; a KV cache does not.
LEAST_BYTES = 64 * MIB

MEND = (
    "for this shell, as root: ulimit -l unlimited; for good: '* - memlock unlimited' in "
    "/etc/security/limits.d/rdma.conf and a new login; in a systemd unit: LimitMEMLOCK=infinity; "
    "in Docker: --ulimit memlock=-1"
)


def locked_memory(system: System) -> Iterator[Finding]:
    """Whether memory can be registered."""
    if not system.names("sys/class/infiniband"):
        return
    limit = system.locked_memory_limit
    if "Max locked memory" not in system.text(f"proc/{system.process}/limits"):
        yield note("", "the limit cannot be read")
    elif limit is None:
        yield ok("", "no limit")
    elif system.may_lock_memory:
        yield ok("", f"{_size(limit)}, which does not hold for this process: it has CAP_IPC_LOCK")
    elif limit < LEAST_BYTES:
        yield broken("", f"{_size(limit)}: no region larger than that can be registered", MEND)
    else:
        memory = re.search(r"^MemTotal:\s+(\d+) kB", system.text("proc/meminfo"), re.MULTILINE)
        if memory and limit < int(memory.group(1)) * 1024 // 2:
            yield warning("", f"{_size(limit)} of {_size(int(memory.group(1)) * 1024)} of memory", MEND)
        else:
            yield ok("", _size(limit))


def _size(nbytes: int) -> str:
    return f"{nbytes >> 30} GiB" if nbytes >= 1 << 30 else f"{nbytes / MIB:g} MiB"


RIGHTS_CHECKS = (
    Check(
        "locked-memory",
        "The limit of memory that the process may lock, and CAP_IPC_LOCK.",
        "A NIC reads and writes physical memory, so a registered region is locked; beyond the limit "
        "registration fails. The usual default is 8 MiB.",
        locked_memory,
    ),
)

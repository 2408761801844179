"""Every check, in the order in which one would look: kernel, rights, libraries, ports, bus, GPUs.

Each file holds checks of one kind. To add one, write a generator over a `System`, describe it as a `Check` in
its file, and test it with a machine that is well and one that is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfabric.doctor.checks.bus import BUS_CHECKS
from anyfabric.doctor.checks.gpus import GPU_CHECKS
from anyfabric.doctor.checks.kernel import KERNEL_CHECKS
from anyfabric.doctor.checks.libraries import LIBRARY_CHECKS
from anyfabric.doctor.checks.ports import PORT_CHECKS
from anyfabric.doctor.checks.rights import RIGHTS_CHECKS

if TYPE_CHECKING:
    from anyfabric.doctor.finding import Check

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (
    *KERNEL_CHECKS,
    *RIGHTS_CHECKS,
    *LIBRARY_CHECKS,
    *PORT_CHECKS,
    *BUS_CHECKS,
    *GPU_CHECKS,
)

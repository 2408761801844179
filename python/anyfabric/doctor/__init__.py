"""What makes RDMA fail in practice, and how to mend it: `anyfabric doctor`.

`diagnose` asks checks about a `System`: this machine, or one in a folder. `CHECKS` only look; `TRIALS` write
from engine to engine in this process; `pair_check` does so with a partner on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anyfabric.doctor.checks import CHECKS
from anyfabric.doctor.finding import Check, Finding, Level
from anyfabric.doctor.pair import Partner, pair_check
from anyfabric.doctor.system import System
from anyfabric.doctor.trial import TRIALS

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CHECKS",
    "TRIALS",
    "Check",
    "Diagnosis",
    "Finding",
    "Level",
    "Partner",
    "System",
    "diagnose",
    "pair_check",
]

NO_NIC = "no RDMA NIC: shm and tcp are used"

# Checks of what an engine needs without RDMA too, or that heed the settings themselves.
NOT_RDMA = {"kernel", "write", "pair"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every finding with its check.

    Attributes:
        has_nic: Whether the machine has an RDMA device, or a card that could be one.
        findings: In the order of the checks.
    """

    has_nic: bool
    findings: tuple[tuple[Check, Finding], ...]

    @property
    def is_broken(self) -> bool:
        """Whether something that is needed does not work."""
        return any(finding.level == "broken" for _, finding in self.findings)

    @property
    def summary(self) -> str:
        """One line."""
        levels = [finding.level for _, finding in self.findings]
        is_software = any(finding.subject == "libfabric" for _, finding in self.findings)
        if not self.has_nic and not self.is_broken and not is_software:
            return NO_NIC
        bad, doubtful = levels.count("broken"), levels.count("warning")
        if bad or doubtful:
            return f"{bad} broken, {doubtful} that work badly"
        return "everything that was looked at is well"


def diagnose(system: System, checks: Iterable[Check] = CHECKS) -> Diagnosis:
    """Run the checks, in their order."""
    findings = tuple(
        (check, _weighed(system, check, finding)) for check in checks for finding in check.run(system)
    )
    has_nic = bool(system.topology.nics or system.has_slingshot) or any(
        check.name == "modules" and finding.level == "broken" and finding.subject
        for check, finding in findings
    )
    return Diagnosis(has_nic, findings)


def _weighed(system: System, check: Check, finding: Finding) -> Finding:
    """A finding, which is no fault of what the settings leave out: RDMA."""
    if finding.level in {"ok", "note"} or check.name in NOT_RDMA or system.may_use("verbs", "libfabric"):
        return finding
    return replace(finding, level="note")

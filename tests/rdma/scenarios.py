"""The scenarios of `make test-rdma`: how the NICs are used, and what happens to them meanwhile.

Each runs in a virtual machine of its own, made afresh by `guest/nics`: what one does to a link concerns no
other. Together they take less than 5 minutes on 2 cores; those that are `long` run when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SCENARIOS", "Scenario", "Tests"]

# Two NICs of ours, two of the peer's; the peer takes them from the end.
TWO_EACH = "rxe1,rxe2,rxe3,rxe4"
BAD_CABLES = "\n".join(f"tc qdisc add dev nic{n} root netem delay 1ms loss 1%" for n in (1, 2, 3, 4))


@dataclass(frozen=True)
class Tests:
    """Some tests of one Rust program.

    Attributes:
        program: `"nic"`, the verbs NIC alone, or `"engine"`, the conformance suite.
        nics: Both ends, as `ANYFABRIC_TEST_NICS`.
        names: Regular expression that a whole test name must match.
        environment: For these tests alone.
    """

    program: str
    nics: str
    names: str = ".*"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """One way to run.

    Attributes:
        name: For `-k` and for the summary.
        about: One line for the summary.
        smoke: Arguments for `smoke`, which shows that the bed itself works; one run each.
        tests: What runs then.
        setup: Shell lines for the guest, after `guest/nics`.
        is_long: Whether it runs only when `-k` names it.
        deadline_s: For the whole; many times what it takes on a busy machine.
    """

    name: str
    about: str
    smoke: tuple[str, ...]
    tests: tuple[Tests, ...] = ()
    setup: str = ""
    is_long: bool = False
    deadline_s: float = 300


SCENARIOS = (
    Scenario("one-nic", "both ends on one NIC", ("rxe0 rxe0", "rxe1 rxe1"), (Tests("nic", "rxe0,rxe0"),)),
    Scenario(
        "cable", "a NIC at each end of a cable", ("rxe1 rxe4", "rxe4 rxe1"), (Tests("nic", "rxe1,rxe4"),)
    ),
    Scenario(
        "bad-cable",
        "delay of 1 ms and loss of 1 %, both ways",
        ("rxe1 rxe4",),
        (Tests("nic", "rxe1,rxe4"),),
        setup=BAD_CABLES,
    ),
    Scenario("flap", "a link goes down and up in the middle", ("rxe1 rxe4 port4", "rxe1 rxe4 port1")),
)

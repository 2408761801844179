"""The scenarios of `make test-rdma`: how the NICs are used, and what happens to them meanwhile.

Each runs in a virtual machine of its own, made afresh by `guest/nics`: what one does to a link concerns no
other.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCENARIOS", "Scenario"]

BAD_CABLE = """
tc qdisc add dev nic1 root netem delay 1ms loss 1%
tc qdisc add dev nic2 root netem delay 1ms loss 1%
"""


@dataclass(frozen=True)
class Scenario:
    """One way to run.

    Attributes:
        name: For `-k` and for the summary.
        about: One line for the summary.
        smoke: Arguments for `smoke`, which shows that the bed itself works, of one run each.
        nics: The ends for the Rust tests, as in `ANYFABRIC_TEST_NICS`; one run each.
        setup: Shell lines for the guest, after `guest/nics`.
        deadline_s: For the whole; many times what it takes on a busy machine.
    """

    name: str
    about: str
    smoke: tuple[str, ...]
    nics: tuple[str, ...] = ()
    setup: str = ""
    deadline_s: float = 240


SCENARIOS = (
    Scenario("one-nic", "both ends on one NIC", ("rxe0 rxe0", "rxe1 rxe1"), nics=("rxe0,rxe0",)),
    Scenario("cable", "a NIC at each end of a cable", ("rxe1 rxe2", "rxe2 rxe1"), nics=("rxe1,rxe2",)),
    Scenario(
        "bad-cable",
        "delay of 1 ms and loss of 1 %, both ways",
        ("rxe1 rxe2",),
        nics=("rxe1,rxe2",),
        setup=BAD_CABLE,
    ),
    Scenario("flap", "a link goes down and up in the middle", ("rxe1 rxe2 port2", "rxe1 rxe2 port1")),
)

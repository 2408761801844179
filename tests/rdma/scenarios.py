"""The scenarios of `make test-rdma`: how the NICs are used, and what happens to them meanwhile.

Each runs in a virtual machine of its own, made afresh by `guest/nics`: what one does to a link concerns no
other. Those that are `long` run when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SCENARIOS", "Scenario", "Tests"]

# Two NICs of ours, two of the peer's; the peer takes them from the end.
TWO_EACH = "rxe1,rxe2,rxe3,rxe4"
FOUR_EACH = "rxe1,rxe2,rxe3,rxe4,rxe5,rxe6,rxe7,rxe8"
ENDS = "death|fencing::revoked"
# A selection: over a bad cable everything takes its time.
LIGHT = "counts|visibility::each_imm|barrier::messages"
# Links that between them are under every rail, at either end.
STORMS = (("2", "port1,port7"), ("4_2", "port8,port2,port4"), ("1_3", "port6,port7,port8"))


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
        commands: Shell lines that must succeed at the end, with `anyfabric` on the path.
        setup: Shell lines for the guest, after `guest/nics`.
        is_long: Whether it runs only when `-k` names it.
        deadline_s: For the whole; many times what it takes on a busy machine.
    """

    name: str
    about: str
    smoke: tuple[str, ...]
    tests: tuple[Tests, ...] = ()
    commands: tuple[str, ...] = ()
    setup: str = ""
    is_long: bool = False
    deadline_s: float = 600


def netem(what: str) -> str:
    """Shell lines that make every cable bad, both ways."""
    return "\n".join(f"tc qdisc add dev nic{n} root netem {what}" for n in range(1, 9))


def bad_cable(name: str, what: str) -> Scenario:
    """A long scenario on cables that are much worse than any in use."""
    # Soft-RoCE acknowledges every 64th packet, and takes a refusal of one in between for no progress: six
    # tries in a row fail now and then. With 7 it never gives up; storms need it to.
    light = Tests("engine", TWO_EACH, rf"({LIGHT}).*::verbs_(2|1_2)", {"ANYFABRIC_TEST_RETRIES": "7"})
    return Scenario(name, what, ("rxe1 rxe4",), (light, *storms(3)), setup=netem(what), is_long=True)


def storms(num_rounds: int) -> tuple[Tests, ...]:
    """All links of two peers go down and come back, some of them or all: each time alone in its machine."""
    return tuple(
        Tests(
            "engine",
            FOUR_EACH,
            f"storm::storm::verbs_{fabric}",
            {"ANYFABRIC_TEST_LINKS": links, "ANYFABRIC_TEST_ROUNDS": str(num_rounds)},
        )
        for fabric, links in STORMS
    )


SCENARIOS = (
    Scenario(
        "one-nic",
        "both ends on one NIC",
        ("rxe0 rxe0", "rxe1 rxe1"),
        (Tests("nic", "rxe0,rxe0"), Tests("engine", "rxe0", r"(counts|barrier).*::verbs_1")),
        ("anyfabric perf --transport verbs --nics rxe1 --op write --sizes 8,64K --rounds 20",),
    ),
    Scenario(
        "cable",
        "a NIC at each end of a cable",
        ("rxe1 rxe4", "rxe4 rxe1"),
        (Tests("nic", "rxe1,rxe4"), Tests("engine", "rxe1,rxe4", rf"({ENDS}|midst::overrun).*::verbs_1")),
    ),
    Scenario(
        "two-nics",
        "two NICs at each end, or one and two: all but links, midst and storm",
        ("rxe2 rxe3",),
        (
            Tests("engine", TWO_EACH, r"(?!links|midst|storm).*::verbs_(2|1_2|2_1)"),
            Tests("engine", TWO_EACH, "links::many_pages::.*", {"ANYFABRIC_TEST_PAGES": "20000"}),
        ),
    ),
    Scenario(
        "bad-cable",
        "delay of 1 ms and loss of 0.2 %, both ways",
        ("rxe1 rxe4",),
        (Tests("nic", "rxe1,rxe4"), Tests("engine", TWO_EACH, rf"({LIGHT}).*::verbs_(2|1_2)")),
        setup=netem("delay 1ms loss 0.2%"),
    ),
    Scenario(
        "flap",
        "a link of two goes down and up in the middle, ten times",
        ("rxe1 rxe4 port4", "rxe1 rxe4 port1"),
        (Tests("engine", TWO_EACH, "links::flaps::.*", {"ANYFABRIC_TEST_LINK": "port4"}),),
    ),
    Scenario(
        "storm",
        "links of two to four NICs go down and up, some or all, under every kind of operation",
        ("rxe2 rxe7 port2",),
        (Tests("engine", FOUR_EACH, r"counts::uneven::write.*::verbs_(1_3|3_4|4_2)"), *storms(2)),
    ),
    Scenario(
        "tools",
        "doctor and perf as people type them, also against another engine and with a link down",
        ("rxe1 rxe4",),
        commands=("sh tests/rdma/guest/tools",),
        is_long=True,
    ),
    Scenario(
        "many-counts",
        "one to four NICs against other numbers; peers killed, stopped and overrun in the midst",
        ("rxe5 rxe8",),
        (
            Tests("engine", FOUR_EACH, r"counts::uneven::.*::verbs_(1_3|3_2|3_4|4_2)"),
            Tests("engine", FOUR_EACH, r"(fencing::uneven|midst).*::verbs_(1|2|1_3|4_2)"),
        ),
        is_long=True,
    ),
    Scenario(
        "many-nics",
        "eight NICs against eight and three",
        ("rxe1 rxe8",),
        (Tests("engine", FOUR_EACH, r"counts::uneven::.*::verbs_(8|8_3)"),),
        is_long=True,
    ),
    Scenario(
        "many-storms",
        "as storm, twenty times",
        ("rxe2 rxe7",),
        storms(20),
        is_long=True,
    ),
    bad_cable("losing", "delay 1ms loss 3%"),
    bad_cable("reordering", "delay 1ms reorder 1%"),
    bad_cable("doubling", "delay 1ms duplicate 5%"),
    Scenario(
        "many-flaps",
        "as flap, fifty times",
        ("rxe1 rxe4",),
        (
            Tests(
                "engine",
                TWO_EACH,
                "links::flaps::.*",
                {"ANYFABRIC_TEST_LINK": "port4", "ANYFABRIC_TEST_FLAPS": "50"},
            ),
        ),
        is_long=True,
    ),
    Scenario(
        "many-pages",
        "a million pages over two NICs in four runs, each and its count checked",
        ("rxe1 rxe4",),
        4 * (Tests("engine", TWO_EACH, "links::many_pages::.*", {"ANYFABRIC_TEST_PAGES": "250000"}),),
        is_long=True,
    ),
)

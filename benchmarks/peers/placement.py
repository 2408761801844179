"""How far apart two processes run at the moment: on a virtual machine the host moves its cores.

While the cores share no cache a bounce takes three times as long, and most transfers move half as much.
"""

from __future__ import annotations

import statistics

from benchmarks.peers.contenders import REPOSITORY, RING, UnavailableError
from benchmarks.peers.pair import Pair, PairError
from benchmarks.peers.workload import Load, Operation, Shape

_DATA_BYTES = 1 << 16
_BOUNCES = Load(Shape(Operation.NOTIFY, 8, 1, _DATA_BYTES), num_calls=5000, num_warmup=200, seed=1)


def ring_ns() -> int:
    """Return half a round trip through a bare ring, in nanoseconds; 0 where nothing can be compiled."""
    try:
        with Pair(RING.command(), RING.env, REPOSITORY, _DATA_BYTES) as pair:
            return round(statistics.median(pair.measure(_BOUNCES).durations_ns))
    except (UnavailableError, PairError):
        return 0

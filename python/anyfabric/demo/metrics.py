"""What is computed from the time stamps; all are `time.monotonic_ns`, one clock for a whole host."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Interval", "LayerTimes", "StreamTimes", "gb_per_s", "union_ns"]

Interval = tuple[int, int]


def union_ns(intervals: Iterable[Interval]) -> int:
    """Measure the time in which at least one of the intervals was open."""
    total, open_until = 0, None
    for begin, end in sorted(intervals):
        if open_until is None or begin > open_until:
            total += end - begin
            open_until = end
        elif end > open_until:
            total += end - open_until
            open_until = end
    return total


def gb_per_s(nbytes: int, elapsed_ns: int) -> float:
    """Bytes over nanoseconds, in GB/s; 0 when nothing was moved."""
    return nbytes / elapsed_ns if elapsed_ns > 0 and nbytes else 0.0


@dataclass(frozen=True)
class LayerTimes:
    """One layer of one chunk: when it ran, when its keys and values were there, when they moved."""

    layer_idx: int
    compute: Interval
    ready_ns: int
    transfer: Interval


@dataclass(frozen=True)
class StreamTimes:
    """One streamed hand-over.

    `layers` come from the prefill process, `begin_ns`, `reached_ns` and `first_token_ns` from the
    decode process.
    """

    begin_ns: int
    reached_ns: int
    first_token_ns: int
    layers: tuple[LayerTimes, ...]

    @property
    def ttft_ms(self) -> float:
        """From before the request was made until the first new token was known."""
        return (self.first_token_ns - self.begin_ns) / 1e6

    @property
    def transfer_ns(self) -> int:
        """The union of the transfers of all layers."""
        return union_ns(layer.transfer for layer in self.layers)

    @property
    def exposed_ns(self) -> int:
        """What the decoder waited for after the last layer's keys and values were there."""
        ready = max((layer.ready_ns for layer in self.layers), default=self.reached_ns)
        return max(0, self.reached_ns - ready)

    @property
    def hidden_share(self) -> float:
        """The part of the transfer that ran while the prefiller still computed.

        `1 - (count reached - last layer done) / union of the transfers`. A layer is done here when
        its keys and values are staged and its writes are released: the earliest and least
        flattering moment. It is negative when noticing the count took longer than all transfers.
        """
        union = self.transfer_ns
        return 1.0 - self.exposed_ns / union if union else 0.0

    def to_json(self) -> list[dict[str, object]]:
        """Describe the layers, times in milliseconds since the request."""

        def since(interval: Interval) -> list[float]:
            return [round((at - self.begin_ns) / 1e6, 4) for at in interval]

        return [
            {
                **asdict(layer),
                "compute": since(layer.compute),
                "ready_ns": layer.ready_ns - self.begin_ns,
                "transfer": since(layer.transfer),
            }
            for layer in self.layers
        ]

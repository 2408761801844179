"""Which way to a peer: the answer of `Engine.path`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Path"]


@dataclass(frozen=True, slots=True)
class Path:
    """How this engine reaches a peer.

    Attributes:
        transport: Name of the transport, such as `"shm"`; `"none"` when there is no path yet.
        nics: What carries the bytes and how, for people, as one entry: `"2 streams"`, or `"2 of 2 rails over
            mlx5_0 (RoCE v2, GID 3), mlx5_1 (RoCE v2, GID 3)"`; empty when there is no path yet.
        state: `"new"`, `"connecting"`, `"ready"`, `"degraded"` (some NICs are down, or nothing serves
            just now) or `"lost"`.
        reason: Why each faster transport is not used; empty for the fastest one.
    """

    transport: str
    nics: tuple[str, ...]
    state: str
    reason: str

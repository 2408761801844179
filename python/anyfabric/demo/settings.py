"""What the command tells both processes, and the engine that each of them opens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyfabric as af

if TYPE_CHECKING:
    from anyfabric.demo.processes import Event

__all__ = ["NO_PAGE", "PAGE_TOKENS", "SOME_PAGE", "Settings", "open_engine"]

PAGE_TOKENS = 16
NO_PAGE = -1
SOME_PAGE = -2


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        model: Directory of the checkpoint.
        prompts: Texts.
        transport: `"shm"`, `"tcp"`, or `None` for the best that both have.
        new_tokens: How many tokens to decode.
        chunk_tokens: Tokens of one forward pass of the prefill.
        rounds: Timed rounds of each prompt, after one that is checked and not timed.
        timeout_s: Deadline of every single wait for the other process.
        baselines: Also move the cache through gloo.
        corrupt_page: Control: page of the first prompt to spoil, NO_PAGE, or SOME_PAGE for one in the middle.
        drop_page: Control: page of the first prompt to leave out, likewise.
    """

    model: Path
    prompts: list[str]
    transport: str | None
    new_tokens: int
    chunk_tokens: int
    rounds: int
    timeout_s: float
    baselines: bool
    corrupt_page: int
    drop_page: int

    @property
    def silence_s(self) -> float:
        """Longest time in which a live process may have nothing to say: loading, decoding."""
        return 120.0 + 4 * self.timeout_s

    def to_json(self) -> Event:
        """Make what `from_json` reads."""
        return {**asdict(self), "model": str(self.model)}

    @classmethod
    def from_json(cls, values: Event) -> Settings:
        """Read what `to_json` made."""
        arguments: Event = {**values, "model": Path(values["model"])}
        return cls(**arguments)


def open_engine(settings: Settings) -> af.Engine:
    """Open an engine for the chosen transport, and refuse any other."""
    if settings.transport is None:
        return af.Engine(timeout_s=settings.timeout_s)
    return af.Engine(
        transports=(settings.transport,), require=settings.transport, timeout_s=settings.timeout_s
    )

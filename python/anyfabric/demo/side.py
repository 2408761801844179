"""What the two processes have in common: settings, a model, an engine, and a mailbox for the other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import anyfabric as af
from anyfabric.demo.llm import Llm
from anyfabric.demo.messages import Mailbox
from anyfabric.demo.settings import Settings, open_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.demo.processes import Console, Event

__all__ = ["Side", "open_side"]


class Side(NamedTuple):
    """One of the two processes, connected to the other."""

    settings: Settings
    llm: Llm
    engine: af.Engine
    peer: af.Address
    mailbox: Mailbox


@contextlib.contextmanager
def open_side(console: Console, config: Event) -> Iterator[Side]:
    """Load the model, tell the command where the engine is, and connect to the other process."""
    settings = Settings.from_json(config)
    llm = Llm(settings.model)
    with open_engine(settings) as engine:
        console.write("ready", address=str(engine.address))
        peer = af.Address.parse(console.read(timeout_s=settings.silence_s)["peer"])
        engine.connect(peer, timeout_s=settings.timeout_s)
        mailbox = Mailbox(engine, peer, timeout_s=settings.timeout_s)
        yield Side(settings, llm, engine, peer, mailbox)
        mailbox.close()

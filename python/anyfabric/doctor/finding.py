"""What a check finds, and what a check is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyfabric.doctor.system import System

__all__ = ["Check", "Finding", "Level", "broken", "note", "ok", "warning"]

# ok: as it should be. note: worth knowing. warning: works, slowly or not for everything. broken: RDMA, which
# this machine has or was asked for, does not work.
Level = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        level: How bad it is.
        subject: What it is about: a NIC, a GPU, a library; empty for the machine.
        found: What there is, in a sentence.
        mend: What to type or change; empty where nothing needs to be.
    """

    level: Level
    subject: str
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a machine.

    Attributes:
        name: Short, for tables and JSON.
        looks_at: What it examines, as a sentence.
        why: Why it matters.
        run: Examines a system; finds nothing where the question does not arise.
    """

    name: str
    looks_at: str
    why: str
    run: Callable[[System], Iterator[Finding]]


def ok(subject: str, found: str) -> Finding:
    """As it should be."""
    return Finding("ok", subject, found)


def note(subject: str, found: str, mend: str = "") -> Finding:
    """Worth knowing."""
    return Finding("note", subject, found, mend)


def warning(subject: str, found: str, mend: str) -> Finding:
    """Works, slowly or not for everything."""
    return Finding("warning", subject, found, mend)


def broken(subject: str, found: str, mend: str) -> Finding:
    """Does not work."""
    return Finding("broken", subject, found, mend)

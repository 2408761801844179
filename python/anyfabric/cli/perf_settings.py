"""Settings of the engines of `anyfabric perf`, from its command line, and the transports they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

import anyfabric as af
from anyfabric.config import SETTINGS, TRANSPORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["OVER_NICS", "Settings", "settings_of", "settings_options", "transports_here", "transports_to"]

Settings = dict[str, Any]
"""Text by name of the setting, as a variable of the environment would hold it."""

Function = TypeVar("Function", bound="Callable[..., Any]")

OVER_NICS = ("verbs", "libfabric")
"""Transports that a machine may not have."""

ELSEWHERE = {
    "transports": "--transport",
    "require": "--transport",
    "polling": "--polling",
    "listen": "--listen",
    "nics": "--nics",
    "secret": "ANYFABRIC_SECRET",
}
"""Settings that are given in another way: the command sets them itself, or nobody else should see them."""


def settings_options(function: Function) -> Function:
    """Add `--nics` and `--set`; `settings_of` reads their parameters."""
    nics = click.option(
        "--nics", metavar="NAME[,NAME]", help="NICs of the engines here; default: as `anyfabric info` says."
    )
    others = click.option(
        "--set",
        "assignments",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_assignments,
        help="Another setting of the engines here, of those that `anyfabric info` lists; may be repeated.",
    )
    return nics(others(function))


def settings_of(options: Mapping[str, Any]) -> Settings:
    """What `settings_options` was given; whether the values can be used is the engine's to say."""
    nics = {} if options["nics"] is None else {"nics": options["nics"]}
    return {**dict(options["assignments"]), **nics}


def transports_here(settings: Settings) -> tuple[str, ...]:
    """Transports that two engines of these settings may use on this machine, fastest first."""
    with af.Engine(**settings) as engine:
        found = {entry["name"] for entry in engine.info()["transports"] if entry["available"]}
    return tuple(
        name for name in TRANSPORTS if name in found and (name not in OVER_NICS or _opens(name, settings))
    )


def transports_to(address: str, settings: Settings) -> tuple[str, ...]:
    """The transport that an engine of these settings uses to a peer, and tcp beside it."""
    peer = af.Address.parse(address)
    with af.Engine(**settings) as engine:
        engine.connect(peer)
        found = engine.path(peer).transport
    return tuple(dict.fromkeys((found, "tcp")))


def _opens(transport: str, settings: Settings) -> bool:
    """Whether there is a NIC of that transport; only opening one tells."""
    alone: Settings = {**settings, "transports": transport}
    try:
        af.Engine(**alone).close()
    except af.Unsupported:
        return False
    return True


def _assignments(
    _context: click.Context, _option: click.Parameter, texts: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Split each at the first equals sign."""
    found: list[tuple[str, str]] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            msg = f"{text!r}: expected NAME=VALUE, such as queue_depth=64"
        elif name in ELSEWHERE:
            msg = f"{name} is given by {ELSEWHERE[name]}"
        elif name not in {setting.name for setting in SETTINGS}:
            msg = f"no setting is called {name!r}; `anyfabric info` lists them"
        else:
            found.append((name, value))
            continue
        raise click.BadParameter(msg)
    return found

"""`anyfabric info`: what an engine started here would have, and every setting with its origin."""

from __future__ import annotations

from typing import Any, cast

import click
from rich.markup import escape
from rich.table import Table

import anyfabric
from anyfabric import _core
from anyfabric.cli.output import data, json_option, messages, write_json

__all__ = ["info"]


@click.command()
@json_option
def info(json_to: str | None) -> None:
    """Show devices, NICs, transports and why one is not available, and every setting.

    Starts an engine with the settings in force, asks it, and closes it.
    """
    with anyfabric.Engine() as engine:
        found = engine.info()
    found["version"] = anyfabric.__version__
    found["build"] = _core.build_info()
    if json_to is not None:
        write_json(json_to, found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    console = data()
    build = found["build"]
    described = f"{build['profile']} build for {build['target']}, wire version {build['wire_version']}"
    console.print(f"[bold]anyfabric {found['version']}[/bold]  {described}", highlight=False)
    console.print(f"address {found['address']}", highlight=False, soft_wrap=True)
    console.print(_transports(found["transports"]))
    console.print(_devices(found["devices"]))
    console.print(_settings(found["settings"]))
    for name in found["unknown_variables"]:
        messages().print(f"[yellow]{name} is set, but no setting is called so[/yellow]")


def _transports(transports: list[dict[str, Any]]) -> Table:
    table = Table(title="Transports, best first", title_justify="left")
    for column in ("transport", "available", "NICs", "why not"):
        table.add_column(column, overflow="fold")
    for transport in transports:
        nics = ", ".join(
            nic["name"] + (f" {nic['gbps']:g} Gbit/s" if nic["gbps"] else "") + f" ({nic['state']})"
            for nic in transport["nics"]
        )
        available = "[green]yes[/green]" if transport["available"] else "[red]no[/red]"
        table.add_row(transport["name"], available, nics, escape(transport["reason"] or ""))
    return table


def _devices(devices: list[dict[str, Any]]) -> Table:
    table = Table(title="Devices", title_justify="left")
    table.add_column("device")
    table.add_column("NICs", overflow="fold")
    for device in devices:
        table.add_row(device["name"], ", ".join(device["nics"]))
    return table


def _settings(settings: list[dict[str, Any]]) -> Table:
    table = Table(title="Settings", title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for row in settings:
        value: Any = row["value"]
        shown = "-" if value is None else escape(_joined(value))
        origin = row["variable"] if row["origin"] == "environment" else row["origin"]
        table.add_row(row["name"], shown, origin, f"{row['doc']} [dim]({row['variable']})[/dim]")
    return table


def _joined(value: object) -> str:
    return (
        ", ".join(str(part) for part in cast("list[object]", value))
        if isinstance(value, list)
        else str(value)
    )

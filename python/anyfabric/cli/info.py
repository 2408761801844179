"""`anyfabric info`: what an engine started here would have, the machine, every setting with its origin."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click
from rich.markup import escape
from rich.table import Table

import anyfabric
from anyfabric import _core
from anyfabric.cli.output import data, json_option, messages, write_json
from anyfabric.gpu import driver_gpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

__all__ = ["info"]

WRITES = {
    "ordered": "visible in order",
    "flushed": "flushed by the driver before each count",
    "never": "never surely visible: refused",
}


@click.command()
@json_option
def info(json_to: str | None) -> None:
    """Show transports, NICs, the machine, every setting.

    Starts an engine with the settings in force, asks it, and closes it. Says of a transport that is not
    available why not, and of a setting where its value comes from.
    """
    with anyfabric.Engine() as engine:
        found = engine.info()
    given = {row["name"]: row["value"] for row in found["settings"]}
    nics, nics_per_device = given["nics"] or (), given["nics_per_device"]
    found["topology"] = asdict(anyfabric.read_topology(nics=nics, nics_per_device=nics_per_device))
    try:
        found["gpus"], found["no_gpus"] = [asdict(gpu) for gpu in driver_gpus(given["cuda_library"])], None
    except anyfabric.Unsupported as error:
        found["no_gpus"] = str(error)
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
    console.print(_groups("This engine: its devices and what serves them", found["devices"]))
    worker = found["worker"]
    kept = f"kept on cores {_ranges(worker['cpus'])}" if worker["cpus"] else "runs on any core"
    console.print(f"Its worker {kept}: {worker['reason']}", highlight=False)
    if found["gpus"]:
        console.print(_gpus(found["gpus"]))
    _print_topology(console, found["topology"])
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


def _groups(title: str, groups: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("device", "NICs and how far", "cores near them"):
        table.add_column(column, overflow="fold")
    for group in groups:
        served = ", ".join(f"{nic['name']} ({nic['distance']})" for nic in group["nics"])
        table.add_row(group["device"], served or "-", _ranges(group["cpus"]) or "any")
    return table


def _gpus(gpus: list[dict[str, Any]]) -> Table:
    table = Table(title="GPUs", title_justify="left")
    for column in ("device", "name", "UUID", "PCI address", "NICs reach it", "dmabuf", "what NICs write is"):
        table.add_column(column, overflow="fold")
    for gpu in gpus:
        told = tuple("yes" if gpu[name] else "no" for name in ("rdma", "dmabuf"))
        table.add_row(
            *(gpu[name] for name in ("device", "name", "uuid", "pci")), *told, WRITES[gpu["writes"]]
        )
    return table


def _print_topology(console: Console, topology: dict[str, Any]) -> None:
    nics, gpus = topology["nics"], topology["gpus"]
    console.print(f"Machine: {topology['num_cores']} cores, {len(gpus)} GPUs, {len(nics)} RDMA ports")
    if not nics:
        return
    ports = Table(title="RDMA ports", title_justify="left")
    for column in ("port", "fabric", "state", "Gbit/s", "node", "PCI address", "interfaces", "passed over"):
        ports.add_column(column, overflow="fold")
    for nic in nics:
        node = "-" if nic["node"] is None else str(nic["node"])
        facts = (nic["name"], nic["fabric"], nic["state"], str(nic["gbps"]), node, nic["pci"] or "-")
        ports.add_row(*facts, ", ".join(nic["netdevs"]), nic["passed_over"] or "")
    console.print(ports)
    console.print(_groups("Every device of the machine, and what would serve it", topology["groups"]))


def _ranges(cpus: Sequence[int]) -> str:
    """`1-4,7` for `[1, 2, 3, 4, 7]`."""
    ranges: list[list[int]] = []
    for cpu in cpus:
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _settings(settings: list[dict[str, Any]]) -> Table:
    table = Table(title="Settings", title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
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

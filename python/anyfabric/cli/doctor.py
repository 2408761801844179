"""`anyfabric doctor`: what makes RDMA fail here, why it matters, and how to mend it."""

from __future__ import annotations

import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from rich.markup import escape
from rich.table import Table

import anyfabric
from anyfabric.cli.output import data, json_option, messages, write_json
from anyfabric.config import resolve
from anyfabric.doctor import CHECKS, TRIALS, Diagnosis, Partner, System, diagnose, pair_check
from anyfabric.gpu import driver_gpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyfabric.doctor import Finding, Level
    from anyfabric.gpu import DriverGpu

__all__ = ["doctor"]

COLOURS: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "red"}


@click.group(invoke_without_command=True)
@click.option(
    "--peer",
    metavar="ADDRESS",
    help="Also try every pair of NICs with the machine where `anyfabric doctor serve` printed ADDRESS.",
)
@click.option(
    "--pid", type=click.IntRange(1), metavar="PID", help="Examine limits and libraries of a running process."
)
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("/"),
    help="Examine a copy of /proc, /sys and so on below this folder.",
)
@json_option
@click.pass_context
def doctor(ctx: click.Context, peer: str | None, pid: int | None, root: Path, json_to: str | None) -> None:
    """Check what makes RDMA fail in practice, and say how to mend it.

    Looks, changes nothing, and then writes over every transport and every NIC, here and with --peer between
    two machines. Exit code 1 if something that is needed is broken; a machine without RDMA NICs is well.
    """
    if ctx.invoked_subcommand is not None:
        return
    is_here = pid is None and root == Path("/")
    if peer is not None and not is_here:
        raise click.UsageError("--peer tries this machine; it goes with neither --pid nor --root")
    process = "self" if pid is None else str(pid)
    if pid is not None and not (root / "proc" / process).exists():
        raise click.UsageError(f"--pid {pid}: there is no such process")
    trials = (*(TRIALS if is_here else ()), *((pair_check(peer),) if peer is not None else ()))
    found = diagnose(_system(root, process, ask_driver=is_here), (*CHECKS, *trials))
    if json_to is not None:
        write_json(json_to, _document(found))
    else:
        _print(found)
    sys.exit(1 if found.is_broken else 0)


@doctor.command()
@click.option("--listen", default="0.0.0.0", show_default=True, metavar="HOST[:PORT]", help="Where to bind.")  # noqa: S104 - a secret guards it
def serve(listen: str) -> None:
    """Be the partner of a doctor elsewhere.

    Prints the command to paste there. Both sides prove a secret. Without ANYFABRIC_SECRET one is made up for
    this run and printed as part of the command; it is in force until this command ends.
    """
    is_set = resolve({})["secret"].value is not None
    secret = None if is_set else secrets.token_hex(16)
    with Partner(_system(), listen=listen, secret=secret) as partner:
        given = "" if secret is None else f"ANYFABRIC_SECRET={secret} "
        hint = (
            "With the same ANYFABRIC_SECRET, run on the other host:" if is_set else "On the other host run:"
        )
        messages().print(hint, highlight=False)
        address = partner.engine.address
        data().print(f"{given}anyfabric doctor --peer {address}", highlight=False, soft_wrap=True)
        try:
            partner.serve()
        except KeyboardInterrupt:
            messages().print("stopped")


def _system(root: Path = Path("/"), process: str = "self", *, ask_driver: bool = False) -> System:
    """A machine under the settings in force."""
    settings = resolve({})
    names = {name: cast("Sequence[str]", settings[name].value or ()) for name in ("nics", "transports")}
    return System(
        root,
        process,
        required=str(settings["require"].value or ""),
        named=tuple(names["nics"]),
        enabled=tuple(names["transports"]),
        names_libfabric=any(settings[f"libfabric_{name}"].value for name in ("provider", "library")),
        gid_index=cast("int | None", settings["gid_index"].value),
        verbs_library=str(settings["verbs_library"].value or ""),
        libfabric_library=str(settings["libfabric_library"].value or ""),
        gpus=_gpus(settings["cuda_library"].value) if ask_driver else (),
    )


def _gpus(library: object) -> tuple[DriverGpu, ...]:
    try:
        return driver_gpus(None if library is None else str(library))
    except anyfabric.Unsupported:
        return ()  # the check says what the files say


def _document(found: Diagnosis) -> dict[str, object]:
    findings = [
        {"check": check.name, "why": check.why, **asdict(finding)} for check, finding in found.findings
    ]
    return {
        "version": anyfabric.__version__,
        "summary": found.summary,
        "is_broken": found.is_broken,
        "has_nic": found.has_nic,
        "findings": findings,
    }


def _print(found: Diagnosis) -> None:
    console = data()
    table = Table(title="anyfabric doctor", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for check, finding in found.findings:
        table.add_row(check.name, f"[{COLOURS[finding.level]}]{finding.level}[/]", _told(finding))
    console.print(table)
    reported: set[str] = set()
    for check, finding in found.findings:
        if finding.level in {"warning", "broken"} and check.name not in reported:
            reported.add(check.name)
            console.print(f"[bold]{check.name}[/bold]: {escape(check.why)}", highlight=False)
    console.print(f"[bold]{escape(found.summary)}[/bold]", highlight=False)


def _told(finding: Finding) -> str:
    subject = f"{finding.subject}: " if finding.subject else ""
    mend = f"\n→ {finding.mend}" if finding.mend else ""
    return escape(f"{subject}{finding.found}{mend}")

"""`anyfabric doctor`: what makes RDMA fail here, why it matters, and how to mend it."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

import anyfabric
from anyfabric.cli.output import data, json_option, write_json
from anyfabric.doctor import Diagnosis, System, diagnose

if TYPE_CHECKING:
    from anyfabric.doctor import Finding, Level

__all__ = ["doctor"]

COLOURS: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "red"}


@click.command()
@click.option("--pid", type=int, metavar="PID", help="Examine limits and libraries of a running process.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("/"),
    help="Examine a copy of /proc, /sys and so on below this folder.",
)
@json_option
def doctor(pid: int | None, root: Path, json_to: str | None) -> None:
    """Check what makes RDMA fail in practice, and say how to mend it.

    Changes nothing. Exit code 1 if something that is needed is broken; a machine without RDMA NICs is well.
    """
    process = "self" if pid is None else str(pid)
    system = System(root, process, required=os.environ.get("ANYFABRIC_REQUIRE", ""))
    found = diagnose(system)
    if json_to is not None:
        write_json(json_to, _document(found))
    else:
        _print(found)
    sys.exit(1 if found.is_broken else 0)


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

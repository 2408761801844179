"""`anyfabric perf`: how fast every transport and operation is between two processes."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import anyfabric as af
from anyfabric.cli.output import OutputFile, data, json_option, messages, printed_size, write_json
from anyfabric.cli.perf_cases import MEMORIES, OPERATIONS, Case, parse_sizes, plan
from anyfabric.cli.perf_peer import Peer
from anyfabric.cli.perf_report import document, plot, require_matplotlib, table
from anyfabric.cli.perf_run import local_link, remote_link, run_case
from anyfabric.cli.perf_settings import (
    OVER_NICS,
    settings_of,
    settings_options,
    transports_here,
    transports_to,
)
from anyfabric.config import SETTINGS, TRANSPORTS, resolve

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from anyfabric.cli.perf_run import Link
    from anyfabric.cli.perf_settings import Settings

__all__ = ["perf"]

POLLINGS = ("adaptive", "busy")
SECRET_VARIABLE = next(setting.env for setting in SETTINGS if setting.secret)


def _sizes(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Parse `8:32M`, `8:1K:2` or `8,4K,32M`."""
    try:
        return None if text is None else parse_sizes(text)
    except af.InvalidArgument as error:
        raise click.BadParameter(str(error)) from error


def _several(name: str, choices: tuple[str, ...], text: str) -> Any:
    return click.option(name, multiple=True, type=click.Choice(choices), help=f"{text}; may be repeated.")


@click.group(invoke_without_command=True)
@_several("--transport", TRANSPORTS, "Only this transport")
@_several("--op", OPERATIONS, "Only this operation")
@_several("--memory", MEMORIES, "Memory of the engines, or registered numpy arrays; default: allocated")
@_several("--polling", POLLINGS, "How both engines wait; default: adaptive")
@click.option(
    "--sizes",
    metavar="SIZES",
    callback=_sizes,
    help="A list (8,4K,32M) or a range: each size 4 times the one before (8:32M), or twice (8:1K:2).",
)
@click.option("--pages", type=click.IntRange(1, 1 << 24), help="Pages or targets of one operation.")
@click.option("--rounds", type=click.IntRange(10), help="Operations of each timed phase; default: by size.")
@click.option("--check/--no-check", default=True, help="Compare the bytes at the target; default: yes.")
@click.option("--plot", "plot_to", type=OutputFile(), help="Draw the rows: a PNG, or what the suffix says.")
@click.option("--connect", metavar="ADDRESS", help="Measure against `anyfabric perf serve` elsewhere.")
@settings_options
@json_option
@click.pass_context
def perf(ctx: click.Context, **options: Any) -> None:
    """Measure every transport and operation between two processes.

    Without arguments both processes run here, over every transport that this machine has, and a row has its
    baseline beside it where there is one. For two hosts, run `anyfabric perf serve` on one and what it prints
    on the other.
    """
    if ctx.invoked_subcommand is not None:
        return
    if options["plot_to"] is not None:
        require_matplotlib(options["plot_to"])
    settings, connect = settings_of(options), options["connect"]
    cases = plan(
        transports=options["transport"]
        or (transports_here(settings) if connect is None else transports_to(connect, settings)),
        ops=options["op"] or OPERATIONS,
        pollings=options["polling"] or POLLINGS[:1],
        memories=options["memory"] or MEMORIES[:1],
        sizes=options["sizes"],
        pages=options["pages"],
        rounds=options["rounds"],
    )
    _check_memory(cases)
    rows, baselines = _measure(cases, connect, settings, check=options["check"])
    if options["json_to"] != "-":
        found = table(rows, baselines)
        data(found).print(found)
    if options["json_to"] is not None:
        write_json(options["json_to"], document(rows, baselines, ["anyfabric", *sys.argv[1:]], settings))
    if options["plot_to"] is not None:
        plot(rows, baselines, Path(options["plot_to"]))
        messages().print(f"wrote {options['plot_to']}", highlight=False)


@perf.command()
@click.option("--listen", default="0.0.0.0", show_default=True, metavar="HOST[:PORT]", help="Where to bind.")  # noqa: S104 - a secret guards it
@click.option(
    "--polling",
    type=click.Choice(POLLINGS),
    default="adaptive",
    show_default=True,
    help="How the engine here waits.",
)
@click.option("--once", is_flag=True, help="End after the first client.")
@settings_options
@json_option
def serve(listen: str, json_to: str | None, *, once: bool, **options: Any) -> None:
    """Be the other process for a client elsewhere.

    Prints the command to paste there. Serves every transport that this machine has; the client chooses. Both
    sides prove a secret. Without ANYFABRIC_SECRET one is made up for this run and printed as part of the
    command; it is in force until this command ends.
    """
    settings: Settings = {**settings_of(options), "listen": listen, "polling": options["polling"]}
    secret = None if resolve(settings)["secret"].value else secrets.token_hex(16)
    with af.Engine(secret=secret, **settings) as engine:
        given = f"{SECRET_VARIABLE}={secret} " if secret else ""
        command = f"{given}anyfabric perf --connect {engine.address}"
        if json_to is not None:
            write_json(json_to, {"address": str(engine.address), "command": command})
        else:
            messages().print("On the other host run:" if secret else _share_secret(), highlight=False)
            data().print(command, highlight=False, soft_wrap=True)
        peer = Peer(engine, report=lambda line: messages().print(line, highlight=False, soft_wrap=True))
        try:
            peer.serve(once=once)
        except KeyboardInterrupt:
            messages().print("stopped")


def _share_secret() -> str:
    return f"With {SECRET_VARIABLE} set there as it is here, run on the other host:"


def _check_memory(cases: list[Case]) -> None:
    """Refuse what would wake the out-of-memory killer: source, target and a copy to compare."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    free_kib = next(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    largest = max(cases, key=lambda case: case.region_bytes)
    if 3 * largest.region_bytes > free_kib << 10:
        msg = (
            f"{_described(largest)}: needs {3 * largest.region_bytes / (1 << 30):.1f} GiB of memory, and "
            f"{free_kib / (1 << 20):.1f} GiB are free; ask for smaller --sizes or fewer --pages"
        )
        raise af.InvalidArgument(msg, operation="perf")


def _measure(
    cases: list[Case], connect: str | None, settings: Settings, *, check: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages(), transient=True) as progress:
        task = progress.add_task("starting", total=len(cases))
        pairs = _pairs(cases)
        for pair in pairs:
            with _link(pair[0], connect, settings, more=pair is not pairs[-1]) as link:
                for case in pair:
                    progress.update(task, description=_described(case))
                    row, beside = run_case(link, case, check=check)
                    rows.append(row)
                    baselines += beside
                    progress.advance(task)
    return rows, baselines


def _pairs(cases: list[Case]) -> list[list[Case]]:
    """Cases that the same two engines can run."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.transport, case.polling), []).append(case)
    return list(groups.values())


def _link(case: Case, connect: str | None, given: Settings, *, more: bool) -> AbstractContextManager[Link]:
    settings = {
        **given,
        "transports": [case.transport],
        "require": case.transport,
        "polling": case.polling,
    }
    if case.transport not in OVER_NICS:
        settings.pop("nics", None)
    if connect is not None:
        return remote_link(connect, settings, more=more)
    # Both processes are ours: they need a secret only if the environment has one, and find it there.
    return local_link({**settings, "listen": "127.0.0.1:0"})


def _described(case: Case) -> str:
    return f"{case.transport} {case.polling} {case.op} {printed_size(case.size_bytes)}"

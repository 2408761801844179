"""What the demo prints and writes."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from anyfabric._provenance import commit, machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from anyfabric.demo.processes import Event

__all__ = ["paint", "print_prompt", "print_summary", "printable", "to_json"]

BAR_CELLS = 26
EIGHTHS = " ▏▎▍▌▋▊▉█"
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}
# Both move the whole cache after the prefill.
BASELINE_NAMES = {"socket": "raw socket", "gloo": "gloo"}
LEGEND = (
    "GB/s: bytes over the time in which at least one layer was on its way, from its write's release to its "
    "completion; raw socket and gloo move the whole cache in one piece, after the prefill.\n"
    "hidden: 1 - (count reached - last layer done) / that time; below 0% when noticing the count took longer "
    "than all transfers, as on busy cores.\n"
)


def paint(intervals: Iterable[Sequence[float]], begin: float, end: float, cells: int) -> str:
    """Draw intervals on a line of `cells` characters that spans `begin` to `end`.

    A cell is filled to the part of its time in which something ran; what is shorter than an eighth
    of a cell still gets a thin mark.
    """
    scale = cells / (end - begin) if end > begin else 0.0
    filled = [0] * cells
    for first, last in intervals:
        low, high = (first - begin) * scale, (last - begin) * scale
        # An interval that ends where a cell begins is not in that cell.
        for cell in range(max(0, int(low)), min(cells, max(int(low) + 1, math.ceil(high)))):
            eighths = round(8 * (min(high, cell + 1) - max(low, cell)))
            filled[cell] = min(8, max(filled[cell], eighths, 1))
    return "".join(EIGHTHS[eighths] for eighths in filled)


def print_prompt(console: Console, idx: int, num_prompts: int, result: Event) -> None:
    """Print one prompt: its text, what came of it, and a bar per layer."""
    console.rule(f"prompt {idx} of {num_prompts}", align="left")
    console.print(
        Text.assemble((printable(result["prompt"]), "dim"), (printable(result["continuation"]), "bold"))
    )
    console.print()
    facts = Table.grid(padding=(0, 2))
    if result["identical"]:
        verdict = Text("identical", style="bold green")
        verdict.append(
            f": {result['new_tokens']} new tokens and {_size(result['kv_bytes'])} of KV cache",
            style="not bold default",
        )
    else:
        verdict = Text("NOT identical", style="bold red")
        tokens = "same" if result["tokens_identical"] else "different"
        reason = result["problem"] or "the same KV cache"
        verdict.append(f": {tokens} tokens; {reason}", style="not bold default")
    facts.add_row("outcome", verdict)
    facts.add_row(
        "KV cache",
        f"{_count(result['chunks'], 'chunk')}, {result['pages']} pages of {_size(result['page_bytes'])}; "
        f"{result['transfer_gb_per_s']:.2f} GB/s, {result['hidden_share']:.0%} hidden",
    )
    facts.add_row(
        "first token",
        f"{result['ttft_ms']:.2f} ms with hand-over, "
        f"{result['ttft_single_process_ms']:.2f} ms in one process",
    )
    console.print(facts)
    if result["layers"]:
        console.print(_bars(result))
    console.print()


def printable(text: str) -> str:
    """Show what is no text as such: bytes that are no UTF-8, and characters that a terminal would obey."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").translate(CONTROLS)


def _bars(result: Event) -> Table:
    """Draw when each layer was computed and when its pages moved, on one common scale."""
    layers: list[Event] = result["layers"]
    begin = min(layer["compute"][0] for layer in layers)
    end = max(result["count_reached_ms"], *(layer["compute"][1] for layer in layers))
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("compute", style="cyan", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("transfer", style="magenta", no_wrap=True)
    table.add_column("ms", justify="right")
    for layer_idx in sorted({layer["layer_idx"] for layer in layers}):
        own = [layer for layer in layers if layer["layer_idx"] == layer_idx]
        cells: list[str] = []
        for kind in ("compute", "transfer"):
            intervals: list[list[float]] = [layer[kind] for layer in own]
            cells.append(paint(intervals, begin, end, BAR_CELLS))
            cells.append(f"{sum(last - first for first, last in intervals):.2f}")
        table.add_row(str(layer_idx), *cells)
    return table


def print_summary(console: Console, report: Event) -> None:
    """Print all prompts side by side, every way of getting there, then the verdict."""
    requests: list[Event] = report["requests"]
    ways = [
        "socket",
        *(["gloo"] if report["gloo_problem"] is None and "gloo" in requests[0]["baselines"] else []),
    ]
    ours = f"anyfabric {report['transport']}"
    times = _table(
        f"time to first token, ms (medians of {_count(report['settings']['rounds'], 'round')})",
        ["prompt", "tokens", "one process", ours, *(BASELINE_NAMES[way] for way in ways)],
    )
    rates = _table(
        "transfer of the KV cache, GB/s",
        ["prompt", "size", ours, *(BASELINE_NAMES[way] for way in ways), "hidden", "identical"],
    )
    for idx, result in enumerate(requests, start=1):
        rows = [result["baselines"][way] for way in ways]
        times.add_row(
            str(idx),
            str(result["prompt_tokens"]),
            *(f"{row:.2f}" for row in (result["ttft_single_process_ms"], result["ttft_ms"])),
            *(f"{row['ttft_ms']:.2f}" for row in rows),
        )
        rates.add_row(
            str(idx),
            _size(result["kv_bytes"]),
            f"{result['transfer_gb_per_s']:.2f}",
            *(f"{row['transfer_gb_per_s']:.2f}" for row in rows),
            f"{result['hidden_share']:.0%}",
            Text("yes", style="green") if result["identical"] else Text("NO", style="bold red"),
        )
    console.print(times)
    console.print(rates)
    console.print(Text(LEGEND, style="dim"))
    if report["gloo_problem"]:
        console.print(Text(f"gloo could not be used here: {report['gloo_problem']}"))
    same = sum(result["identical"] for result in requests)
    style = "bold green" if report["all_identical"] else "bold red"
    verdict = Text(f"{same} of {_count(len(requests), 'prompt')} identical", style=style)
    detail = ", tokens and KV cache; of each prompt the decode process ran only the last token"
    console.print(verdict.append(detail, style="not bold default"))


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def to_json(results: list[Event], path: Event, pids: dict[str, int], settings: Event) -> Event:
    """Put the record of a run together, of an incomplete one too."""
    return {
        "requests": results,
        "all_identical": len(results) == len(settings["prompts"])
        and all(result["identical"] for result in results),
        "transport": path.get("transport"),
        "path_reason": path.get("reason"),
        "gloo_problem": path.get("gloo_problem"),
        "pids": pids,
        "model": {
            "directory": Path(settings["model"]).name,
            "num_layers": path.get("num_layers"),
            "page_bytes": path.get("page_bytes"),
        },
        "settings": {name: settings[name] for name in ("new_tokens", "chunk_tokens", "rounds")},
        **_provenance(),
    }


def _provenance() -> dict[str, Any]:
    """Say where a record comes from: machine, commit, versions, command."""
    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in ("anyfabric", "torch", "transformers", "numpy")}
    return {
        "machine": machine(),
        "commit": commit(),
        "versions": versions,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _size(nbytes: int) -> str:
    """Write a size in binary units."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            size = nbytes / scale
            return f"{size:.0f} {unit}" if size >= 100 or size == int(size) else f"{size:.2f} {unit}"
    return f"{nbytes} B"

"""What `anyfabric perf` shows: the table, the JSON document, the plot."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from anyfabric import _core
from anyfabric._core import __version__
from anyfabric._provenance import commit, machine
from anyfabric.cli.output import printed_size
from anyfabric.cli.perf_cases import USE_MEMORY
from anyfabric.config import resolve
from anyfabric.errors import Unsupported

__all__ = ["document", "plot", "require_matplotlib", "table"]

Row = dict[str, Any]

WIDTH_INCHES = 13
ROW_INCHES = 4
CAPTION = (
    "Latency: half a round trip until the counter has it, in microseconds. Dimmed: what the machine does "
    "without an engine, and our speed against it."
)


def document(
    rows: list[Row], baselines: list[Row], command: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The JSON document: rows, baselines, and what one needs to repeat them.

    Args:
        rows: Of `perf_run.run_case`; likewise `baselines`.
        baselines: May be empty.
        command: The command line.
        settings: Of the engines here, as the command line gives them; the environment may have more.
    """
    resolved = resolve(settings).values()
    return {
        "machine": machine(),
        "commit": commit() or f"v{__version__}",
        "command": command,
        "settings": {s.setting.name: s.shown() for s in resolved if s.origin != "default"},
        "versions": {
            "anyfabric": __version__,
            "python": platform.python_version(),
            "numpy": metadata.version("numpy"),
            **_core.build_info(),
        },
        "rows": rows,
        "baselines": baselines,
    }


def table(rows: list[Row], baselines: list[Row]) -> Table:
    """A section per pair of engines, a line per case, and dimmed below it one per baseline."""
    ways = {row["transport"]: "; ".join(row["nics"]) for row in rows}
    caption = "\n".join(["", CAPTION, *(f"{name}: {escape(nics)}." for name, nics in ways.items())])
    # Without an edge and with single spaces, because 80 columns are what a terminal has.
    found = Table(box=box.SIMPLE, caption=caption, caption_justify="left", show_edge=False, padding=0)
    # Only titles may be broken: they are wider than what they stand above.
    names = ["operation", *(row["op"] for row in rows), *(f"  {base['baseline']}" for base in baselines)]
    found.add_column("operation", min_width=max(map(len, names)))
    for column in ("size", "op/s", "GB/s", "p50 us", "p99", "p99.9", "max", "against"):
        found.add_column(column, justify="right", no_wrap=True)
    title = ""
    for row in rows:
        if _title(row) != title:
            title = _title(row)
            found.add_section()
            found.add_row(f"[bold]{title}[/bold]")
        size = printed_size(row["size_bytes"]) + (f" x {row['pages']}" if row["pages"] > 1 else "")
        found.add_row(row["op"], size, *_numbers(row))
        for base in baselines:
            if _key(base) == _key(row):
                found.add_row(f"  {base['baseline']}", "", *_numbers(base), _against(row, base), style="dim")
    for column in found.columns[1:]:
        column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    return found


def require_matplotlib(file: str) -> None:
    """Say what is missing before minutes are spent on what shall be drawn.

    Raises:
        Unsupported: matplotlib is not installed, or cannot draw such a file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        msg = "plots need matplotlib; try: pip install 'anyfabric[plot]'"
        raise Unsupported(msg, operation="plot")
    known: dict[str, str] = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.filetypes
    if _format(Path(file)) not in known:
        msg = f"cannot draw {file}: its suffix is none of {', '.join(sorted(known))}"
        raise Unsupported(msg, operation="plot")


def plot(rows: list[Row], baselines: list[Row], path: Path) -> None:
    """Draw GB/s and the median latency over the size, a line per transport and operation.

    `require_matplotlib` must have passed.
    """
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels = _panels(rows, baselines)
    figure, grid = pyplot.subplots(
        len(panels), 2, figsize=(WIDTH_INCHES, ROW_INCHES * len(panels)), layout="constrained", squeeze=False
    )
    for (title, lines), (left, right) in zip(panels.items(), grid, strict=True):
        for label, points in lines.items():
            style = {"linestyle": ":", "alpha": 0.8} if "baseline" in points[0] else {"marker": "o"}
            sizes = [max(p["size_bytes"], 1) for p in points]
            left.plot(sizes, [p["gb_per_s"] for p in points], label=label, **style)
            right.plot(sizes, [p["latency_us"]["p50"] for p in points], label=label, **style)
        for axes, unit in ((left, "GB/s"), (right, "median latency, us")):
            axes.set(yscale="log", xlabel="size in bytes", ylabel=unit, title=title)
            axes.set_xscale("log", base=2)
            axes.grid(visible=True, which="major", alpha=0.3)
        right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format=_format(path))
    pyplot.close(figure)


def _format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _panels(rows: list[Row], baselines: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Lines by pair of engines, then by what they measure, each in the order of sizes."""
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in [*rows, *baselines]:
        pages = f" x {row['pages']}" if row["pages"] > 1 else ""
        memory = f", {row['memory']}" if row["op"] in USE_MEMORY else ""
        label = f"{row.get('baseline', row['op'])}{pages}{memory}"
        panel = panels.setdefault(f"{row['transport']}, {row['polling']}", {})
        panel.setdefault(label, []).append(row)
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda p: p["size_bytes"])
    return panels


def _title(row: Row) -> str:
    memory = f", {row['memory']} memory" if row["op"] in USE_MEMORY else ""
    return f"{row['transport']}, {row['polling']}{memory}"


def _numbers(row: Row) -> list[str]:
    latency = row["latency_us"]
    return [
        _short(row["ops_per_s"]),
        _rate(row["gb_per_s"]) if row["size_bytes"] else "",
        *(_short(latency[name]) for name in ("p50", "p99", "p999", "max")),
    ]


def _rate(gb_per_s: float) -> str:
    num_digits = 3 if gb_per_s >= 0.01 else 2 if gb_per_s >= 0.001 else 1
    return f"{gb_per_s:.{num_digits}g}"


def _short(value: float) -> str:
    for least, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _against(row: Row, base: Row) -> str:
    """Our figure beside the baseline's: the difference of latencies, or the ratio of speeds."""
    if base["baseline"] == "ring":
        return f"{(row['latency_us']['p50'] - base['latency_us']['p50']) * 1e3:+.0f} ns"
    return f"{row['gb_per_s'] / base['gb_per_s']:.2f} x"


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("transport", "op", "polling", "memory", "size_bytes", "pages"))

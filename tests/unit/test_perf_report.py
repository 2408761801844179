"""The table of `anyfabric perf`: nothing that was measured is cut off."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from anyfabric.cli import output
from anyfabric.cli.perf_report import table


def row(op, size_bytes, pages, *, memory="allocated", **more):
    return {
        "transport": "shm",
        "op": op,
        "polling": "adaptive",
        "memory": memory,
        "size_bytes": size_bytes,
        "pages": pages,
        "gb_per_s": size_bytes * 1.1e-5,
        "ops_per_s": 11_100,
        "latency_us": {"p50": 23.4, "p99": 34_500, "p999": 456.1, "max": 5_670},
        "nics": ["memory"],
        **more,
    }


ROWS = [row("write", 8, 1), row("pages", 64 << 10, 4096), row("pages", 8 << 10, 4096, memory="registered")]
BASELINES = [
    row("write", 8, 1, baseline="ring"),
    row("pages", 64 << 10, 4096, baseline="copy_pages"),
    row("pages", 8 << 10, 4096, memory="registered", baseline="process_vm_writev"),
]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_every_figure_is_shown(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    found = table(ROWS, BASELINES)
    output.data(found).print(found)
    shown = output.sys.stdout.getvalue()
    assert "…" not in shown
    figures = [line for line in shown.splitlines() if " 23.4 34.5k   456 5670" in line]
    assert len(figures) == len(ROWS) + len(BASELINES)


def test_the_table_fits_into_the_columns_of_a_terminal():
    console = Console(file=io.StringIO(), width=output.TERMINAL_WIDTH)
    console.print(table(ROWS, BASELINES))
    assert max(map(len, console.file.getvalue().splitlines())) <= output.TERMINAL_WIDTH
    assert "…" not in console.file.getvalue()
    for figure in ("11.1k", "0.721", "34.5k", "process_vm_writev", "64 KiB x 4096", "1.00 x", "+0 ns"):
        assert figure in console.file.getvalue()

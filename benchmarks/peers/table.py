"""Renders a record as Markdown, between markers of the files that show it.

Usage: python -m benchmarks.peers.table [--record FILE] [FILE ...]

Without --record the newest record counts; without files, README.md gets the short form and
docs/benchmarks.md the long one (files that do not exist are skipped). Which form a file gets is said
by its markers:

    <!-- begin: peers -->           <!-- end: peers -->             the medians
    <!-- begin: peers, ranges -->   <!-- end: peers, ranges -->     medians with their range, and notes
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import records
from benchmarks.peers.workload import Operation, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.records import Participant, Record, Row

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "benchmarks" / "records"
SHOWN_IN = (REPOSITORY / "README.md", REPOSITORY / "docs" / "benchmarks.md")
FORMS = ("peers", "peers, ranges")


@dataclass(frozen=True)
class Column:
    """How one shape is titled, and which of its rates are shown."""

    title: str
    shape: Shape
    rates: tuple[str, ...]

    @staticmethod
    def of(shape: Shape) -> Column:
        """Return the column of a shape: percentiles of what bounces, GB/s of what streams."""
        size = amount(shape.size_bytes)
        if shape.op is Operation.NOTIFY:
            return Column(f"{size} + notification, µs p50 / p99", shape, ("p50_us", "p99_us"))
        if shape.op is Operation.FLAG:
            return Column(f"{size}, polled, µs p50 / p99", shape, ("p50_us", "p99_us"))
        if shape.op is Operation.WRITE:
            return Column(f"{size}, GB/s", shape, ("gb_per_s",))
        among = amount(shape.span_bytes)
        return Column(f"{shape.num_pages} of {size} among {among}, GB/s", shape, ("gb_per_s",))


def amount(nbytes: int) -> str:
    """Return a size in the largest binary unit that divides it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def figure(value: float) -> str:
    """Return a number with three significant digits, at most two of them behind the point."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(row: Row | None, column: Column, *, ranges: bool) -> str:
    """Return what one contender shows at one operation."""
    if row is None:
        return ""
    if row.problem:
        return "failed" if row.problem.startswith("failed") else "-"
    shown: list[str] = []
    for rate in column.rates:
        values = row.values(rate)
        median = row.median(rate)
        if median is None:
            return ""
        text = figure(median)
        shown.append(f"{text} ({figure(min(values))} to {figure(max(values))})" if ranges else text)
    return " / ".join(shown)


def _lines(record: Record, *, ranges: bool) -> list[str]:
    shapes = dict.fromkeys(row.shape for row in record.rows)
    columns = [Column.of(shape) for shape in shapes]
    titles = ["", "caller", *(column.title for column in columns)]
    lines = [_line(titles), _line(["---", "---", *("--:" for _ in columns)])]
    for each in record.participants:
        rows = [record.row(each.name, col.shape) for col in columns]
        if _unavailable(rows):
            cells = ["unavailable", *("" for _ in columns[1:])]
        else:
            cells = [cell(row, col, ranges=ranges) for row, col in zip(rows, columns, strict=True)]
        name = f"**{each.name}**" if each.kind == "anyfabric" else each.name
        lines.append(_line([name, each.language, *cells]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _unavailable(rows: Sequence[Row | None]) -> bool:
    return all(row is not None and (row.problem or "").startswith("unavailable") for row in rows)


def _problems(record: Record) -> list[str]:
    """Return one sentence per contender without a number for which there is more to say than a dash."""
    lines: list[str] = []
    for each in record.participants:
        said = {row.problem for row in record.rows if row.contender == each.name and row.problem}
        lines += [f"- {each.name}: {text}" for text in sorted(said) if not text.startswith("unsupported")]
    return lines


def _setting(record: Record) -> str:
    machine = record.machine
    where = f"{machine.num_cpus} cores of {machine.cpu}, {machine.memory_bytes / 2**30:.0f} GiB"
    virtual = ", virtual machine" if machine.hypervisor else ""
    changed = " with changes" if record.modified else ""
    return (
        f"Medians of {record.num_rounds} interleaved rounds; two processes, every byte checked after each "
        f"round. {where}{virtual}, Linux {machine.kernel}, {record.started_at[:10]}, commit "
        f"{record.commit[:10]}{changed}, `{record.command}`."
    )


def _foreign(record: Record) -> str:
    shares = [turn.foreign_cpu for row in record.rows for turn in row.rounds]
    worst = max(shares, default=0.0)
    return f"Other processes used at most {worst:.0%} of the machine while a number was taken."


def _placement(record: Record) -> str:
    """Return how the cores stood to one another, or nothing for a record that does not know."""
    turns = [turn for row in record.rows for turn in row.rounds if turn.ring_ns]
    if not turns:
        return ""
    rings = [turn.ring_ns for turn in turns]
    far = sum(not turn.is_near for turn in turns) / len(turns)
    return (
        f"A bare ring took {min(rings)} to {max(rings)} ns beside the turns: the host moves the cores of a "
        f"virtual machine. Turns beside which it took more than {records.FAR} times what it took in the "
        f"quickest quarter ({far:.0%}) do not count."
    )


def _note(each: Participant) -> str:
    facts = [each.note]
    if each.version != "-":
        facts.append(f"version {each.version}")
    if each.path != "-":
        facts.append(f"path `{each.path}`")
    facts += [f"`{name}={value}`" for name, value in each.env.items()]
    return f"- {each.name}: {'; '.join(fact for fact in facts if fact)}"


def render(record: Record, form: str = "peers") -> str:
    """Return the Markdown of a record in one of `FORMS`, without markers."""
    ranges = form == "peers, ranges"
    parts = ["\n".join(_lines(record, ranges=ranges)), _setting(record)]
    parts += ["\n".join(lines)] if (lines := _problems(record)) else []
    if ranges:
        parts += [_foreign(record), *filter(None, [_placement(record)])]
        parts.append("\n".join(_note(each) for each in record.participants))
    return "\n\n".join(parts)


def markers(form: str) -> tuple[str, str]:
    """Return the lines between which a form belongs."""
    return f"<!-- begin: {form} -->", f"<!-- end: {form} -->"


def replace_between(text: str, form: str, content: str) -> str:
    """Return `text` with what stands between a form's markers replaced; unchanged without them.

    Raises:
        ValueError: There is one marker without the other, or they are in the wrong order.
    """
    begin, end = markers(form)
    if begin not in text and end not in text:
        return text
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        msg = f"expected {begin} and then {end}"
        raise ValueError(msg)
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def newest() -> Path | None:
    """Return the newest record of the folder; their names sort by date."""
    found = sorted(RECORDS.glob("peers-*.json"))
    return found[-1] if found else None


def main(arguments: Sequence[str]) -> int:
    """Render into the files, or say which could not be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.table", description=__doc__)
    parser.add_argument("--record", type=Path, help="the record to render (the newest)")
    parser.add_argument("--print", action="store_true", help="print the long form instead")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    source = options.record or newest()
    if source is None:
        print("there is no record: run python -m benchmarks.peers.run", file=sys.stderr)
        return 1
    record = records.from_json(source.read_text())
    if options.print:
        print(render(record, FORMS[1]))
        return 0
    for file in options.files or [each for each in SHOWN_IN if each.exists()]:
        text = before = file.read_text()
        for form in FORMS:
            text = replace_between(text, form, render(record, form))
        if text != before:
            file.write_text(text)
            print(f"updated {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

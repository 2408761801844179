"""What our own code costs for a work request, over libraries without hardware: time and instructions.

Usage: python -m benchmarks.posting [--json FILE] [--rounds N] [--no-instructions]
       python -m benchmarks.posting --table [FILE]

The first measures and writes a record: times from `cargo bench --bench posting`, instructions from the
same program under callgrind (valgrind), of all threads while the calls are made and of nothing else.
The second renders the newest record, or the one named, into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import machine, table

if TYPE_CHECKING:
    from collections.abc import Sequence

REPOSITORY = Path(__file__).parents[1]
RECORDS = REPOSITORY / "benchmarks" / "records"
SHOWN_IN = REPOSITORY / "docs" / "benchmarks.md"
KIND = "posting"
# Rounds under callgrind, and the function around them.
COUNTED, COUNTED_IN = 4, "posting::counted"
# Instructions of our own a request, at most; the command fails beyond: see the goals of docs/benchmarks.md.
MAX_INSTRUCTIONS = {"write_pages_4096": 250}
# Objects of callgrind that are no code of ours.
_FAKES = re.compile(r"null-nic|fake-libfabric")
_NAME = re.compile(r"(\w+)=\((\d+)\)(?: (.*))?$")
_COST = re.compile(r"(?:[+-]?\d+|\*) (\d+)$")
TITLES = {
    "write": "`write`, one at a time",
    "write_pages_4": "`write_pages` of 4",
    "write_pages_64": "`write_pages` of 64",
    "write_pages_4096": "`write_pages` of 4096",
    "scatter_63": "`scatter` to 63 peers",
    "barrier_63": "`barrier` of 63 peers",
}


def build() -> Path:
    """Compile the benchmark; return its program."""
    command = [
        "cargo",
        "bench",
        "--no-run",
        "-p",
        "anyfabric-engine",
        "--bench",
        KIND,
        "--message-format=json",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    messages = (json.loads(line) for line in done.stdout.splitlines())
    programs = [message["executable"] for message in messages if message.get("executable")]
    return Path(programs[-1])


def run(command: list[str]) -> list[dict[str, Any]]:
    """Run the benchmark; return its rows."""
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def instructions_by_object(text: str) -> Counter[str]:
    """Add up a profile of callgrind: instructions of each object, without those of what they called."""
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    current, is_call = "", False
    for line in text.splitlines():
        if named := _NAME.match(line):
            kind, number, name = named.groups()
            if kind in {"ob", "cob"} and name:
                names[number] = name
            if kind == "ob":
                current = names[number]
        elif line.startswith("calls="):
            # The next line is what the callee cost, which is counted where it was spent.
            is_call = True
        elif cost := _COST.match(line):
            if not is_call:
                found[current] += int(cost.group(1))
            is_call = False
    return found


def count_instructions(program: Path, row: str) -> dict[str, float]:
    """Return instructions for each request of one row: all, and those of the library."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile"
        valgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
        only = [f"--zero-before={COUNTED_IN}", f"--dump-after={COUNTED_IN}"]
        (found,) = run([*valgrind, *only, str(program), "--count", "--rounds", str(COUNTED), row])
        costs = instructions_by_object(Path(f"{out}.1").read_text())
    library = sum(count for name, count in costs.items() if _FAKES.search(name))
    return {
        "instructions": sum(costs.values()) / found["requests"],
        "library_instructions": library / found["requests"],
    }


def own_instructions(row: dict[str, Any]) -> float:
    """Return instructions for each request without those of the library; 0 where none were counted."""
    return float(row.get("instructions", 0) - row.get("library_instructions", 0))


def version(*command: str) -> str:
    """Return what a program says of its version."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(rounds: int, *, with_instructions: bool) -> dict[str, Any]:
    """Measure everything; return the record."""
    program = build()
    rows = run([str(program), "--rounds", str(rounds)])
    if with_instructions:
        for row in rows:
            row.update(count_instructions(program, f"{row['library']}/{row['row']}"))
    commit, is_modified = machine.commit(REPOSITORY)
    versions = {"rustc": version("rustc", "--version"), "cc": version("cc", "--version").partition("\n")[0]}
    if with_instructions:
        versions["valgrind"] = version("valgrind", "--version")
    return {
        "kind": KIND,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python -m benchmarks.posting " + " ".join(sys.argv[1:]),
        "commit": commit,
        "modified": is_modified,
        "machine": asdict(machine.here()),
        "versions": versions,
        "rows": rows,
    }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    posting = f"{row['post_ns']:.0f}" if row["row"] != "write_pages_4096" else "-"
    counts = [f"{row[name]:.0f}" if name in row else "-" for name in ("instructions", "library_instructions")]
    title = TITLES.get(str(row["row"]), str(row["row"]))
    return [
        title,
        str(row["library"]),
        posting,
        f"{row['whole_ns']:.0f}",
        f"{row['library_ns']:.0f}" if row["library_ns"] else "-",
        f"{row['first_post_ns']:.0f}",
        *counts,
    ]


def render(record: dict[str, Any]) -> str:
    """Return a record as Markdown."""
    head = (
        "",
        "library",
        "posting, ns",
        "whole path, ns",
        "of the library, ns",
        "call to first post, ns",
        "instructions",
        "of the library",
    )
    where, num_rounds = record["machine"], record["rows"][0]["rounds"]
    changes = " with changes" if record["modified"] else ""
    lines = [
        _line(head),
        _line(["---", "---", *["--:"] * 6]),
        *(_line(_cells(row)) for row in record["rows"]),
        "",
        f"For each work request; medians of {num_rounds} rounds. Whole path: from the public",
        "call until the transfer was waited for. 4096 pages are more than a queue takes: posting",
        "them is not apart. Of the library: what the fake one takes from C, for as many peers in turn,",
        "of libfabric with the completion; the other times are with it.",
    ]
    lines += [
        "",
        f"{where['num_cpus']} cores of {where['cpu']}, Linux {where['kernel']}, {record['started_at'][:10]},",
        f"commit {record['commit'][:10]}{changes}, `{record['command'].strip()}`.",
    ]
    return "\n".join(lines)


def newest() -> Path:
    """Return the newest record."""
    return max(RECORDS.glob(f"{KIND}-*.json"))


def main() -> None:
    """Measure and record, or render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--no-instructions", action="store_true")
    parser.add_argument("--table", nargs="?", const="newest", metavar="FILE")
    options = parser.parse_args()
    if options.table:
        path = newest() if options.table == "newest" else Path(options.table)
        content = render(json.loads(path.read_text()))
        SHOWN_IN.write_text(table.replace_between(SHOWN_IN.read_text(), KIND, content))
        return
    with_instructions = not options.no_instructions
    if with_instructions and not shutil.which("valgrind"):
        sys.exit("valgrind is missing: install it (Debian, Ubuntu: valgrind), or pass --no-instructions")
    record = measure(options.rounds, with_instructions=with_instructions)
    to = options.json or RECORDS / f"{KIND}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    to.write_text(json.dumps(record, indent=1) + "\n")
    print(render(record))
    print(f"\nrecorded in {to}")
    over = [row for row in record["rows"] if own_instructions(row) > MAX_INSTRUCTIONS.get(row["row"], 1e9)]
    if over:
        rows = ", ".join(f"{row['library']} {row['row']}: {own_instructions(row):.0f}" for row in over)
        sys.exit(f"more instructions of our own a request than the goal: {rows}")


if __name__ == "__main__":
    main()

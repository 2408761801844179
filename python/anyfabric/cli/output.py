"""What all commands share: consoles, the `--json` option, printed sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["data", "json_option", "messages", "printed_size", "write_json"]

Function = TypeVar("Function", bound="Callable[..., Any]")

STDOUT = "-"
FILE_WIDTH = 120


def data() -> Console:
    """The console for results: stdout, never narrower than the tables where nobody looks at it."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=max(console.width, FILE_WIDTH))


def messages() -> Console:
    """The console for everything else: stderr."""
    return Console(file=sys.stderr)


def json_option(function: Function) -> Function:
    """Add `--json [FILE]`; the parameter `json_to` is `None`, `"-"` or a file name."""
    option = click.option(
        "--json",
        "json_to",
        # Said before minutes are spent on what could not be kept.
        type=click.Path(dir_okay=False, writable=True, allow_dash=True),
        metavar="[FILE]",
        is_flag=False,
        flag_value=STDOUT,
        default=None,
        help="Write JSON to FILE; without FILE to stdout, in place of the tables.",
    )
    return option(function)


def write_json(json_to: str, document: object) -> None:
    """Write a document to a file, or to stdout for `"-"`."""
    text = json.dumps(document, indent=2) + "\n"
    if json_to == STDOUT:
        sys.stdout.write(text)
        return
    path = Path(json_to)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as cause:
        msg = f"cannot write {path}: {cause.strerror}"
        raise click.ClickException(msg) from cause
    messages().print(f"wrote {path}", highlight=False)


def printed_size(nbytes: int) -> str:
    """`4096` as `4 KiB`: powers of 1024 where they divide, bytes elsewhere."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"

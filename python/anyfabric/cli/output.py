"""What all commands share: consoles, the `--json` option, printed sizes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.measure import Measurement

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

__all__ = ["OutputFile", "data", "json_option", "messages", "printed_size", "write_json"]

Function = TypeVar("Function", bound="Callable[..., Any]")

STDOUT = "-"
FILE_WIDTH = 120
TERMINAL_WIDTH = 80
ANY_WIDTH = 1000


class OutputFile(click.Path):
    """A file to write, or `-`; what cannot be kept is refused before minutes are spent on it."""

    def __init__(self) -> None:
        """Take the name of a file that may lie in folders that are yet to be made."""
        super().__init__(dir_okay=False, writable=True, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the file, or the folder that it would be made in."""
        name = os.fsdecode(super().convert(value, param, ctx))
        if name == STDOUT or Path(name).exists():
            return name
        there = next(folder for folder in Path(name).absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            self.fail(
                f"{name!r} cannot be made: {str(there)!r} is no folder that can be written to", param, ctx
            )
        return name


def data(*shown: RenderableType) -> Console:
    """The console for results: stdout.

    It is never narrower than what will be shown needs, nor than tables are readable: a terminal that is
    breaks their lines, and cuts no figure off.
    """
    console = Console()
    least = TERMINAL_WIDTH if console.is_terminal else FILE_WIDTH
    needed = [
        Measurement.get(console, console.options.update_width(ANY_WIDTH), each).minimum for each in shown
    ]
    return Console(width=max(console.width, least, *needed))


def messages() -> Console:
    """The console for everything else: stderr."""
    return Console(stderr=True)


def json_option(function: Function) -> Function:
    """Add `--json [FILE]`; the parameter `json_to` is `None`, `"-"` or a file name."""
    option = click.option(
        "--json",
        "json_to",
        type=OutputFile(),
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
        if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] - it was closed before we began
            raise click.ClickException("cannot write to stdout: it is closed")
        sys.stdout.write(text)
        # What cannot be written is said by us, not by the end of the interpreter.
        sys.stdout.flush()
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

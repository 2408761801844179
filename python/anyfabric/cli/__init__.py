"""The command line: `anyfabric info`, `anyfabric doctor`, `anyfabric perf`, `anyfabric demo`.

Parses and prints, decides nothing. Data goes to stdout, progress and messages to stderr; every command
takes `--json`, alone for stdout or with a file. One file per command.
"""

from __future__ import annotations

import logging
import os
import sys

import click
from rich.markup import escape

import anyfabric
from anyfabric.cli.demo import demo
from anyfabric.cli.doctor import doctor
from anyfabric.cli.info import info
from anyfabric.cli.output import messages
from anyfabric.cli.perf import perf

__all__ = ["cli", "main"]

STDOUT_FILENO = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(anyfabric.__version__, prog_name="anyfabric")
def cli() -> None:
    """Point-to-point tensor transfers between the processes of an LLM system."""


cli.add_command(info)
cli.add_command(doctor)
cli.add_command(perf)
cli.add_command(demo)


def main() -> None:
    """Run the command line; errors of the library become one line on stderr and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        cli()
    except anyfabric.AnyFabricError as error:
        context = " ".join(f"{key}={value}" for key, value in error.context().items() if value is not None)
        messages().print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        messages().print(f"[dim]{escape(context)}[/dim]", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        # A full disk above all. What is left of the results must not fail once more at the interpreter's end.
        messages().print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT_FILENO)
        sys.exit(1)

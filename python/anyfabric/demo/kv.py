"""`anyfabric demo kv`: a prefill process streams a transformer's KV cache into a decode process.

This file reads the options, starts the two processes, prints what they say and decides the exit
code; it loads no model itself.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from anyfabric.demo.processes import ChildLostError, Event, Pair
from anyfabric.demo.report import print_prompt, print_summary, to_json
from anyfabric.demo.settings import NO_PAGE, PAGE_TOKENS, SOME_PAGE, Settings

__all__ = ["KvOptions", "kv_command", "read_prompts", "run_kv"]

HERE = Path(__file__).parent
DROP_TIMEOUT_S = 10.0
STDOUT = "-"


@dataclass(frozen=True)
class KvOptions:
    """Options of `anyfabric demo kv`; the defaults are the command's."""

    prompts: Path = HERE / "prompts.txt"
    model: Path = HERE / "model"
    transport: str | None = None
    json_to: str | None = None
    new_tokens: int = 96
    chunk_tokens: int = 512
    rounds: int = 3
    timeout_s: float = 60.0
    baselines: bool = True
    corrupt_page: int = NO_PAGE
    drop_page: int = NO_PAGE


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file.

    Prompts are separated by blank lines; in a file without a blank line every line is one. Bytes
    that are no UTF-8 are kept.

    Raises:
        ValueError: The file holds nothing.
    """
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = [line.rstrip() for line in re.split(r"\r\n?|\n", text.strip())]
    parts = "\n".join(lines).split("\n\n") if "" in lines else lines
    prompts = [part.strip("\n") for part in parts if part.strip()]
    if not prompts:
        msg = f"{path} holds no prompt"
        raise ValueError(msg)
    return prompts


def run_kv(options: KvOptions) -> int:
    """Run the demo and print it; with JSON on standard output, to standard error.

    Args:
        options: What to run.

    Returns:
        Exit code: 0 when every token and every byte was identical, 1 when not or when a process
        was lost.
    """
    if not (options.model / "config.json").is_file():
        msg = f"{options.model} is no checkpoint: it has no config.json"
        raise ValueError(msg)
    console = Console(stderr=options.json_to == STDOUT)
    settings = Settings(
        model=options.model.resolve(),
        prompts=read_prompts(options.prompts),
        transport=options.transport,
        new_tokens=options.new_tokens,
        chunk_tokens=options.chunk_tokens,
        rounds=options.rounds,
        timeout_s=options.timeout_s,
        baselines=options.baselines,
        corrupt_page=options.corrupt_page,
        drop_page=options.drop_page,
    )
    run = _Run(settings, console)
    try:
        run.collect()
    except ChildLostError as error:
        run.error = str(error)
    finally:
        run.pair.stop()
    report = run.report()
    if run.error is None:
        print_summary(console, report)
    else:
        console.print(Text("failed: ", style="bold red").append(run.error, style="not bold default"))
    if options.json_to is not None:
        _write_json(options.json_to, report)
    return 0 if report["all_identical"] and run.error is None else 1


def _write_json(json_to: str, report: Event) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if json_to == STDOUT:
        sys.stdout.write(text)
        return
    path = Path(json_to)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class _Run:
    """One run: both processes, and what they have said so far."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.pair = Pair()
        self.error: str | None = None
        self._settings = settings
        self._console = console
        self._path: Event = {}
        self._results: list[Event] = []

    def collect(self) -> None:
        """Start both processes, introduce them to each other, print what they say.

        Raises:
            ChildLostError: One of them failed, died or fell silent.
        """
        prefill, decode = self.pair.start("prefill"), self.pair.start("decode")
        self._say(
            f"prefill process pid {prefill.pid}, decode process pid {decode.pid}; "
            f"each loads {_name_model(self._settings.model)}"
        )
        for child in self.pair.children:
            child.write(**self._settings.to_json())
        addresses: dict[str, str] = {}
        while len(addresses) < len(self.pair.children):
            child, event = self.pair.next_event(timeout_s=self._settings.silence_s)
            addresses[child.role] = event["address"]
        prefill.write(peer=addresses["decode"])
        decode.write(peer=addresses["prefill"])
        while self._take(self.pair.next_event(timeout_s=self._settings.silence_s)[1]):
            pass
        for child in self.pair.children:
            child.finish(timeout_s=self._settings.timeout_s)

    def _take(self, event: Event) -> bool:
        """Take an event of the decode process; say whether more will come."""
        kind = event.pop("event")
        if kind == "path":
            self._path = event
            reason = f" ({event['reason']})" if event["reason"] else ""
            self._say(f"transport {event['transport']}{reason}")
        elif kind == "result":
            self._results.append(event)
            print_prompt(self._console, len(self._results), len(self._settings.prompts), event)
        return bool(kind != "finished")

    def _say(self, line: str) -> None:
        self._console.print(Text(line))

    def report(self) -> Event:
        """Make the record."""
        pids = {child.role: child.pid for child in self.pair.children}
        report = to_json(self._results, self._path, pids, self._settings.to_json())
        return report if self.error is None else {**report, "error": self.error}


def _name_model(directory: Path) -> str:
    shipped = directory == (HERE / "model").resolve()
    return "the byte-level Llama of this package" if shipped else f"the checkpoint in {directory}"


def _page_number(_context: click.Context, _option: click.Parameter, text: str | None) -> int:
    """Read `page`, for a page in the middle of the first prompt's cache, or a page's number."""
    if text is None:
        return NO_PAGE
    if text == "page":
        return SOME_PAGE
    if not text.isdecimal():
        msg = f"{text!r} is neither `page` nor the number of a page"
        raise click.BadParameter(msg)
    return int(text)


@click.command("kv")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file; blank lines separate prompts, without any every line is one.",
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Local Hugging Face checkpoint; by default the small one of this package.",
)
@click.option("--transport", type=click.Choice(["shm", "tcp"]), help="By default the best that there is.")
@click.option(
    "--json",
    "json_to",
    # Said before minutes are spent on what could not be kept.
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    metavar="[FILE]",
    is_flag=False,
    flag_value=STDOUT,
    help="Write JSON to FILE; without FILE to stdout, and the rest to stderr.",
)
@click.option("--new-tokens", type=click.IntRange(1), default=96, show_default=True, help="Tokens to decode.")
@click.option(
    "--chunk-tokens",
    type=click.IntRange(PAGE_TOKENS),
    default=512,
    show_default=True,
    help=f"Tokens of one forward pass of the prefill; a multiple of {PAGE_TOKENS}.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Timed rounds of each prompt; printed times are medians.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    help="Deadline in seconds of every wait of one process for the other.",
)
@click.option("--baselines/--no-baselines", default=True, help="Also move the cache through gloo.")
@click.option(
    "--corrupt",
    "corrupt_page",
    metavar="page|N",
    callback=_page_number,
    help="Control: flip one byte of page N on its way (`page`: of one in the middle); must be noticed.",
)
@click.option(
    "--drop",
    "drop_page",
    metavar="page|N",
    callback=_page_number,
    help="Control: do not write page N (`page`: one in the middle); must be noticed.",
)
def kv_command(**given: Any) -> None:
    """Stream a transformer's KV cache from a prefill into a decode process.

    Exits with 0 when every new token equals that of the same generation in one process and the
    cache arrived byte for byte, with 1 otherwise.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        msg = f"the demo needs {' and '.join(missing)}; try: pip install 'anyfabric[demo]'"
        raise click.ClickException(msg)
    options = KvOptions(**{name: value for name, value in given.items() if value is not None})
    if options.chunk_tokens % PAGE_TOKENS:
        msg = f"given {options.chunk_tokens}, which is no multiple of {PAGE_TOKENS}"
        raise click.BadParameter(msg, param_hint="--chunk-tokens")
    if options.drop_page != NO_PAGE:
        # The count of an incomplete cache is never reached: no need to wait a minute to say so.
        options = replace(options, timeout_s=min(options.timeout_s, DROP_TIMEOUT_S))
    try:
        code = run_kv(options)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    sys.exit(code)


if __name__ == "__main__":
    kv_command()

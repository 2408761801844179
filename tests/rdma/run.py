"""`make test-rdma`: every scenario in a virtual machine with Soft-RoCE NICs, from programs built on the host.

Exit code: 0 passed; 1 something failed; 77 this machine cannot run the bed, and the last line says why. The
output of a scenario goes to `<target>/rdma/<name>.log`, and to the terminal when it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from image import HERE, Image, Missing, ready  # the folder is a program, not a package
from scenarios import SCENARIOS, Scenario
from vm import CANNOT_RUN, DEADLINE, DIED, run_in_vm

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

RUST_TESTS = ("--package", "anyfabric-transports", "--test", "verbs")


def main() -> int:
    """Build, run what was asked for, print a summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", metavar="WORD", default="", help="only scenarios with WORD in their name")
    given = parser.parse_args()
    chosen = [scenario for scenario in SCENARIOS if given.k in scenario.name]
    if not chosen:
        parser.error(f"no scenario has {given.k!r} in its name: {', '.join(s.name for s in SCENARIOS)}")
    try:
        image = ready()
    except Missing as reason:
        print(f"SKIPPED the RDMA tests: {reason}")
        return CANNOT_RUN
    except RuntimeError as error:
        print(f"the RDMA bed cannot be made: {error}", file=sys.stderr)
        return 1
    out = Path(os.environ.get("CARGO_TARGET_DIR", "target")).resolve() / "rdma"
    out.mkdir(parents=True, exist_ok=True)
    try:
        tests = build(out)
    except subprocess.CalledProcessError as error:
        print(f"nothing was run: {error}", file=sys.stderr)
        return 1
    started = time.monotonic()
    failed = [scenario.name for scenario in chosen if not passes(scenario, image, out, tests)]
    took = f"kernel {image.version}, {time.monotonic() - started:.0f} s"
    print(f"{len(chosen) - len(failed)} of {len(chosen)} RDMA scenarios passed; {took}", flush=True)
    return 1 if failed else 0


def build(out: Path) -> list[str]:
    """Compile on the host, for under emulation it would take minutes; the programs of the Rust tests."""
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", out / "smoke", HERE / "smoke.c", "-libverbs"], check=True)
    cargo = ["cargo", "test", "--no-run", "--quiet", "--message-format", "json", *RUST_TESTS]
    lines = subprocess.run(cargo, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    programs = [json.loads(line).get("executable") for line in lines]
    return [program for program in programs if program]


def passes(scenario: Scenario, image: Image, out: Path, tests: Sequence[str]) -> bool:
    """Run one scenario, print its line, and its output if it failed."""
    log = out / f"{scenario.name}.log"
    environment = {"PATH": os.environ["PATH"], "HOME": "/root", "LC_ALL": "C", "RUST_BACKTRACE": "1"}
    started = time.monotonic()
    with log.open("wb") as file:
        code = run_in_vm(
            image,
            script(scenario, out, tests),
            environment=environment,
            deadline_s=scenario.deadline_s,
            stdout=file,
        )
    took_s = time.monotonic() - started
    outcome = {0: "ok", DEADLINE: f"not over after {scenario.deadline_s:g} s", DIED: "the guest died"}
    print(
        f"{scenario.name:12} {outcome.get(code, f'exit code {code}'):10} {took_s:5.1f} s  {scenario.about}",
        flush=True,
    )
    if code != 0:
        sys.stdout.write(log.read_text(errors="replace"))
        print(f"again: make test-rdma ARGS='-k {scenario.name}'; this output: {log}", flush=True)
    return code == 0


def script(scenario: Scenario, out: Path, tests: Sequence[str]) -> str:
    """The guest's command: the first line that fails ends it."""
    smoke = [f"{out}/smoke {given}" for given in scenario.smoke]
    rust = [f"ANYFABRIC_TEST_NICS={nics} {program}" for nics in scenario.nics for program in tests]
    return "\n".join(["set -eux", scenario.setup, *smoke, *rust])


if __name__ == "__main__":
    sys.exit(main())

"""`make test-rdma`: every scenario in a virtual machine with Soft-RoCE NICs, from programs built on the host.

Exit code: 0 passed; 1 something failed; 77 this machine cannot run the bed, and the last line says why. The
output of a scenario goes to `<target>/rdma/<name>.log`, and to the terminal when it failed. It is then run
once more, as the other Rust tests are, and named as flaky when it passes: a bug all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
    from collections.abc import Mapping

__all__ = ["main"]

RUST_PROGRAMS = {
    "nic": ("anyfabric-transports", "verbs"),
    "engine": ("anyfabric-engine", "conformance"),
}


def main() -> int:
    """Build, run what was asked for, print a summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "-k", metavar="WORD", default="", help="only scenarios with WORD in their name, long ones too"
    )
    given = parser.parse_args()
    chosen = [s for s in SCENARIOS if s.name == given.k] or [
        s for s in SCENARIOS if given.k in s.name and (given.k or not s.is_long)
    ]
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
        programs = build(out)
    except subprocess.CalledProcessError as error:
        print(f"nothing was run: {error}", file=sys.stderr)
        return 1
    started = time.monotonic()
    unsteady = [scenario for scenario in chosen if not passes(scenario, image, out, programs)]
    failed = [scenario for scenario in unsteady if not passes(scenario, image, out, programs, again=True)]
    flaky = [scenario.name for scenario in unsteady if scenario not in failed]
    took = f"kernel {image.version}, {time.monotonic() - started:.0f} s"
    print(f"{len(chosen) - len(failed)} of {len(chosen)} RDMA scenarios passed; {took}", flush=True)
    if flaky:
        print(f"FLAKY, passed at the second try: {', '.join(flaky)}", flush=True)
    return 1 if failed else 0


def build(out: Path) -> dict[str, Path]:
    """Compile on the host, for under emulation it would take minutes; the Rust programs by their names."""
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", out / "smoke", HERE / "smoke.c", "-libverbs"], check=True)
    programs: dict[str, Path] = {}
    for name, (package, test) in RUST_PROGRAMS.items():
        cargo = [
            *["cargo", "test", "--no-run", "--quiet", "--message-format", "json", "--package"],
            package,
            "--test",
            test,
        ]
        lines = subprocess.run(cargo, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        (program,) = {path for line in lines if (path := json.loads(line).get("executable"))}
        programs[name] = Path(program)
    return programs


def passes(
    scenario: Scenario, image: Image, out: Path, programs: Mapping[str, Path], *, again: bool = False
) -> bool:
    """Run one scenario, print its line, and its output if it failed."""
    log = out / f"{scenario.name}{'-again' if again else ''}.log"
    # What is installed beside this Python comes first: `anyfabric`.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": "/root", "LC_ALL": "C", "RUST_BACKTRACE": "1"}
    lines, num_tests = script(scenario, out, programs)
    started = time.monotonic()
    with log.open("wb") as file:
        code = run_in_vm(image, lines, environment=environment, deadline_s=scenario.deadline_s, stdout=file)
    took_s = time.monotonic() - started
    outcomes = {0: "ok", DEADLINE: f"not over after {scenario.deadline_s:g} s", DIED: "the guest died"}
    outcome = outcomes.get(code, f"exit code {code}")
    print(f"{scenario.name:12} {outcome:8} {took_s:5.1f} s {num_tests:4} tests  {scenario.about}", flush=True)
    if code != 0:
        sys.stdout.write(log.read_text(errors="replace"))
        print(f"again: make test-rdma ARGS='-k {scenario.name}'; this output: {log}", flush=True)
    return code == 0


def script(scenario: Scenario, out: Path, programs: Mapping[str, Path]) -> tuple[str, int]:
    """The guest's command, of which the first line that fails ends it, and the number of tests in it."""
    lines = ["set -eux", scenario.setup]
    lines += [f"{out}/smoke {given}" for given in scenario.smoke]
    num_tests = len(scenario.smoke)
    for tests in scenario.tests:
        program = programs[tests.program]
        names = [name for name in listed(program) if re.fullmatch(tests.names, name)]
        if not names:
            msg = f"{scenario.name}: no test of {tests.program} is called {tests.names}"
            raise RuntimeError(msg)
        num_tests += len(names)
        environment = {"ANYFABRIC_TEST_NICS": tests.nics, **tests.environment}
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        # Many of the tests wait: two at a time fill two cores.
        lines.append(f"env {variables} {program} --exact --test-threads=2 {' '.join(names)}")
    lines += scenario.commands
    return "\n".join(lines), num_tests + len(scenario.commands)


def listed(program: Path) -> list[str]:
    """Names of the tests of a program, without those that are ignored."""
    told = [
        subprocess.run([program, "--list", *more], check=True, capture_output=True, text=True).stdout
        for more in ([], ["--ignored"])
    ]
    every, ignored = (re.findall(r"^(\S+): test$", text, re.MULTILINE) for text in told)
    return [name for name in every if name not in ignored]


if __name__ == "__main__":
    sys.exit(main())

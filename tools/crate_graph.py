"""Check that the crates depend on one another only downwards.

The arrows are the architecture: `wire`, `plan`, `cuda`, `transports`, `engine`, `python`, from the bottom
up, and a crate may use only those below it; `models` stands beside them. Read from `cargo metadata`;
test-only dependencies count too.
"""

from __future__ import annotations

import json
import subprocess
import sys

PREFIX = "anyfabric-"
ALLOWED: dict[str, set[str]] = {
    "wire": set(),
    "plan": {"wire"},
    "cuda": set(),
    "transports": {"wire", "plan", "cuda"},
    "engine": {"wire", "plan", "cuda", "transports"},
    "python": {"wire", "plan", "cuda", "transports", "engine"},
    # Takes files of transports and engine, not the crates.
    "models": {"wire"},
}


def violations(packages: list[dict[str, object]]) -> list[str]:
    """Name every arrow that is not allowed, and every crate without a place."""
    found: list[str] = []
    for package in packages:
        crate = str(package["name"]).removeprefix(PREFIX)
        if crate not in ALLOWED:
            found.append(f"{crate}: has no place in the layers; add it to ALLOWED and ARCHITECTURE.md")
            continue
        dependencies = package["dependencies"]
        assert isinstance(dependencies, list)
        used = {d["name"].removeprefix(PREFIX) for d in dependencies if d["name"].startswith(PREFIX)}
        found += [f"{crate} -> {name}: not downwards" for name in sorted(used - ALLOWED[crate])]
    return found


def main() -> int:
    """Print the violations; exit code 1 if there are any."""
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found = violations(json.loads(answer.stdout)["packages"])
    for line in found:
        print(f"crate graph: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/doctor.md from the checks themselves: `python tools/doctor_docs.py`."""

from __future__ import annotations

from pathlib import Path

from anyfabric.doctor import CHECKS, TRIALS, pair_check

HEAD = """# What `anyfabric doctor` checks

```sh
anyfabric doctor               # a table; exit code 1 if something that is needed is broken
anyfabric doctor --json        # the same for programs
anyfabric doctor serve         # prints what to run on another machine, to try every pair of NICs
anyfabric doctor --pid 1234    # limits and libraries of a running process
anyfabric doctor --root copy   # a machine of which somebody sent a folder with /proc, /sys and so on
```

Each finding says what is there, why it matters, and what to type. `ok` is as it should be; a `note` is worth
knowing; a `warning` works, but slowly or not for everything; what is `broken` does not work. A machine
without RDMA NICs is well: it uses shm and tcp. The settings say what is needed: a NIC that no engine would
take needs no address, one that `ANYFABRIC_NICS` names has to be up, and without `verbs` and `libfabric` in
`ANYFABRIC_TRANSPORTS` nothing of RDMA is a fault.

| check | looks at | why it matters |
| --- | --- | --- |
"""


def text() -> str:
    """The page."""
    checks = (*CHECKS, *TRIALS, pair_check(""))
    rows = [f"| `{check.name}` | {check.looks_at} | {check.why} |\n" for check in checks]
    return HEAD + "".join(rows) + "\nThis page is made by `tools/doctor_docs.py`.\n"


if __name__ == "__main__":
    Path("docs/doctor.md").write_text(text())

"""What a process is told that has no descriptor, thread or memory left."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import anyfabric as af

FEWER_AND_FEWER = """
import os, resource
import anyfabric as af

def use():
    settings = {"transports": ("shm", "tcp"), "timeout_s": 5}  # NICs take descriptors of their own
    with af.Engine(**settings) as here, af.Engine(**settings) as there:
        src, dst = here.allocate(64), there.allocate(64)
        here.write(src, dst.descriptor()).wait()
        here.send(there.address, b"x").wait()

for left in range(48):
    if os.fork() == 0:
        limit = len(os.listdir("/proc/self/fd")) - 1 + left
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        try:
            use()
        except af.AnyFabricError as error:
            print(left, error.code, flush=True)
        else:
            print(left, "done", flush=True)
        os._exit(0)
    os.wait()
"""


def test_however_few_descriptors_are_left_the_first_error_is_ours():
    done = subprocess.run(
        [sys.executable, "-c", FEWER_AND_FEWER], capture_output=True, text=True, timeout=300
    )
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert list(outcomes) == [str(left) for left in range(48)], done.stderr
    assert outcomes["0"] == "resource_exhausted"
    assert outcomes["47"] == "done"
    assert "internal" not in outcomes.values()


NICS_TAKE_DESCRIPTORS = """
import os, resource, sys
import anyfabric as af

SETTINGS = dict(transports=("libfabric",), libfabric_provider="tcp", libfabric_library=sys.argv[1])

for nics in (("127.0.0.1",), None):
    for left in range(0, 40):
        if os.fork() == 0:
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + left, hard))
            try:
                af.Engine(nics=nics, **SETTINGS).close()
                print("done", flush=True)
            except af.AnyFabricError as error:
                print(error.code, flush=True)
                # The same process, with descriptors.
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                af.Engine(nics=nics, **SETTINGS).close()
            os._exit(0)
        _, status = os.wait()
        if status:
            sys.exit(f"{nics}, {left} left")
"""


def test_a_nic_without_descriptors_is_told_as_that_and_not_remembered(libfabric_of_the_wheel):
    done = subprocess.run(
        [sys.executable, "-c", NICS_TAKE_DESCRIPTORS, libfabric_of_the_wheel],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert set(outcomes) == {"resource_exhausted", "done"}
    assert len(outcomes) == 80
    assert outcomes[0] == outcomes[40] == "resource_exhausted"


def num_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_thread_for_callbacks(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    gc.collect()
    before = num_files()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(af.ResourceExhausted, match="no thread is left") as caught:
            af.Engine()
    del caught
    gc.collect()
    assert num_files() == before
    af.Engine().close()

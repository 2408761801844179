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

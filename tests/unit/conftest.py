"""Two engines in one process, connected on first use."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyfabric as af

READ = -2
NULL_NIC = Path(__file__).parents[2] / "crates/transports/tests/null_nic"


@pytest.fixture
def engine():
    with af.Engine(timeout_s=10) as made:
        yield made


@pytest.fixture
def peer():
    with af.Engine(timeout_s=10) as made:
        yield made


@pytest.fixture
def libfabric_of_the_wheel():
    wheel = Path(sys.prefix) / "lib/mpich/libfabric.so.1"
    if not wheel.exists():
        pytest.skip("no libfabric of the wheel mpich: make .venv with `make test`")
    return str(wheel)


@pytest.fixture(scope="session")
def null_nic(tmp_path_factory):
    """A libibverbs without hardware: its path, and what sets one of its knobs, or reads it."""
    library = tmp_path_factory.mktemp("null_nic") / "libnull.so"
    source = NULL_NIC / "ibverbs.c"
    versions = f"-Wl,--version-script={NULL_NIC / 'symbols.map'}"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", versions, "-o", library, source], check=True)
    knobs = re.search(r"static struct \{\n(.*?)\} knobs", source.read_text(), re.DOTALL)
    names = re.findall(r"\b(\w+)\s*[,;]", re.sub(r"//.*", "", knobs[1]))
    knob = ctypes.CDLL(str(library)).null_nic_knob
    knob.argtypes = [ctypes.c_int, ctypes.c_long]
    return str(library), lambda name, value=READ: knob(names.index(name), value)

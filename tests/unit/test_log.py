"""What the transports log reaches Python's logging."""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
from pathlib import Path

import pytest

import anyfabric as af

NULL_NIC = Path(__file__).parents[2] / "crates/transports/tests/null_nic"


@pytest.fixture(scope="module")
def null_nic(tmp_path_factory):
    """A libibverbs without hardware: its path, and what sets one of its knobs."""
    library = tmp_path_factory.mktemp("null_nic") / "libnull.so"
    source = NULL_NIC / "ibverbs.c"
    versions = f"-Wl,--version-script={NULL_NIC / 'symbols.map'}"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", versions, "-o", library, source], check=True)
    knobs = re.search(r"static struct \{\n(.*?)\} knobs", source.read_text(), re.DOTALL)
    names = re.findall(r"\b(\w+)\s*[,;]", re.sub(r"//.*", "", knobs[1]))
    knob = ctypes.CDLL(str(library)).null_nic_knob
    knob.argtypes = [ctypes.c_int, ctypes.c_long]
    return str(library), lambda name, value: knob(names.index(name), value)


def test_a_nic_that_is_left_out_is_in_the_log(null_nic, caplog):
    library, set_knob = null_nic
    set_knob("shut", 1)
    with (
        caplog.at_level(logging.INFO, "anyfabric"),
        af.Engine(transports=("verbs",), verbs_library=library) as engine,
    ):
        info = str(engine.info()["transports"])
    set_knob("shut", 0)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "null1" in info
    assert any(line.startswith("NIC null0 is not used: ") for line in lines), lines

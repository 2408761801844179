"""The package as a whole: importing does nothing, names are what they say."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import anyfabric as af
from anyfabric import _core

IMPORT = """
import os, sys, threading, logging
before = dict(os.environ), threading.active_count(), set(os.listdir("/proc/self/fd"))
import anyfabric
after = dict(os.environ), threading.active_count(), set(os.listdir("/proc/self/fd"))
assert before == after, (before, after)
assert not logging.getLogger("anyfabric").handlers and not logging.getLogger().handlers
for module in ("torch", "click", "rich", "matplotlib", "transformers"):
    assert module not in sys.modules, module
"""


def test_importing_does_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_begins_with_the_oldest_click_that_is_allowed():
    # Types of parameters cannot be subscripted there.
    code = "import click; click.ParamType.__class_getitem__ = None; import anyfabric.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_exists_and_is_documented():
    assert af.__all__ == sorted(af.__all__)
    for name in af.__all__:
        if name != "__version__":
            assert getattr(af, name).__doc__, name


def test_versions_agree():
    assert af.__version__ == _core.__version__ == metadata.version("anyfabric")


def test_the_package_is_typed():
    files = {entry.name for entry in resources.files("anyfabric").iterdir()}
    assert {"py.typed", "_core.pyi"} <= files


def test_the_bare_package_needs_little():
    required = [line for line in metadata.requires("anyfabric") if "extra ==" not in line]
    assert {line.split(">")[0] for line in required} == {"numpy", "click", "rich"}

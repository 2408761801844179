"""What every test shares: a clean environment, and the markers for hardware."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Settings of the developer's shell must not reach the engines of the tests."""
    for name in [name for name in os.environ if name.startswith("ANYFABRIC_")]:
        del os.environ[name]
    # A shell starts what runs in the background with Ctrl-C ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here, and say what was missing."""
    gpus, nics = _num_gpus(), _num_nics()
    for item in items:
        for marker, present in (("requires_gpus", gpus), ("requires_nics", nics)):
            found = item.get_closest_marker(marker)
            if found is not None and found.args[0] > present:
                kind = marker.removeprefix("requires_")
                item.add_marker(pytest.mark.skip(reason=f"needs {found.args[0]} {kind}, {present} here"))


def _num_gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) if shutil.which("nvidia-smi") else 0


def _num_nics() -> int:
    folder = Path("/sys/class/infiniband")
    return len(list(folder.iterdir())) if folder.is_dir() else 0

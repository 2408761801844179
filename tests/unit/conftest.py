"""Two engines in one process, connected on first use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import anyfabric as af


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

"""Two engines in one process, connected on first use."""

from __future__ import annotations

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

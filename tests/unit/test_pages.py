"""Lists of pages: what becomes an index array, and what is refused."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anyfabric as af
from anyfabric.pages import operands

MEMORY = object()
"""Stands for a region: `Pages` only passes it on."""


def pages(indices, page_bytes=16, **more):
    return af.Pages(MEMORY, indices, page_bytes, **more)


def native_indices(found):
    _, (indices, *_), *_ = operands(found, found)
    assert indices.dtype == np.uint32
    assert indices.flags.c_contiguous
    return indices.tolist()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_every_way_to_give_indices_reaches_native_code(indices):
    for given_indices in (
        indices,
        tuple(indices),
        np.array(indices, np.uint32),
        np.array(indices, np.int64),
        np.array([[i, 0] for i in indices], np.uint64).reshape(-1, 2)[:, 0],
    ):
        found = pages(given_indices)
        assert native_indices(found) == indices
        assert len(found) == len(indices)
        assert found.nbytes == 16 * len(indices)


def test_ranges_and_torch_tensors():
    assert native_indices(pages(range(6, 0, -2))) == [6, 4, 2]
    assert native_indices(pages(range(0))) == []
    torch = pytest.importorskip("torch", reason="torch is not installed: make .venv with `make test`")
    assert native_indices(pages(torch.tensor([3, 1, 2]))) == [3, 1, 2]


def test_an_array_at_an_odd_address_is_copied():
    indices = np.frombuffer(b"x" + np.arange(4, dtype=np.uint32).tobytes(), np.uint32, offset=1)
    assert not indices.flags.aligned
    assert native_indices(pages(indices)) == [0, 1, 2, 3]
    assert pages(indices).indices.flags.aligned


def test_swapped_indices_are_swapped_back():
    assert native_indices(pages(np.array([1, 2], ">u4"))) == [1, 2]


def test_a_fitting_array_is_not_copied():
    indices = np.arange(4, dtype=np.uint32)
    assert np.shares_memory(pages(indices).indices, indices)


def test_a_part_is_replaced_as_in_any_dataclass():
    found = dataclasses.replace(pages([1, 2], stride=32), offset=8, indices=[3])
    assert native_indices(found) == [3]
    assert (found.page_bytes, found.stride, found.offset) == (16, 32, 8)


def test_defaults():
    def sizes(found):
        return found.page_bytes, found.stride, found.offset

    assert sizes(pages([1], 64)) == (64, 64, 0)
    assert sizes(pages([1], np.int32(64), stride=np.uint64(128), offset=7)) == (64, 128, 7)
    assert pages([], 0).nbytes == 0


@pytest.mark.parametrize(
    "indices",
    [
        [-1],
        [0, 2**32],
        [2**70],
        [0.0],
        np.array([1.5]),
        [True],
        ["1"],
        [[1]],
        np.int64(3),
        3,
        None,
        object(),
        [[1], [2, 3]],
        [None],
        range(2**63, 2**63 + 2),
        range(10**15),
    ],
)
def test_refused_indices(indices):
    with pytest.raises(af.InvalidArgument, match="page ind"):
        pages(indices)


@pytest.mark.parametrize(
    ("indices", "kind"), [((i for i in range(3)), "generator"), ({1, 2}, "set"), (3, "int")]
)
def test_what_is_no_sequence_is_named(indices, kind):
    with pytest.raises(af.InvalidArgument, match=f"given a {kind}"):
        pages(indices)


def test_the_wrong_index_is_named():
    with pytest.raises(af.InvalidArgument, match="page index -5 at position 2: expected 0 to 4294967295"):
        pages([0, 1, -5])


@pytest.mark.parametrize("field", ["page_bytes", "stride", "offset"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "8", np.array([1, 2])])
def test_refused_sizes(field, value):
    with pytest.raises(af.InvalidArgument, match=field):
        pages([0], **{"page_bytes": 8, field: value})


def test_frozen():
    found = pages([0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.offset = 3
    assert "page_bytes=16" in repr(found)


def test_targets_are_plain_tuples():
    target = af.Target(MEMORY, 1, 2, 3)
    assert target == (MEMORY, 1, 2, 3)
    assert target.dst_offset == 2
    assert pickle.loads(pickle.dumps(af.Target(None, 1, 2, 3))) == (None, 1, 2, 3)

"""Baselines that need another process: what becomes of them when it does nothing."""

from __future__ import annotations

import socket

import numpy as np
import pytest

import anyfabric as af
from anyfabric import _core


@pytest.mark.parametrize(
    ("act", "nbytes"),
    [
        (_core.baseline_socket_source, 8),  # waits for the answer
        (_core.baseline_socket_source, 64 << 20),  # waits for room
        (_core.baseline_socket_sink, 8),
    ],
)
@pytest.mark.parametrize("num_streams", [1, 2])
def test_sockets_on_which_nothing_moves_end_the_baseline(act, nbytes, num_streams):
    memory, index = np.zeros(nbytes, "u1"), np.zeros(1, "u4")
    pairs = [socket.socketpair() for _ in range(num_streams)]
    indices = (index.ctypes.data, index.ctypes.data, 1)
    with pytest.raises(af.ConnectionBroken, match="nothing moved within the timeout"):
        act([ours.fileno() for ours, _ in pairs], memory.ctypes.data, indices, nbytes, 1, timeout_s=0.1)
    for pair in pairs:
        for end in pair:
            end.close()

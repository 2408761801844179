"""The same cache, whole and after the prefill, over a bare TCP socket and over gloo.

The decode process listens and the prefill process connects, both on the loopback interface. What
comes over the socket is also the reference for the comparison byte by byte: it has touched neither
the engine nor a page.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

__all__ = ["Carrier", "GlooCarrier", "SocketCarrier"]


# torch exports it without saying so to type checkers.
_TCPStore: Any = vars(dist)["TCPStore"]


class Carrier(Protocol):
    """Moves one tensor of bytes from the prefill to the decode process."""

    def send(self, data: torch.Tensor) -> None:
        """Send `[nbytes] uint8`."""

    def receive(self, data: torch.Tensor) -> None:
        """Receive into `[nbytes] uint8`, of the length that is sent."""

    def close(self) -> None:
        """Let go of it."""


class SocketCarrier:
    """One TCP connection, `sendall` and `recv_into`."""

    def __init__(self, connection: socket.socket, *, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection

    @classmethod
    def connect(cls, port: int, *, timeout_s: float) -> SocketCarrier:
        """Connect to a listener of this host."""
        return cls(socket.create_connection(("127.0.0.1", port), timeout=timeout_s), timeout_s=timeout_s)

    @classmethod
    def accept(cls, listener: socket.socket, *, timeout_s: float) -> SocketCarrier:
        """Take one connection and close the listener."""
        with listener:
            listener.settimeout(timeout_s)
            connection, _ = listener.accept()
        return cls(connection, timeout_s=timeout_s)

    def send(self, data: torch.Tensor) -> None:
        """Send the bytes.

        Raises:
            TimeoutError: The peer took none for too long.
        """
        try:
            self._connection.sendall(_view(data))
        except TimeoutError:
            msg = f"the raw socket of the comparison took no byte for {self._connection.gettimeout():g} s"
            raise TimeoutError(msg) from None

    def receive(self, data: torch.Tensor) -> None:
        """Receive exactly as many bytes as fit.

        Raises:
            ConnectionError: The peer closed before.
            TimeoutError: The peer sent nothing for too long.
        """
        view = _view(data)
        while len(view) > 0:
            try:
                received = self._connection.recv_into(view)
            except TimeoutError:
                silent_s = self._connection.gettimeout()
                msg = f"nothing came over the raw socket of the comparison for {silent_s:g} s"
                raise TimeoutError(msg) from None
            if received == 0:
                msg = f"the prefill process closed; {len(view)} bytes are missing"
                raise ConnectionError(msg)
            view = view[received:]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class GlooCarrier:
    """`torch.distributed` point to point, two ranks; decode is rank 0."""

    def __init__(self, store: Any, rank: int, *, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s)
        )

    @staticmethod
    def host_store(*, timeout_s: float) -> Any:
        """Open the store that the two ranks meet at; its port is `store.port`."""
        return _TCPStore(
            "127.0.0.1",
            0,
            2,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )

    @staticmethod
    def join_store(port: int, *, timeout_s: float) -> Any:
        """Connect to the store of the other process."""
        return _TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=timeout_s))

    def send(self, data: torch.Tensor) -> None:
        """Send the bytes."""
        dist.send(data, 1 - self._rank)

    def receive(self, data: torch.Tensor) -> None:
        """Receive exactly as many bytes as fit."""
        dist.recv(data, 1 - self._rank)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def _view(data: torch.Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)

"""What the two processes say to each other: small JSON heads with binary parts, over `Engine.send`.

A message may be larger than an engine takes at once, so it is cut into pieces that say where they
belong; an engine promises no order, so pieces are put together by their number. One piece:

    offset  bytes  what
    0       4      magic `AFkv`
    4       4      message number, of its sender
    8       4      piece number
    12      4      number of pieces
    16      ...    bytes of the piece

The pieces together are `head length (4 bytes) | head (JSON) | parts`; the head lists the lengths
of the parts. All integers are little-endian.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import anyfabric as af

__all__ = ["Mailbox", "Note", "encode_note"]

PIECE = struct.Struct("<4sIII")
MAGIC = b"AFkv"
# Half of an engine's default limit.
PIECE_BYTES = 32 * 1024
# How often a waiting process looks whether its peer still lives.
LIVENESS_S = 0.25


@dataclass(frozen=True)
class Note:
    """A message: its kind, what JSON can say, and binary parts."""

    kind: str
    head: dict[str, Any] = field(default_factory=dict[str, Any])
    parts: tuple[bytes, ...] = ()


def encode_note(note: Note, number: int) -> list[bytes]:
    """Cut a note into pieces."""
    head = {"kind": note.kind, "head": note.head, "parts": [len(part) for part in note.parts]}
    head_bytes = json.dumps(head).encode()
    body = struct.pack("<I", len(head_bytes)) + head_bytes + b"".join(note.parts)
    cuts = range(0, len(body), PIECE_BYTES)
    return [
        PIECE.pack(MAGIC, number, idx, len(cuts)) + body[cut : cut + PIECE_BYTES]
        for idx, cut in enumerate(cuts)
    ]


def decode_note(body: bytes) -> Note:
    """Read the pieces of a note, put together."""
    (head_bytes,) = struct.unpack_from("<I", body)
    cut = 4 + head_bytes
    head = json.loads(body[4:cut])
    parts: list[bytes] = []
    for length in head["parts"]:
        parts.append(body[cut : cut + length])
        cut += length
    return Note(head["kind"], head["head"], tuple(parts))


class Mailbox:
    """Notes to and from one peer; a wait ends at its deadline or when the peer is lost."""

    def __init__(self, engine: af.Engine, peer: af.Address, *, timeout_s: float) -> None:
        self._engine = engine
        self._peer = peer
        self._timeout_s = timeout_s
        self._sent = 0
        self._pieces: dict[int, dict[int, bytes]] = {}
        # Nobody ever counts here: it fails as soon as the peer dies.
        self._liveness = engine.counter(sources=[peer])

    def close(self) -> None:
        """Stop watching the peer."""
        self._liveness.close()

    def send(self, note: Note) -> None:
        """Send a note and wait until the peer's engine has it.

        Raises:
            af.AnyFabricError: A piece could not be delivered; `PeerLost` if the peer is dead.
        """
        self._sent += 1
        transfers = [
            self._engine.send(self._peer, piece, timeout_s=self._timeout_s)
            for piece in encode_note(note, self._sent)
        ]
        for transfer in transfers:
            transfer.wait(self._timeout_s)

    def receive(self, *, timeout_s: float | None = None) -> Note:
        """Wait for a note.

        Args:
            timeout_s: Longest wait; the mailbox's by default.

        Raises:
            af.PeerLost: The peer died.
            af.WaitTimeout: Nothing came in time.
            ValueError: What came is no piece of a note.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        while True:
            left_s = deadline - time.monotonic()
            try:
                message = self._engine.receive(timeout_s=max(0.0, min(LIVENESS_S, left_s)))
            except af.WaitTimeout:
                self._check_peer()
                if left_s <= 0:
                    raise
                continue
            note = self._add(message.data) if message.source == self._peer else None
            if note is not None:
                return note

    def _check_peer(self) -> None:
        try:
            self._liveness.wait(1, timeout_s=0)
        except af.WaitTimeout:
            return

    def _add(self, data: bytes) -> Note | None:
        """Take one piece; return the note when it was the last."""
        if len(data) < PIECE.size:
            msg = f"a message of {len(data)} bytes is no piece of a note"
            raise ValueError(msg)
        magic, number, idx, count = PIECE.unpack_from(data)
        if magic != MAGIC or idx >= count:
            msg = f"a message that begins with {magic!r} is no piece of a note"
            raise ValueError(msg)
        pieces = self._pieces.setdefault(number, {})
        pieces[idx] = data[PIECE.size :]
        if len(pieces) < count:
            return None
        del self._pieces[number]
        return decode_note(b"".join(pieces[i] for i in range(count)))

"""Notes between the two processes: cut into pieces, and put together whatever the order."""

import random

import anyfabric as af
from anyfabric.demo.messages import PIECE, PIECE_BYTES, Mailbox, Note, encode_note


def test_notes_survive_any_order_of_their_pieces():
    notes = [Note("kind", {"number": number}, (b"", bytes(range(256)) * 1000, b"x")) for number in (1, 2)]
    pieces = [piece for note in notes for piece in encode_note(note, note.head["number"])]
    assert len(pieces) > 6
    assert all(len(piece) <= PIECE_BYTES + PIECE.size for piece in pieces)
    random.Random(1).shuffle(pieces)
    with af.Engine() as engine, af.Engine() as peer:
        mailbox = Mailbox(engine, peer.address, timeout_s=20)
        for piece in pieces:
            peer.send(engine.address, piece).wait(20)
        found = [mailbox.receive() for _ in notes]
        mailbox.close()
    assert sorted(found, key=lambda note: note.head["number"]) == notes

"""Watchers: what fires when, the word, and what closing does to what has not fired."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import anyfabric as af


@pytest.fixture
def moved(engine, peer):
    """A source of 64 bytes, the destination, and its descriptor."""
    src = engine.register(np.arange(64, dtype=np.uint8))
    dst = peer.allocate(64)
    return src, dst, dst.descriptor()


def test_the_word(engine):
    watcher = engine.watch()
    assert watcher.value == 0
    assert watcher.add() == 1
    assert watcher.add(5) == 6
    watcher.set(2**63)
    assert watcher.value == 2**63
    assert watcher.numpy().tolist() == [2**63]
    for wrong in (5, -1, 2**64):
        with pytest.raises(af.InvalidArgument):
            watcher.set(wrong)
    with pytest.raises(af.InvalidArgument):
        watcher.add(2**63)
    assert watcher.value == 2**63


def test_operations_fire_at_their_value(engine, peer, moved):
    src, dst, remote = moved
    watcher = engine.watch()
    with peer.counter() as counter:
        pages = af.WritePages(
            af.Pages(src, [3, 2, 1, 0], 16), af.Pages(remote, [0, 1, 2, 3], 16), imm=counter.imm
        )
        last = watcher.at(3, af.Write(src[0:8], remote[0:8], imm=counter.imm))
        first = watcher.at(1, pages)
        with pytest.raises(af.WaitTimeout):
            first.wait(0.05)
        assert not first.done
        watcher.add()
        first.wait(10)
        counter.wait(4, 10)
        assert dst.numpy().reshape(4, 16)[:, 0].tolist() == [48, 32, 16, 0]
        assert not last.done
        watcher.set(7)
        last.wait(10)
        counter.wait(5, 10)
        assert dst.numpy()[:8].tolist() == list(range(8))
        assert (first.value, last.value) == (1, 3)
        assert first.transfer.interval_ns[0] <= first.transfer.interval_ns[1]
        at_once = watcher.at(7, af.Write(src, remote))
        at_once.wait(10)


def test_a_store_through_numpy_fires(engine, moved):
    src, _, remote = moved
    watcher = engine.watch()
    trigger = watcher.at(1, af.Write(src, remote))
    watcher.numpy()[0] = 1
    trigger.wait(10)


def test_everything_is_checked_at_once(engine, moved):
    src, _, remote = moved
    watcher = engine.watch()
    with pytest.raises(af.InvalidArgument):
        watcher.at(1, af.Write(src[0:8], remote[0:9]))
    with pytest.raises(af.InvalidArgument):
        watcher.at(1, af.WritePages(af.Pages(src, [4], 16), af.Pages(remote, [0], 16)))
    for wrong in (-1, 2**64):
        with pytest.raises(af.InvalidArgument):
            watcher.at(wrong, af.Write(src, remote))
    own = engine.allocate(64).descriptor()
    for operation in (
        af.Write(src[0:64], own),
        af.WritePages(af.Pages(src, [0], 16), af.Pages(own, [0], 16)),
    ):
        with pytest.raises(af.InvalidArgument, match="this engine itself"):
            watcher.at(1, operation)
    assert str(engine.address) not in [known["address"] for known in engine.info()["peers"]]
    with pytest.raises(TypeError, match="`Write` or a `WritePages`"):
        watcher.at(1, src)
    with pytest.raises(TypeError, match="expected `Pages` of"):
        watcher.at(1, af.WritePages(src, remote))


def test_closing_cancels_what_has_not_fired(engine, moved):
    src, _, remote = moved
    watcher = engine.watch()
    trigger, other = (watcher.at(1, af.Write(src, remote)) for _ in range(2))
    other.cancel()
    with pytest.raises(af.Cancelled):
        other.wait(10)
    watcher.close()
    watcher.close()
    assert watcher.closed
    with pytest.raises(af.Cancelled):
        trigger.wait(10)
    with pytest.raises(af.Closed):
        watcher.at(1, af.Write(src, remote))


def test_the_word_outlives_the_watcher():
    with af.Engine() as engine:
        word = engine.watch().numpy()
    gc.collect()
    word[0] = 9
    assert word.tolist() == [9]

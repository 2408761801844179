"""`on_done`: where callbacks run, in what order, and what an exception in one does."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import numpy as np
import pytest

import anyfabric as af


def test_callbacks_run_once_on_the_thread_of_the_engine(engine, peer):
    src, dst = engine.register(np.ones(64)), peer.allocate(512)
    calls = []
    later = threading.Event()
    transfer = engine.write(src, dst.descriptor())
    transfer.on_done(lambda done: calls.append((done, done.done, threading.current_thread().name)))
    transfer.wait(10)
    # Callbacks run one after the other: when this one has run, a second call of the first would have, too.
    transfer.on_done(lambda _: later.set())
    assert later.wait(10)
    assert calls == [(transfer, True, "anyfabric-callbacks")]


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_an_exception_ends_in_the_log(engine, peer, caplog, kind):
    def fail(_):
        raise kind

    src, dst = engine.register(np.ones(64)), peer.allocate(512)
    later = threading.Event()
    with caplog.at_level(logging.ERROR, "anyfabric"):
        transfer = engine.write(src, dst.descriptor())
        transfer.on_done(fail)
        transfer.on_done(lambda _: later.set())
        assert later.wait(10)
    transfer.wait(0)
    assert kind.__name__ in caplog.text
    engine.write(src, dst.descriptor()).wait(10)


def test_a_callback_may_submit_and_close(peer):
    engine = af.Engine()
    src, dst = engine.register(np.ones(64)), peer.allocate(512)
    closed = threading.Event()

    def close(_):
        engine.close()
        closed.set()

    engine.write(src, dst.descriptor()).on_done(lambda _: engine.write(src, dst.descriptor()).on_done(close))
    assert closed.wait(10)
    assert engine.closed


def test_close_runs_what_is_due_and_joins(peer):
    engine = af.Engine()
    src, dst = engine.register(np.ones(64)), peer.allocate(512)
    calls = []
    for _ in range(100):
        engine.write(src, dst.descriptor()).on_done(calls.append)
    engine.close()
    assert len(calls) == 100
    assert all(transfer.done for transfer in calls)


def test_after_the_close_nobody_is_left_to_call(peer):
    engine = af.Engine()
    transfer = engine.write(engine.allocate(64), peer.allocate(64).descriptor())
    late = []

    def register_late(_):
        engine.close()
        with pytest.raises(af.Closed):
            transfer.on_done(late.append)
        late.append("refused")

    transfer.on_done(register_late)
    engine._service()._thread.join(10)
    assert late == ["refused"]
    with pytest.raises(af.Closed) as error:
        transfer.on_done(late.append)
    assert error.value.operation == "on_done"
    assert late == ["refused"]


def test_what_is_registered_while_the_engine_closes_is_called_or_refused(peer):
    for _ in range(20):
        engine = af.Engine()
        transfer = engine.write(engine.allocate(64), peer.allocate(64).descriptor())
        called, accepted = [], 0
        closing = threading.Thread(target=engine.close)
        closing.start()
        try:
            while True:
                transfer.on_done(called.append)
                accepted += 1
        except af.Closed:
            closing.join(10)
        engine._service()._thread.join(10)
        assert len(called) == accepted


def test_an_engine_nobody_uses_is_collected_with_its_thread():
    before = set(threading.enumerate())
    engine = af.Engine()
    threads = set(threading.enumerate()) - before
    assert [thread.name for thread in threads] == ["anyfabric-callbacks"]
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_one_log_line_per_new_peer(caplog):
    with caplog.at_level(logging.INFO, "anyfabric"), af.Engine() as engine, af.Engine() as peer:
        engine.connect(peer.address)
        src, dst = engine.register(np.ones(8)), peer.allocate(64)
        engine.write(src, dst.descriptor()).wait(10)
        engine.write(src, dst.descriptor()).wait(10)
        written = threading.Event()
        # The thread that writes the log also runs the callbacks, in the order in which both became due.
        engine.write(src, dst.descriptor()).on_done(lambda _: written.set())
        assert written.wait(10)
        lines = [r.getMessage() for r in caplog.records if str(peer.address) in r.getMessage()]
    assert len(lines) == 1
    assert "shm" in lines[0]

"""No blocking call holds the interpreter lock: another Python thread ends what each of these waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import anyfabric as af

LONG_S = 20.0
"""Until a call that keeps the other thread out gives up by itself."""


def stop(pid: int) -> None:
    """Stop every thread of a process; return when they stand."""
    os.kill(pid, signal.SIGSTOP)
    stats = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
    while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in stats):
        time.sleep(0.001)


class Stopped:
    """A peer in a process of its own that stands still: its one region is known, and nothing of it mapped."""

    def __init__(self) -> None:
        program = (
            "import anyfabric as af, sys\n"
            "engine = af.Engine()\n"
            "region = engine.allocate(1 << 20)\n"
            "print(region.descriptor().to_bytes().hex(), flush=True)\n"
            "sys.stdin.read()\n"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", program], **pipes)
        assert self.process.stdout
        self.remote = af.Descriptor.from_bytes(bytes.fromhex(self.process.stdout.readline().decode()))
        stop(self.process.pid)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def stopped():
    peer = Stopped()
    yield peer
    peer.end()


def ends_by(act, call, *errors):
    """Run `call`, which blocks until `act` is done by another thread a moment later."""
    acted = threading.Event()

    def later():
        time.sleep(0.2)
        acted.set()
        act()

    other = threading.Thread(target=later)
    other.start()
    began = time.monotonic()
    with contextlib.suppress(*errors):
        call()
    took = time.monotonic() - began
    assert acted.is_set(), "it did not block"
    other.join()
    assert took < LONG_S, "the other thread was kept out"


def pending(engine, stopped):
    source = engine.allocate(1 << 20)
    return engine.write(source, stopped.remote, timeout_s=2 * LONG_S)


def test_counter_wait(engine):
    with engine.counter() as counter:
        ends_by(counter.close, lambda: counter.wait(1, LONG_S), af.Closed)


def test_receive(engine, peer):
    ends_by(lambda: peer.send(engine.address, b"x"), lambda: engine.receive(timeout_s=LONG_S))


def test_transfer_wait(engine, stopped):
    transfer = pending(engine, stopped)
    ends_by(transfer.cancel, lambda: transfer.wait(LONG_S), af.Cancelled)


def test_wait_quiesced(engine, stopped):
    transfer = pending(engine, stopped)
    ends_by(stopped.go_on, lambda: transfer.wait_quiesced(LONG_S))


def test_full_queue(stopped):
    with af.Engine(queue_depth=1) as engine:
        first = pending(engine, stopped)
        ends_by(first.cancel, lambda: pending(engine, stopped).cancel())
        stopped.go_on()


def test_room_that_another_thread_took(stopped):
    stopped.go_on()
    with af.Engine(queue_depth=1, transports=("tcp",), timeout_s=LONG_S, heartbeat_s=LONG_S) as engine:
        src = engine.allocate(8)
        engine.connect(stopped.remote.address)
        over = threading.Event()

        def submit():
            while not over.is_set():
                engine.write(src, stopped.remote[:8])

        threads = [threading.Thread(target=submit) for _ in range(6)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for _ in range(20):
            time.sleep(0.02)  # one writes, the others wait for room
            stop(stopped.process.pid)
            time.sleep(0.02)
            stopped.go_on()
        over.set()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < LONG_S, "who waited for room kept this thread out"


def test_engine_close(engine, stopped):
    pending(engine, stopped)
    ends_by(stopped.go_on, lambda: engine.close(timeout_s=LONG_S))


@pytest.mark.parametrize("call", ["connect", "peer_group"])
def test_meeting_who_never_answers(call):
    with socket.create_server(("127.0.0.1", 0)) as listener, af.Engine(timeout_s=LONG_S) as engine:
        port = listener.getsockname()[1]
        nobody = af.Address.parse(f"af://127.0.0.1:{port}/{'07' * 16}")
        meet = {
            "connect": lambda: engine.connect(nobody),
            "peer_group": lambda: engine.peer_group([nobody]),
        }
        ends_by(lambda: engine.close(timeout_s=0), meet[call], af.AnyFabricError)


@pytest.mark.parametrize("what", ["revoke", "region"])
def test_taking_memory_back(what):
    engine = af.Engine()
    region = engine.allocate(4096)
    program = (
        "import anyfabric as af, sys\n"
        "remote = af.Descriptor.from_bytes(bytes.fromhex(sys.argv[1]))\n"
        "engine = af.Engine()\n"
        "engine.write(engine.allocate(4096), remote).wait(20)\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writer = subprocess.Popen([sys.executable, "-c", program, region.descriptor().to_bytes().hex()], **pipes)
    assert writer.stdout
    assert writer.stdout.readline() == b"written\n"
    # It has the memory mapped, and answers nobody.
    stop(writer.pid)
    take = {
        "revoke": lambda: region.revoke(timeout_s=LONG_S),
        "region": lambda: region.close(timeout_s=LONG_S),
    }[what]
    ends_by(lambda: os.kill(writer.pid, signal.SIGCONT), take)
    engine.close()
    writer.kill()
    writer.communicate()


def test_a_daemon_thread_that_waits_at_the_end_does_no_harm():
    """It hears that the engine is closed while the interpreter ends, which ended the process with SIGABRT."""
    code = """if True:
        import threading, anyfabric as af
        engine = af.Engine()
        def serve():
            while True:
                try:
                    engine.receive(timeout_s=1)
                except af.AnyFabricError:
                    pass
        for _ in range(4):
            threading.Thread(target=serve, daemon=True).start()
    """
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

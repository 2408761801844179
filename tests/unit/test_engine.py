"""The engine as an object: settings, introspection, bad input, closing, forking."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

import anyfabric as af
from anyfabric import config


def test_settings_reach_the_engine_with_their_origin(monkeypatch):
    monkeypatch.setenv("ANYFABRIC_HEARTBEAT_S", "0.5")
    monkeypatch.setenv("ANYFABRIC_POLING", "busy")
    with af.Engine(tcp_streams=3, secret="hunter2") as engine:
        found = engine.info()
    settings = {row["name"]: row for row in found["settings"]}
    assert list(settings) == [setting.name for setting in config.SETTINGS]
    assert (settings["tcp_streams"]["value"], settings["tcp_streams"]["origin"]) == (3, "argument")
    assert (settings["heartbeat_s"]["value"], settings["heartbeat_s"]["origin"]) == (0.5, "environment")
    assert settings["secret"]["value"] == "(set)"
    assert found["unknown_variables"] == ["ANYFABRIC_POLING"]
    assert "hunter2" not in json.dumps(found)


def test_info_and_stats_are_json_and_name_the_transports(engine, peer):
    nbytes = 4 << 20
    src, dst = engine.register(np.ones(nbytes, np.uint8)), peer.allocate(nbytes)
    engine.write(src, dst.descriptor()).wait(10)
    found = json.loads(json.dumps(engine.info()))
    assert found["address"] == str(engine.address)
    assert [transport["name"] for transport in found["transports"]] == ["nvlink", *config.TRANSPORTS]
    assert all(transport["available"] or transport["reason"] for transport in found["transports"])
    (device,) = found["devices"]
    assert re.fullmatch(r"cpu:\d+", device["device"])
    assert all(set(nic) == {"name", "distance"} for nic in device["nics"])
    assert found["worker"] == {"cpus": [], "reason": "no NIC is open"}
    stats = json.loads(json.dumps(engine.stats()))["peers"][str(peer.address)]
    assert (stats["bytes"], stats["operations"], stats["errors"]) == (nbytes, 1, 0)
    assert 0 < stats["latency_us"]["p50"] <= stats["latency_us"]["max"]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_stats_have_what_was_waited_for(transport):
    with af.Engine(transports=(transport,), tcp_streams=1) as engine, af.Engine() as peer:
        num_pages, page_bytes = 256, 4096
        nbytes = num_pages * page_bytes
        src, dst = engine.allocate(nbytes), peer.allocate(nbytes)
        remote = dst.descriptor()
        pages = [af.Pages(region, np.arange(num_pages), page_bytes) for region in (src, remote)]
        engine.connect(peer.address)
        for number in range(1, 101):
            if number % 2:
                engine.write_pages(*pages).wait(10)
            else:
                engine.write(src, remote, verify=True).wait(10)  # by another link than the path's
            stats = engine.stats()["peers"][str(peer.address)]
            assert (stats["bytes"], stats["operations"], stats["errors"]) == (number * nbytes, number, 0)
            assert stats["bytes"] == sum(nic["bytes"] for nic in stats["nics"].values())


@pytest.mark.parametrize(("transport", "num_nics"), [("shm", 1), ("tcp", 1), ("tcp", 4)])
def test_stats_count_operations_and_not_their_parts(transport, num_nics):
    with (
        af.Engine(transports=(transport,), tcp_streams=num_nics) as engine,
        af.Engine() as peer,
        af.Engine() as other,
    ):
        nbytes = 8 << 20
        src, dst, elsewhere = engine.allocate(nbytes), peer.allocate(nbytes), other.allocate(100)
        here, there = dst.descriptor(), elsewhere.descriptor()
        engine.connect(peer.address)

        def seen(of):
            stats = engine.stats()["peers"].get(str(of), {"operations": 0, "errors": 0, "bytes": 0})
            return stats["operations"], stats["errors"], stats["bytes"]

        assert seen(peer.address) == (0, 0, 0)
        for done in range(1, 100):
            parts = sum(nic["parts"] for nic in engine.stats()["peers"][str(peer.address)]["nics"].values())
            engine.write(src, here).wait(10)
            assert seen(peer.address) == (done, 0, done * nbytes)
            nics = engine.stats()["peers"][str(peer.address)]["nics"].values()
            if sum(nic["parts"] for nic in nics) - parts == num_nics:  # streams come one after the other
                break
        else:
            pytest.fail(f"never a part on each NIC: {nics}")
        targets = [af.Target(here, 0, 0, 100), af.Target(there, 0, 0, 100), af.Target(here, 0, 200, 100)]
        engine.scatter(src, targets).wait(10)
        engine.barrier([peer.address, other.address], imm=1).wait(10)
        engine.send(peer.address, b"hello").wait(10)
        assert seen(peer.address) == (done + 3, 0, done * nbytes + 205)
        assert seen(other.address) == (2, 0, 100)
        elsewhere.close()
        for failed in range(1, 4):
            with pytest.raises(af.Refused):
                engine.write(src[:8], there[:8]).wait(10)
            assert seen(other.address) == (2 + failed, failed, 100)


def test_stats_have_operations_that_found_nobody(engine):
    with af.Engine() as gone:
        region = gone.allocate(8)
        address, remote = gone.address, region.descriptor()
    with pytest.raises(af.ConnectionBroken):
        engine.write(engine.allocate(8), remote).wait(10)
    stats = engine.stats()["peers"][str(address)]
    assert (stats["transport"], stats["operations"], stats["errors"], stats["bytes"]) == ("none", 1, 1, 0)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_path(transport):
    with af.Engine(transports=(transport,)) as engine, af.Engine() as peer:
        assert engine.path(peer.address) == af.Path("none", (), "new", "")
        engine.connect(peer.address)
        until = time.monotonic() + 10
        while (path := engine.path(peer.address)).state != "ready" and time.monotonic() < until:
            time.sleep(0.01)  # the data streams follow the control connection
        assert (path.transport, path.state) == (transport, "ready")
        assert path.nics


def test_require_takes_no_faster_path():
    with af.Engine(require="tcp") as engine, af.Engine() as peer:
        engine.connect(peer.address)
        path = engine.path(peer.address)
        assert path.transport == "tcp"
        assert "shm: tcp is required" in path.reason


def test_require_refuses_a_slower_path():
    with (
        af.Engine(require="shm") as engine,
        af.Engine(transports=("tcp",)) as peer,
        pytest.raises(af.Unsupported, match="shm"),
    ):
        engine.connect(peer.address, timeout_s=20)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(af.InvalidArgument, match="tcp_streams"):
        af.Engine(tcp_streams=9)
    with pytest.raises(af.InvalidArgument, match=r"203\.0\.113\.7"):
        af.Engine(listen="203.0.113.7:0")
    with pytest.raises(TypeError):
        af.Engine(pollin="busy")


def test_bad_operations_are_refused_and_the_engine_goes_on(engine, peer):
    src, dst = engine.register(np.arange(64, dtype=np.uint8)), peer.allocate(64)
    remote = dst.descriptor()
    bad = [
        lambda: engine.write(src[0:8], remote[0:9]),
        lambda: engine.write(src, remote, imm=-1),
        lambda: engine.write(src, remote, imm=2**30),
        lambda: engine.write(src, remote, imm=2**40),
        lambda: engine.write(src, remote, timeout_s=-1),
        lambda: engine.write(src, remote, timeout_s=float("nan")),
        lambda: engine.write_pages(af.Pages(src, [0, 1], 8), af.Pages(remote, [0], 8)),
        lambda: engine.write_pages(af.Pages(src, [0], 8), af.Pages(remote, [0], 16)),
        lambda: engine.write_pages(af.Pages(src, [8], 8), af.Pages(remote, [0], 8)),
        lambda: engine.write_pages(af.Pages(src, [0], 8), af.Pages(remote, [2**32 - 1], 8, stride=2**60)),
        lambda: engine.scatter(src, [af.Target(remote, 60, 0, 8)]),
        lambda: engine.scatter(src, [af.Target(remote, 0, 60, 8)]),
        lambda: engine.scatter(src, [af.Target(remote, -1, 0, 8)]),
        lambda: engine.send(peer.address, bytes(1 << 20)),
        lambda: engine.counter(imm=2**29),
        lambda: engine.allocate(-1),
        lambda: engine.allocate(2**63),
        lambda: engine.peer_group([peer.address, peer.address]),
    ]
    for number, operation in enumerate(bad):
        with pytest.raises((af.InvalidArgument, af.ResourceExhausted)):
            operation()
            pytest.fail(f"operation {number} was not refused")
    engine.write(src, remote).wait(10)
    assert (dst.numpy() == src.numpy()).all()


def test_native_code_takes_no_other_arrays_for_indices(engine, peer):
    src, dst = engine.allocate(64), peer.allocate(64)
    remote = dst.descriptor()
    fitting, rest = np.arange(4, dtype=np.uint32), (None, False, None)
    swapped, odd = fitting.astype(">u4"), np.zeros(17, np.uint8)[1:].view(np.uint32)
    for other in (
        fitting[::2],
        fitting.reshape(2, 2),
        fitting.view(np.int32),
        fitting[:2].view(np.uint64),
        swapped,
        odd,
    ):
        with pytest.raises(TypeError, match="a contiguous array of uint32 with one dimension"):
            engine._write_pages(src, (other, 8, 8, 0), remote, (fitting, 8, 8, 0), *rest)
    with pytest.raises(AttributeError, match="__array_struct__"):
        engine._write_pages(src, ([0], 8, 8, 0), remote, (fitting, 8, 8, 0), *rest)
    engine._write_pages(src, (fitting, 8, 8, 0), remote, (fitting, 8, 8, 0), *rest).wait(10)


def test_a_later_engine_takes_nothing_from_an_earlier_one_that_used_the_same_descriptor():
    with af.Engine(transports=("tcp",)) as peer:
        region = peer.allocate(8)
        remote = region.descriptor()
        for turn in range(50):  # some of them lie where another one lay
            with af.Engine(transports=("tcp",)) as engine:
                src = engine.allocate(8)
                src.numpy()[:] = turn
                engine.connect(peer.address)
                engine.write(src, remote).wait(10)
                engine.scatter(src, [af.Target(remote, 0, 0, 8)]).wait(10)
            assert (region.numpy() == turn).all()
            del engine, src


def test_connecting_needs_no_room():
    with (
        af.Engine(queue_depth=1, queue_full="raise") as engine,
        af.Engine() as one,
        af.Engine() as other,
    ):
        assert len(engine.peer_group([one.address, other.address])) == 2


def test_a_full_queue_names_what_it_has_no_room_for():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        af.Engine(queue_depth=1, queue_full="raise") as engine,
    ):
        nobody = af.Address.parse(f"af://127.0.0.1:{silent.getsockname()[1]}/{'07' * 16}")
        pending = engine.send(nobody, b"first")
        for operation, submit in (
            ("send", lambda: engine.send(nobody, b"12345")),
            ("barrier", lambda: engine.barrier([nobody], imm=1)),
        ):
            with pytest.raises(af.QueueFull) as caught:
                submit()
            context = caught.value.context()
            assert (context["operation"], context["peer"]) == (operation, str(nobody))
            assert context["nbytes"] == (5 if operation == "send" else 0)
        pending.cancel()


def test_a_scatter_of_many_targets_is_submitted_before_its_peer_is_met(engine, peer):
    """Each target takes the same time, also while there is no path yet."""
    src, dst, counter = engine.allocate(64), peer.allocate(64), peer.counter()
    # In time that grows with their square this takes minutes, and pytest ends it.
    targets = [af.Target(dst.descriptor(), 0, 0, 8)] * 500_000
    engine.scatter(src, targets, imm=counter.imm).wait(20)
    counter.wait(500_000, timeout_s=20)


@pytest.mark.parametrize(("timeout_s", "said"), [(0.05, "0.05 s"), (0.0004, "0.0004 s"), (1.25, "1.25 s")])
def test_a_deadline_that_passed_is_the_one_that_was_given(engine, timeout_s, said):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = af.Address.parse(f"af://127.0.0.1:{silent.getsockname()[1]}/{'07' * 16}")
        with pytest.raises(af.TransferTimeout, match=f"the deadline of {said} passed"):
            engine.send(nobody, b"", timeout_s=timeout_s).wait()


def test_who_copies_while_it_waits_looks_at_deadlines_meanwhile(engine):
    """In memory that nobody has touched, where a megabyte takes its time; each peer has some to come."""
    nbytes, peers = 8 << 20, [af.Engine() for _ in range(8)]
    src = engine.allocate(nbytes)
    for peer in peers:
        engine.connect(peer.address)
    for _ in range(5):
        targets = [peer.allocate(nbytes) for peer in peers]
        transfers = [engine.write(src, target.descriptor()) for target in targets]
        behind_them = engine.write(src, targets[-1].descriptor(), timeout_s=0)
        with pytest.raises(af.TransferTimeout):
            behind_them.wait()
        for transfer in transfers:
            transfer.wait()
    for peer in peers:
        peer.close()


def test_a_deadline_is_met_by_an_engine_that_had_nothing_to_do():
    """Which looks at its clock four times a second only, whoever waits."""
    silent = "import anyfabric as af; engine = af.Engine(); print(engine.address, flush=True); input()"
    engines, late_s = [af.Engine(heartbeat_s=60) for _ in range(12)], []
    with subprocess.Popen(
        [sys.executable, "-c", silent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            address = af.Address.parse(process.stdout.readline().strip())
            for engine in engines:
                engine.send(address, b"").wait(10)
            time.sleep(0.6)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            for idx, engine in enumerate(engines):
                ended = threading.Event()
                began = time.monotonic()
                transfer = engine.send(address, b"", timeout_s=0.02)
                if idx % 2:
                    transfer.on_done(lambda _, ended=ended: ended.set())
                    assert ended.wait(10)
                else:
                    with pytest.raises(af.TransferTimeout):
                        transfer.wait()
                late_s.append(time.monotonic() - began - 0.02)
        finally:
            process.kill()
    for engine in engines:
        engine.close()
    # A busy machine may keep one or another process waiting.
    assert sorted(late_s)[-3] < 0.1, late_s


def test_foreign_and_closed_things(engine, peer):
    src, dst = engine.allocate(8), peer.allocate(8)
    foreign = peer.allocate(8)
    with pytest.raises(af.InvalidArgument):
        engine.write(foreign, dst.descriptor())
    with engine.counter(imm=5), pytest.raises(af.InvalidArgument):
        engine.counter(imm=5)
    part = src[0:4]
    src.close()
    with pytest.raises(af.Closed) as caught:
        engine.write(part, dst.descriptor()[0:4])
    assert (caught.value.operation, caught.value.region) == ("write", src.id)


def test_an_error_names_what_it_was_about(engine, peer):
    src, dst = engine.allocate(64), peer.allocate(64)
    remote = dst.descriptor()
    engine.write(src, remote).wait(10)
    dst.close()
    transfer = engine.write(src, remote)
    with pytest.raises(af.Refused) as caught:
        transfer.wait(10)
    error = caught.value
    assert transfer.failed
    assert transfer.error.code == error.code == "refused"
    assert error.operation == "write"
    assert error.peer == str(peer.address)
    assert error.nbytes == 64
    assert error.path.startswith("shm")


def test_closed_engines_say_so(peer):
    engine = af.Engine()
    src, remote = engine.allocate(8), peer.allocate(8).descriptor()
    counter = engine.counter()
    failures = []

    def wait():
        try:
            counter.wait(1)
        except af.Closed as error:
            failures.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.05)  # most likely it waits by then; closed before, the counter raises the same
    threads = [threading.Thread(target=engine.close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in [*threads, waiting]:
        thread.join(10)
        assert not thread.is_alive()
    engine.close()
    assert engine.closed
    assert len(failures) == 1
    part = af.Pages(src, [0], 8), af.Pages(remote, [0], 8)
    for name, operation in {
        "write": lambda: engine.write(src, remote),
        "write_pages": lambda: engine.write_pages(*part),
        "scatter": lambda: engine.scatter(src, [af.Target(remote, 0, 0, 8)]),
        "barrier": lambda: engine.barrier([peer.address], imm=1),
        "send": lambda: engine.send(peer.address, b""),
        "receive": lambda: engine.receive(timeout_s=0),
        "connect": lambda: engine.connect(peer.address),
        "peer_group": lambda: engine.peer_group([peer.address]),
        "allocate": lambda: engine.allocate(8),
        "register": lambda: engine.register(np.zeros(1)),
        "descriptor": src.descriptor,
        "revoke": src.revoke,
        "view": src.numpy,
        "counter": engine.counter,
        "watch": engine.watch,
    }.items():
        with pytest.raises(af.Closed) as caught:
            operation()
        assert caught.value.operation == name
    for question in (engine.stats, engine.info):
        with pytest.raises(af.Closed):
            question()
    assert repr(engine)


PROGRAM_AT_EXIT = """
import numpy as np, anyfabric as af
engine, peer = af.Engine(), af.Engine()
src, dst = engine.register(np.ones(1 << 20)), peer.allocate(8 << 20)
transfers = [engine.write(src, dst.descriptor()) for _ in range(8)]
transfers[0].on_done(lambda t: None)
"""


def test_the_interpreter_ends_with_transfers_in_flight():
    done = subprocess.run([sys.executable, "-c", PROGRAM_AT_EXIT], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    # Which engine goes first is left to the interpreter; the other may log that it lost it.
    assert "Traceback" not in done.stderr
    assert "panic" not in done.stderr


def test_a_forked_child_is_told_and_the_parent_goes_on(engine, peer):
    src, dst = engine.register(np.ones(8)), peer.allocate(64)
    remote = dst.descriptor()
    engine.write(src, remote).wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what this is about
        child = os.fork()
    if child == 0:
        code = 1
        try:
            for operation in (
                lambda: engine.write(src, remote),
                lambda: engine.allocate(8),
                engine.counter,
                engine.stats,
            ):
                try:
                    operation()
                    os._exit(2)
                except af.EngineForked:
                    pass
            with af.Engine() as fresh, af.Engine() as other:
                target = other.allocate(8)
                fresh.write(fresh.allocate(8), target.descriptor()).wait(10)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    engine.write(src, remote).wait(10)


def test_ctrl_c_ends_a_wait():
    program = (
        "import anyfabric as af, _thread, threading\n"
        "with af.Engine() as e, e.counter() as c:\n"
        "    try:\n"
        "        threading.Timer(0.3, _thread.interrupt_main).start()\n"
        "        c.wait(1, 40)\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "interrupted\n"


@pytest.mark.parametrize("device", ["cuda:99", "gpu:ffff:ff:1f.7", "cpu:1024", "host"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(af.InvalidArgument, match=f"there is no device {device}; this machine has cpu:"):
        af.Engine(devices=[device])

"""The workload of the comparison: its Python and C definitions must place and check the same bytes."""

import contextlib
import shutil
import socket
import struct

import numpy as np
import pytest
from benchmarks.peers import build, pair, workload
from benchmarks.peers.workload import Load, Operation, Shape

DATA_BYTES = 1 << 20
PAGED = Shape(Operation.PAGES, 1024, 64, 512 << 10)
PLAIN = Shape(Operation.WRITE, 64 << 10, 1, 1 << 20)
BLOB = struct.Struct("<iiQH6x")
"""`struct blob` of baseline.c: pid, memfd, base, port."""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def data_of(load):
    """What a target must hold, made without `expected_target`: page by page, from the definition."""
    source = np.empty(DATA_BYTES, dtype=np.uint8)
    workload.fill_source(source, load.seed)
    target = np.empty(DATA_BYTES, dtype=np.uint8)
    workload.fill_target(target)
    size = load.shape.size_bytes
    place = workload.Placement.of(load) if load.shape.op is Operation.PAGES else None
    for call in range(load.total_calls):
        if place is None:
            at = workload.offset_of_call(load, call)
            target[at : at + size] = source[at : at + size]
            continue
        for src, dst in zip(*place.of_call(call), strict=True):
            target[dst * size : (dst + 1) * size] = source[src * size : (src + 1) * size]
    return target


def test_mix_is_splitmix64():
    assert workload.mix(0) == 0xE220A8397B1DCDAF
    assert workload.mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_mixed_words_follow_mix():
    words = workload.mixed_words(7, 5)
    assert [int(word) for word in words] == [
        workload.mix(workload.mix(7) + i & (1 << 64) - 1) for i in range(5)
    ]


def test_order_is_a_permutation_and_depends_on_seed_and_salt():
    orders = [workload.order(seed, salt, 1000) for seed in (1, 2) for salt in (3, 4)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4


@pytest.mark.parametrize("num_calls", [1, 3, 8, 11])
@pytest.mark.parametrize("shape", [PAGED, PLAIN])
def test_check_knows_every_byte(shape, num_calls):
    load = Load(shape, num_calls, 2, seed=5)
    target = data_of(load)
    assert workload.num_wrong_bytes(target, load) == 0
    for at in (0, 700_000, DATA_BYTES - 1):
        target[at] ^= 0x10
    assert workload.num_wrong_bytes(target, load) == 3


def test_check_sees_a_missing_and_a_misplaced_page():
    load = Load(PAGED, 2, 0, seed=5)
    target = data_of(load)
    _, slots = workload.Placement.of(load).of_call(1)
    pages = target.reshape(-1, 1024)
    pages[slots[0]] = workload.CLEAR_BYTE
    assert workload.num_wrong_bytes(target, load) > 900
    target = data_of(load)
    pages = target.reshape(-1, 1024)
    pages[slots[[0, 1]]] = pages[slots[[1, 0]]]
    assert workload.num_wrong_bytes(target, load) > 1800


def test_load_survives_the_protocol():
    load = Load(PAGED, 3, 1, seed=99)
    assert Load.parse(load.words().split()) == load


def test_pages_must_divide_the_slots():
    with pytest.raises(ValueError, match="no multiple"):
        workload.Placement.of(Load(Shape(Operation.PAGES, 1024, 63, 64 << 10), 1, 0, seed=1))


@pytest.fixture
def baseline():
    """Start one process of the C program, in the given role."""
    with contextlib.ExitStack() as stack:

        def start(role, *arguments):
            process = pair.Process(role, [str(build.baseline()), *arguments], {}, build.FOLDER)
            stack.callback(process.end)
            return process

        yield start


def ask(process, line):
    process.ask(line)
    answer = None
    while answer is None:
        answer = process.read()
    return answer


def blob_of(port):
    return BLOB.pack(0, 0, 0, port).hex()


def receive(stream, nbytes):
    received = bytearray()
    while len(received) < nbytes:
        chunk = stream.recv(nbytes - len(received))
        assert chunk
        received += chunk
    return bytes(received)


@needs_cc
@pytest.mark.parametrize("shape", [PAGED, PLAIN])
def test_a_c_source_sends_what_python_expects(baseline, shape):
    load = Load(shape, 3, 1, seed=21)
    contents = np.empty(DATA_BYTES, dtype=np.uint8)
    workload.fill_source(contents, load.seed)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = baseline("source", "tcp", "1")
        ask(source, f"setup source {DATA_BYTES}")
        ask(source, f"connect {blob_of(listener.getsockname()[1])}")
        stream, _ = listener.accept()
    with stream:
        ask(source, f"fill {load.seed}")
        source.ask(f"run {load.words()}")
        for call in range(load.total_calls):
            received = receive(stream, shape.size_bytes * shape.num_pages)
            stream.sendall(b"\1")
            if shape is PAGED:
                slots, _ = workload.Placement.of(load).of_call(call)
                expected = contents.reshape(-1, shape.size_bytes)[slots].tobytes()
            else:
                at = workload.offset_of_call(load, call)
                expected = contents[at : at + shape.size_bytes].tobytes()
            assert received == expected
        assert len(source.read().split()) == load.num_calls


@needs_cc
@pytest.mark.parametrize("damage", [0, 1])
@pytest.mark.parametrize("shape", [PAGED, PLAIN])
def test_a_c_target_places_and_checks_what_python_sends(baseline, shape, damage):
    load = Load(shape, 3, 1, seed=22)
    contents = np.empty(DATA_BYTES, dtype=np.uint8)
    workload.fill_source(contents, load.seed)
    target = baseline("target", "tcp", "1")
    blob = bytes.fromhex(ask(target, f"setup target {DATA_BYTES}"))
    port = BLOB.unpack(blob)[3]
    with socket.create_connection(("127.0.0.1", port)) as stream:
        ask(target, f"connect {blob_of(0)}")
        ask(target, f"fill {load.seed}")
        target.ask(f"run {load.words()}")
        for call in range(load.total_calls):
            if shape is PAGED:
                slots, _ = workload.Placement.of(load).of_call(call)
                moved = contents.reshape(-1, shape.size_bytes)[slots].tobytes()
            else:
                at = workload.offset_of_call(load, call)
                moved = contents[at : at + shape.size_bytes].tobytes()
            stream.sendall(bytes([moved[0] ^ damage]) + moved[1:])
            assert receive(stream, 1) == b"\1"
        assert target.read() == ""
        assert ask(target, f"verify {load.words()}") == str(damage * load.total_calls)


@needs_cc
@pytest.mark.parametrize("shape", [PAGED, PLAIN, Shape(Operation.NOTIFY, 8, 1, DATA_BYTES)])
def test_a_pair_measures_and_verifies(shape):
    command = [str(build.baseline()), "memcpy"]
    with pair.Pair(command, {}, build.FOLDER, DATA_BYTES) as both:
        measured = both.measure(Load(shape, 4, 1, seed=3))
    assert len(measured.durations_ns) == 4
    assert measured.num_wrong == 0


@needs_cc
def test_a_contender_that_fails_is_quoted():
    command = [str(build.baseline()), "vmwrite"]
    with (
        pair.Pair(command, {}, build.FOLDER, DATA_BYTES) as both,
        pytest.raises(pair.PairError, match="does not measure"),
    ):
        both.measure(Load(Shape(Operation.NOTIFY, 8, 1, DATA_BYTES), 4, 1, seed=3))


def test_a_program_that_dies_is_quoted():
    with pytest.raises(pair.PairError, match="status 3, last line: no such library"):
        pair.Pair(["sh", "-c", "echo no such library >&2; exit 3"], {}, build.FOLDER, DATA_BYTES)

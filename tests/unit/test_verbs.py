"""NICs from Python, over a libibverbs without hardware: settings reach it, and what is wrong is said."""

from __future__ import annotations

import resource

import pytest

import anyfabric as af


@pytest.fixture
def verbs(null_nic):
    """What makes an engine of these NICs, and what turns their knobs, until the test ends."""
    library, knob = null_nic
    turned = {}

    def turn(name, value):
        turned.setdefault(name, knob(name))
        knob(name, value)

    yield (
        lambda *nics, **more: af.Engine(transports=("verbs",), verbs_library=library, nics=nics, **more),
        turn,
    )
    for name, before in turned.items():
        knob(name, before)


def test_every_setting_reaches_the_device(verbs, null_nic):
    engine, turn = verbs
    turn("gid_index", 5)
    given = {
        "gid_index": 5,
        "traffic_class": 106,
        "service_level": 3,
        "pkey_index": 517,
        "ack_timeout": 19,
        "retry_count": 4,
        "rnr_retry": 2,
        "rnr_timer": 21,
    }
    with engine("null0", **given) as here, engine("null0", **given) as there:
        here.connect(there.address)
        assert here.path(there.address).transport == "verbs"
    names = {"gid_index": "sgid_index", "ack_timeout": "timeout"}
    assert {name: null_nic[1](names.get(name, name)) for name in given} == given
    for is_relaxed in (True, False):
        more = {"relaxed_ordering": is_relaxed}
        with engine("null0", **more) as here, engine("null0", **more) as there:
            target = there.allocate(64)
            write(here, target)
            assert bool(null_nic[1]("access") >> 20 & 1) == is_relaxed


def write(here, target):
    remote = af.Descriptor.from_bytes(target.descriptor().to_bytes())
    source = here.allocate(64)
    here.write(source, remote).wait(timeout_s=20)


WRONG = [
    ("no such NIC", ("mlx5_7",), {}, "there is no NIC mlx5_7; this host has null0"),
    ("no such port", ("null0:9",), {}, "null0: no active port: it has no such port"),
    ("no active port", ("null0",), {"port_is_down": 1}, "null0: no active port: port 1 is down"),
    ("no permission", ("null2",), {"shut": 4}, "null2 cannot be opened: Permission denied.*/dev/infiniband"),
    ("no GID", ("null0",), {"gid_index": 77}, "null0: port 1 has no GID"),
]


@pytest.mark.parametrize(("nics", "knobs", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_nic_that_cannot_serve_is_named(verbs, nics, knobs, said):
    engine, turn = verbs
    for name, value in knobs.items():
        turn(name, value)
    with pytest.raises(af.InvalidArgument, match=said):
        engine(*nics)


def test_a_library_that_is_not_there():
    with pytest.raises(af.Unsupported, match=r"/nowhere\.so.*install libibverbs1 and ibverbs-providers"):
        af.Engine(require="verbs", verbs_library="/nowhere.so")
    # Something else, or half of it.
    with pytest.raises(af.Unsupported, match="libibverbs has no ibv_get_device_list"):
        af.Engine(require="verbs", verbs_library="libc.so.6")


def test_the_limit_of_locked_memory_is_named(verbs):
    engine, turn = verbs
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with engine("null0") as here, engine("null0") as there:
        target = there.allocate(64)
        write(here, target)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, hard))
        turn("no_memory", 1)
        try:
            said = r"64 bytes with null0: at most 1048576 bytes may be locked.*ulimit -l unlimited"
            with pytest.raises(af.ResourceExhausted, match=said):
                write(here, target)
        finally:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_a_peer_with_other_transports_only(verbs):
    engine, _ = verbs
    said = r'here \["verbs"\].*there \["tcp"\]'
    with (
        engine("null0") as here,
        af.Engine(transports=("tcp",)) as there,
        pytest.raises(af.Unsupported, match=said),
    ):
        here.connect(there.address)

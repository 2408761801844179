"""libfabric from Python: what is wrong with a library or a NIC is said, and does not stay in the way."""

from __future__ import annotations

import json
import subprocess
import sys

# A process opens one library, and other tests have opened theirs.
PROGRAM = """
import json, sys
import anyfabric as af

def engine(**settings):
    return af.Engine(transports=("libfabric",), libfabric_provider="tcp", timeout_s=20, **settings)

def why(**settings):
    try:
        engine(**settings).close()
    except af.AnyFabricError as error:
        return [error.code, str(error)]

said = {name: why(libfabric_library=name) for name in ("/nowhere/libfabric.so.1", "libc.so.6")}
here = {"libfabric_library": sys.argv[1]}
said["no NIC"] = why(nics=("192.0.2.7",), **here)
said["no name"] = why(nics=("rdmap0s0-rdm",), **here)
with engine(nics=("127.0.0.1",), **here) as ours, engine(nics=("127.0.0.1",), **here) as theirs:
    source, target = ours.allocate(64), theirs.allocate(64)
    ours.write(source, af.Descriptor.from_bytes(target.descriptor().to_bytes())).wait(timeout_s=20)
    with af.Engine(transports=("tcp",)) as other:
        try:
            ours.connect(other.address)
        except af.AnyFabricError as error:
            said["others"] = [error.code, str(error)]
said["another"] = why(libfabric_library="/elsewhere/libfabric.so.1")
print(json.dumps(said))
"""


def test_what_is_wrong_is_said(libfabric_of_the_wheel):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, libfabric_of_the_wheel], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    expected = {
        "/nowhere/libfabric.so.1": ("unsupported", ["/nowhere/libfabric.so.1", "install libfabric1"]),
        "libc.so.6": ("unsupported", ["libc.so.6 cannot be used", "it has no fi_version"]),
        "no NIC": ("invalid_argument", ["192.0.2.7: fi_endpoint: Cannot assign requested address"]),
        "no name": ("invalid_argument", ["has no NIC rdmap0s0-rdm for provider tcp; it has "]),
        "others": ("unsupported", ['here ["libfabric"]', 'there ["tcp"]']),
        "another": ("unsupported", ["/elsewhere/libfabric.so.1", f"uses {libfabric_of_the_wheel} already"]),
    }
    assert said.keys() == expected.keys()
    for name, (code, parts) in expected.items():
        assert said[name][0] == code, said[name]
        assert all(part in said[name][1] for part in parts), said[name]

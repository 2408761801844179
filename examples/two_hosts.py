"""Write into the memory of another host; both sides prove a secret.

On the host that receives, with an address of it that the other one can reach:

    ANYFABRIC_SECRET=... python two_hosts.py receive 10.0.0.1

On the other host, with what that printed:

    ANYFABRIC_SECRET=... python two_hosts.py send af://10.0.0.1:...

Without arguments both run here.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import numpy as np

import anyfabric as af

NUM_ELEMENTS = 1 << 20


def receive(host: str) -> None:
    """Print where this engine is reached, lend memory to the first who asks, wait for its bytes."""
    with af.Engine(listen=host) as engine:
        print(engine.address, flush=True)
        request = engine.receive(timeout_s=600)
        region = engine.allocate(int(request.data))
        with engine.counter(sources=[request.source]) as counter:
            offer = {"descriptor": region.descriptor().to_bytes().hex(), "imm": counter.imm}
            engine.send(request.source, json.dumps(offer).encode()).wait()
            counter.wait(1, timeout_s=60)  # or PeerLost: the sender is a source of this counter
        print(f"received {region.nbytes} bytes, the last element is {region.numpy('float32')[-1]}")


def send(printed: str) -> None:
    """Ask for memory, and write into it."""
    address = af.Address.parse(printed)
    with af.Engine() as engine:  # it calls, so nobody needs to reach it
        tensor = np.arange(NUM_ELEMENTS, dtype="float32")
        engine.send(address, str(tensor.nbytes).encode()).wait()  # ConnectionBroken: another secret
        offer = json.loads(engine.receive(timeout_s=10).data)
        remote = af.Descriptor.from_bytes(bytes.fromhex(offer["descriptor"]))
        path = engine.path(address)
        print(f"the path is {path.transport}: {path.reason or 'nothing is faster'}")
        engine.write(engine.register(tensor), remote, imm=offer["imm"]).wait()


def both() -> None:
    """Run the receiver as another process of this host."""
    os.environ["ANYFABRIC_SECRET"] = secrets.token_hex(16)
    command = [sys.executable, __file__, "receive", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:  # noqa: S603 - ourselves
        assert receiver.stdout is not None
        try:
            send(receiver.stdout.readline().strip())
            print(receiver.stdout.read(), end="")
        finally:
            receiver.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        receive(sys.argv[2])
    elif sys.argv[1:2] == ["send"]:
        send(sys.argv[2])
    else:
        both()

"""Move a tensor from one process into another.

The receiver allocates memory and says where it is; the sender writes into it. Nobody at the receiver takes
part: it waits for a count.
"""

from __future__ import annotations

import multiprocessing

import numpy as np

import anyfabric as af

NUM_ELEMENTS = 1 << 20


def receive() -> None:
    """Offer memory, wait for one arrival, look at the bytes."""
    with af.Engine() as engine, engine.counter() as counter:
        region = engine.allocate(4 * NUM_ELEMENTS)
        offer = region.descriptor(), counter.imm  # pickled; `to_bytes` and `int` travel anywhere
        sender = multiprocessing.get_context("spawn").Process(target=send, args=offer)
        sender.start()
        counter.wait(1, timeout_s=10)
        tensor = region.numpy("float32")
        print(f"received {tensor.nbytes} bytes, the last element is {tensor[-1]}")
        sender.join()


def send(remote: af.Descriptor, imm: int) -> None:
    """Write into the memory that the receiver offers."""
    with af.Engine() as engine:
        tensor = np.arange(NUM_ELEMENTS, dtype="float32")  # a torch tensor works as well
        source = engine.register(tensor)
        engine.write(source, remote, imm=imm).wait()
        path = engine.path(remote.address)
        print(f"wrote {source.nbytes} bytes over {path.transport}")


if __name__ == "__main__":
    receive()

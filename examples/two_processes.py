"""Move a tensor from one process into another.

The receiver allocates memory and says where it is; the sender writes into it. Nobody at the receiver takes
part: it waits for a count.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

import anyfabric as af

NUM_ELEMENTS = 1 << 20


def receiver(pipe: Connection) -> None:
    """Offer memory, wait for one arrival, look at the bytes."""
    with af.Engine() as engine, engine.counter() as counter:
        region = engine.allocate(4 * NUM_ELEMENTS)
        pipe.send((region.descriptor(), counter.imm))  # pickled; `to_bytes` and `int` travel anywhere
        counter.wait(1, timeout_s=10)
        tensor = region.numpy("float32")
        print(f"received {tensor.nbytes} bytes, the last element is {tensor[-1]}")


def main() -> None:
    """Start the receiver and write into it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=receiver, args=(there,))
    process.start()
    remote, imm = here.recv()
    with af.Engine() as engine:
        tensor = np.arange(NUM_ELEMENTS, dtype="float32")  # a torch tensor works as well
        source = engine.register(tensor)
        engine.write(source, remote, imm=imm).wait()
        path = engine.path(remote.address)
        print(f"wrote {source.nbytes} bytes over {path.transport}")
        process.join()


if __name__ == "__main__":
    main()

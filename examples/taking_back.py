"""Take memory back from a writer that does not answer.

A request is given up while its writer is stopped. Until the writer has let go the bytes are quarantined:
nothing else may be put there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import numpy as np

import anyfabric as af

NBYTES = 1 << 20


def writer(pipe: Connection) -> None:
    """Write twice: while it may, and after its right was taken back."""
    with af.Engine() as engine:
        lent = pipe.recv()
        source = engine.register(np.ones(NBYTES, "uint8"))
        engine.write(source, lent).wait()
        pipe.send(engine.address)
        pipe.recv()
        try:
            engine.write(source, lent, timeout_s=10).wait()
        except af.Refused as refused:
            pipe.send(str(refused))


def main() -> None:
    """Lend memory, stop the writer, take the memory back."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=writer, args=(there,))
    process.start()
    with af.Engine() as engine:
        region = engine.allocate(NBYTES)
        here.send(region.descriptor())
        address = here.recv()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)  # at any moment, in the middle of a copy too
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        try:
            region.revoke(address, timeout_s=0.2)
        except af.WaitTimeout:
            (held,) = engine.info()["quarantine"]
            print(f"{held['nbytes']} bytes of region {held['region']} are quarantined")
        os.kill(process.pid, signal.SIGCONT)
        region.revoke(address, timeout_s=10)  # returns once it can touch nothing any more
        assert not engine.info()["quarantine"]
        here.send("go on")
        print(f"its next write: {here.recv()}")
        process.join()


if __name__ == "__main__":
    main()

"""One sender and several receivers: a group, a scatter, a barrier, messages, and a peer that dies."""

from __future__ import annotations

import multiprocessing

import numpy as np

import anyfabric as af

NUM_RECEIVERS = 3
SHARD_BYTES = 64 << 10
SHARD_IMM, BARRIER_IMM = 6, 7


def receiver(sender: str) -> None:
    """Announce a shard of memory, wait for its bytes and for the barrier, confirm, and wait for the end."""
    with af.Engine() as engine:
        address = af.Address.parse(sender)
        shard = engine.allocate(SHARD_BYTES)
        with (
            engine.counter(imm=SHARD_IMM, sources=[address]) as filled,
            engine.counter(imm=BARRIER_IMM, sources=[address]) as barrier,
        ):
            engine.send(address, shard.descriptor().to_bytes())
            filled.wait(1, timeout_s=30)
            barrier.wait(1, timeout_s=30)
            engine.send(address, bytes([shard.numpy()[0]])).wait()
            engine.receive(timeout_s=60)  # nothing comes: it is killed


def main() -> None:
    """Fill every receiver's shard in one call, then lose one of them."""
    context = multiprocessing.get_context("spawn")
    with af.Engine() as engine:
        processes = [
            context.Process(target=receiver, args=(str(engine.address),)) for _ in range(NUM_RECEIVERS)
        ]
        for process in processes:
            process.start()

        announced = [engine.receive(timeout_s=30) for _ in processes]
        shards = [af.Descriptor.from_bytes(message.data) for message in announced]
        peers = engine.peer_group([message.source for message in announced])

        source = engine.register(np.repeat(np.arange(NUM_RECEIVERS, dtype="uint8"), SHARD_BYTES))
        targets = [
            af.Target(shard, number * SHARD_BYTES, 0, SHARD_BYTES) for number, shard in enumerate(shards)
        ]
        engine.scatter(source, targets, imm=SHARD_IMM, group=peers).wait()
        engine.barrier(peers, imm=BARRIER_IMM).wait()
        firsts = sorted(engine.receive(timeout_s=10).data[0] for _ in processes)
        print(f"the shards begin with {firsts}")

        with engine.counter(sources=peers.addresses) as nothing:
            processes[0].kill()
            try:
                nothing.wait(1, timeout_s=10)  # nobody counts here: the loss of a source ends the wait
            except af.PeerLost as lost:
                print(f"a receiver is gone: {lost}")
        survivors = 0
        for shard in shards:
            try:
                engine.write(source[0:8], shard[0:8], timeout_s=5).wait()
                survivors += 1
            except af.PeerLost as lost:
                print(f"a {lost.operation} to it fails with `{lost.code}`")
        print(f"{survivors} receivers live on")
        assert survivors == NUM_RECEIVERS - 1
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main()

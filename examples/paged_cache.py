"""Stream a paged cache, layer by layer, while it is still being computed.

Source and destination keep their pages in different places: each side has its own list of indices. The writes
are handed over before anything is computed; a watcher fires each one when its layer is done, in native code.
The receiver counts pages and never asks.
"""

from __future__ import annotations

import asyncio

import numpy as np

import anyfabric as af

NUM_LAYERS = 4
NUM_PAGES = 64
PAGE_BYTES = 4096
LAYER_BYTES = NUM_PAGES * PAGE_BYTES


async def main() -> None:
    """Both ends in one process, for the sake of brevity; nothing changes when they are on two hosts."""
    random = np.random.default_rng(0)
    with af.Engine() as prefill, af.Engine() as decode, decode.counter() as counter:
        cache = prefill.allocate(NUM_LAYERS * LAYER_BYTES)
        pool = decode.allocate(NUM_LAYERS * LAYER_BYTES)
        here, there = random.permutation(NUM_PAGES), random.permutation(NUM_PAGES)

        watcher = prefill.watch()
        triggers = [
            watcher.at(
                layer + 1,
                af.WritePages(
                    af.Pages(cache, here, PAGE_BYTES, offset=layer * LAYER_BYTES),
                    af.Pages(pool.descriptor(), there, PAGE_BYTES, offset=layer * LAYER_BYTES),
                    imm=counter.imm,
                ),
            )
            for layer in range(NUM_LAYERS)
        ]

        layers = cache.numpy("uint8", (NUM_LAYERS, NUM_PAGES, PAGE_BYTES))
        for layer in range(NUM_LAYERS):
            layers[layer] = random.integers(0, 256, layers[layer].shape)  # the computation
            watcher.add()

        await counter.reached(NUM_LAYERS * NUM_PAGES, timeout_s=10)
        received = pool.numpy("uint8", (NUM_LAYERS, NUM_PAGES, PAGE_BYTES))
        assert (received[:, there] == layers[:, here]).all()
        for trigger in triggers:
            await trigger
        print(f"{NUM_LAYERS} layers of {NUM_PAGES} pages arrived, each as soon as it was done")


if __name__ == "__main__":
    asyncio.run(main())

"""Waiting from asyncio: transfers, counters, messages; cancelling, timing out, many at once."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import anyfabric as af
from anyfabric import _asyncio


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def begun(coroutine):
    """A task that has run until it waits."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


def pair(engine, peer, nbytes=4096):
    src = engine.register(np.arange(nbytes, dtype=np.uint8))
    dst = peer.allocate(nbytes)
    return src, dst, dst.descriptor()


def test_await_a_transfer_and_a_counter(engine, peer):
    src, dst, remote = pair(engine, peer)

    async def main():
        with peer.counter() as counter:
            assert await engine.write(src, remote, imm=counter.imm) is None
            await counter.reached(1, timeout_s=20)
            assert counter.value == 1
            await counter.reached(1)
            assert (dst.numpy() == src.numpy()).all()

    run(main())


def test_a_thousand_at_once(engine, peer):
    src, _, remote = pair(engine, peer, 8)

    async def main():
        with peer.counter() as counter:
            waiters = [counter.reached(n) for n in range(1, 1001)]
            writes = [engine.write(src, remote, imm=counter.imm) for _ in range(1000)]
            await asyncio.gather(*waiters, *writes)
            assert counter.value == 1000

    run(main())


def test_a_loop_after_a_loop(engine, peer):
    src, dst, remote = pair(engine, peer)

    async def main():
        for _ in range(3):
            await engine.write(src, remote)
        assert dst.numpy()[-1] == 255

    for _ in range(5):
        run(main())


def test_the_same_transfer_awaited_twice_and_waited_for(engine, peer):
    src, _, remote = pair(engine, peer)

    async def main():
        transfer = engine.write(src, remote)

        async def waits():
            await transfer

        await asyncio.gather(waits(), waits())
        await transfer
        transfer.wait(0)

    run(main())


def test_reached_times_out_and_is_cancelled(engine):
    async def main():
        with engine.counter() as counter:
            with pytest.raises(af.WaitTimeout):
                await counter.reached(1, timeout_s=0.05)
            task = await begun(counter.reached(1))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_a_wait_that_is_given_up_leaves_nothing_behind(engine, peer, monkeypatch):
    """A server that looks for something else now and then gives up thousands of waits in its life."""
    delivered = []
    wake = _asyncio._LoopWaiter._wake

    def spy(waiter):
        notifier, waiter._notifier = waiter._notifier, Drained(waiter._notifier.drain())
        delivered.extend(waiter._notifier.tokens)
        wake(waiter)
        waiter._notifier = notifier

    class Drained:
        def __init__(self, tokens):
            self.tokens = tokens

        def drain(self):
            return self.tokens

    monkeypatch.setattr(_asyncio._LoopWaiter, "_wake", spy)

    async def main():
        with engine.counter() as counter:
            for _ in range(50):
                with pytest.raises(af.WaitTimeout):
                    await counter.reached(1, timeout_s=0)
                with pytest.raises(af.WaitTimeout):
                    await engine.receive_async(timeout_s=0.001)
            waiting = [asyncio.create_task(each) for each in (counter.reached(1), engine.receive_async())]
            await asyncio.sleep(0)
            await peer.barrier([engine.address], imm=counter.imm)
            await peer.send(engine.address, b"at last")
            await asyncio.gather(*waiting)

    run(main())
    # Two waits that were not given up, and the two transfers.
    assert len(delivered) <= 4


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("-inf")])
def test_a_timeout_that_is_none_is_refused(engine, timeout_s):
    async def main():
        with engine.counter() as counter, pytest.raises(af.InvalidArgument, match="expected seconds, 0 or"):
            await counter.reached(1, timeout_s=timeout_s)
        with pytest.raises(af.InvalidArgument, match="expected seconds, 0 or more"):
            await engine.receive_async(timeout_s=timeout_s)

    run(main())


def test_a_timeout_says_for_how_long_was_waited(engine):
    async def main():
        said = r"imm 5: 0 of 2 arrivals after 0\.01 s"
        with engine.counter(imm=5) as counter, pytest.raises(af.WaitTimeout, match=said):
            await counter.reached(2, timeout_s=0.01)

    run(main())


def test_closing_fails_those_who_wait(engine):
    async def main():
        counter = engine.counter()
        task = await begun(counter.reached(1))
        counter.close()
        with pytest.raises(af.Closed):
            await task
        other = af.Engine()
        receiving = await begun(other.receive_async())
        await asyncio.to_thread(other.close)
        with pytest.raises(af.Closed):
            await receiving

    run(main())


def test_messages(engine, peer):
    async def main():
        with pytest.raises(af.WaitTimeout):
            await peer.receive_async(timeout_s=0.05)
        waiting = [await begun(peer.receive_async(timeout_s=10)) for _ in range(20)]
        waiting[0].cancel()
        sent = {f"message {n}".encode() for n in range(19)}
        await asyncio.gather(*(engine.send(peer.address, data) for data in sent))
        received = await asyncio.gather(*waiting[1:])
        assert {message.data for message in received} == sent
        assert {message.source for message in received} == {engine.address}

    run(main())


def test_revoke_async(engine, peer):
    src, dst, remote = pair(engine, peer)

    async def main():
        await engine.write(src, remote)
        await dst.revoke_async(engine.address)
        with pytest.raises(af.Refused):
            await engine.write(src, remote)

    run(main())

"""The decode process: owns the pages, asks for prompts to be run, counts arrivals, and decodes.

It never runs the model on a prompt, but for the prompt's last token, which gives the first new one.
That the cache is complete it knows by counting: one arrival per page and one for the tail.

Everything is then compared. The tokens with those of the same generation in one process; the
pages, byte by byte, with the prefill process's own cache, which comes over a bare socket.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import statistics
import time
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

import anyfabric as af
from anyfabric.demo.baselines import Carrier, GlooCarrier, SocketCarrier
from anyfabric.demo.llm import Llm, cache_from_bytes
from anyfabric.demo.messages import Mailbox, Note
from anyfabric.demo.metrics import LayerTimes, StreamTimes, gb_per_s
from anyfabric.demo.paging import PagePool, load, page_tensor
from anyfabric.demo.prefill import TAIL, TAIL_MAGIC, StreamRequest
from anyfabric.demo.processes import Console, Event, run_child
from anyfabric.demo.settings import NO_PAGE, SOME_PAGE, Settings
from anyfabric.demo.side import open_side

__all__ = ["Decoder"]

# Free pages hold this byte, so that what was not written shows.
POISON = 0xA5


class IncompleteError(Exception):
    """The count was not reached, or what arrived is not what was asked for."""


@dataclass(frozen=True)
class Received:
    """One streamed cache, still in its pages."""

    num_tokens: int
    pages: list[list[int]]
    sha256: str
    times: StreamTimes
    tokens: list[int]


@dataclass(frozen=True)
class Moved:
    """One cache that came whole, over a carrier."""

    data: torch.Tensor
    elapsed_ns: int
    ttft_ms: float


class Decoder:
    """Asks the prefill process and checks what comes."""

    def __init__(
        self, engine: af.Engine, llm: Llm, mailbox: Mailbox, peer: af.Address, settings: Settings
    ) -> None:
        self._engine = engine
        self._llm = llm
        self._mailbox = mailbox
        self._peer = peer
        self._settings = settings
        self._requests = itertools.count(1)
        prompts = [llm.encode(text) for text in settings.prompts]
        if not all(prompts):
            msg = "a prompt has no token"
            raise ValueError(msg)
        shape = llm.shape
        longest = shape.num_pages(max(map(len, prompts)))
        # A quarter more than needed: pages change from request to request.
        self._pool = PagePool(longest * shape.num_layers * 5 // 4 + 1, seed=1)
        self._region = engine.allocate(self._pool.num_pages * shape.page_bytes)
        self._bytes = self._region.numpy("uint8")
        self._bytes[:] = POISON
        self._pages = page_tensor(self._bytes, shape)
        self._tail = engine.allocate(TAIL.size)
        self._carriers: dict[str, Carrier] = {}
        self.gloo_problem: str | None = None
        self.prompts = prompts

    def open_carriers(self) -> None:
        """Make the connections of the baselines; a gloo that does not work is noted, not fatal."""
        timeout_s = self._settings.timeout_s
        listener = socket.create_server(("127.0.0.1", 0))
        store: Any = None
        if self._settings.baselines:
            store = GlooCarrier.host_store(timeout_s=timeout_s)
        ports = {
            "socket_port": listener.getsockname()[1],
            "store_port": None if store is None else store.port,
        }
        self._mailbox.send(Note("carriers", ports))
        self._carriers["socket"] = SocketCarrier.accept(listener, timeout_s=timeout_s)
        if store is not None:
            try:
                self._carriers["gloo"] = GlooCarrier(store, 0, timeout_s=timeout_s)
            except (RuntimeError, ValueError) as error:
                self.gloo_problem = str(error)
        theirs = self._mailbox.receive().head["gloo_problem"]
        if theirs is not None:
            self.gloo_problem = theirs
            self._carriers.pop("gloo", None)

    def close(self) -> None:
        """Tell the prefill process that this was all."""
        self._mailbox.send(Note("stop"))
        for carrier in self._carriers.values():
            carrier.close()

    def run_prompt(self, prompt_idx: int) -> Event:
        """Run one prompt in every way, several rounds, and describe what came of it."""
        tokens = self.prompts[prompt_idx]
        rounds: list[Event] = []
        checked: Event = {}
        problem: str | None = None
        for round_idx in range(1 + self._settings.rounds):
            # The first round is checked to the last token and warms everything up.
            new_tokens = self._settings.new_tokens if round_idx == 0 else 1
            faults = self._faults(tokens) if prompt_idx == round_idx == 0 else (NO_PAGE, NO_PAGE)
            received = self._stream(tokens, new_tokens, faults)
            reference = self._whole(tokens, "socket")
            problem = problem or self._compare(received, reference.data)
            self._release(received)
            alone = self._alone(tokens, new_tokens)
            if round_idx == 0:
                checked = {"tokens": received.tokens, "tokens_alone": alone["tokens"]}
            moved = {"socket": reference}
            if "gloo" in self._carriers:
                moved["gloo"] = self._whole(tokens, "gloo")
            rounds.append({"stream": received.times, "alone": alone["ttft_ns"] / 1e6, **moved})
        return self._describe(prompt_idx, rounds[1:], checked, problem)

    def _stream(self, tokens: list[int], new_tokens: int, faults: tuple[int, int]) -> Received:
        """Have the prompt run elsewhere, its cache written here, and go on from it."""
        settings, shape = self._settings, self._llm.shape
        num_tokens = len(tokens) - 1
        num_pages = shape.num_pages(num_tokens)
        begin_ns = time.monotonic_ns()
        taken = self._pool.take(num_pages * shape.num_layers)
        pages = [taken[i * num_pages : (i + 1) * num_pages] for i in range(shape.num_layers)]
        number = next(self._requests)
        with self._engine.counter(sources=[self._peer]) as counter:
            request = StreamRequest(
                request=number,
                tokens=tokens[:-1],
                chunk_tokens=settings.chunk_tokens,
                pages=pages,
                imm=counter.imm,
                pool=self._region.descriptor().to_bytes(),
                tail=self._tail.descriptor().to_bytes(),
                corrupt_page=faults[0],
                drop_page=faults[1],
            )
            self._mailbox.send(request.to_note())
            self._wait(counter, len(taken) + 1)
            reached_ns = time.monotonic_ns()
        self._check_tail(request, len(taken))
        cache = DynamicCache()
        for layer_idx, layer_pages in enumerate(pages if num_tokens else []):
            cache.update(*load(self._pages, layer_pages, num_tokens), layer_idx)
        new, first_token_ns = self._generate(tokens[-1], cache, new_tokens)
        self._mailbox.send(Note("report"))
        report = self._mailbox.receive().head
        layers = tuple(
            LayerTimes(
                layer["layer_idx"],
                (layer["compute"][0], layer["compute"][1]),
                layer["ready_ns"],
                (layer["transfer"][0], layer["transfer"][1]),
            )
            for layer in report["layers"]
        )
        times = StreamTimes(begin_ns, reached_ns, first_token_ns, layers)
        return Received(num_tokens, pages, report["sha256"], times, new)

    def _wait(self, counter: af.Counter, expected: int) -> None:
        """Wait for the count: the only thing that tells this process that its cache is there."""
        timeout_s = self._settings.timeout_s
        try:
            counter.wait(expected, timeout_s=timeout_s)
        except af.WaitTimeout:
            msg = (
                f"only {counter.value} of {expected} arrivals (one per page, one for the tail) were "
                f"counted within {timeout_s:g} s; the cache is incomplete and is not used"
            )
            raise IncompleteError(msg) from None

    def _check_tail(self, request: StreamRequest, num_pages: int) -> None:
        expected = (TAIL_MAGIC, request.request, len(request.tokens), self._llm.shape.num_layers)
        found = TAIL.unpack_from(self._tail.numpy("uint8").data)
        if found != (*expected, num_pages, self._llm.shape.page_bytes):
            msg = f"the tail is {found}; it should begin with {expected}"
            raise IncompleteError(msg)

    def _generate(self, last_token: int, cache: DynamicCache, new_tokens: int) -> tuple[list[int], int]:
        """Decode greedily; say when the first token was there."""
        tokens: list[int] = []
        first_token_ns = 0
        for token in self._llm.generate(last_token, cache):
            if not tokens:
                first_token_ns = time.monotonic_ns()
            tokens.append(token)
            if len(tokens) == new_tokens or self._llm.is_end(token):
                break
        return tokens, first_token_ns

    def _whole(self, tokens: list[int], carrier: str) -> Moved:
        """Have the prompt run elsewhere, then fetch its whole cache, then take the first token."""
        num_tokens = len(tokens) - 1
        data = torch.empty(self._llm.shape.cache_bytes(num_tokens), dtype=torch.uint8)
        # The bytes of a fresh allocation would otherwise be paged in while they arrive.
        data.zero_()
        begin_ns = time.monotonic_ns()
        head = {"carrier": carrier, "chunk_tokens": self._settings.chunk_tokens}
        self._mailbox.send(Note("whole", head, (array("i", tokens[:-1]).tobytes(),)))
        self._carriers[carrier].receive(data)
        end_ns = time.monotonic_ns()
        cache = cache_from_bytes(data, self._llm.shape, num_tokens)
        _, first_token_ns = self._generate(tokens[-1], cache, 1)
        sent_ns = self._mailbox.receive().head["begin_ns"]
        return Moved(data, end_ns - sent_ns, (first_token_ns - begin_ns) / 1e6)

    def _alone(self, tokens: list[int], new_tokens: int) -> Event:
        """Have the whole generation done by the prefill process alone."""
        head = {"chunk_tokens": self._settings.chunk_tokens, "new_tokens": new_tokens}
        self._mailbox.send(Note("alone", head, (array("i", tokens).tobytes(),)))
        return self._mailbox.receive(timeout_s=self._settings.silence_s).head

    def _compare(self, received: Received, reference: torch.Tensor) -> str | None:
        """Compare the pages with the prefill process's cache; describe the first difference."""
        if hashlib.sha256(reference.numpy().tobytes()).hexdigest() != received.sha256:
            return "two runs of the prefill gave different caches; nothing can be compared"
        shape, num_tokens = self._llm.shape, received.num_tokens
        layer_bytes = num_tokens * shape.token_bytes
        for layer_idx, pages in enumerate(received.pages if num_tokens else []):
            ours = torch.cat([part.reshape(-1) for part in load(self._pages, pages, num_tokens)])
            theirs = reference[layer_idx * layer_bytes : (layer_idx + 1) * layer_bytes]
            wrong = (ours.view(torch.uint8) != theirs).nonzero()
            if len(wrong):
                element = int(wrong[0, 0]) // shape.dtype.itemsize
                token = element // shape.head_dim % num_tokens
                return (
                    f"{len(wrong)} of {layer_bytes} bytes of layer {layer_idx} differ from the "
                    f"prefill process's cache, first at token {token}"
                )
        return None

    def _release(self, received: Received) -> None:
        """Poison the pages and put them back; the count says that nobody writes into them."""
        for page in (page for layer in received.pages for page in layer):
            at = page * self._llm.shape.page_bytes
            self._bytes[at : at + self._llm.shape.page_bytes] = POISON
        self._pool.give([page for layer in received.pages for page in layer])

    def _faults(self, tokens: list[int]) -> tuple[int, int]:
        """Find the pages that the controls spoil: corrupt, drop; NO_PAGE for none.

        Raises:
            ValueError: The first prompt has no such page.
        """
        total = self._llm.shape.num_pages(len(tokens) - 1) * self._llm.shape.num_layers
        wanted = (self._settings.corrupt_page, self._settings.drop_page)
        corrupt, drop = (total // 2 if page == SOME_PAGE else page for page in wanted)
        if max(corrupt, drop) >= total or (total == 0 and SOME_PAGE in wanted):
            page = "a page" if SOME_PAGE in wanted else f"page {max(corrupt, drop)}"
            msg = f"the controls cannot spoil {page}: the first prompt has {total}, counted from 0"
            raise ValueError(msg)
        return corrupt, drop

    def _describe(self, prompt_idx: int, rounds: list[Event], checked: Event, problem: str | None) -> Event:
        """Make the JSON of one prompt: medians over the rounds, the bars of the median one."""
        tokens, shape = self.prompts[prompt_idx], self._llm.shape
        num_tokens = len(tokens) - 1
        nbytes = shape.cache_bytes(num_tokens)
        streams: list[StreamTimes] = [one["stream"] for one in rounds]
        middle = sorted(streams, key=lambda times: times.ttft_ms)[len(streams) // 2]
        same_tokens = checked["tokens"] == checked["tokens_alone"]

        def median(values: Any, digits: int = 4) -> float:
            return round(statistics.median(values), digits)

        def baseline(name: str) -> Event:
            moved: list[Moved] = [one[name] for one in rounds]
            return {
                "transfer_gb_per_s": median(gb_per_s(nbytes, one.elapsed_ns) for one in moved),
                "ttft_ms": median(one.ttft_ms for one in moved),
            }

        return {
            "prompt": self._settings.prompts[prompt_idx],
            "continuation": self._llm.decode(checked["tokens"]),
            "prompt_tokens": len(tokens),
            "new_tokens": len(checked["tokens"]),
            "identical": same_tokens and problem is None,
            "tokens_identical": same_tokens,
            "kv_identical": problem is None,
            "problem": problem,
            "kv_bytes": nbytes,
            "pages": shape.num_pages(num_tokens) * shape.num_layers,
            "page_bytes": shape.page_bytes,
            "chunks": -(-num_tokens // self._settings.chunk_tokens),
            "prefilled_by_decoder": self._llm.num_prefilled,
            "transfer_gb_per_s": median(gb_per_s(nbytes, one.transfer_ns) for one in streams),
            "ttft_ms": median(one.ttft_ms for one in streams),
            "ttft_single_process_ms": median(one["alone"] for one in rounds),
            "hidden_share": median(one.hidden_share for one in streams),
            "exposed_ms": median(one.exposed_ns / 1e6 for one in streams),
            "count_reached_ms": round((middle.reached_ns - middle.begin_ns) / 1e6, 4),
            "layers": middle.to_json(),
            "baselines": {name: baseline(name) for name in self._carriers},
        }


def main(console: Console, config: Event) -> None:
    """Run the process: load, meet the prefill process, run every prompt, tell the command."""
    with open_side(console, config) as side:
        llm = side.llm
        decoder = Decoder(side.engine, llm, side.mailbox, side.peer, side.settings)
        decoder.open_carriers()
        path = side.engine.path(side.peer)
        console.write(
            "path",
            transport=path.transport,
            reason=path.reason,
            gloo_problem=decoder.gloo_problem,
            num_layers=llm.shape.num_layers,
            page_bytes=llm.shape.page_bytes,
        )
        for prompt_idx in range(len(decoder.prompts)):
            console.write("result", **decoder.run_prompt(prompt_idx))
        decoder.close()
    console.write("finished")


if __name__ == "__main__":
    run_child(main)

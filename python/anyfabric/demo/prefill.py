"""The prefill process: runs prompts and writes their KV cache into the decode process's pages.

One streamed request goes like this. Before the model runs, one write per layer and chunk is armed on
a watcher word, `WritePages` from this process's staging pages to the pages that the request names.
While the model runs, every layer copies its keys and values into its staging pages and increments
the word; the engine's own thread then fires that layer's write. Python waits for nothing in
between. The last write to fire is the tail: 64 bytes that say whose cache this was.

Watcher values of layer `l` in chunk `c`: `c * num_layers + l + 1`. The tail fires with the last one.
"""

from __future__ import annotations

import hashlib
import struct
import time
from array import array
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from transformers import DynamicCache

import anyfabric as af
from anyfabric.demo.baselines import Carrier, GlooCarrier, SocketCarrier
from anyfabric.demo.llm import LayerCache, Llm, Span, cache_bytes
from anyfabric.demo.messages import Mailbox, Note
from anyfabric.demo.metrics import LayerTimes
from anyfabric.demo.paging import KvShape, page_tensor, store
from anyfabric.demo.processes import Console, Event, run_child
from anyfabric.demo.settings import NO_PAGE, PAGE_TOKENS, Settings
from anyfabric.demo.side import open_side

if TYPE_CHECKING:
    import torch

__all__ = ["TAIL", "StreamRequest"]

TAIL = struct.Struct("<8sQIIII32x")
TAIL_MAGIC = b"AFkvtail"


@dataclass(frozen=True)
class StreamRequest:
    """What the decode process asks for; `to_note` and `from_note` are each other's inverse.

    Attributes:
        request: Number of the request.
        tokens: The prompt without its last token.
        chunk_tokens: Tokens of one forward pass, a multiple of PAGE_TOKENS.
        pages: The decoder's page numbers, layer by layer; all layers have as many.
        imm: What the decoder counts.
        pool: Its page pool.
        tail: Its 64 bytes for the tail.
        corrupt_page: Control: flip a byte of this page, counted over all layers, or NO_PAGE.
        drop_page: Control: leave this page out, or NO_PAGE.
    """

    request: int
    tokens: list[int]
    chunk_tokens: int
    pages: list[list[int]]
    imm: int
    pool: bytes
    tail: bytes
    corrupt_page: int = NO_PAGE
    drop_page: int = NO_PAGE

    def to_note(self) -> Note:
        """Make the message."""
        head = {
            "request": self.request,
            "chunk_tokens": self.chunk_tokens,
            "imm": self.imm,
            "num_layers": len(self.pages),
            "corrupt_page": self.corrupt_page,
            "drop_page": self.drop_page,
        }
        flat = [page for layer in self.pages for page in layer]
        parts = (array("i", self.tokens).tobytes(), array("I", flat).tobytes(), self.pool, self.tail)
        return Note("stream", head, parts)

    @classmethod
    def from_note(cls, note: Note) -> StreamRequest:
        """Read the message."""
        head, (tokens, flat_bytes, pool, tail) = dict(note.head), note.parts
        flat, num_layers = list(array("I", flat_bytes)), head.pop("num_layers")
        step = len(flat) // num_layers
        pages = [flat[idx * step : (idx + 1) * step] for idx in range(num_layers)]
        return cls(tokens=list(array("i", tokens)), pages=pages, pool=pool, tail=tail, **head)


class Staging:
    """This process's own pages of one request: layer by layer, in the order of the tokens."""

    def __init__(self, engine: af.Engine, shape: KvShape, num_pages: int) -> None:
        self.num_pages = num_pages
        self.region = engine.allocate(shape.num_layers * num_pages * shape.page_bytes)
        self.bytes = self.region.numpy("uint8")
        self._pages = page_tensor(self.bytes, shape)

    def page(self, layer_idx: int, page_idx: int) -> int:
        """Number a page within the region."""
        return layer_idx * self.num_pages + page_idx

    def put(self, layer_idx: int, page_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy a chunk of one layer, beginning with the given page."""
        first = self.page(layer_idx, page_idx)
        count = -(-keys.shape[2] // PAGE_TOKENS)
        store(self._pages[first : first + count], keys, values)


class Stream:
    """One streamed request: arms the writes, then hands out layers as the model makes them."""

    def __init__(self, engine: af.Engine, shape: KvShape, staging: Staging, request: StreamRequest) -> None:
        self._shape = shape
        self._staging = staging
        self._request = request
        self._watcher = engine.watch()
        self._pool = af.Descriptor.from_bytes(request.pool)
        self._num_done = 0
        self.ready_ns: list[int] = []
        chunk_pages = request.chunk_tokens // PAGE_TOKENS
        num_pages = shape.num_pages(len(request.tokens))
        self._chunks = [
            range(begin, min(begin + chunk_pages, num_pages)) for begin in range(0, num_pages, chunk_pages)
        ]
        self._transfers = [
            self._arm(chunk_idx, layer_idx)
            for chunk_idx in range(len(self._chunks))
            for layer_idx in range(shape.num_layers)
        ]

    def _arm(self, chunk_idx: int, layer_idx: int) -> af.Transfer:
        """Arm the write of one layer's pages of one chunk."""
        wanted = [
            (self._staging.page(layer_idx, page_idx), self._request.pages[layer_idx][page_idx])
            for page_idx in self._chunks[chunk_idx]
            if layer_idx * len(self._request.pages[0]) + page_idx != self._request.drop_page
        ]
        src, dst = [pair[0] for pair in wanted], [pair[1] for pair in wanted]
        page_bytes = self._shape.page_bytes
        operation = af.WritePages(
            af.Pages(self._staging.region, src, page_bytes),
            af.Pages(self._pool, dst, page_bytes),
            imm=self._request.imm,
        )
        value = chunk_idx * self._shape.num_layers + layer_idx + 1
        return self._watcher.at(value, operation).transfer

    def arm_tail(self, tail: af.Region) -> None:
        """Arm the tail, which fires with the last write (at once when the cache is empty)."""
        view = tail.numpy("uint8")
        num_pages = sum(len(layer) for layer in self._request.pages)
        TAIL.pack_into(
            view.data,
            0,
            TAIL_MAGIC,
            self._request.request,
            len(self._request.tokens),
            self._shape.num_layers,
            num_pages,
            self._shape.page_bytes,
        )
        target = af.Descriptor.from_bytes(self._request.tail)
        operation = af.Write(tail[0 : TAIL.size], target[0 : TAIL.size], imm=self._request.imm)
        last = len(self._chunks) * self._shape.num_layers
        self._tail = self._watcher.at(last, operation).transfer

    def on_layer(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stage one layer of the chunk that is running, then release its write."""
        chunk = self._chunks[self._num_done // self._shape.num_layers]
        self._staging.put(layer_idx, chunk.start, keys, values)
        self._spoil(layer_idx, chunk)
        self._num_done += 1
        self.ready_ns.append(time.monotonic_ns())
        self._watcher.set(self._num_done)

    def _spoil(self, layer_idx: int, chunk: range) -> None:
        """Control: flip one byte in the middle of a page that was staged just now."""
        layer, page_idx = divmod(self._request.corrupt_page, max(1, len(self._request.pages[0])))
        if self._request.corrupt_page >= 0 and layer == layer_idx and page_idx in chunk:
            at = self._staging.page(layer_idx, page_idx) * self._shape.page_bytes
            self._staging.bytes[at] ^= 0x40

    def finish(self, spans: list[Span], timeout_s: float) -> list[LayerTimes]:
        """Wait until every write is done; only then may the staging pages be used again."""
        for transfer in [*self._transfers, self._tail]:
            transfer.wait(timeout_s)
        self._watcher.close()
        return [
            # Without an interval there was nothing to write: the control dropped the only page.
            LayerTimes(
                span.layer_idx,
                (span.begin_ns, span.end_ns),
                ready_ns,
                transfer.interval_ns or (ready_ns, ready_ns),
            )
            for span, ready_ns, transfer in zip(spans, self.ready_ns, self._transfers, strict=True)
        ]


class Prefiller:
    """Answers the decode process until it says stop."""

    def __init__(self, engine: af.Engine, llm: Llm, mailbox: Mailbox, settings: Settings) -> None:
        self._engine = engine
        self._llm = llm
        self._mailbox = mailbox
        self._settings = settings
        self._staging = Staging(engine, llm.shape, 1)
        self._tail = engine.allocate(TAIL.size)
        self._carriers: dict[str, Carrier] = {}
        self._streamed: tuple[list[LayerTimes], DynamicCache] = ([], DynamicCache())

    def serve(self) -> None:
        """Take requests, one after the other."""
        answers = {
            "stream": self.stream,
            "report": self.report,
            "alone": self.alone,
            "whole": self.whole,
            "carriers": self.connect_carriers,
        }
        while (note := self._mailbox.receive(timeout_s=self._settings.silence_s)).kind != "stop":
            answers[note.kind](note)
        for carrier in self._carriers.values():
            carrier.close()

    def stream(self, note: Note) -> None:
        """Run a prompt and write every layer's pages as soon as they are there."""
        request = StreamRequest.from_note(note)
        shape = self._llm.shape
        num_pages = shape.num_pages(len(request.tokens))
        if num_pages > self._staging.num_pages:
            self._staging.region.close()
            self._staging = Staging(self._engine, shape, num_pages)
        stream = Stream(self._engine, shape, self._staging, request)
        stream.arm_tail(self._tail)
        spans: list[Span] = []
        stop_recording = self._llm.record_spans(spans)
        try:
            cache = LayerCache(stream.on_layer)
            self._llm.prefill(request.tokens, cache, request.chunk_tokens)
        finally:
            stop_recording()
        self._streamed = stream.finish(spans, self._settings.timeout_s), cache

    def report(self, _note: Note) -> None:
        """Say how the last stream went; asked for later, for the decode process needs these cores now."""
        layers, cache = self._streamed
        head = {
            "layers": [asdict(layer) for layer in layers],
            "sha256": hashlib.sha256(cache_bytes(cache).numpy().tobytes()).hexdigest(),
        }
        self._mailbox.send(Note("streamed", head))

    def alone(self, note: Note) -> None:
        """Do the whole generation in this one process: the reference for tokens and times."""
        tokens = list(array("i", note.parts[0]))
        begin_ns = time.monotonic_ns()
        cache = DynamicCache()
        self._llm.prefill(tokens[:-1], cache, note.head["chunk_tokens"])
        new_tokens: list[int] = []
        first_token_ns = begin_ns
        for token in self._llm.generate(tokens[-1], cache):
            if not new_tokens:
                first_token_ns = time.monotonic_ns()
            new_tokens.append(token)
            if len(new_tokens) == note.head["new_tokens"] or self._llm.is_end(token):
                break
        head = {"tokens": new_tokens, "ttft_ns": first_token_ns - begin_ns}
        self._mailbox.send(Note("generated", head))

    def whole(self, note: Note) -> None:
        """Run a prompt, then move its whole cache: what a hand-over without streaming costs."""
        tokens = list(array("i", note.parts[0]))
        cache = DynamicCache()
        self._llm.prefill(tokens, cache, note.head["chunk_tokens"])
        data = cache_bytes(cache)
        begin_ns = time.monotonic_ns()
        self._carriers[note.head["carrier"]].send(data)
        self._mailbox.send(Note("moved", {"begin_ns": begin_ns}))

    def connect_carriers(self, note: Note) -> None:
        """Connect to what the decode process listens on; say why gloo cannot be had."""
        timeout_s = self._settings.timeout_s
        port = note.head["socket_port"]
        self._carriers["socket"] = SocketCarrier.connect(port, timeout_s=timeout_s)
        problem = None
        if note.head["store_port"] is not None:
            try:
                gloo_store = GlooCarrier.join_store(note.head["store_port"], timeout_s=timeout_s)
                self._carriers["gloo"] = GlooCarrier(gloo_store, 1, timeout_s=timeout_s)
            except (RuntimeError, ValueError) as error:
                problem = str(error)
        self._mailbox.send(Note("connected", {"gloo_problem": problem}))


def main(console: Console, config: Event) -> None:
    """Run the process: load, meet the decode process, serve."""
    with open_side(console, config) as side:
        Prefiller(side.engine, side.llm, side.mailbox, side.settings).serve()


if __name__ == "__main__":
    run_child(main)

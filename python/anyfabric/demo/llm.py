"""The model of the demo: load it, run a prompt in chunks, decode greedily.

Both processes and the single-process reference call the same functions here with the same chunks
and one thread. That makes every floating-point operation of the two ways the same, so that tokens
and caches can be compared for equality and not for closeness.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from anyfabric.demo.paging import KvShape

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LayerCache", "Llm", "Span", "cache_bytes", "cache_from_bytes"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

OnLayer = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Span:
    """When one layer ran, on the clock of `time.monotonic_ns`; one span per chunk and layer."""

    layer_idx: int
    begin_ns: int
    end_ns: int


class LayerCache(DynamicCache):
    """A cache that says at once when a layer's keys and values of a chunk are there.

    They are there before the attention of that layer runs: the hand-over of a layer overlaps with
    its own attention and feed-forward part, and with all later layers.
    """

    def __init__(self, on_layer: OnLayer) -> None:
        super().__init__()
        self._on_layer = on_layer

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a chunk's keys and values `[1, num_kv_heads, num_tokens, head_dim]` of one layer."""
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._on_layer(layer_idx, key_states, value_states)
        return out


class Llm:
    """A causal language model on the CPU, its tokenizer, and the shape of its KV cache.

    Attributes:
        shape: Of the cache.
        num_prefilled: Tokens that `prefill` has run; 0 for ever in a process that only decodes.
    """

    def __init__(self, directory: Path) -> None:
        """Load a local Hugging Face checkpoint as float32, with one thread.

        Args:
            directory: Holds `config.json` and the weights; with no tokenizer in it, tokens are bytes.

        Raises:
            ValueError: There is no checkpoint, none that can be loaded, or its cache or vocabulary does not
                fit the demo.
        """
        if not (directory / "config.json").is_file():
            msg = f"{directory} is no checkpoint: it has no config.json"
            raise ValueError(msg)
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._model = _loaded(AutoModelForCausalLM, directory, dtype=torch.float32)
        self._model.eval()
        self._tokenizer: Any = None
        if any((directory / name).is_file() for name in TOKENIZER_FILES):
            self._tokenizer = _loaded(AutoTokenizer, directory)
        elif self._model.config.vocab_size < 256:
            msg = (
                f"{directory} has no tokenizer, and its vocabulary of "
                f"{self._model.config.vocab_size} is too small for bytes"
            )
            raise ValueError(msg)
        self.num_prefilled = 0
        self.shape = self._probe_shape()
        self.num_prefilled = 0

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, with a begin token where the model has one."""
        if self._tokenizer is not None:
            valid = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            return [int(token) for token in self._tokenizer(valid)["input_ids"]]
        begin = self._model.config.bos_token_id
        prefix = [begin] if isinstance(begin, int) and begin >= 256 else []
        return prefix + list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: list[int]) -> str:
        """Turn token ids into text; bytes that are no text become U+FFFD."""
        if self._tokenizer is not None:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    @torch.inference_mode()
    def prefill(self, tokens: list[int], cache: DynamicCache, chunk_tokens: int) -> None:
        """Run the model on `tokens`, a chunk at a time, to fill the cache; no logits are made."""
        for begin in range(0, len(tokens), chunk_tokens):
            chunk = tokens[begin : begin + chunk_tokens]
            ids = torch.tensor([chunk])
            self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            self.num_prefilled += len(chunk)

    @torch.inference_mode()
    def generate(self, last_token: int, cache: DynamicCache) -> Iterator[int]:
        """Yield greedy tokens after `last_token` without end.

        Args:
            last_token: Last token of the prompt; the only one that is run here.
            cache: Of all tokens before it; grows.
        """
        token = last_token
        while True:
            ids = torch.tensor([[token]])
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
            yield token

    def is_end(self, token: int) -> bool:
        """Say whether the model ends its text with this token."""
        end = self._model.config.eos_token_id
        return token == end or (isinstance(end, list) and token in end)

    def record_spans(self, spans: list[Span]) -> Callable[[], None]:
        """Append a span for every layer that runs from now on.

        Returns:
            A function that stops the recording.
        """
        begins: dict[int, int] = {}
        handles: list[Any] = []
        for layer_idx, layer in enumerate(self._layers()):

            def before(_module: Any, _args: Any, layer_idx: int = layer_idx) -> None:
                begins[layer_idx] = time.monotonic_ns()

            def after(_module: Any, _args: Any, _out: Any, layer_idx: int = layer_idx) -> None:
                spans.append(Span(layer_idx, begins[layer_idx], time.monotonic_ns()))

            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(after))

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return stop

    def _layers(self) -> Any:
        """The modules of which each fills one layer of the cache; architectures name them differently."""
        for module in self._model.base_model.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.shape.num_layers:
                return module
        msg = f"the demo needs a model with a list of its {self.shape.num_layers} layers; this one has none"
        raise ValueError(msg)

    def _probe_shape(self) -> KvShape:
        """Run one token and look at the cache: works for every model with a plain KV cache."""
        cache = DynamicCache()
        self.prefill([0], cache, 1)
        layers: list[Any] = cache.layers
        if not layers:
            kind = self._model.config.model_type
            msg = f"the demo needs a model that keeps keys and values; one of type {kind} does not"
            raise ValueError(msg)
        shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers}
        keys = layers[0].keys
        if shapes != {(tuple(keys.shape), tuple(keys.shape))} or keys.ndim != 4:
            msg = (
                f"the demo needs layers whose keys and values all have one shape; "
                f"this model's are {sorted(shapes)}"
            )
            raise ValueError(msg)
        return KvShape(len(layers), keys.shape[1], keys.shape[3], keys.dtype)


def _loaded(kind: Any, directory: Path, **options: Any) -> Any:
    """A model or tokenizer of a checkpoint; whatever a broken one raises becomes a `ValueError`."""
    try:
        return kind.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:
        msg = f"{directory} cannot be loaded: {type(error).__name__}: {error}"
        raise ValueError(msg) from error


def cache_bytes(cache: DynamicCache) -> torch.Tensor:
    """Copy a whole cache into `[num_bytes] uint8`: layer by layer, keys, then values."""
    layers: list[Any] = cache.layers
    rows = [part.reshape(-1) for layer in layers for part in (layer.keys, layer.values)]
    return torch.cat(rows).view(torch.uint8) if rows else torch.empty(0, dtype=torch.uint8)


def cache_from_bytes(data: torch.Tensor, shape: KvShape, num_tokens: int) -> DynamicCache:
    """Make a cache of what `cache_bytes` wrote; copies."""
    cache = DynamicCache()
    if num_tokens:
        rows = data.view(shape.dtype).view(
            shape.num_layers, 2, 1, shape.num_kv_heads, num_tokens, shape.head_dim
        )
        for layer_idx in range(shape.num_layers):
            cache.update(rows[layer_idx, 0].clone(), rows[layer_idx, 1].clone(), layer_idx)
    return cache

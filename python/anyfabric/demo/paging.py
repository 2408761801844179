"""What a page of the KV cache is, and how a cache is laid out in pages.

A page holds PAGE_TOKENS tokens of one layer:

    offset          bytes            what
    0               page_bytes / 2   keys    [num_kv_heads, PAGE_TOKENS, head_dim]
    page_bytes / 2  page_bytes / 2   values  the same shape

The places after the last token of a cache are zero, so that a page's bytes are always defined.
A layer of `n` tokens takes `ceil(n / PAGE_TOKENS)` pages; they need not be neighbours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from anyfabric.demo.settings import PAGE_TOKENS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KvShape", "PagePool", "load", "page_tensor", "store"]


@dataclass(frozen=True)
class KvShape:
    """Shape of a model's KV cache; every layer has the same."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Size of one page."""
        return PAGE_TOKENS * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Size of the keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def num_pages(self, num_tokens: int) -> int:
        """Count the pages of one layer."""
        return -(-num_tokens // PAGE_TOKENS)

    def cache_bytes(self, num_tokens: int) -> int:
        """Size of the keys and values of all layers, without the padding of the last pages."""
        return self.num_layers * num_tokens * self.token_bytes


class PagePool:
    """Hands out page numbers of one allocation in a seeded random order, as a used pool would."""

    def __init__(self, num_pages: int, *, seed: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._rng = random.Random(seed)
        self._rng.shuffle(self._free)

    def take(self, num_pages: int) -> list[int]:
        """Take pages out of the pool.

        Raises:
            MemoryError: Fewer are free.
        """
        if num_pages > len(self._free):
            msg = (
                f"the KV page pool has {len(self._free)} of {self.num_pages} pages free; "
                f"{num_pages} are needed"
            )
            raise MemoryError(msg)
        taken = self._free[len(self._free) - num_pages :]
        del self._free[len(self._free) - num_pages :]
        return taken

    def give(self, pages: list[int]) -> None:
        """Put pages back; nobody may still write into them."""
        self._free.extend(pages)
        self._rng.shuffle(self._free)


def page_tensor(memory: npt.NDArray[np.uint8], shape: KvShape) -> torch.Tensor:
    """View memory as pages.

    Args:
        memory: `[num_pages * page_bytes] uint8`, writable; the view keeps it alive.
        shape: Of the cache.

    Returns:
        `[num_pages, 2, num_kv_heads, PAGE_TOKENS, head_dim]` of the cache's dtype.
    """
    flat = torch.as_tensor(memory).view(shape.dtype)
    return flat.view(-1, 2, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)


def store(pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy keys and values of consecutive tokens into pages, from the first token of the first page.

    Args:
        pages: `[num_pages, 2, num_kv_heads, PAGE_TOKENS, head_dim]`, just enough pages.
        keys: `[1, num_kv_heads, num_tokens, head_dim]`.
        values: As `keys`.
    """
    num_tokens = keys.shape[2]
    num_full, rest = divmod(num_tokens, PAGE_TOKENS)
    for idx, source in enumerate((keys, values)):
        heads, _, dim = source[0].shape
        full = source[0, :, : num_full * PAGE_TOKENS].reshape(heads, num_full, PAGE_TOKENS, dim)
        pages[:num_full, idx].copy_(full.permute(1, 0, 2, 3))
        if rest:
            pages[num_full, idx, :, :rest].copy_(source[0, :, num_full * PAGE_TOKENS :])
            pages[num_full, idx, :, rest:].zero_()


def load(pages: torch.Tensor, page_indices: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather one layer's keys and values out of a pool.

    Args:
        pages: `[num_pool_pages, 2, num_kv_heads, PAGE_TOKENS, head_dim]`.
        page_indices: The layer's pages in the order of their tokens.
        num_tokens: How many tokens they hold.

    Returns:
        Keys and values, `[1, num_kv_heads, num_tokens, head_dim]` each, views of a copy.
    """
    heads, dim = pages.shape[2], pages.shape[4]
    # [2, heads, num_pages, PAGE_TOKENS, dim]: the pages of a head follow each other.
    taken = pages.permute(1, 2, 0, 3, 4).index_select(2, torch.tensor(page_indices, dtype=torch.int64))
    rows = taken.view(2, 1, heads, -1, dim)[:, :, :, :num_tokens]
    return rows[0], rows[1]

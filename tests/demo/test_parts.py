"""The parts of the demo that need no second process: pages, metrics, prompts, bars."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("transformers", reason="the demo needs transformers")

from anyfabric.demo import metrics, paging
from anyfabric.demo.decode import Decoder
from anyfabric.demo.kv import read_prompts
from anyfabric.demo.llm import LayerCache, Llm, Span, cache_bytes, cache_from_bytes
from anyfabric.demo.prefill import StreamRequest
from anyfabric.demo.report import paint, printable, to_json
from anyfabric.demo.text import stories

MODEL = Path(paging.__file__).parent / "model"


@pytest.fixture(scope="module")
def llm():
    return Llm(MODEL)


def _random_cache(shape, num_tokens):
    rows = torch.randn(2, 1, shape.num_kv_heads, num_tokens, shape.head_dim).to(shape.dtype)
    return rows[0], rows[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 48, 100])
def test_pages_hold_what_was_stored(dtype, num_tokens):
    shape = paging.KvShape(num_layers=1, num_kv_heads=3, head_dim=8, dtype=dtype)
    count = shape.num_pages(num_tokens)
    keys, values = _random_cache(shape, num_tokens)
    pool = np.full(2 * count * shape.page_bytes, 0xA5, np.uint8)
    pages = random.Random(num_tokens).sample(range(2 * count), k=count)
    staged = np.full(count * shape.page_bytes, 0xFF, np.uint8)
    paging.store(paging.page_tensor(staged, shape), keys, values)
    for idx, page in enumerate(pages):
        pool[page * shape.page_bytes :][: shape.page_bytes] = staged[idx * shape.page_bytes :][
            : shape.page_bytes
        ]
    out = paging.load(paging.page_tensor(pool, shape), pages, num_tokens)
    assert torch.equal(out[0], keys)
    assert torch.equal(out[1], values)
    # The places behind the last token are defined, too.
    rest = count * paging.PAGE_TOKENS - num_tokens
    if rest:
        tail = paging.page_tensor(staged, shape)[-1, :, :, -rest:]
        assert not tail.any()


def test_page_pool_hands_out_every_page_once_and_says_when_it_is_empty():
    pool = paging.PagePool(10, seed=3)
    first, second = pool.take(4), pool.take(6)
    assert sorted(first + second) == list(range(10))
    assert first != sorted(first)
    with pytest.raises(MemoryError, match="0 of 10 pages free; 1 are needed"):
        pool.take(1)
    pool.give(first)
    assert sorted(pool.take(4)) == sorted(first)


def test_union_counts_overlaps_once():
    assert metrics.union_ns([]) == 0
    assert metrics.union_ns([(5, 9), (0, 3), (2, 4), (6, 7)]) == 8
    assert metrics.union_ns([(0, 1), (1, 2)]) == 2


def test_hidden_share_is_what_was_not_waited_for():
    layers = tuple(
        metrics.LayerTimes(idx, (100 * idx, 100 * idx + 90), 100 * idx + 20, (100 * idx + 20, 100 * idx + 60))
        for idx in range(4)
    )
    times = metrics.StreamTimes(begin_ns=0, reached_ns=368, first_token_ns=500, layers=layers)
    # 4 transfers of 40 ns, of which the decoder waited for 48 ns after the last layer was ready.
    assert times.transfer_ns == 160
    assert times.exposed_ns == 48
    assert times.hidden_share == pytest.approx(1 - 48 / 160)
    assert times.ttft_ms == 500 / 1e6


def test_stream_request_survives_its_note():
    pages = [[5, 1, 70000], [0, 2, 3]]
    request = StreamRequest(
        request=9, tokens=[256, 1, 70000], chunk_tokens=32, pages=pages, imm=2**29, pool=b"pool", tail=b"tail"
    )
    assert StreamRequest.from_note(request.to_note()) == request
    empty = StreamRequest(
        request=1, tokens=[], chunk_tokens=16, pages=[[], []], imm=1, pool=b"p", tail=b"t", drop_page=3
    )
    assert StreamRequest.from_note(empty.to_note()) == empty


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo\n\nthree\n\n\n\nfour\n\n", ["one\ntwo", "three", "four"]),
        ("\n\n only \n", ["only"]),
        ("Größe\r\n", ["Größe"]),
        ("one\r\n\r\ntwo\rthree", ["one", "two\nthree"]),
        # Neither a page's end nor what Unicode calls a line's is a line's end in a file.
        ("one\f1\x1c2\u20283\x854\ntwo", ["one\f1\x1c2\u20283\x854", "two"]),
        # As Windows begins its files.
        ("\ufeffone\r\ntwo", ["one", "two"]),
    ],
)
def test_prompts_are_paragraphs_or_lines(tmp_path, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    assert read_prompts(path) == prompts


def test_prompts_keep_bytes_that_are_no_text(tmp_path, llm):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a\xff\x00b\n")
    (prompt,) = read_prompts(path)
    assert llm.encode(prompt) == [256, 0x61, 0xFF, 0x00, 0x62]
    path.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)


def test_bars_show_short_and_long_intervals():
    assert paint([(0, 50)], 0, 100, 10) == "█████" + " " * 5
    line = paint([(90.0, 90.001)], 0, 100, 10)
    assert line.strip()
    assert line.index(line.strip()) == 9
    assert paint([], 0, 100, 10) == " " * 10
    assert len(paint([(0, 100)], 0, 100, 7)) == 7


def test_a_prompt_says_nothing_to_the_terminal():
    assert (
        printable("\x1b]0;title\x07 ä\tb\r\n\x9b31m\udcff🎉")
        == "\ufffd]0;title\ufffd ä\tb\r\n\ufffd31m\ufffd🎉"
    )


def test_stories_are_the_same_for_the_same_seed():
    first, again, other = (list(itertools.islice(stories(seed), 5)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(200 < len(story.encode()) < 2000 for story in first)
    assert any(not story.isascii() for story in itertools.islice(stories(1), 20))


def test_every_layer_is_handed_out_as_soon_as_it_is_there(llm):
    """Layers come one by one, in order, chunk by chunk, before the forward pass is over."""
    tokens = llm.encode("The library kept every page that anyone had ever sent to it. ")
    seen = []
    spans: list[Span] = []
    stop = llm.record_spans(spans)
    cache = LayerCache(lambda layer_idx, keys, _: seen.append((layer_idx, keys.shape[2], len(spans))))
    llm.prefill(tokens, cache, 32)
    stop()
    layers = range(llm.shape.num_layers)
    chunks = [32] * (len(tokens) // 32) + [len(tokens) % 32]
    assert [one[:2] for one in seen] == [(layer, chunk) for chunk in chunks for layer in layers]
    # When a layer is handed out, only the layers before it have ended.
    assert [one[2] for one in seen] == list(range(len(seen)))
    llm.prefill(tokens, LayerCache(lambda *_: None), 32)
    assert len(spans) == len(seen)


def test_cache_rebuilt_from_bytes_continues_identically(llm):
    tokens = llm.encode("Mira had a red kite. ")
    whole = LayerCache(lambda *_: None)
    llm.prefill(tokens[:-1], whole, 512)
    data = cache_bytes(whole)
    assert data.numel() == llm.shape.cache_bytes(len(tokens) - 1)
    rebuilt = cache_from_bytes(data, llm.shape, len(tokens) - 1)
    expected = list(itertools.islice(llm.generate(tokens[-1], whole), 20))
    assert list(itertools.islice(llm.generate(tokens[-1], rebuilt), 20)) == expected


def test_continuations_read_as_words(llm):
    known = set(itertools.chain.from_iterable(one.split() for one in itertools.islice(stories(1), 2000)))
    prompt = "This is the story of Mira and the red kite. Her kite was red, and she took good care of it. "
    tokens = llm.encode(prompt)
    cache = LayerCache(lambda *_: None)
    llm.prefill(tokens[:-1], cache, 512)
    text = llm.decode(list(itertools.islice(llm.generate(tokens[-1], cache), 120)))
    words = text.split()[1:-1]
    assert len(words) > 10
    assert sum(word in known for word in words) >= 0.9 * len(words), text


def test_a_directory_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Llm(tmp_path)


# Each calls its sizes by names of its own, too.
ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
    "opt": {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 32, "num_hidden_layers": 3},
    # As many experts as layers.
    "mixtral": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_local_experts": 3},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_layers_are_found_whatever_an_architecture_calls_them(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=258, bos_token_id=256, **ARCHITECTURES[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llm = Llm(tmp_path)
    seen: list[int] = []
    spans: list[Span] = []
    stop = llm.record_spans(spans)
    llm.prefill(llm.encode("Tom had a boat"), LayerCache(lambda layer_idx, *_: seen.append(layer_idx)), 16)
    stop()
    assert seen == [span.layer_idx for span in spans] == [0, 1, 2]


def test_a_model_without_keys_and_values_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type mamba does not"):
        Llm(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_checkpoint_is_named(tmp_path, file):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded"):
        Llm(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "alone", "problem", "identical"),
    [([1, 2], [1, 2], None, True), ([1, 2], [1, 3], None, False), ([1, 2], [1, 2], "page 3", False)],
)
def test_other_tokens_or_other_bytes_are_not_identical(llm, tokens, alone, problem, identical):
    span = metrics.LayerTimes(layer_idx=0, compute=(0, 1), ready_ns=1, transfer=(1, 2))
    times = metrics.StreamTimes(begin_ns=0, reached_ns=3, first_token_ns=4, layers=(span,))
    prompts = {"prompts": ["Once"], "model": MODEL, "new_tokens": 2, "chunk_tokens": 8, "rounds": 1}
    decoder = SimpleNamespace(
        prompts=[llm.encode("Once")], _llm=llm, _carriers={}, _settings=SimpleNamespace(**prompts)
    )
    checked = {"tokens": tokens, "tokens_alone": alone}
    result = Decoder._describe(decoder, 0, [{"stream": times, "alone": 1.0}], checked, problem)
    assert (result["identical"], result["tokens_identical"]) == (identical, tokens == alone)
    assert to_json([result], {}, {}, prompts)["all_identical"] is identical

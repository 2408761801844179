"""Train the demo model: a byte-level Llama on stories of `anyfabric.demo.text`.

    python -m anyfabric.demo.train --out DIR [--seed 0] [--minutes 60]

The run is seeded and uses one thread, so that it gives the same bytes again on the same machine
and versions. The checkpoint is stored as float16 (about 3 MB) and is meant to be loaded as float32.

Token ids 0 to 255 are the bytes of UTF-8 text; 256 begins a text. There is no end token: a text
goes on with the next story, so a continuation is always as long as was asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyfabric.demo.text import stories

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Phase", "train"]

BEGIN_TOKEN = 256


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch shape; the tokens of a step stay about the same."""

    num_steps: int
    batch: int
    window: int


# Short windows teach the words; the long ones teach positions that long prompts need.
PHASES = (Phase(num_steps=680, batch=16, window=320), Phase(num_steps=250, batch=4, window=1536))
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 40


def model_config() -> LlamaConfig:
    """Describe the model: 8 layers, 4 query heads on 2 key-value heads, 1.5 million weights."""
    return LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_TOKEN,
        eos_token_id=None,
        pad_token_id=None,
    )


def train(config: LlamaConfig, phases: tuple[Phase, ...], *, seed: int, minutes: float) -> LlamaForCausalLM:
    """Train from scratch, for the given phases or until the time is over."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.train()
    optimizers = _optimizers(model)
    num_steps = sum(phase.num_steps for phase in phases)
    began, step = time.monotonic(), 0
    for idx, phase in enumerate(phases):
        batches = _batches(phase, seed=seed + idx)
        for _ in range(phase.num_steps):
            rate = _learning_rate(step, num_steps)
            for group in (group for one in optimizers for group in one.param_groups):
                group["lr"] = rate
            tokens = next(batches)
            # Only the matrix products run in bfloat16; weights and the optimizer stay in float32.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            elapsed_s = time.monotonic() - began
            if step % 20 == 0:
                click.echo(f"step {step}/{num_steps} loss {loss.item():.4f} {elapsed_s:.0f} s")
            if elapsed_s > minutes * 60:
                click.echo(f"stopped by --minutes after step {step}; not reproducible")
                return model
    return model


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Use Muon for the matrices and AdamW for the rest.

    With AdamW alone the loss stays higher and the model forgets who the story is about; with Muon it recalls
    names and things from far back. `model/training.json` has the loss on stories that it has not seen.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (others if weight.ndim < 2 or "embed" in name else matrices).append(weight)
    return [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _learning_rate(step: int, num_steps: int) -> float:
    """Rise linearly, then fall along a cosine to a twentieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def _batches(phase: Phase, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, window]: each row begins with BEGIN_TOKEN and the start of a story."""
    source = stories(seed)
    while True:
        rows: list[list[int]] = []
        for _ in range(phase.batch):
            row = [BEGIN_TOKEN]
            while len(row) < phase.window:
                row += (next(source) + "\n\n").encode()
            rows.append(row[: phase.window])
        yield torch.tensor(rows)


def _save(model: LlamaForCausalLM, out: Path, record: dict[str, object]) -> None:
    loose: Any = model
    loose.half().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long")
    options = parser.parse_args()
    model = train(model_config(), PHASES, seed=options.seed, minutes=options.minutes)
    model.eval()
    with torch.inference_mode():
        tokens = next(_batches(Phase(1, 16, 1024), seed=options.seed + 1_000_003))
        held_out = model(input_ids=tokens, labels=tokens).loss.item()
    click.echo(f"held-out loss {held_out:.4f} nats a byte")
    record: dict[str, object] = {
        "seed": options.seed,
        "phases": [asdict(phase) for phase in PHASES],
        "held_out_nats_per_byte": round(held_out, 4),
        "torch": torch.__version__,
    }
    _save(model, options.out, record)


if __name__ == "__main__":
    main()

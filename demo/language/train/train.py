"""Train the demo model on the standard library: `python -m demo.language.train.train --steps N`.

The learning rate rises, stays, and falls (a trapezoid over steps), and every batch depends on the
seed and the step number alone. So a run can be stopped at any time and resumed, and a run whose
length or fall was changed before the fall began is the run that had the new one from the start.
Weights, gradients and optimizer are float32; matrix products run in bfloat16 where the CPU has
them (`--float32` switches that off). Nothing outside the cache folder is written: when training is
over, `python -m demo.language.train.publish` makes the model folder, its card and the loss curve.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...training import Checkpoint, Optimizers, update, versions
from .corpus import SEED, read_sources, split_by_module
from .tokenizer import BEGIN, CONTEXT, END, VOCABULARY, train_tokenizer

__all__ = ["CACHE", "MEASURED_TOKENS", "Data", "Recipe", "held_out_loss", "new_model", "prepare"]

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "demo"
LOG_STEPS = 20
MEASURE_STEPS = 200
MEASURED_TOKENS = 8192
SAVE_STEPS = 100
VERSIONS = versions("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the text. Lengths and batches in tokens."""

    steps: int
    seed: int = SEED
    batch: int = 4096
    # Attention costs a third of a step at the full context on a CPU: most steps use half of it.
    context: int = CONTEXT // 2
    final_context: int = CONTEXT
    warmup_steps: int = 100
    fall_share: float = 0.42
    # A run that is out of time may land earlier: its last `landing_steps` end at step `landing`,
    # and there the rates fall to zero on top of the fall.
    landing: int | None = None
    landing_steps: int = 100
    adamw_rate: float = 8e-3
    muon_rate: float = 2e-2
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    float32: bool = False

    @property
    def fall_start(self) -> int:
        return self.steps - max(1, round(self.steps * self.fall_share))

    @property
    def end(self) -> int:
        return self.steps if self.landing is None else self.landing

    def context_at(self, step: int) -> int:
        return self.context if step < self.fall_start else self.final_context


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Share of the full learning rate used at `step`: 0..1, up, level, then down to zero."""
    rise = (step + 1) / recipe.warmup_steps
    fall = (recipe.steps - step) / (recipe.steps - recipe.fall_start)
    landing = 1.0 if recipe.landing is None else (recipe.landing - step) / recipe.landing_steps
    return min(1.0, rise, fall) * min(1.0, landing)


def batch_at(recipe: Recipe, stream: torch.Tensor, begin: int, step: int) -> torch.Tensor:
    """Windows for `step`, int64 [batch / context, context + 1]; each begins with token `begin`.

    Every pass over `stream` (int64, 1-D) cuts it at a new offset and shuffles the pieces, so a pass
    sees each token once, and the model learns to start anywhere, as it must when text is measured
    window by window.
    """
    context = recipe.context_at(step)
    first = step if context == recipe.context else step - recipe.fall_start
    rows = recipe.batch // context
    pieces = len(stream) // context - 1
    windows = []
    for index in range(first * rows, (first + 1) * rows):
        epoch, place = divmod(index, pieces)
        dice = torch.Generator().manual_seed(recipe.seed + 1000 * context + epoch)
        offset = int(torch.randint(context, (1,), generator=dice))
        piece = int(torch.randperm(pieces, generator=dice)[place])
        windows.append(stream[offset + piece * context :][:context])
    body = torch.stack(windows)
    return torch.cat([torch.full((rows, 1), begin, dtype=body.dtype), body], dim=1)


def held_out_loss(model: LlamaForCausalLM, ids: list[int], begin: int, context: int) -> float:
    """Mean negative log-likelihood in nats per token of `ids`, in windows of `context` tokens.

    Every window is predicted from `begin` and its own earlier tokens only; a last, shorter window
    counts as well.
    """
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), context - 1):
            window = torch.tensor([[begin, *ids[start : start + context - 1]]])
            logits = model(input_ids=window).logits[0, :-1].float()
            total += functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return total / len(ids)


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
        )
    )


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> Optimizers:
    """Muon for the layers' matrices, AdamW for the rest, each with its full learning rate."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    adamw = torch.optim.AdamW(
        others, lr=recipe.adamw_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
    return [(muon, recipe.muon_rate), (adamw, recipe.adamw_rate)]


@dataclass(frozen=True)
class Data:
    """The tokenizer, the training stream (int64, 1-D) and the held-out text's token ids."""

    tokenizer: PreTrainedTokenizerFast
    stream: torch.Tensor
    held_out: list[int]


def prepare(cache: Path) -> Data:
    """Make the data; tokenizer and stream are kept in `cache` until the training files change."""
    cache.mkdir(parents=True, exist_ok=True)
    split = split_by_module(read_sources())
    key = {"vocabulary": VOCABULARY, "files": {file.path: file.sha256 for file in split.train}}
    recorded = cache / "tokens.json"
    if recorded.exists() and json.loads(recorded.read_text()) == key:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer")
        stream = load_file(cache / "tokens.safetensors")["train"]
    else:
        texts = [file.text for file in split.train]
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(cache / "tokenizer")
        begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        stream = torch.tensor([token for ids in encoded for token in (begin, *ids, end)])
        save_file({"train": stream}, cache / "tokens.safetensors")
        recorded.write_text(json.dumps(key))
    held_out = "".join(file.text for file in split.held_out)
    ids = tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]
    return Data(tokenizer, stream, ids)


def refuse_other_recipe(recipe: Recipe, progress: dict[str, Any]) -> None:
    """Raise ValueError unless the run behind `progress` is one that `recipe` would have made."""
    earlier = Recipe(**progress["recipe"])
    plan = ("steps", "fall_share", "landing", "landing_steps")
    if replace(earlier, **{name: getattr(recipe, name) for name in plan}) != recipe:
        raise ValueError(
            f"the checkpoint was trained with {earlier}, not with {recipe}: go on with that recipe,"
            " or remove the checkpoint"
        )
    for step in range(progress["step"]):
        was, would_be = (
            (learning_rate_at(one, step), one.context_at(step)) for one in (earlier, recipe)
        )
        if was != would_be:
            raise ValueError(
                f"the checkpoint is at step {progress['step']}, and from step {step} on it was"
                f" trained otherwise than {recipe} says: go on with {earlier}"
            )


def take_step(
    model: LlamaForCausalLM,
    optimizers: Optimizers,
    recipe: Recipe,
    windows: torch.Tensor,
    share: float,
) -> float:
    """One update at `share` of the full learning rates on `windows`; the loss before it."""
    precision = torch.float32 if recipe.float32 else torch.bfloat16
    with torch.autocast("cpu", precision, enabled=not recipe.float32):
        logits = model(input_ids=windows[:, :-1]).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    update(model, optimizers, share, recipe.gradient_clip)
    return loss.item()


def train(recipe: Recipe, data: Data, cache: Path, until: int | None = None) -> None:
    """Train by `recipe` from the checkpoint in `cache`, if there is one, and leave one there.

    Prints the loss curve. Stops after step `until`, to be resumed, or when the recipe is done.
    Raises ValueError for a checkpoint that another recipe made.
    """
    begin = data.tokenizer.bos_token_id
    stop = recipe.end if until is None else min(until, recipe.end)
    model = new_model(recipe.seed)
    optimizers = new_optimizers(model, recipe)
    checkpoint = Checkpoint(cache)
    progress = checkpoint.progress()
    if progress is None:
        progress = {"step": 0, "seconds": 0.0, "curve": []}
    else:
        refuse_other_recipe(recipe, progress)
        checkpoint.load_model(model)
        checkpoint.load_optimizers(optimizers)
    progress |= {"recipe": asdict(recipe), "versions": VERSIONS, "train_tokens": len(data.stream)}
    print(
        f"{model.num_parameters():,} weights, {len(data.stream):,} training tokens,"
        f" {len(data.held_out):,} held-out tokens; starting at step {progress['step']}",
        flush=True,
    )
    losses: list[float] = []
    began = time.monotonic() - progress["seconds"]
    for step in range(progress["step"], stop):
        share = learning_rate_at(recipe, step)
        windows = batch_at(recipe, data.stream, begin, step)
        losses.append(take_step(model, optimizers, recipe, windows, share))
        done = step + 1
        last = done == stop
        if done % LOG_STEPS == 0 or last:
            row = {
                "step": done,
                "tokens": done * recipe.batch,
                "seconds": round(time.monotonic() - began),
                "learning_rate_share": round(share, 4),
                "train_loss": round(sum(losses) / len(losses), 4),
                "held_out_loss": "",
            }
            if done % MEASURE_STEPS == 0 or last:
                sample = data.held_out[:MEASURED_TOKENS]
                row["held_out_loss"] = round(held_out_loss(model, sample, begin, recipe.context), 4)
            progress["curve"].append(row)
            print(*row.values(), flush=True)
            losses.clear()
        if done % SAVE_STEPS == 0 or last:
            progress |= {"step": done, "seconds": time.monotonic() - began}
            checkpoint.save(model, optimizers, progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, required=True, help="length of the whole run")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder for checkpoint and tokens"
    )
    parser.add_argument("--landing", type=int, help="end at this step, before --steps")
    parser.add_argument("--until", type=int, help="stop after this step, to be resumed")
    parser.add_argument("--float32", action="store_true", help="matrix products in float32")
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, landing=args.landing, float32=args.float32)
    train(recipe, prepare(args.cache), args.cache, args.until)


if __name__ == "__main__":
    main()

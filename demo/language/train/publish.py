"""Make the model folder, its card and the loss curve from the last checkpoint.

`python -m demo.language.train.publish` writes `demo/model/` (weights in bfloat16, tokenizer, model
card) and `loss.csv`, `loss.png` and `run.json` beside this file. This
script measures every figure in the card.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from ...training import Checkpoint, render_card, write_record
from .corpus import manifest, module_of, read_sources, split_by_module
from .tokenizer import BEGIN, CONTEXT, VOCABULARY
from .train import CACHE, MEASURED_TOKENS, Recipe, held_out_loss, new_model, prepare

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1]
# A server adds at least one token to a prompt: BEGIN, the window and that one fill the context.
WINDOW = CONTEXT - 2
PROMPTS = ("def read_", "import os\n\nclass ", "    for i in range(")


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer to `out` in bfloat16, each file by rename, `config.json` last.

    The two small settings files are written here and not by transformers, whose version 5 adds
    class names and keys that version 4 does not know.
    """
    settings = {
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file, values in settings.items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o644)  # safetensors makes its file readable by its owner alone
            path.replace(out / path.name)


def complete(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 64
) -> str:
    """`prompt` and up to `tokens` greedy tokens after it."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def plot(curve: list[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over the tokens seen, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    millions = [row["tokens"] / 1e6 for row in curve]
    axes.plot(millions, [row["train_loss"] for row in curve], label="training", linewidth=1)
    measured = [row for row in curve if row["held_out_loss"] != ""]
    axes.plot(
        [row["tokens"] / 1e6 for row in measured],
        [row["held_out_loss"] for row in measured],
        label=f"held out, its first {MEASURED_TOKENS:,} tokens",
        marker=".",
    )
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Demo model: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    # The default metadata names the drawing library's version: the picture would differ by machine.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def card(run: dict[str, Any]) -> str:
    """The model card, as Markdown, from what `run.json` holds."""
    recipe, corpus, model, held_out = run["recipe"], run["corpus"], run["model"], run["held_out"]
    plan = Recipe(**recipe)
    schedule = (
        f"up in {plan.warmup_steps} steps, level to step {plan.fall_start:,}, then on a line that "
        f"reaches zero at step {plan.steps:,}"
    )
    command = f"python -m demo.language.train.train --steps {plan.steps}"
    if plan.landing is not None:
        schedule += (
            f", landed earlier: on top of it a line from step {plan.end - plan.landing_steps:,} to "
            f"zero at step {plan.end:,}, where the run ended"
        )
        command += f" --landing {plan.landing}"
    rows = [
        ("weights", f"{model['weights']:,}, bfloat16, {model['bytes']:,} bytes"),
        ("shape", model["shape"]),
        ("tokenizer", f"byte-level BPE, {VOCABULARY} tokens, learned from the training side only"),
        ("context", f"{CONTEXT} tokens (trained up to there, not beyond)"),
        ("text", f"{corpus['source']}, {corpus['train_bytes']:,} bytes, "
                 f"{corpus['train_tokens']:,} tokens"),
        ("training", f"{run['steps']:,} steps of {recipe['batch']:,} tokens = {run['tokens']:,} "
                     f"tokens, {run['seconds'] / 60:.0f} minutes on two cores with other work"),
        ("precision", "float32" if plan.float32 else "float32, matrix products in bfloat16"),
        ("optimizer", f"Muon (rate {plan.muon_rate}) for the layers' matrices, AdamW "
                      f"({plan.adamw_rate}) for the rest, weight decay {plan.weight_decay}"),
        ("learning rate", schedule),
        ("seed", recipe["seed"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in run["versions"].items())),
        ("last training loss", f"{run['train_loss']:.3f} nats per token"),
        ("held-out perplexity", f"**{held_out['perplexity']:.3f}** per token, "
                                f"{held_out['bits_per_byte']:.3f} bits per byte"),
    ]  # fmt: skip
    return render_card(
        HERE / "card.md.jinja",
        rows=rows,
        samples=run["samples"],
        held_out=held_out,
        begin=BEGIN,
        command=command,
    )


def measured(out: Path, progress: dict[str, Any], train_tokens: int) -> dict[str, Any]:
    """What `run.json` holds: the recipe, the corpus, and what the model in `out` does.

    Args:
        out: the model folder; the card's figures are measured on its files.
        progress: of the checkpoint that the model comes from.
        train_tokens: tokens of the training text.
    """
    split = manifest(split_by_module(read_sources()))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    config = model.config
    return {
        "recipe": progress["recipe"],
        "versions": progress["versions"],
        "steps": progress["step"],
        "tokens": progress["step"] * progress["recipe"]["batch"],
        "seconds": round(progress["seconds"]),
        "train_loss": progress["curve"][-1]["train_loss"],
        "corpus": {
            "source": split["source"],
            "train_bytes": split["train"]["bytes"],
            "train_tokens": train_tokens,
        },
        "model": {
            "weights": model.num_parameters(),
            "bytes": (out / "model.safetensors").stat().st_size,
            "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"MLP {config.intermediate_size}, {config.num_attention_heads} heads of "
            f"{config.head_dim} on {config.num_key_value_heads} key-value heads, "
            "output layer of its own",
        },
        "held_out": _held_out(model, tokenizer, split["held_out"]["files"]),
        "samples": [complete(model, tokenizer, prompt) for prompt in PROMPTS],
    }


def _held_out(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, files: dict[str, Any]
) -> dict[str, Any]:
    """The held-out text, whose `files` are listed by path, and the model's perplexity on it."""
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    loss = held_out_loss(model, ids, tokenizer.bos_token_id, WINDOW + 1)
    size = len(text.encode())
    return {
        "bytes": size,
        "tokens": len(ids),
        "modules": len({module_of(path) for path in files}),
        "window": WINDOW,
        "perplexity": round(math.exp(loss), 4),
        "bits_per_byte": round(loss * len(ids) / math.log(2) / size, 4),
    }


def main() -> None:
    """Publish the model of the last checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of the training's checkpoint"
    )
    parser.add_argument("--out", type=Path, default=DEMO / "model", help="the model folder")
    parser.add_argument("--weights-only", action="store_true", help="no measurements, no card")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.cache)
    progress = checkpoint.progress()
    if progress is None:
        parser.error(
            f"{args.cache} holds no checkpoint: run `python -m demo.language.train.train` first"
        )
    data = prepare(args.cache)
    model = new_model(progress["recipe"]["seed"])
    checkpoint.load_model(model)
    export(model, data.tokenizer, args.out)
    if args.weights_only:
        return
    run = measured(args.out, progress, len(data.stream))
    write_record(HERE, run, progress["curve"])
    plot(progress["curve"], HERE / "loss.png")
    (args.out / "README.md").write_text(card(run), encoding="utf-8")
    found = run["held_out"]
    print(
        f"held-out perplexity {found['perplexity']:.4f} on {found['tokens']:,} tokens; "
        f"{args.out} is complete"
    )


if __name__ == "__main__":
    main()

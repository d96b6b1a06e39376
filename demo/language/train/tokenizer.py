"""The demo model's tokenizer: byte-level BPE, so every text comes back byte for byte."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["BEGIN", "CONTEXT", "END", "VOCABULARY", "train_tokenizer"]

BEGIN = "<|begin|>"
END = "<|end|>"
VOCABULARY = 2048
CONTEXT = 512


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn `VOCABULARY` tokens from `texts`; every encoded prompt begins with `BEGIN`.

    `BEGIN` has id 0 and `END` id 1. Training is deterministic: ties are broken by token order.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=CONTEXT,
        # Otherwise decoding would rewrite " ." to "." and the like, and code would not round-trip.
        clean_up_tokenization_spaces=False,
    )

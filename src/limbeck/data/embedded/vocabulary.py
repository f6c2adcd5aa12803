"""The tokenizer of the embedded task: words and single digits, each with the space before it: short sequences."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from limbeck.data.embedded import problems

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PIECE = r" ?[A-Za-z]+| ?[0-9]|\n| ?[^\sA-Za-z0-9]"


def _pieces() -> list[str]:
    """Every piece that a problem or its worked steps can hold, in a fixed order."""
    templates = [*problems.STARTS, *problems.GROUPS, *problems.ASIDES, *problems.QUESTIONS, *problems.TOGETHER]
    for sentences in (*problems.CHANGES.values(), *problems.COMPARISONS.values()):
        templates += sentences
    templates += [*problems.LINKS, "+ - * = . Answer:"]
    # A text begins with a name or a digit; all other words follow a space.
    words = {piece for text in templates for piece in re.findall(PIECE, " " + re.sub(r"\{.\}", "", text))}
    words |= {" " + word for word in (*problems.NAMES, *problems.THINGS)} | set(problems.NAMES)
    words |= {".", "?", ":"}
    digits = [str(digit) for digit in range(10)]
    return ["\n", *digits, *(f" {digit}" for digit in digits), *sorted(words)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer built from the task's own words: BOS before every text, exact round trip of the task's texts.

    A word that no problem holds becomes `<unk>`.
    """
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *_pieces()])}
    pad, bos, eos, unk = SPECIAL
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )

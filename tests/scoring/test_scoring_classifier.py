"""A sequence classifier as reward, against transformers' own pipeline, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    pipeline,
)

from limbeck.data.embedded.vocabulary import tokenizer as embedded_tokenizer
from limbeck.errors import ModelError, RecipeError, ScoreError
from limbeck.scoring import build_reward, check_reward

WORDS = "the a cat dog sat ran home away yes no big small".split()
PROMPTS = ["the cat", "a dog ran home", "the big dog", "yes", "no the small cat sat"]
COMPLETIONS = ["sat home", "away", "", "the small cat ran away home", "dog"]
ROWS = [{"document": f"the {word}"} for word in WORDS[2:7]]


def bert(folder: Path, labels: int = 1) -> Path:
    torch.manual_seed(0)
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    settings: Any = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        initializer_range=0.5,
    )
    settings.num_labels = labels
    BertForSequenceClassification(settings).save_pretrained(folder)
    return folder


def oracle(folder: Path, firsts: list[str] | None, apply: str = "none") -> list[float]:
    classify: Any = pipeline("text-classification", model=str(folder), function_to_apply=apply, device="cpu")
    if firsts is None:
        return [classify(completion)[0]["score"] for completion in COMPLETIONS]
    return [classify({"text": a, "text_pair": b})["score"] for a, b in zip(firsts, COMPLETIONS, strict=True)]


def test_pairs_columns_and_completions_alone(tmp_path: Path) -> None:
    folder = bert(tmp_path)

    def found(**options: Any) -> list[float]:
        reward = build_reward({"name": "classifier", "path": str(folder), **options})
        return reward(PROMPTS, COMPLETIONS, ROWS)

    pairs = oracle(folder, PROMPTS)
    assert max(pairs) - min(pairs) > 0.05  # the texts matter
    assert found() == pytest.approx(pairs, abs=1e-5)
    for batch_size in (1, 2):
        assert found(batch_size=batch_size) == pytest.approx(pairs, abs=1e-5)
    assert found(sigmoid=True) == pytest.approx(oracle(folder, PROMPTS, "sigmoid"), abs=1e-6)
    documents = [row["document"] for row in ROWS]
    assert found(column="document") == pytest.approx(oracle(folder, documents), abs=1e-5)
    assert found(alone=True) == pytest.approx(oracle(folder, None), abs=1e-5)
    spec = {"name": "classifier", "path": str(folder), "column": "docment"}
    with pytest.raises(RecipeError, match="column docment.*did you mean 'document'"):
        check_reward(spec, ROWS)


def test_a_decoder_without_a_pad_token(tmp_path: Path) -> None:
    tokenizer = embedded_tokenizer()
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=None,
    )
    config.num_labels = 1
    model: Any = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    texts = ["Ada has 3 apples.", "Tom", "Ada has 3 apples and 4 pears."]
    reward = build_reward({"name": "classifier", "path": str(tmp_path), "alone": True})
    with torch.no_grad():
        alone = [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits.item() for text in texts]
    assert reward(texts, texts, [{}] * 3) == pytest.approx(alone, abs=1e-5)


def test_a_text_that_is_too_long_is_refused_unless_cut(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    long = " ".join(WORDS * 2)
    reward = build_reward({"name": "classifier", "path": str(folder)})
    with pytest.raises(ScoreError, match=r"prompt 1 \('the'\): expected at most 20 tokens, found 28: set reward.trunc"):
        reward(["the", "the"], ["cat", long], [{}, {}])
    cut = build_reward({"name": "classifier", "path": str(folder), "truncate": True})
    (found,) = cut(["the"], [long], [{}])
    assert found == cut(["the"], [" ".join((WORDS * 2)[:16])], [{}])[0]


def test_what_is_no_classifier_with_one_logit_is_refused(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        build_reward({"name": "classifier", "path": str(folder)})

    with pytest.raises(ModelError, match="one logit, found BertForSequenceClassification with 3"):
        build(bert(tmp_path / "three", labels=3))
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "writer")
    embedded_tokenizer().save_pretrained(tmp_path / "writer")
    with pytest.raises(ModelError, match="expected a sequence classifier with one logit, found LlamaForCausalLM"):
        build(tmp_path / "writer")
    pickled = bert(tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="found pickled weights only"):
        build(pickled)
    with pytest.raises(ModelError, match="found nothing there"):
        build(tmp_path / "none" / "at" / "all")
    with pytest.raises(RecipeError, match="reward.alone"):
        build_reward({"name": "classifier", "path": str(pickled), "alone": True, "column": "x"})
    with pytest.raises(RecipeError, match="reward.batch_size"):
        build_reward({"name": "classifier", "path": str(pickled), "batch_size": 0})


def test_a_nan_names_the_prompt(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    model: Any = BertForSequenceClassification.from_pretrained(folder)
    model.bert.embeddings.word_embeddings.weight.data[5 + WORDS.index("dog")] = torch.nan
    model.save_pretrained(folder)
    reward = build_reward({"name": "classifier", "path": str(folder)})
    with pytest.raises(
        ScoreError, match=r"score classifier at prompt 1 \('a dog ran home'\): .*finite number, found nan"
    ):
        reward(PROMPTS[:2], COMPLETIONS[:2], ROWS[:2])

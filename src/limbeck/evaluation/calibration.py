"""How far a model's confidence is from how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limbeck.data import dataset_rollout, render
from limbeck.errors import DataError
from limbeck.evaluation.held_out import device_batches, evaluating, row_sums
from limbeck.models import completion_hidden
from limbeck.ops.chunked import CHUNK_TOKENS, head_logits, linear_terms
from limbeck.scoring import references_in
from limbeck.types import Example, Rollout

BINS = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """`ece`, `accuracy` and mean `confidence` as fractions over `count` predictions; `bins` that hold some: `low` and
    `high` confidence, `count`, mean `confidence`, `accuracy`."""

    ece: float
    accuracy: float
    confidence: float
    count: int
    bins: list[dict[str, float]]


def calibration(confidence_N: np.ndarray, correct_N: np.ndarray) -> Calibration:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): sum over BINS bins of equal width,
    (low, high], of their share of the predictions times |accuracy - confidence|. DataError without predictions."""
    if not len(confidence_N):
        raise DataError("expected at least one prediction to calibrate, found none")
    edges = np.linspace(0, 1, BINS + 1)
    bin_N = np.digitize(confidence_N, edges[1:-1], right=True)
    counts = np.bincount(bin_N, minlength=BINS)
    confidences, rights = (np.bincount(bin_N, values_N, minlength=BINS) for values_N in (confidence_N, correct_N))
    found = [
        {
            "low": float(edges[place]),
            "high": float(edges[place + 1]),
            "count": int(counts[place]),
            "confidence": float(confidences[place] / counts[place]),
            "accuracy": float(rights[place] / counts[place]),
        }
        for place in counts.nonzero()[0]
    ]
    ece = float(np.abs(rights - confidences).sum() / len(confidence_N))
    return Calibration(ece, float(np.mean(correct_N)), float(np.mean(confidence_N)), len(confidence_N), found)


@torch.no_grad()
def token_calibration(
    model: Any, examples: Sequence[Example], pad_id: int, *, batch_tokens: int = 16_384
) -> Calibration:
    """Of the learnt tokens of `examples`: the probability of the token that the model finds likeliest (temperature 1),
    and whether it is the one that stands there."""
    confidences: list[np.ndarray] = []
    rights: list[np.ndarray] = []
    with evaluating(model):
        for _, batch in device_batches(model, _learnt(examples), pad_id, batch_tokens):
            hidden_NH, tokens_N, head = completion_hidden(model, batch)
            for start in range(0, len(tokens_N), CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                probability_n, likeliest_n = head_logits(hidden_NH[chunk], head).softmax(-1).max(-1)
                confidences.append(probability_n.double().cpu().numpy())
                rights.append((likeliest_n == tokens_N[chunk]).double().cpu().numpy())
    return calibration(np.concatenate(confidences or [np.empty(0)]), np.concatenate(rights or [np.empty(0)]))


@torch.no_grad()
def label_calibration(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    context: int | None = None,
    batch_tokens: int = 16_384,
) -> Calibration:
    """Of rows with a `prompt`, `labels` (two texts or more that may answer it, with the white space that stands before
    them) and the right one (`label`, `completion` or `answer`, or `label` as its place from 0): the probability of the
    likeliest label among the row's labels (softmax over their log-probabilities after the prompt, each the sum over its
    tokens without the end), and whether it is the right one. As for SST2 and BoolQ in MiniLLM (arXiv 2306.08543,
    table 2). Raises DataError for rows that lack one of these.
    """
    right, examples = labelled(tokenizer, rows, template=template, context=context)
    logprobs = np.zeros(len(examples))
    rollouts = [_without_end(example) for example in examples]
    with evaluating(model):
        for places, batch in device_batches(model, rollouts, tokenizer.pad_token_id, batch_tokens):
            hidden_NH, tokens_N, head = completion_hidden(model, batch)
            nll_N = linear_terms(hidden_NH, head, None, tokens_N).loss_N.double().cpu().numpy()
            logprobs[places] = -row_sums(batch, nll_N)
    confidence, correct = [], []
    for place, of_row in zip(
        right, np.split(logprobs, np.cumsum([len(row["labels"]) for row in rows])[:-1]), strict=True
    ):
        probabilities = np.exp(of_row - np.logaddexp.reduce(of_row))
        confidence.append(probabilities.max())
        correct.append(float(probabilities.argmax() == place))
    return calibration(np.array(confidence), np.array(correct))


def labelled(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, template: str | None = None, context: int | None = None
) -> tuple[list[int], list[Example]]:
    """The right label's place in each row, and prompt and label for every label of every row. DataError as
    `label_calibration` says, before a model is run."""
    right = [_right_label(row, number) for number, row in enumerate(rows, 1)]
    filled = [{"prompt": row["prompt"], "completion": label} for row in rows for label in row["labels"]]
    examples, summary = render(filled, tokenizer, template=template, context=context)
    if summary.shortened:
        raise DataError(
            f"labels: expected prompt and label within the model's context of {context} tokens, found "
            f"{summary.shortened} that are longer: take them out"
        )
    return right, examples


def _right_label(row: Mapping[str, Any], number: int) -> int:
    """The place of the right label. DataError where there is none."""
    labels = row.get("labels")
    if not isinstance(labels, list) or len(labels) < 2 or not isinstance(row.get("prompt"), str):
        raise DataError(
            f"row {number}: expected a prompt and two labels or more (column labels), found {', '.join(row)}"
        )
    label = row.get("label")
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    answers = {str(answer).strip() for answer in ([label] if label is not None else references_in(row))}
    places = [place for place, text in enumerate(labels) if str(text).strip() in answers]
    if len(places) != 1:
        raise DataError(
            f"row {number}: expected one of the labels {', '.join(map(repr, labels))} as the right one (column label, "
            f"completion or answer), found {', '.join(map(repr, answers)) or 'none'}"
        )
    return places[0]


def _learnt(examples: Sequence[Example]) -> list[Rollout]:
    return [dataset_rollout(example) for example in examples if any(example.mask)]


def _without_end(example: Example) -> Rollout:
    """The label's tokens alone are learnt: neither the token that ends it nor what stands before it."""
    start, end = example.prompt_tokens, len(example.tokens) - 1
    mask = [start <= place < end for place in range(len(example.tokens))]
    return Rollout(example.tokens, mask, start, "dataset", index=example.index)

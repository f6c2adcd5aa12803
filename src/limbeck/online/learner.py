"""A draft as something to train: traces in, new weights out. Knows nothing of processes, gates and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.errors import RecipeError
from limbeck.models import autocast_to, cut_layers, hidden_and_head, load_model, probe_autocast, set_vocabulary
from limbeck.online.buffer import Trace, joined
from limbeck.online.objective import acceptance, find_objective, known_mass, terms
from limbeck.types import Head, Sparse

Breathe = Callable[[], None]
"""Called between two pieces of work, each of a fraction of a second: it may wait, or raise to end the work."""

Idle = Callable[[], bool]
"""Whether nobody is served just now."""

Measured = Callable[[int, float, float | None], None]
"""measured(steps so far, mean loss of the steps since the last measure, acceptance on the traces to stop by)."""

_BETTER = 1e-4  # of acceptance: less is no gain
_EARLY = 9  # a step is 9/10, 9/11, 9/12, ... of an average, until that is over as many as `Training.average` says


@dataclass(frozen=True, eq=False)
class Batch:
    """Some traces side by side, padded on the right. Position n is index `index_N[n]` of row `row_N[n]`: a causal model
    predicts it from column `index_N[n] - 1`. `columns_BTF`: the target's hidden states there (float32), zero behind."""

    tokens_BT: Tensor
    real_BT: Tensor
    row_N: Tensor
    index_N: Tensor
    signal: Sparse
    columns_BTF: Tensor | None = None


class Learner(Protocol):
    """A draft with gradients, in float32. `ids_D`: the tokens that it may draft (None: all). `autocast`: what its
    products are taken in (None: float32)."""

    ids_D: Tensor | None
    autocast: torch.dtype | None

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names that `Draft.prepare` takes."""
        ...

    def predict(self, batch: Batch) -> tuple[Tensor, Head]:
        """The hidden states (N, H) that predict the batch's positions, each as the first drafted token, and the whole
        head."""
        ...

    def lessons(self, batch: Batch) -> tuple[Tensor, Head, Tensor]:
        """What it is trained by: hidden states (M, H), the whole head, and the position of the batch that each of them
        predicts (M,). A draft that reads what it has made itself predicts a position in several ways."""
        ...


class ModelLearner:
    """A causal model, in float32: its own copy."""

    def __init__(self, model: Any, *, ids_D: Tensor | None = None, autocast: torch.dtype | None = None) -> None:
        self.model = model.float().train().requires_grad_(True)
        self.ids_D = ids_D
        self.autocast = autocast

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def predict(self, batch: Batch) -> tuple[Tensor, Head]:
        hidden_BTH, head = hidden_and_head(self.model, batch.tokens_BT, batch.real_BT)
        return hidden_BTH[batch.row_N, batch.index_N - 1], head

    def lessons(self, batch: Batch) -> tuple[Tensor, Head, Tensor]:
        return *self.predict(batch), torch.arange(len(batch.index_N))


def model_learner(
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    vocabulary: int | None = None,
    ids_D: Tensor | None = None,
) -> ModelLearner:
    """The learner of a model in a folder, or of some of its layers, with its products in bf16 where that is faster.
    `vocabulary`: rows of its head that are tokens, as the draft that serves has them (None: as its config says).
    `ids_D`: the tokens that it may draft (None: all). ModelError as from `load_model`."""
    model = load_model(folder, dtype=torch.float32)
    if vocabulary is not None:
        set_vocabulary(model, vocabulary)
    autocast, _ = probe_autocast(model.device, model.config.get_text_config().hidden_size)
    return ModelLearner(model if layers is None else cut_layers(model, layers), ids_D=ids_D, autocast=autocast)


@dataclass(frozen=True)
class Training:
    """How a draft is trained. objective: `blend`, or a divergence. An optimiser step is of `batch_tokens` of context at
    most, an epoch of `least_steps` at least; `epochs` at most over the traces; acceptance on the traces held out for it
    is measured `measures` times an epoch, and `patience` measures without a new best end it; while nobody is served
    `idle_epochs` and `idle_patience` stand in their place. `replay`: share of the batches that are of earlier traces.
    So an update takes 1 / (1 - replay) x `epochs` passes for each new position, however many are kept. `average`: steps
    that the weights that serve are the mean of, about (1: the last alone)."""

    objective: str = "blend"
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    least_steps: int = 8
    epochs: int = 4
    idle_epochs: int = 24
    measures: int = 2
    patience: int = 4
    idle_patience: int = 8
    clip: float = 1.0
    replay: float = 0.5
    average: int = 100

    def __post_init__(self) -> None:
        find_objective(self.objective)
        if not 0 <= self.replay < 1:
            raise RecipeError(f"replay: expected a share from 0 to below 1, found {self.replay}: lower it")
        if self.average < 1:
            raise RecipeError(f"average: expected 1 step or more, found {self.average}: raise it")


@dataclass(frozen=True)
class Fitted:
    """`before`, `after`: mean acceptance on the traces held out to stop by (None without such). `finite`: no NaN."""

    before: float | None
    after: float | None
    steps: int
    positions: int
    finite: bool = True


@dataclass(eq=False)
class Average:
    """What serves is the running mean of what is trained (Polyak and Juditsky 1992). So steps may be large, and
    training goes on from where it was, not from the mean, update after update.

    own: the weights that are trained (None: so far those of the learner). steps: that have been averaged."""

    own: dict[str, Tensor] | None = None
    steps: int = 0

    @torch.no_grad()
    def add(self, mean: Mapping[str, Tensor], learner: Learner, over: int) -> None:
        """mean += share (weight - mean), share = max(1 / over, 9 / (9 + steps))."""
        self.steps += 1
        share = max(1 / over, _EARLY / (_EARLY + self.steps))
        for name, weight in learner.trained().items():
            mean[name].lerp_(weight, share)


def batches(traces: Sequence[Trace], batch_tokens: int) -> list[Batch]:
    """The traces in batches of at most so many tokens, padding included; those of like length together."""
    made: list[Batch] = []
    group: list[Trace] = []
    for trace in sorted(traces, key=lambda trace: (len(trace.tokens), trace.number)):
        if group and len(trace.tokens) * (len(group) + 1) > batch_tokens:
            made.append(batch(group))
            group = []
        group.append(trace)
    return [*made, batch(group)] if group else made


def batch(traces: Sequence[Trace]) -> Batch:
    width = max(len(trace.tokens) for trace in traces)
    tokens_BT = torch.zeros(len(traces), width, dtype=torch.long)
    real_BT = torch.zeros(len(traces), width, dtype=torch.long)
    for row, trace in enumerate(traces):
        tokens_BT[row, : len(trace.tokens)] = torch.from_numpy(trace.tokens.astype(np.int64))
        real_BT[row, : len(trace.tokens)] = 1
    row_N = torch.tensor(np.repeat(np.arange(len(traces)), [trace.size for trace in traces]))
    index_N = torch.from_numpy(np.concatenate([trace.positions for trace in traces]).astype(np.int64))
    return Batch(tokens_BT, real_BT, row_N, index_N, _signal(traces), _columns(traces, width))


def _signal(traces: Sequence[Trace]) -> Sparse:
    ids_NK, logprobs_NK, tail_N = joined((trace.ids_NK, trace.logprobs_NK, trace.tail_N) for trace in traces)
    return Sparse(
        torch.from_numpy(ids_NK.astype(np.int64)),
        torch.from_numpy(logprobs_NK.astype(np.float32)),
        torch.from_numpy(tail_N),
    )


def _columns(traces: Sequence[Trace], width: int) -> Tensor | None:
    found = [trace.columns_TF for trace in traces if trace.columns_TF is not None]
    if len(found) < len(traces):
        return None
    columns_BTF = torch.zeros(len(found), width, found[0].shape[1])
    for row, columns_TF in enumerate(found):
        columns_BTF[row, : len(columns_TF)] = torch.from_numpy(columns_TF).view(torch.bfloat16).float()
    return columns_BTF


@torch.no_grad()
def alphas(learner: Learner, made: Batch) -> Tensor:
    """alpha_raw (N,) at each position of the batch, float32."""
    with autocast_to(made.tokens_BT.device, learner.autocast):
        return acceptance(*learner.predict(made), made.signal, learner.ids_D).float()


@torch.no_grad()
def acceptances(
    learner: Learner, traces: Sequence[Trace], batch_tokens: int, breathe: Breathe = lambda: None
) -> dict[int, tuple[float, int]]:
    """Of each trace, by its number: (mean acceptance over its positions, how many these are)."""
    found: dict[int, tuple[float, int]] = {}
    ordered = sorted(traces, key=lambda trace: (len(trace.tokens), trace.number))
    place = 0
    for made in batches(traces, batch_tokens):
        breathe()
        alpha_N = alphas(learner, made)
        rows = made.tokens_BT.shape[0]
        sums = torch.zeros(rows).index_add_(0, made.row_N, alpha_N)
        for row, trace in enumerate(ordered[place : place + rows]):
            found[trace.number] = (float(sums[row]) / trace.size, trace.size)
        place += rows
    return found


def mean_known(learner: Learner, traces: Sequence[Trace]) -> float | None:
    """p(D): the target's mean mass on the tokens that the draft may draft, at least."""
    if learner.ids_D is None or not traces:
        return None
    return float(known_mass(_signal(traces), learner.ids_D).mean())


def mean_acceptance(found: Mapping[int, tuple[float, int]]) -> float | None:
    """Over all positions; None over none."""
    positions = sum(size for _, size in found.values())
    return sum(alpha * size for alpha, size in found.values()) / positions if positions else None


def optimiser_of(learner: Learner, training: Training) -> torch.optim.Optimizer:
    weights = list(learner.trained().values())
    return torch.optim.AdamW(weights, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def fit(
    learner: Learner,
    optimiser: torch.optim.Optimizer,
    train: Sequence[Trace],
    stop: Sequence[Trace],
    training: Training,
    generator: torch.Generator,
    *,
    replay: Sequence[Trace] = (),
    average: Average | None = None,
    breathe: Breathe = lambda: None,
    idle: Idle = lambda: False,
    measured: Measured = lambda steps, loss, alpha: None,
) -> Fitted:
    """Trains on `train` and leaves the learner with the averaged weights that accept the most on `stop`, those from
    before included. Without `stop` traces it is one epoch. A NaN ends it. `average`: training goes on from the call
    before that had it."""
    best = before = mean_acceptance(acceptances(learner, stop, training.batch_tokens, breathe))
    best_state, waited, steps, positions, finite = snapshot(learner), 0, 0, 0, True
    average = average or Average()
    mean = average.own or snapshot(learner)
    exchange(learner, mean)
    losses: list[float] = []
    for made in _order(train, replay, training, _epochs(training, idle) if stop else range(1), generator):
        if isinstance(made, Batch):
            breathe()
            loss = _step(learner, optimiser, made, training)
            if loss is None:
                finite = False
                break
            average.add(mean, learner, training.average)
            losses.append(loss)
            steps += 1
            positions += len(made.index_N)
            continue
        exchange(learner, mean)
        found = mean_acceptance(acceptances(learner, stop, training.batch_tokens, breathe))
        waited += 1
        if best is not None and found is not None and found > best + _BETTER:
            best, best_state, waited = found, snapshot(learner), 0
        exchange(learner, mean)
        measured(steps, sum(losses) / len(losses), found)
        losses = []
        if waited >= (training.idle_patience if idle() else training.patience):
            break
    exchange(learner, mean)
    average.own = mean
    if best is not None or not finite:
        restore(learner, best_state)
    return Fitted(before, best, steps, positions, finite)


def _epochs(training: Training, idle: Idle) -> Iterator[int]:
    """Idle time is free: epochs beyond those that traffic allows begin where there is none."""
    for epoch in range(max(training.epochs, training.idle_epochs)):
        if epoch >= training.epochs and not idle():
            return
        yield epoch


def _order(
    train: Sequence[Trace],
    replay: Sequence[Trace],
    training: Training,
    epochs: Iterable[int],
    generator: torch.Generator,
) -> Iterator[Batch | None]:
    """Batches in random order, and None where acceptance is to be measured."""
    most = training.batch_tokens
    if training.least_steps:
        most = min(most, -(-sum(len(trace.tokens) for trace in train) // training.least_steps))
    fresh, earlier = batches(train, most), batches(replay, most)
    every = max(1, -(-len(fresh) // training.measures))
    for _ in epochs:
        for count, place in enumerate(torch.randperm(len(fresh), generator=generator).tolist(), 1):
            yield fresh[place]
            while earlier and torch.rand((), generator=generator) < training.replay:
                yield earlier[int(torch.randint(len(earlier), (), generator=generator))]
            if count % every == 0 or count == len(fresh):
                yield None


def _step(learner: Learner, optimiser: torch.optim.Optimizer, made: Batch, training: Training) -> float | None:
    """One optimiser step on the mean over the batch's lessons, which is returned. None: it is not finite, and nothing
    was changed."""
    objective = find_objective(training.objective)
    with autocast_to(made.tokens_BT.device, learner.autocast):
        hidden_MH, head, place_M = learner.lessons(made)
        given = made.signal
        signal = Sparse(given.tokens_NK[place_M], given.logprobs_NK[place_M], given.tail_logprob_N[place_M])
        loss = terms(hidden_MH, head, signal, learner.ids_D, objective).loss_N.mean()
    optimiser.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(list(learner.trained().values()), training.clip)
    if not torch.isfinite(norm) or not torch.isfinite(loss):
        return None
    optimiser.step()
    return float(loss.detach())


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in learner.trained().items()}


@torch.no_grad()
def restore(learner: Learner, state: Mapping[str, Tensor]) -> None:
    for name, weight in learner.trained().items():
        weight.copy_(state[name])


@torch.no_grad()
def exchange(learner: Learner, state: Mapping[str, Tensor]) -> None:
    """The learner's weights become those of `state`, and the other way round."""
    for name, weight in learner.trained().items():
        own = weight.clone()
        weight.copy_(state[name])
        state[name].copy_(own)


def optimiser_state(learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by the names of what they belong to."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, weight in learner.trained().items()
        for key, value in optimiser.state.get(weight, {}).items()
    }


def set_optimiser_state(learner: Learner, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Puts back what `optimiser_state` gave; names that it does not know are left alone."""
    optimiser.state.clear()
    weights = learner.trained()
    for full, tensor in state.items():
        name, _, key = full.rpartition("/")
        if name in weights:
            optimiser.state[weights[name]][key] = tensor.clone()

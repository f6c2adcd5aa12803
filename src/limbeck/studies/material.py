"""What a study works with: the target that answers, the draft as something to train, and the recorded answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from limbeck.decoding.drafts.layers import every_other
from limbeck.models import cast, fingerprint, load_model, load_tokenizer, probe_autocast, set_vocabulary
from limbeck.online import Trace, model_learner
from limbeck.online.recording import TOP
from limbeck.online.updater import Build
from limbeck.online.vocabulary import likely_tokens
from limbeck.pipeline.cells import Say
from limbeck.studies.answers import prompts_of, record
from limbeck.studies.setting import Domain, Setting


class Material:
    """Loads the target, in bf16 where that is faster. `layers`: those of the draft that are kept (None: all of a
    draft's own; by default every other one of the target's first, half as many as it has). `build`: makes the draft's
    learner with the weights that it begins with and its whole head. ModelError where they do not load."""

    def __init__(self, setting: Setting, say: Say) -> None:
        self.setting, self.say = setting, say
        self.tokenizer: Any = load_tokenizer(setting.target)
        target: Any = load_model(setting.target, dtype=torch.float32)
        dtype, _ = probe_autocast(target.device, target.config.get_text_config().hidden_size)
        self.target = target if dtype is None else cast(target, dtype)
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        set_vocabulary(self.target, self.vocabulary)
        self.layers = None if setting.layers is None else list(setting.layers)
        if self.layers is None and setting.draft is None:
            self.layers = every_other(target)
        folder = setting.draft or setting.target
        self.build = partial(model_learner, folder, layers=self.layers, vocabulary=self.vocabulary)
        self._answers: dict[tuple[str, int], list[Trace]] = {}

    def head(self, *domains: Domain) -> torch.Tensor | None:
        """The tokens that the draft may draft, where its head is reduced: those that these domains' texts use most."""
        if not self.setting.head_rows:
            return None
        sources = [(domain.path, domain.columns or None) for domain in domains]
        return likely_tokens(self.tokenizer, self.setting.head_rows, sources)

    def building(self, *domains: Domain) -> Build:
        """As `build`, for a stream of these domains."""
        return partial(self.build, ids_D=self.head(*domains))

    @property
    def words(self) -> str:
        """The two models, for the page."""
        kept = "all layers" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        rows = f", {self.setting.head_rows} rows of its head" if self.setting.head_rows else ""
        return f"Target {self.setting.target}, draft {self.setting.draft or 'cut from it'}, {kept}{rows}"

    def head_words(self, texts: str) -> list[str]:
        """Where a reduced head comes from, for the page: from these texts."""
        if not self.setting.head_rows:
            return []
        return [f"The head's rows are the tokens that {texts}, answers included, use most."]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the models are, whatever their folders are called."""
        target, draft = dict(self.target.named_parameters()), self.build().trained()
        return {"target": fingerprint(target), "dtype": str(self.target.dtype), "draft": fingerprint(draft)}

    def prompts(self, domain: Domain, count: int, least: int | None = None) -> list[list[int]]:
        """See `prompts_of`."""
        return prompts_of(domain, self.tokenizer, self.target, count, self.setting.max_tokens, least)

    def digest(self, domain: Domain, count: int, least: int | None = None) -> str:
        """Of these prompts, for a cell's facts."""
        return hashlib.sha256(repr(self.prompts(domain, count, least)).encode()).hexdigest()

    def answers(self, domain: Domain, count: int, least: int | None = None) -> list[Trace]:
        """The target's answers to these prompts, recorded unless they are on disk."""
        if (domain.name, count) not in self._answers:
            self._answers[domain.name, count] = record(
                self.target,
                self.tokenizer,
                self.prompts(domain, count, least),
                self.setting.work / "answers",
                max_tokens=self.setting.max_tokens,
                temperature=self.setting.temperature,
                batch=self.setting.batch,
                say=self.say,
            )
        return self._answers[domain.name, count]

    def tail_words(self, asked: Sequence[tuple[Domain, int, int]]) -> str:
        """How far an alpha on recorded answers may be off."""
        mass = np.concatenate([np.exp(trace.tail_N) for one in asked for trace in self.answers(*one)]).mean()
        return (
            f"The {TOP} likeliest tokens of each distribution were recorded; the others, {mass:.3f} in the mean, count "
            "as one token, so that an alpha is too high by that at most."
        )

"""A reward for what the student wrote, and each token's advantage (GKD with a reward, arXiv 2306.13649, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from limbeck import ranks
from limbeck.data import completion_text, plain_text
from limbeck.ops.policy import leave_one_out
from limbeck.scoring import Reward
from limbeck.types import Rollout


@dataclass
class Rewarded:
    """Every token of a completion gets its reward less a baseline: `leave_one_out`, the mean of its prompt's other
    samples (n of them stand together), or `running_mean`, that of all rewards of the steps before, on all ranks
    (nothing at the first).

    `rows(index)` is the row of the data set that a rollout's prompt came from. ScoreError where the reward fails.
    """

    reward: Reward
    rows: Callable[[int], Mapping[str, Any]]
    tokenizer: Any
    stop_tokens: Collection[int]
    n: int
    baseline: Literal["leave_one_out", "running_mean"]
    state: dict[str, float] = field(default_factory=lambda: {"sum": 0.0, "count": 0.0})

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        written = [rollout for rollout in rollouts if rollout.writer == "student"]
        rewards = self._rewards(written)
        credited = iter(
            replace(rollout, columns={**rollout.columns, "advantage": [advantage] * rollout.completion}, reward=reward)
            for rollout, reward, advantage in zip(written, rewards, self._advantages(rewards), strict=True)
        )
        return [next(credited) if rollout.writer == "student" else rollout for rollout in rollouts]

    def _rewards(self, written: list[Rollout]) -> list[float]:
        if not written:
            return []
        prompts = [plain_text(self.tokenizer, rollout.tokens[: rollout.prompt_tokens]) for rollout in written]
        completions = [
            completion_text(self.tokenizer, rollout.tokens[rollout.prompt_tokens :], self.stop_tokens)
            for rollout in written
        ]
        return self.reward(prompts, completions, [self.rows(rollout.index) for rollout in written])

    def _advantages(self, rewards: list[float]) -> list[float]:
        if self.baseline == "leave_one_out":
            rewards_GN = torch.tensor(rewards, dtype=torch.float64).reshape(-1, self.n)
            return leave_one_out(rewards_GN).flatten().tolist()
        mean = self.state["sum"] / max(self.state["count"], 1.0)
        everywhere = [reward for own in ranks.from_all(rewards) for reward in own]
        self.state = {
            "sum": self.state["sum"] + sum(everywhere),
            "count": self.state["count"] + len(everywhere),
        }
        return [reward - mean for reward in rewards]

"""MiniLLM's credit: what each token has earned toward a small reverse KL of whole sequences.

Gu et al., ICLR 2024, arXiv 2306.08543. With q the student, p the teacher, T the completion's length:
- each token was drawn from p~ = a p + (1 - a) q, and w_t = q(y_t) / p~(y_t);
- the immediate reward's gradient is exact, the reverse KL over the vocabulary, weighted by w_t (single step, eq. 7),
  which inner epochs keep as it was when the text was written; the surrogate's ratio follows the student;
- later rewards r_k = log p(y_k) - log q(y_k) reach y_t through R_{t+1} = sum over k > t of r_k, over T - t (eq. 9).
The objective is `policy` with reverse_kl, this credit, and a clip.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from limbeck.errors import TrainingError
from limbeck.ops import policy
from limbeck.types import Rollout


@dataclass
class MiniLLM:
    """Puts `advantage`, `behaviour_logprobs` and `divergence_weight` beside `student_logprobs` and `teacher_logprobs`.

    teacher_mix: a, the teacher's weight in what was written.
    length_norm: R_{t+1} / (T - t), which keeps short completions from being favoured.
    single_step: take the immediate reward out of R (it has its exact gradient instead). Off, R begins at r_t.
    importance: `step`, w_t alone; `product`, w_1 ... w_t, which is unbiased and of large variance.
    own_reward, discount, reward_scale, reward_clip, whiten: what the authors' code does and the paper does not, off
        here (r_t stays in R beside the single step; gamma .95; rewards / .5, clipped at 100; advantages whitened).
    """

    teacher_mix: float = 0.2
    length_norm: bool = True
    single_step: bool = True
    importance: Literal["step", "product"] = "step"
    weighted_single_step: bool = True
    own_reward: bool = False
    discount: float = 1.0
    reward_scale: float = 1.0
    reward_clip: float | None = None
    whiten: bool = False
    state: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with their credit, and each one's `reward` the sum of its r_t, nats. TrainingError where a
        log-probability is not finite: the teacher rules out what it was to judge."""
        mask_BT, student_BT, teacher_BT = _padded(rollouts)
        mixed_BT = _mixed(student_BT, teacher_BT, self.teacher_mix)
        weights_BT = policy.importance_weights(student_BT, mixed_BT)
        rewards_BT = teacher_BT - student_BT
        if not bool(rewards_BT.isfinite().all()):
            row = int((~rewards_BT.isfinite()).any(1).int().argmax())
            raise TrainingError(
                f"row {rollouts[row].index}: expected finite log-probabilities of what was written, found an infinite "
                "reward: give the teacher a vocabulary without tokens that it rules out"
            )
        advantage_BT = self.advantages(rewards_BT, weights_BT, mask_BT)
        columns = {"advantage": advantage_BT, "divergence_weight": self._single_step(weights_BT)}
        # The surrogate's ratio carries w_t where it is the current step's; a product stands in the advantage.
        columns["behaviour_logprobs"] = mixed_BT if self.importance == "step" else student_BT
        totals_B = (rewards_BT * mask_BT).sum(1)
        credited: list[Rollout] = []
        for row, rollout in enumerate(rollouts):
            length = int(mask_BT[row].sum())
            own = {name: [float(value) for value in values_BT[row, :length]] for name, values_BT in columns.items()}
            credited.append(replace(rollout, columns={**rollout.columns, **own}, reward=float(totals_B[row])))
        return credited

    def advantages(self, rewards_BT: torch.Tensor, weights_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """What multiplies the gradient of log q(y_t), [B, T]; w_t apart where it is the current step's."""
        rewards_BT = rewards_BT / self.reward_scale
        if self.reward_clip is not None:
            rewards_BT = rewards_BT.clamp(-self.reward_clip, self.reward_clip)
        if self.importance == "product":
            rewards_BT = rewards_BT * policy.prefix_products(weights_BT.masked_fill(~mask_BT, 1.0))
        own = self.own_reward or not self.single_step
        sums_BT = policy.later_rewards(rewards_BT, mask_BT, discount=self.discount, own=own)
        if self.length_norm:
            sums_BT = policy.length_normalised(sums_BT, policy.terms_of(mask_BT, own=own))
        return policy.whitened(sums_BT, mask_BT) if self.whiten else sums_BT

    def _single_step(self, weights_BT: torch.Tensor) -> torch.Tensor:
        """The weight of the reverse KL at each token."""
        if not self.single_step:
            return torch.zeros_like(weights_BT)
        if not self.weighted_single_step:
            return torch.ones_like(weights_BT)
        if self.importance == "step":
            return weights_BT
        products_BT = policy.prefix_products(weights_BT)  # the state is reached by the tokens before it
        return torch.cat([torch.ones_like(products_BT[:, :1]), products_BT[:, :-1]], 1)


def _padded(rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mask, student's and teacher's log-probabilities) [B, T], float64, zero at padding."""
    lengths = [len(rollout.columns["student_logprobs"]) for rollout in rollouts]
    student_BT = torch.zeros(len(rollouts), max([*lengths, 1]), dtype=torch.float64)
    teacher_BT = torch.zeros_like(student_BT)
    for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
        student_BT[row, :length] = torch.tensor(rollout.columns["student_logprobs"], dtype=torch.float64)
        teacher_BT[row, :length] = torch.tensor(rollout.columns["teacher_logprobs"], dtype=torch.float64)
    mask_BT = torch.arange(student_BT.shape[1]) < torch.tensor(lengths)[:, None]
    return mask_BT, student_BT, teacher_BT


def _mixed(student_BT: torch.Tensor, teacher_BT: torch.Tensor, share: float) -> torch.Tensor:
    """log p~ = log(a p + (1 - a) q) of the tokens that were drawn."""
    if share == 0:
        return student_BT
    mixed_BT = (1 - share) * student_BT.exp() + share * teacher_BT.exp()
    return mixed_BT.log()

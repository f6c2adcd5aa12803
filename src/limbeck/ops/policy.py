"""Credit for sampled tokens, and the gradient that it gives: sums of later rewards, baselines, clipped surrogates.

Rewards and advantages are [B, T], one row a completion, `mask_BT` true at its tokens (they come first, padding after).
Nothing here carries a gradient: rewards and advantages are numbers, and the surrogate is given as the weight that
-log q takes in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck import ranks


def importance_weights(student_logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor) -> Tensor:
    """w_t = q(y_t) / p~(y_t): the current step's alone, of low variance, biased (MiniLLM, arXiv 2306.08543, eq. 8)."""
    return (student_logprobs_BT - behaviour_logprobs_BT).exp()


def prefix_products(weights_BT: Tensor) -> Tensor:
    """W_t = w_1 ... w_t: with these the estimate is unbiased and its variance grows with the length (ibid., eq. 7)."""
    return weights_BT.cumprod(-1)


def later_rewards(rewards_BT: Tensor, mask_BT: Tensor, *, discount: float = 1.0, own: bool = False) -> Tensor:
    """R_{t+1} = sum over k > t of discount^(k - t - 1) r_k, zero at padding. `own`: R_t, the sum begins at k = t."""
    rewards_BT = rewards_BT * mask_BT
    sums_BT = torch.zeros_like(rewards_BT)
    later_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        from_here_B = rewards_BT[:, t] + discount * later_B
        sums_BT[:, t] = from_here_B if own else later_B
        later_B = from_here_B
    return sums_BT * mask_BT


def terms_of(mask_BT: Tensor, *, own: bool = False) -> Tensor:
    """How many rewards `later_rewards` sums at each token: T - t for a completion of T tokens, T - t + 1 with `own`."""
    from_here_BT = mask_BT.long().flip(-1).cumsum(-1).flip(-1)
    return (from_here_BT if own else from_here_BT - 1) * mask_BT


def length_normalised(sums_BT: Tensor, terms_BT: Tensor) -> Tensor:
    """R_{t+1} / (T - t), and zero at t = T, where nothing is left to sum: short completions are not favoured. (The
    paper divides by T - t - 1, section 2.2, which is zero at the last token but one.)"""
    return sums_BT / terms_BT.clamp(min=1)


def whitened(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the real tokens of all ranks; zero at padding."""
    real_N = torch.cat(ranks.from_all(values_BT[mask_BT]))
    if not len(real_N):
        return values_BT
    return (values_BT - real_N.mean()) * (real_N.var(correction=0) + 1e-8).rsqrt() * mask_BT


def leave_one_out(rewards_GN: Tensor) -> Tensor:
    """Each sample's reward less the mean of its group's others (G prompts, N >= 2 samples each): a baseline that does
    not know the sample, so the gradient stays unbiased (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740)."""
    count = rewards_GN.shape[1]
    if count < 2:
        raise ValueError(f"expected two samples a prompt or more, found {count}: one has no others to be compared with")
    others_GN = (rewards_GN.sum(1, keepdim=True) - rewards_GN) / (count - 1)
    return rewards_GN - others_GN


def surrogate(ratio_N: Tensor, advantage_N: Tensor, clip: float | None) -> Tensor:
    """min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), which is maximised (PPO, arXiv 1707.06347, eq. 7)."""
    gain_N = ratio_N * advantage_N
    if clip is None:
        return gain_N
    return torch.minimum(gain_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N)


def surrogate_weight(ratio_N: Tensor, advantage_N: Tensor, clip: float | None) -> Tensor:
    """The weight of -log q in a loss whose gradient is that of -surrogate: ratio A, and 0 where the clamp holds it.

    d ratio = ratio d log q, since ratio = q / constant.
    """
    gain_N = ratio_N * advantage_N
    if clip is None:
        return gain_N
    held_N = (ratio_N.clamp(1 - clip, 1 + clip) * advantage_N) < gain_N
    return gain_N.masked_fill(held_N, 0.0)

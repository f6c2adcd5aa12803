"""JSD from hidden states, forward and backward, with gradients for the student's hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import DTYPES, Contender, Result, Row, in_turn, peer, say
from limbeck.ops import products, tiles
from limbeck.ops.chunked import linear_divergence

TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}
"""Relative errors of value and of the hidden states' gradient (norm) from which a line is called a mismatch."""

BLOCK = 64  # tokens that the reference takes at once
NEVER = 1 << 60


@dataclass
class Inputs:
    """Both models' hidden states (N, H) and heads (V, H); the student's take gradients."""

    student_NH: Tensor
    student_VH: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor

    def clear(self) -> None:
        self.student_NH.grad = self.student_VH.grad = None

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_NH, self.student_VH, self.teacher_NH, self.teacher_VH


def made_inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    heads = [torch.randn(vocabulary, width).mul_(width**-0.5).to(dtype) for _ in range(2)]
    hidden = [torch.randn(tokens, width).to(dtype) for _ in range(2)]
    return Inputs(hidden[0].requires_grad_(), heads[0].requires_grad_(), hidden[1], heads[1])


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student hidden, student head, teacher hidden, teacher head) -> mean JSD over the tokens, nats."""


def ours(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
    return linear_divergence(student_NH, student_VH, teacher_NH, teacher_VH, "jsd", beta=0.5).mean()


def ours_eager(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
    compile_from, tiles.COMPILE_FROM = tiles.COMPILE_FROM, NEVER
    try:
        return ours(student_NH, student_VH, teacher_NH, teacher_VH)
    finally:
        tiles.COMPILE_FROM = compile_from


def plain(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
    """The definition, summed over the tokens."""
    log_q = F.linear(student_NH, student_VH).log_softmax(-1)
    log_p = F.linear(teacher_NH, teacher_VH).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((log_p - log_m) * log_p.exp() + (log_q - log_m) * log_q.exp()).sum()


def reference(inputs: Inputs) -> tuple[float, Tensor]:
    """Mean JSD and its gradient (N, H), float32, from the very same numbers by the definition."""
    student_VH, teacher_VH = inputs.student_VH.detach().float(), inputs.teacher_VH.float()
    tokens = len(inputs.student_NH)
    total, gradients = 0.0, []
    for begin in range(0, tokens, BLOCK):
        rows = slice(begin, begin + BLOCK)
        hidden_nH = inputs.student_NH.detach()[rows].float().requires_grad_()
        loss = plain(hidden_nH, student_VH, inputs.teacher_NH[rows].float(), teacher_VH) / tokens
        loss.backward()
        total += loss.item()
        assert hidden_nH.grad is not None
        gradients.append(hidden_nH.grad)
    return total, torch.cat(gradients)


def trl_gkd() -> Loss | None:
    module = peer("trl.experimental.gkd")
    if module is None:
        return None

    def loss(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_NV = F.linear(teacher_NH, teacher_VH)
        student_NV = F.linear(student_NH, student_VH)
        return module.GKDTrainer.generalized_jsd_loss(student_NV, teacher_NV, beta=0.5)

    return loss


def trl_chunked() -> Loss | None:
    module = peer("trl.kernels.chunked_divergence")
    if module is None:
        return None

    def loss(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
        function = module.ChunkedDivergenceFunction
        return function.apply(student_NH, student_VH, None, teacher_NH, teacher_VH, None, 0.5)[0].mean()

    return loss


def liger() -> Loss | None:
    module = peer("liger_kernel.chunked_loss")
    if module is None:
        return None
    function = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def loss(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
        labels_N = torch.zeros(len(student_NH), dtype=torch.long)
        return function(student_NH, student_VH, teacher_NH, teacher_VH, labels_N)

    return loss


PEERS = {"trl GKDTrainer loss": trl_gkd, "trl ChunkedDivergence": trl_chunked, "liger JSD": liger}


def contender(who: str, side: str, loss: Loss, inputs: Inputs) -> Contender:
    def run(_: None) -> tuple[float, Tensor]:
        value = loss(*inputs.values())
        value.backward()
        assert inputs.student_NH.grad is not None
        return value.item(), inputs.student_NH.grad

    return Contender(who, "ours" if side == "ours" else "peer", run, inputs.clear)


FLOOR, TORCH = "floor: 4 products", "4 products by torch itself"


def floor(inputs: Inputs, who: str = FLOOR) -> Contender:
    """The four products alone: both models' logits, the gradients of the student's hidden states and of its head; by
    the library that limbeck takes on this machine, or by torch's own choice, which is all that peers have."""
    student_NH, student_VH, teacher_NH, teacher_VH = (tensor.detach() for tensor in inputs.values())

    def prepare() -> list[Tensor]:
        inputs.clear()
        logits_NV = torch.ones(len(student_NH), len(student_VH), dtype=student_NH.dtype)
        return [logits_NV, logits_NV.clone(), torch.ones_like(student_NH), torch.ones_like(student_VH)]

    def run(outputs: list[Tensor]) -> None:
        student_NV, teacher_NV, hidden_NH, weight_VH = outputs
        if who == FLOOR:
            products.linear_into(student_NV, student_NH, student_VH)
            products.linear_into(teacher_NV, teacher_NH, teacher_VH)
            products.back(student_NV, student_VH)
            products.outer_into(weight_VH, student_NV, student_NH, add=False)
            return
        torch.mm(student_NH, student_VH.T, out=student_NV)
        torch.mm(teacher_NH, teacher_VH.T, out=teacher_NV)
        torch.mm(student_NV, student_VH, out=hidden_NH)
        torch.mm(student_NV.T, student_NH, out=weight_VH)

    return Contender(who, "floor", run, prepare)


def errors(output: tuple[float, Tensor], truth: tuple[float, Tensor]) -> dict[str, float]:
    gradient = (output[1].float() - truth[1]).norm() / truth[1].norm()
    return {"value_error": abs(output[0] - truth[0]) / abs(truth[0]), "gradient_error": gradient.item()}


def mismatch(found: dict[str, float], dtype: str) -> str:
    value, gradient = TOLERANCES[dtype]
    right = found["value_error"] <= value and found["gradient_error"] <= gradient
    return "" if right else f"MISMATCH: more than {value:g} in the value or {gradient:g} in the gradient"


def cases(quick: bool) -> list[str]:
    return ["V=512"] if quick else ["V=32000", "V=151936"]


def run(case: str, quick: bool) -> Iterator[Result]:
    tokens, width, vocabulary = 64 if quick else 1024, 32 if quick else 896, int(case[2:])
    for dtype in DTYPES:
        say(f"  {case} {dtype}")
        inputs = made_inputs(tokens, width, vocabulary, DTYPES[dtype])
        truth = reference(inputs)
        losses = {who: make() for who, make in PEERS.items()}
        contenders = [
            *(floor(inputs, who) for who in (FLOOR, TORCH)),
            contender("limbeck", "ours", ours, inputs),
            contender("limbeck eager", "ours", ours_eager, inputs),
            *(contender(who, "peer", loss, inputs) for who, loss in losses.items() if loss is not None),
        ]
        timings = in_turn(contenders, rounds=1 if quick else 3)
        least = min(timings[who].seconds for who in (FLOOR, TORCH))
        for item in contenders:
            timing = timings[item.who]
            if timing.failure:
                yield Result("divergence", case, dtype, item.who, item.side, note=timing.failure)
            elif item.side == "floor":
                yield Result("divergence", case, dtype, item.who, item.side, {"seconds": timing.seconds})
            else:
                above = {"ns_above_floor_per_logit": (timing.seconds - least) / (tokens * vocabulary) * 1e9}
                found = errors(timing.output, truth)
                numbers = {**timing.numbers, **above, **found}
                yield Result("divergence", case, dtype, item.who, item.side, numbers, mismatch(found, dtype))
        for who in (who for who, loss in losses.items() if loss is None):
            yield Result("divergence", case, dtype, who, "peer", note="not installed")


ROWS = [
    Row(
        "divergence",
        "JSD(0.5) from hidden states, forward and backward, 1024 tokens of width 896; errors against float32",
        "seconds",
        cases,
        run,
    )
]

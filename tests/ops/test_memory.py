"""Peak memory of a process: [N, V] is never built, neither for the loss nor for its gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
from warm import printed

# The peak of a process is what the kernel counts (ru_maxrss, KiB), above what it was with the inputs in memory, which
# are made in place so that this start is no peak itself. A first call of few tokens loads the libraries' code and
# workspaces, the compiler's too, of which more or less is counted as the machine has read these files before.
SCRIPT = """
import resource, torch
from limbeck.ops import linear_terms
from limbeck.types import Head, Hidden

N, V, H, divergence, learn = {N}, {V}, {H}, {divergence!r}, {learn}

def make(n, v):
    head = Head(torch.randn(v, H).div_(H**0.5).requires_grad_(learn))
    teacher = Head(torch.randn(v, H).div_(H**0.5)) if divergence else None
    return torch.randn(n, H, requires_grad=learn), head, torch.randn(n, H), teacher, torch.randint(0, v, (n,))

def run(hidden, head, states, teacher, tokens):
    signal = Hidden(states, teacher) if teacher else None
    terms = linear_terms(hidden, head, signal, tokens, divergence=divergence)
    if learn:
        (terms.loss_N.sum() / len(tokens)).backward()
        assert hidden.grad.isfinite().all() and head.weight_VH.grad.shape == (len(head.weight_VH), H)
    assert terms.loss_N.isfinite().all()

run(*make(8, 16_384))
inputs = make(N, V)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(*inputs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_bytes(folder: Path, *, N: int, V: int, H: int, divergence: str | None, learn: bool = True) -> int:
    """Bytes over the inputs at the peak of forward and backward."""
    script = SCRIPT.format(N=N, V=V, H=H, divergence=divergence, learn=learn)
    return int(printed(script, output=folder / "printed"))


def test_cross_entropy_over_a_large_vocabulary(tmp_path: Path) -> None:
    """[N, V] alone would be .54 GB in float32; it takes .27 GB."""
    assert peak_bytes(tmp_path, N=512, V=262_144, H=16, divergence=None) < 0.3e9


def test_no_gradient_is_kept_where_none_is_asked_for(tmp_path: Path) -> None:
    """The head's own gradient would be 0.27 GB."""
    assert peak_bytes(tmp_path, N=64, V=65_536, H=1024, divergence=None, learn=False) < 0.08e9


@pytest.mark.slow
def test_jsd_at_a_real_size(tmp_path: Path) -> None:
    """Qwen2.5-0.5B's head: 0.55 GB is the head's own gradient; [N, V] would be 0.62 GB, and JSD holds a dozen."""
    measured = peak_bytes(tmp_path, N=1024, V=151_936, H=896, divergence="jsd")
    print(f"peak over the inputs: {measured / 1e9:.2f} GB")
    assert measured < 1.0e9


def test_jsd_in_chunks_of_few_tokens(tmp_path: Path) -> None:
    """Where products go to oneDNN as where not: both models' logits of a chunk, and never [N, V], which is .27 GB."""
    assert peak_bytes(tmp_path, N=4096, V=16_384, H=64, divergence="jsd") < 0.15e9

"""Peak memory and time of the chunked divergence at a real vocabulary (`make bench`).

Forward and backward of `linear_divergence` with gradients for the student's hidden states and its head, in a process
of its own. Peak: highest resident size less the resident size once the inputs are there. Of it, 4 V H bytes (519 MiB
as it stands) are the head's own gradient. Linux: reads /proc/self.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from limbeck.ops.chunked import linear_divergence
from limbeck.report.environment import cpu_name

MIB = 1 << 20


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, found none: this benchmark needs Linux")


def step(tokens: int, vocabulary: int, width: int, divergence: str, repeats: int) -> tuple[int, list[float]]:
    """Peak bytes over the inputs, and the seconds of each repeat."""
    torch.manual_seed(0)
    student_hidden_NH = torch.randn(tokens, width, requires_grad=True)
    student_weight_VH = torch.randn(vocabulary, width).mul_(width**-0.5).requires_grad_()
    teacher_hidden_NG = torch.randn(tokens, width)
    teacher_weight_VG = torch.randn(vocabulary, width).mul_(width**-0.5)
    linear_divergence(torch.randn(2, 4, requires_grad=True), torch.randn(8, 4), torch.randn(2, 4), torch.randn(8, 4))

    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    seconds: list[float] = []
    for _ in range(repeats):
        student_hidden_NH.grad = student_weight_VH.grad = None
        start = time.perf_counter()
        values_N = linear_divergence(
            student_hidden_NH, student_weight_VH, teacher_hidden_NG, teacher_weight_VG, divergence
        )
        values_N.mean().backward()
        seconds.append(time.perf_counter() - start)
        del values_N
    return resident_bytes("VmHWM") - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time of the chunked divergence.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--divergence", default="jsd")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.here:
        sys.exit(subprocess.run([sys.executable, __file__, "--here", *sys.argv[1:]]).returncode)

    peak, seconds = step(options.tokens, options.vocabulary, options.width, options.divergence, options.repeats)
    plain = 4 * options.tokens * options.vocabulary
    print(f"cpu         {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"case        {options.divergence}, N={options.tokens} V={options.vocabulary} H={options.width}")
    print(f"peak        {peak / MIB:.0f} MiB over the inputs ({peak / 1e9:.2f} GB), gradients included")
    print(f"            of which the head's gradient {4 * options.vocabulary * options.width / MIB:.0f} MiB")
    print(f"            one [N, V] tensor would be {plain / MIB:.0f} MiB")
    print(f"time        {min(seconds):.2f} s forward and backward, best of {len(seconds)}")


if __name__ == "__main__":
    main()

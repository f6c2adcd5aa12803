"""Writes docs/estimators.md: bias and variance of MiniLLM's gradient estimates, exact, on the toy of toy_sequences.

python tests/objectives/estimators.py > docs/estimators.md
"""

from __future__ import annotations

from toy_sequences import ALL, error, expectation, minillm_gradients, reverse_kl_gradient, variance

ROWS = {
    "whole method, no length normalisation": {},
    "the same, products of weights": {"importance": "product"},
    "without the single step": {"single_step": False},
    "single step unweighted": {"weighted_single_step": False},
    "with length normalisation": {"length_norm": True},
    "the same and the clip (.2)": {"length_norm": True, "clip": 0.2},
}


def main() -> None:
    exact = reverse_kl_gradient()
    shares = (0.0, 0.2, 0.5)
    print("# MiniLLM's estimates on a toy, exact\n")
    print(
        f"Written by `python tests/objectives/estimators.py`: {len(ALL)} sequences of three tokens, enumerated in "
        "float64; student and\nteacher are random tables (seeds 1 and 2). *Bias*: distance of the estimate's mean from "
        "the gradient of the\nsequences' reverse KL, over its length. *Variance*: of one sequence's gradient. "
        "Length normalisation and clip change\nwhat is estimated: their bias is by design. `a`: the teacher's share of "
        "what was written. A sequence's terms are summed;\nthe trainer divides a step's sum by its number of tokens, "
        "as the authors' code does: a ratio of two random sums, which is\nconsistent, not unbiased.\n"
    )
    print(
        "| estimate | "
        + " | ".join(f"bias, a = {share}" for share in shares)
        + " | "
        + " | ".join(f"variance, a = {share}" for share in shares)
        + " |"
    )
    print("|---" * (1 + 2 * len(shares)) + "|")
    for name, options in ROWS.items():
        options = {"length_norm": False, **options}
        biases = [error(expectation(minillm_gradients(share, **options)), exact) for share in shares]
        variances = [variance(minillm_gradients(share, **options)) for share in shares]
        print(
            f"| {name} | "
            + " | ".join(f"{bias:.2f}" if bias > 1e-8 else "< 1e-8" for bias in biases)
            + " | "
            + " | ".join(f"{value:.2f}" for value in variances)
            + " |"
        )


if __name__ == "__main__":
    main()

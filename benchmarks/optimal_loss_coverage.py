"""How often the error bars of the estimators of J* hold the exact value, on the digits.

    uv run python -m benchmarks.optimal_loss_coverage [REPEATS]

200 repeats with keys of their own unless said otherwise. Exact is a mean over 200 passes of
exact sums. Error bars are two standard errors either way, which for a normal law hold 95.4 %.
What a subset costs in bias is not in the standard error of dol, cdol, snis and knn: for those
the bracket from `lower` to `upper`, each with its two standard errors, must hold the value.
"corrected" has no bias, and its bars stand for themselves.
"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
from sklearn.datasets import load_digits

from diffusion.estimators import estimate_optimal_loss

LEVELS = [0.5, 0.7, 1.0, 1.5, 3.0, 10.0, 80.0]
SUBSETS = dict(num_draws=1024, subset_size=256, block=32)
CASES = {
    "exact, 1024 draws": dict(num_draws=1024, block=256),
    "exact, A - B, 1024 draws": dict(num_draws=1024, block=256, form="unpaired"),
    "corrected cdol, L = 256, 256 exact": SUBSETS
    | dict(estimator="corrected", exact_draws=256),
    "corrected knn, K = 64, 256 exact": SUBSETS
    | dict(estimator="corrected", exact_draws=256, neighbours=64, subset_size=128, block=16),
    "cdol, L = 256": SUBSETS | dict(estimator="cdol"),
    "dol, L = 256": SUBSETS | dict(estimator="dol"),
    "snis, L = 256": SUBSETS | dict(estimator="snis", form="residual"),
}


def main(repeats: str = "200") -> None:
    """Prints the shares as Markdown."""
    y = (load_digits().data / 8 - 1).astype(np.float32)
    truth = estimate_optimal_loss(
        y, LEVELS, jax.random.key(10**6), num_draws=200 * len(y), block=1797
    )
    print("| estimator | error bars hold | " + " | ".join(f"s = {s:g}" for s in LEVELS) + " |")
    print("|---" * (len(LEVELS) + 2) + "|")
    for name, given in CASES.items():
        found = [
            estimate_optimal_loss(y, LEVELS, jax.random.key(i), **given)
            for i in range(int(repeats))
        ]
        each = lambda field, found=found: np.stack([getattr(f, field) for f in found])
        off = np.abs(each("value") - truth.value)
        row(name, "value", off <= 2 * np.hypot(each("stderr"), truth.stderr))
        if given.get("estimator") in ("cdol", "dol", "snis"):
            low = each("lower") - 2 * each("lower_err") <= truth.value
            high = truth.value <= each("upper") + 2 * each("upper_err")
            row(name, "bracket", low & high)
        jax.clear_caches()


def row(name: str, what: str, held: np.ndarray) -> None:
    cells = " | ".join(f"{100 * share:.1f} %" for share in held.mean(0))
    print(f"| {name} | {what} | {cells} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

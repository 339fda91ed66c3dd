"""Distances between two sets of features, and scores of class probabilities.

    real = statistics(extract(features, data))
    made = statistics(extract(features, samples))
    frechet_distance(real, made)

Called FID where the features are those of `diffusion.inception`, FD-DINOv2 where they are
those of `diffusion.dinov2`, and local Fréchet distance else. All is float64 on the host.
Precision, recall and nearest rows are in `diffusion.neighbours`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float

from common.errors import UserError, reject

SPLITS = 10  # Of the Inception score.


class Statistics(NamedTuple):
    """Sums over rows, to be merged.

    Attributes:
      count: N.
      mean: float64 [D].
      scatter: float64 [D, D], sum over rows of (x - mean) (x - mean)ᵀ.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, scatter / (N - 1); float64 [D, D]."""
        return self.scatter / (self.count - 1)


class Score(NamedTuple):
    """A mean over splits or subsets, and the standard deviation between them."""

    mean: float
    std: float


def statistics(features: Float[np.ndarray, "n d"]) -> Statistics:
    """Of all rows at once.

    Raises:
      UserError: there are none, or some are not finite.
    """
    x = np.asarray(features, np.float64)
    if not len(x):
        raise reject("eval.num_samples", 0, "2 at least")
    bad = int(np.sum(~np.isfinite(x).all(axis=1)))
    if bad:
        raise UserError(f"The features of {bad} of {len(x)} images are not finite.")
    mean = x.mean(0)
    x = x - mean
    return Statistics(len(x), mean, x.T @ x)


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Of the rows of both (Chan, Golub, LeVeque, COMPSTAT 1982)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    spread = np.outer(delta, delta) * (a.count * b.count / count)
    return Statistics(count, mean, a.scatter + b.scatter + spread)


def streamed(batches: Iterable[Float[np.ndarray, "n d"]]) -> Statistics:
    """Of rows that come in parts, for instance from `features.extract_batches`.

    Raises:
      UserError: there are none, or some are not finite.
    """
    total = None
    for batch in batches:
        part = statistics(batch)
        total = part if total is None else merged(total, part)
    if total is None:
        raise reject("eval.num_samples", 0, "2 at least")
    return total


def save(path: str | os.PathLike, s: Statistics) -> None:
    """Writes `mu` [D], `sigma` [D, D] (the covariance) and `count` to an npz, or nothing."""
    target = Path(path).expanduser()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            np.savez(file, mu=s.mean, sigma=s.covariance, count=s.count)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike, field: str = "eval.reference") -> Statistics:
    """Statistics from such an npz, ours or another program's of the usual names.

    Without a `count` they count as two rows, which only matters to `merged`.

    Raises:
      UserError: the file is missing, damaged, or its shapes do not fit.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as stored:
            mean, covariance = (np.asarray(stored[k], np.float64) for k in ("mu", "sigma"))
            count = int(stored["count"]) if "count" in stored else 2
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        allowed = "an .npz with mu and sigma"
        raise UserError(f"config.{field}: {path} is not {allowed} ({error}).") from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or count < 2:
        raise UserError(
            f"config.{field}: {path} has mu {mean.shape} and sigma {covariance.shape}, which "
            "must be [D] and [D, D]."
        )
    return Statistics(count, mean, covariance * (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^{1/2}), Dowson and Landau (1982).

    The trace of the root is the sum of the singular values of R_aᵀ R_b, with S = R Rᵀ by
    eigenvalues. So nothing is divided by, covariances may be singular, and rounding stays
    at 1e-16 of the variance instead of 1e-8, which the root of a product would have.

    Raises:
      UserError: fewer than two rows, or the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"Features of {a.mean.size} and {b.mean.size} dimensions cannot be compared."
        )
    if min(a.count, b.count) < 2:
        raise reject("eval.num_samples", min(a.count, b.count), "2 at least")
    delta = a.mean - b.mean
    common = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(max(delta @ delta + traces - 2 * common.sum(), 0.0))


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m d"],
    rng: np.random.Generator,
    *,
    subsets: int = 100,
    size: int = 1000,
) -> Score:
    """KID: the squared maximum mean discrepancy, kernel (x·y / d + 1)³, without bias.

    (Bińkowski et al., arXiv:1801.01401.) Good for few samples; 0 on average for one
    distribution, and may come out below.

    Args:
      rng: of the subsets.
      subsets, size: how many, and rows of each, drawn from both sides without repeats.

    Raises:
      UserError: fewer than two rows.
    """
    size = min(size, len(real), len(made))
    if size < 2:
        raise reject("eval.num_samples", size, "2 at least")
    values = []
    for _ in range(subsets):
        x, y = (
            np.asarray(rows[rng.choice(len(rows), size, replace=False)], np.float64)
            for rows in (real, made)
        )
        kernel = lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3
        within = sum(np.sum(k) - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        values.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return Score(float(np.mean(values)), float(np.std(values)))


def inception_score(logits: Float[np.ndarray, "n k"], splits: int = SPLITS) -> Score:
    """exp(E KL(p(y | x), p(y))) per split (Salimans et al., arXiv:1606.03498).

    Args:
      logits: of a classifier, `Features.logits`.
      splits: of the rows in their order, 1 at least.

    Raises:
      UserError: fewer rows than splits.
    """
    if len(logits) < splits:
        allowed = f"at least the {splits} splits of the Inception score"
        raise reject("eval.samples", len(logits), allowed)
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        peak = part.max(axis=0)
        log_mean = peak + np.log(np.exp(part - peak).mean(axis=0))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_mean), axis=1).mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R Rᵀ = S; what is below the rounding of S counts as zero."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors * np.sqrt(np.where(values > floor, values, 0.0))

"""Which estimator, and how many draws, for an accuracy that is asked for.

Every candidate is tried on few draws. Its squared error falls as one over its cost, so their
product at the level that needs most says which is best, and how much of it is needed.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from common.errors import reject
from diffusion.estimators import OptimalLoss, estimate_optimal_loss
from diffusion.preconditioning import check_sigmas

BLOCKS = 16  # Of exact draws in a pilot, so that their spread can be told.
ATTEMPTS = 4


class Candidate(NamedTuple):
    """An estimator and what a pilot says of it.

    Attributes:
      options: keyword arguments of `estimate_optimal_loss`, with num_draws.
      need: work that reaches the accuracy over the work of the pilot.
      flops: of the pilot.
    """

    options: dict
    need: float
    flops: float


class Sized(NamedTuple):
    """A curve and how it was come by.

    Attributes:
      loss: the curve.
      options: keyword arguments that made it.
      flops: of the final estimate.
      accuracy: the largest standard error over max(J*, least V), as measured at the end.
      reached: whether that is what was asked for.
      candidates: all that were tried.
    """

    loss: OptimalLoss
    options: dict
    flops: float
    accuracy: float
    reached: bool
    candidates: tuple[Candidate, ...]


def estimate_to(
    data: Any,
    sigmas: Any,
    key: jax.Array,
    *,
    accuracy: float,
    least: float = 0.01,
    pilot: int = 512,
    budget: float = 1e15,
    subset_size: int = 0,
    **options,
) -> Sized:
    """J* with standard errors of at most `accuracy` times max(J*, least V) at every level.

    Args:
      data, sigmas, key, options: as of `estimate_optimal_loss`.
      accuracy: relative, for instance 0.02.
      least: below this share of the variance the error is relative to it; J* itself vanishes
        at small noise, and its relative error with it.
      pilot: draws of each trial.
      budget: FLOPs that the final estimate may cost; it stops there, `reached` says so.
      subset_size: L of the candidates that take a subset; 0: N / 8, at most 4096.

    Raises:
      UserError: as `estimate_optimal_loss`, or an argument is out of range.
    """
    if not 0 < accuracy < np.inf:
        raise reject("estimator.accuracy", accuracy, "a number above 0")
    if not 0 < least <= 1:
        raise reject("estimator.least", least, "a share of the variance, above 0")
    if pilot < 64:
        raise reject("estimator.pilot", pilot, "a whole number from 64 up")
    if not budget > 0:
        raise reject("estimator.budget", budget, "a number of FLOPs above 0")
    sigmas = check_sigmas(sigmas)
    count, dim = len(data), int(np.prod(np.shape(data)[1:]))
    trial, final = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
    size = subset_size or min(4096, max(2, count // 8))
    tried = []
    for given in _candidates(count, size, pilot):
        few = dict(block=max(2, pilot // BLOCKS))
        found = estimate_optimal_loss(data, sigmas, trial, **options | given | few)
        off = _relative(found, least)
        flops = work(count, dim, len(sigmas), **given)
        tried.append(Candidate(given, float((off / accuracy) ** 2), flops))
    best = min(tried, key=lambda c: c.need * c.flops)
    # A little more than the pilot says, as it is uncertain itself; and more again if that
    # turns out to be too little.
    chosen, cost, more = dict(best.options), best.flops, 1.2 * best.need
    for attempt in range(ATTEMPTS):
        more = min(max(more, 1.0), max(budget / cost, 1.0))
        for name in ("num_draws", "exact_draws"):
            if chosen.get(name):
                chosen[name] = int(np.ceil(more * chosen[name]))
        of = jax.random.fold_in(final, attempt)
        loss = estimate_optimal_loss(data, sigmas, of, **options | chosen)
        cost = work(count, dim, len(sigmas), **chosen)
        off = float(_relative(loss, least))
        if off <= accuracy or cost >= budget:
            break
        more = 1.2 * (off / accuracy) ** 2
    return Sized(loss, chosen, cost, off, off <= accuracy, tuple(tried))


def work(
    count: int,
    dim: int,
    levels: int,
    *,
    num_draws: int,
    estimator: str = "exact",
    subset_size: int = 0,
    neighbours: int = 0,
    exact_draws: int = 0,
) -> float:
    """FLOPs of an estimate: 2 D (2 + S) per draw and row that it is compared with."""
    per = 2.0 * dim * (2 + levels if levels > 1 else 2)
    if estimator == "exact":
        return per * num_draws * count
    seen = subset_size + neighbours
    both = exact_draws * (count + seen) if estimator == "corrected" else 0
    pairs = 2.0 * dim * count**2 if neighbours else 0.0
    return per * (num_draws * seen + both) + pairs


def _candidates(count: int, size: int, pilot: int) -> list[dict]:
    found = [dict(estimator="exact", num_draws=pilot)]
    if size <= count // 4:  # Else a subset saves nothing worth its error.
        mended = dict(estimator="corrected", num_draws=4 * pilot, exact_draws=pilot)
        found.append(mended | dict(subset_size=size))
        near = max(1, size // 4)
        if near < size - 1:
            found.append(mended | dict(subset_size=size, neighbours=near))
    return found


def _relative(found: OptimalLoss, least: float) -> float:
    return np.max(found.stderr / np.maximum(found.value, least * float(found.variance)))

"""Which estimator, and how many draws, for an accuracy that is asked for.

Every candidate is tried on few draws. Its squared error falls as one over its cost, so their
product at the level that needs most says which is best, and how much of it is needed. Blocks
are of one size throughout, so that draws cost and spread as they did in the trial.

By command: `--do=size --input=0.01` of an estimation run.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from common.errors import reject
from diffusion.estimators import OptimalLoss, estimate_optimal_loss, levels_of
from diffusion.plans import BATCHES, whole

ATTEMPTS = 8
KNN = 30.0  # Cost of a row that one draw has for itself, in rows that draws share.


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
      loss: the curve, of all draws after the trials.
      options: keyword arguments that made it; num_draws and exact_draws are those of the last
        attempt.
      flops: of trials and attempts together.
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
      budget: FLOPs of everything; what is found by then is the result, `reached` says so.
      subset_size: L of the candidates that take a subset; 0: N / 8, at most 4096. With labels
        all sums are exact.

    Raises:
      UserError: as `estimate_optimal_loss`, or an argument is out of range.
    """
    if not 0 < accuracy < np.inf:
        raise reject("estimator.accuracy", accuracy, "a number above 0")
    if not 0 < least <= 1:
        raise reject("estimator.least", least, "a share of the variance, above 0")
    pilot = whole("pilot", pilot, 64)
    if not budget > 0:
        raise reject("estimator.budget", budget, "a number of FLOPs above 0")
    sigmas = levels_of(sigmas)
    count, dim = len(data), int(np.prod(np.shape(data)[1:]))
    seen, labels = count, options.get("labels")
    if labels is not None:  # A draw sees its class.
        seen = int(np.sum(np.unique(labels, return_counts=True)[1] ** 2) / count)
    mesh = options.get("mesh")
    fold = (mesh.shape["data"] if mesh else 1) * (2 if options.get("antithetic") else 1)
    block = max(fold, pilot // BATCHES // fold * fold)
    pilot = max(pilot, BATCHES * block)
    alone = labels is not None or options.get("chunk")
    size = 0 if alone else subset_size or min(4096, max(2, count // 8))
    cost = lambda given: work(seen, dim, len(sigmas), **given)
    candidates = _candidates(count, size, pilot)
    costs = [cost(given) for given in candidates]
    if budget < sum(costs) + max(costs):
        least_budget = f"FLOPs from {sum(costs) + max(costs):.3g} up, or a smaller pilot"
        raise reject("estimator.budget", budget, least_budget)
    run = lambda key, given: estimate_optimal_loss(
        data, sigmas, key, **options | dict(block=block) | given
    )
    tried = []
    for given, flops in zip(candidates, costs, strict=True):
        off = _relative(run(jax.random.fold_in(key, 1), given), least)
        tried.append(Candidate(given, float((off / accuracy) ** 2), flops))
    best = min(tried, key=lambda c: c.need * c.flops)
    # A little more than the pilot says, as it is uncertain itself; and more again if that
    # turns out to be too little.
    spent, more, done, found = sum(costs), 1.2 * best.need, 0.0, []
    for attempt in range(ATTEMPTS):
        share = min(max(more, 1.0), (budget - spent) / best.flops)
        if share < 1:
            break
        chosen = dict(best.options)
        for name in ("num_draws", "exact_draws"):
            if name in chosen:  # Whole blocks, as more would be over the budget.
                chosen[name] = int(share * chosen[name]) // block * block
        found.append(run(jax.random.fold_in(key, 2 + attempt), chosen))
        spent, done = spent + cost(chosen), done + share
        loss = _pooled(found)
        off = _relative(loss, least)
        if off <= accuracy:
            break
        more = done * (1.2 * (off / accuracy) ** 2 - 1)
    return Sized(loss, chosen, spent, off, off <= accuracy, tuple(tried))


def page(found: Sized, asked: float) -> str:
    """What was chosen and what it took, as Markdown; `asked` is the accuracy."""
    verb = "reaches" if found.reached else "does not reach, within the FLOPs allowed,"
    text = (
        f"{_named(found.options)} {verb} an error of {asked:g} max(J\\*, V / 100) at every "
        f"level: measured {found.accuracy:.3g}, of {int(found.loss.num_draws)} draws and "
        f"{found.flops:.3g} FLOPs with the trials."
    )
    lines = [
        "| tried | draws | FLOPs | estimated FLOPs for this accuracy |",
        "|---|---|---|---|",
    ]
    for each in found.candidates:
        cells = (
            _named(each.options),
            str(each.options["num_draws"]),
            f"{each.flops:.3g}",
            f"{each.need * each.flops:.3g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join([text, "\n".join(lines)])


def _named(options: dict) -> str:
    more = [
        f"{name} {options[name]}"
        for name in ("subset_size", "neighbours", "exact_draws")
        if options.get(name)
    ]
    return options["estimator"] + (f" ({', '.join(more)})" if more else "")


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
    """FLOPs of an estimate: 2 D (2 + S) per draw and row that it is compared with; `KNN` times
    as much for a neighbour, as such rows pass through the memory for a single draw."""
    per = 2.0 * dim * (2 + levels if levels > 1 else 2)
    if estimator == "exact":
        return per * num_draws * count
    seen = subset_size + KNN * neighbours
    both = exact_draws * (count + seen) if estimator == "corrected" else 0
    pairs = 2.0 * dim * count**2 if neighbours else 0.0
    return per * (num_draws * seen + both) + pairs


def _candidates(count: int, size: int, pilot: int) -> list[dict]:
    found = [dict(estimator="exact", num_draws=pilot)]
    if 2 <= size <= count // 4:  # Else a subset saves nothing worth its error.
        mended = dict(estimator="corrected", num_draws=4 * pilot, exact_draws=pilot)
        found.append(mended | dict(subset_size=size))
        near = max(1, size // 4)
        if near < size - 1:
            found.append(mended | dict(subset_size=size, neighbours=near))
    return found


def _relative(found: OptimalLoss, least: float) -> float:
    size = np.maximum(found.value, least * float(found.variance))
    # Of equal rows nothing is lost, nor in doubt.
    return float(np.max(found.stderr / np.where(size > 0, size, np.inf)))


def _pooled(found: list[OptimalLoss]) -> OptimalLoss:
    """The mean of independent estimates, weighted by their draws."""
    weight = np.array([float(f.num_draws) for f in found])
    weight = (weight / weight.sum())[:, None]
    each = lambda name: np.stack([getattr(f, name) for f in found])
    mean = lambda name: np.sum(weight * each(name), 0)
    error = lambda name: np.sqrt(np.sum((weight * each(name)) ** 2, 0))
    return found[0]._replace(
        **{n: mean(n) for n in ("value", "lower", "upper", "ess", "p_self")},
        **{n: error(n) for n in ("stderr", "lower_err", "upper_err")},
        **{n: np.sum(each(n)) for n in ("num_draws", "cheap_draws")},
    )

"""Scaling laws of a loss with and without its floor: J(F) - J* = beta F^alpha.

F is training compute, J a loss of runs of several sizes, J* the optimal loss. J cannot fall
below J*, so log(J - J*) is straighter in log F than log J is (arXiv:2506.13763). `analyse`
takes measurements {name: (flops, loss)}, of anybody and in any unit, for a total loss or
one noise band, finds their lower envelope and fits it thrice on the same points:

    raw        log J        = log beta + alpha log F
    corrected  log (J - J*) = log beta + alpha log F
    free       log (J - c)  = log beta + alpha log F      c in [0, min J), a check of J*

Intervals come from resampling whole runs, since points of one run are not independent.
NumPy on the host, float64.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from common.errors import UserError, reject
from diffusion.power_laws import (
    LEAST,
    PowerLaw,
    check_offset,
    measured,
    power_law,
    with_offset,
)


class Envelope(NamedTuple):
    """The best of all runs.

    Attributes:
      flops, loss: [P] float64, F ascending.
      run: [P] whose value it is.
    """

    flops: np.ndarray
    loss: np.ndarray
    run: np.ndarray


class Intervals(NamedTuple):
    """(low, high), 95 %, of the fields of a fit; NaN where runs are too few to resample."""

    alpha: tuple[float, float]
    beta: tuple[float, float]
    rho: tuple[float, float]
    offset: tuple[float, float]


class ScalingReport(NamedTuple):
    """All fits of one loss.

    Attributes:
      runs: {name: (flops [T], loss [T])} as given, F ascending.
      envelope: the points of all three fits; `run` holds names.
      optimum, optimum_err: J* and its standard error.
      raw, corrected, free: the fits with offset 0, J* and c.
      raw_interval, corrected_interval, free_interval: of runs. They take J* as known.
      gain: rho of `corrected` minus rho of `raw`, with its interval.
      free_gain: rho of `free` minus rho of `raw`, with its interval.
      alpha_shift: by how much one standard error of J* moves `corrected.alpha`.
      below, within: how many measurements were dropped as J <= J*, and as more than that but
        by no more than two standard errors of J - J*.
      draws: resamples behind the intervals; those with fewer than 5 points do not count.
    """

    runs: dict[str, tuple[np.ndarray, np.ndarray]]
    envelope: Envelope
    optimum: float
    optimum_err: float
    raw: PowerLaw
    corrected: PowerLaw
    free: PowerLaw
    raw_interval: Intervals
    corrected_interval: Intervals
    free_interval: Intervals
    gain: float
    gain_interval: tuple[float, float]
    free_gain: float
    free_gain_interval: tuple[float, float]
    alpha_shift: float
    below: int
    within: int
    draws: int


def analyse(
    runs: Mapping[str, tuple[Any, Any]],
    optimum: float,
    optimum_err: float = 0.0,
    *,
    errors: Mapping[str, Any] | None = None,
    rng: np.random.Generator,
    points: int = 24,
    draws: int = 1000,
) -> ScalingReport:
    """Fits the envelope of runs with and without the optimal loss, with intervals.

    An envelope that ends on one run's plateau bends up there, and the free offset then lies
    above J*: judge it by runs that are stopped about where a larger one overtakes them.
    Where every run has one measurement, all of them are fitted, rather than an envelope of
    which each owns a step. Otherwise the envelope is found in the plane of log(J - J*), and
    all fits use its points, so that their rho differ by the offset alone.

    Args:
      runs: {name: (flops [T], loss [T])}, in any order, F > 0 in any unit.
      optimum, optimum_err: J* >= 0 in the unit of the losses, and its standard error.
      errors: {name: [T]} of what stands above J* in each loss, where losses are known only
        so well; None: exactly. Measurements within two standard errors of J*, of both
        together, are dropped: their logarithm is noise.
      rng: of the bootstrap.
      points: of the envelope, from 5 up; at least 20 for 1.5 decades are advised.
      draws: of runs, with replacement; 0: no intervals.

    Raises:
      UserError: a measurement or its error is not finite, F not above 0, shapes differ, or
        fewer than 5 points of different F are left.
    """
    runs = {name: measured(f"runs.{name}", *pair) for name, pair in runs.items()}
    own = {name: _errors(name, errors, loss) for name, (_, loss) in runs.items()}
    order = {name: np.argsort(flops, kind="stable") for name, (flops, _) in runs.items()}
    runs = {name: (f[order[name]], loss[order[name]]) for name, (f, loss) in runs.items()}
    for name, value in (("optimum", optimum), ("optimum_err", optimum_err)):
        if not (np.isfinite(value) and value >= 0):
            raise reject(f"scaling.{name}", value, "a finite number from 0 up")
    _check_points(points)
    if draws < 0:
        raise reject("scaling.draws", draws, "a whole number from 0 up")
    optimum, optimum_err = float(optimum), float(optimum_err)
    gaps = {name: loss - optimum for name, (_, loss) in runs.items()}
    below = sum(int((gap <= 0).sum()) for gap in gaps.values())
    least = {name: 2 * np.hypot(optimum_err, own[name][order[name]]) for name in runs}
    small = sum(int((gap <= least[name]).sum()) for name, gap in gaps.items())
    kept = {
        name: (np.log(runs[name][0][good]), np.log(gap[good]))
        for name, gap in gaps.items()
        if (good := gap > least[name]).any()
    }
    dropped = f"({small} of the measurements are within two standard errors of J* or below it)"
    if sum(len(x) for x, _ in kept.values()) < LEAST:
        raise UserError(f"A scaling fit needs {LEAST} points above the optimal loss {dropped}.")

    single = all(len(flops) == 1 for flops, _ in runs.values())
    x, resample = (_points if single else _curves)(list(kept.values()), points)
    y, weights, owner = resample(np.ones(len(kept), int))
    if len(np.unique(x)) < LEAST:
        raise UserError(f"A scaling fit needs {LEAST} different values of F {dropped}.")
    raw, corrected, free = _three(x, y, weights, optimum)
    samples = []
    for _ in range(draws if len(kept) > 1 else 0):
        chosen = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)))
        y_drawn, w, _ = resample(chosen)
        if len(np.unique(x[w > 0])) >= LEAST:
            drawn = _three(x, y_drawn, w, optimum)
            samples.append([(f.alpha, f.beta, f.rho, f.offset) for f in drawn])
    spread = np.array(samples).reshape(-1, 3, 4)
    intervals = [Intervals(*(_interval(spread[:, i, j]) for j in range(4))) for i in range(3)]
    flops, gap = np.exp(x), np.exp(y)
    low, high = (power_law(flops, gap + e).alpha for e in (-optimum_err, optimum_err))
    names = np.array(list(kept))
    return ScalingReport(
        runs=runs,
        envelope=Envelope(flops, gap + optimum, names[owner]),
        optimum=optimum,
        optimum_err=optimum_err,
        raw=raw,
        corrected=corrected,
        free=free,
        raw_interval=intervals[0],
        corrected_interval=intervals[1],
        free_interval=intervals[2],
        gain=corrected.rho - raw.rho,
        gain_interval=_interval(spread[:, 1, 2] - spread[:, 0, 2]),
        free_gain=free.rho - raw.rho,
        free_gain_interval=_interval(spread[:, 2, 2] - spread[:, 0, 2]),
        alpha_shift=abs(high - low) / 2,
        below=below,
        within=small - below,
        draws=len(samples),
    )


def envelope(
    flops: Any,
    losses: Any,
    runs: Shaped[np.ndarray, " n"],
    points: int = 24,
    *,
    offset: float = 0.0,
) -> Envelope:
    """The smallest loss that any run reached with at most F, on a grid of F.

    Runs are straight between their measurements in the plane of log F and log(J - offset).
    The grid has equal steps of log F over what the ranges of the runs cover together; a run
    of one measurement outside of these adds its own F.

    Args:
      flops, losses: [n] measurements of all runs, in any order.
      runs: [n] to which run each belongs, numbers or names.
      points: of the grid, from 5 up.
      offset: what is subtracted, below all losses.

    Raises:
      UserError: a measurement or the offset is out of range.
    """
    flops, losses = measured("losses", flops, losses)
    _check_points(points)
    check_offset(offset, losses)
    names = np.unique(runs)
    gap = np.log(losses - offset)
    pairs = [(np.log(flops[runs == n]), gap[runs == n]) for n in names]
    x, resample = _curves(pairs, points)
    y, _, owner = resample(np.ones(len(names), int))
    return Envelope(np.exp(x), np.exp(y) + offset, names[owner])


def record(report: ScalingReport) -> dict[str, float]:
    """The numbers of a report as one flat row, for a table or a JSON file."""
    row: dict[str, float] = {}
    for kind in ("raw", "corrected", "free"):
        fit, spread = getattr(report, kind), getattr(report, f"{kind}_interval")
        row[f"{kind}_r2"] = fit.r2
        for name in Intervals._fields:
            row[f"{kind}_{name}"] = getattr(fit, name)
            row[f"{kind}_{name}_low"], row[f"{kind}_{name}_high"] = getattr(spread, name)
    for name in ("gain", "free_gain"):
        row[name] = getattr(report, name)
        row[f"{name}_low"], row[f"{name}_high"] = getattr(report, f"{name}_interval")
    names = ("optimum", "optimum_err", "alpha_shift", "below", "within", "draws")
    row |= {name: getattr(report, name) for name in names}
    return row | {"points": len(report.envelope.flops), "runs": len(report.runs)}


Pair = tuple[np.ndarray, np.ndarray]
Resample = Callable[[Int[np.ndarray, " r"]], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _points(pairs: list[Pair], points: int) -> tuple[np.ndarray, Resample]:
    """Runs of one measurement, F ascending: each weighs as often as it is drawn."""
    del points
    x, y = (np.concatenate(each) for each in zip(*pairs, strict=True))
    order = np.argsort(x, kind="stable")
    return x[order], lambda counts: (y[order], counts[order].astype(float), order)


def _curves(pairs: list[Pair], points: int) -> tuple[np.ndarray, Resample]:
    """The grid [P] of log F, and: draws of each run [R] -> log gap, weight, run, each [P].

    The weight is 0 where no drawn run has measurements on both sides of the point.
    """
    grid = _grid([(x.min(), x.max()) for x, _ in pairs], points)
    reach = np.full((len(pairs), len(grid)), np.inf)
    inside = np.zeros(reach.shape, bool)
    for i, (x, y) in enumerate(pairs):
        knots, first = np.unique(x[order := np.argsort(x)], return_index=True)
        y = np.minimum.reduceat(y[order], first)
        at = np.searchsorted(knots, grid, "right") - 1
        lowest = np.minimum(np.minimum.accumulate(y)[at], np.interp(grid, knots, y))
        reach[i] = np.where(at >= 0, lowest, np.inf)
        inside[i] = (at >= 0) & (grid <= knots[-1])

    def resample(counts):
        drawn = np.where((counts > 0)[:, None], reach, np.inf)
        covered = inside[counts > 0].any(0)
        return drawn.min(0), covered.astype(float), drawn.argmin(0)

    return grid, resample


def _grid(ranges: list[tuple[float, float]], points: int) -> np.ndarray:
    """Equal steps over the union of ranges, and the ranges of no width outside of it."""
    merged: list[list[float]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    alone = [low for low, high in merged if low == high]
    wide = np.array([pair for pair in merged if pair[0] < pair[1]]).reshape(-1, 2)
    ends = np.cumsum(wide[:, 1] - wide[:, 0])
    if not ends.size:
        return np.array(alone)
    steps = np.linspace(0, ends[-1], points)
    which = np.minimum(np.searchsorted(ends, steps), len(ends) - 1)
    # Back from the upper end, which the last step meets exactly; rounding stays in range.
    found = np.clip(wide[which, 1] - (ends[which] - steps), wide[which, 0], wide[which, 1])
    return np.union1d(found, alone)


def _three(x, y, weights, optimum: float) -> tuple[PowerLaw, PowerLaw, PowerLaw]:
    """Raw, corrected and free fits of y = log(J - J*) where there is weight."""
    used = weights > 0
    flops, gap, w = np.exp(x[used]), np.exp(y[used]), weights[used]
    raw = power_law(flops, gap + optimum, weights=w)
    corrected = power_law(flops, gap, weights=w)._replace(offset=optimum)
    return raw, corrected, with_offset(flops, gap + optimum, weights=w)


def _interval(samples: np.ndarray) -> tuple[float, float]:
    samples = samples[np.isfinite(samples)]
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) > 1 else (np.nan, np.nan)
    return float(low), float(high)


def _errors(name: str, errors: Mapping[str, Any] | None, loss: np.ndarray) -> np.ndarray:
    """Of the losses of a run, in the order given; 0 where none are."""
    if errors is None:
        return np.zeros(len(loss))
    field = f"scaling.errors.{name}"
    found = np.atleast_1d(np.asarray(errors.get(name), float))
    if found.shape != loss.shape:
        raise reject(field, found.shape, f"of the shape {loss.shape} of the losses")
    good = np.isfinite(found) & (found >= 0)
    if not good.all():
        i = int(np.argmin(good))
        raise reject(f"{field}[{i}]", float(found[i]), "a finite number from 0 up")
    return found


def _check_points(points: int) -> None:
    if points < LEAST:
        raise reject("scaling.points", points, f"a whole number from {LEAST} up")

"""From the moments of blocks of draws to a curve and its errors.

"corrected" is a control variate: mean(exact) over few blocks plus beta times (mean over many
minus mean over the few) of a cheap estimate.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from diffusion import draws
from diffusion.plans import BATCHES, Plan


class OptimalLoss(NamedTuple):
    """A curve J*(s), sums over coordinates; float64 [S] unless said otherwise.

    Attributes:
      sigmas: noise levels s, as given.
      value: the estimate.
      stderr: its standard error; NaN where there is one draw. Biases are not in it. Of few
        blocks it is wider by Student's factor, so that two of them either way hold 95 %.
      lower, upper: bracket, of the estimators with subsets; the value itself otherwise.
      lower_err, upper_err: standard errors of these.
      ess: mean number of rows that share a posterior.
      p_self: mean weight of the source.
      variance: [], of the data, the limit V of large s; within classes, where they are told.
      num_draws: [], of the outer mean; of "corrected", those with exact sums.
      dim: [], coordinates D of a row; value / dim is per coordinate.
      cheap_draws: [], of "corrected", those in addition that saw subsets alone.
    """

    sigmas: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    lower_err: np.ndarray
    upper_err: np.ndarray
    ess: np.ndarray
    p_self: np.ndarray
    variance: np.ndarray
    num_draws: np.ndarray
    dim: np.ndarray
    cheap_draws: np.ndarray = np.array(0)


def curve_of(
    plan: Plan,
    sigmas: np.ndarray,
    exact: draws.Moments | None,
    cheap: draws.Subset | None,
    square: float,
    variance: float,
) -> OptimalLoss:
    """Blocks, stacked along axis 0 as float64, as a curve.

    Args:
      plan: whose blocks they are; of "corrected" the first `few` of `cheap` go with `exact`.
      sigmas: [S].
      exact: moments [few, S].
      cheap: moments [steps, S], or None.
      square, variance: `sizes`.
    """
    if plan.estimator == "exact":
        main = exact
        value = low = up = _by_draw(exact, plan, square)
    else:
        low = _by_block(cheap.lower.mean.trcov)
        up = _by_block(cheap.upper.mean.residual)
        main = {"dol": cheap.lower, "snis": cheap.upper}.get(plan.estimator, cheap.corrected)
        value = _by_block(_form(main.mean, plan.form, square))
    if plan.estimator == "corrected":
        base = _form(cheap.corrected.mean, plan.form, square)
        truth = _form(exact.mean, plan.form, square)
        value, main = _controlled(truth, base[: plan.few], base[plan.few :]), exact
    corrected = cheap is not None and plan.estimator == "corrected"
    cheaper = len(cheap.corrected.mean.ess) - plan.few if corrected else 0
    return OptimalLoss(
        sigmas=np.asarray(sigmas, np.float64),
        value=value[0],
        stderr=value[1],
        lower=low[0],
        upper=up[0],
        lower_err=low[1],
        upper_err=up[1],
        ess=main.mean.ess.mean(0),
        p_self=main.mean.p_self.mean(0),
        variance=np.array(variance),
        num_draws=np.array(len(main.mean.ess) * plan.block),
        dim=np.array(plan.dim),
        cheap_draws=np.array(max(cheaper, 0) * plan.block),
    )


def _form(mean, form, square):
    """Of block means: the mean of this form."""
    return square - mean.mean_square if form == "unpaired" else getattr(mean, form)


def _by_draw(found, plan, square):
    """Mean and standard error where draws, or pairs of them, are independent."""
    mean = _form(found.mean, plan.form, square)
    name = "mean_square" if plan.form == "unpaired" else plan.form
    if plan.fold > 1:  # Pairs are not independent; blocks of them are.
        return _by_block(mean)
    n = len(mean) * plan.block
    if n < 2:
        return mean.mean(0), np.full(mean.shape[1:], np.nan)
    within = getattr(found.spread, name).sum(0)
    between = plan.block * np.sum((mean - mean.mean(0)) ** 2, 0)
    return mean.mean(0), np.sqrt((within + between) / (n - 1) / n)


def _by_block(means):
    """Mean and standard error where the draws of a block belong together."""
    n = len(means)
    if n < 2:
        return means.mean(0), np.full(means.shape[1:], np.nan)
    return means.mean(0), wider(n - 1) * means.std(0, ddof=1) / np.sqrt(n)


def wider(freedom: int) -> float:
    """What makes two standard errors of so many degrees of freedom hold as much as of all."""
    return float(stats.t.ppf(stats.norm.cdf(2), freedom) / 2)


def _controlled(truth, base, many):
    """The control variate's value and standard error, from block means [n, S], [n, S], [m, S].

    The error is that of n values, each with one exact block left out, so what the fit of beta
    costs is in it. While there are few blocks of either kind, as early in a run, the exact
    ones stand alone.
    """
    n, m = len(truth), len(many)
    if min(n, m) < BATCHES:
        return _by_block(truth)
    value, beta = _mended(truth, base, many.mean(0), m)
    without = [np.delete(np.arange(n), i) for i in range(n)]
    spread = np.stack([_mended(truth[w], base[w], many.mean(0), m)[0] for w in without])
    left_out = (n - 1) / n * np.sum((spread - spread.mean(0)) ** 2, 0)
    seen, there = base.var(0, ddof=1), many.var(0, ddof=1)
    unseen = _unseen(truth, base, there / np.where(seen > 0, seen, np.inf)) / n
    error = np.sqrt(left_out + unseen + beta**2 * there / m)
    return value, wider(n - 2) * error


def _unseen(truth, base, more):
    """Variance of `truth` by draws so rare that its blocks lack them, though they carry J*.

    Where few draws are all of the value, and many blocks spread `more` times as `base`, so
    does the part of `truth` that does not go with `base`.
    """
    spread = truth.var(0, ddof=1)
    both = truth.var(0) * base.var(0)
    shared = np.mean((truth - truth.mean(0)) * (base - base.mean(0)), 0) ** 2
    alike = np.divide(shared, both, out=np.zeros_like(both), where=both > 0)
    size = truth.mean(0) ** 2
    rare = np.divide(spread, size, out=np.zeros_like(size), where=size > 0)
    return (1 - np.minimum(alike, 1)) * np.minimum(rare, 1) * np.maximum(more - 1, 0) * spread


def _mended(truth, base, mean, m):
    """Value and the beta of least variance, for independent means over n and m blocks."""
    about = lambda v: v - v.mean(0)
    covariance = np.sum(about(truth) * about(base), 0)
    spread = np.sum(about(base) ** 2, 0)
    # No correlation, no correction.
    beta = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    beta = np.clip(beta, 0, None) * m / (len(truth) + m)
    return truth.mean(0) + beta * (mean - base.mean(0)), beta

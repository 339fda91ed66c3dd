"""Error bars of Markov chains. NumPy on the host; `series` is [time, chains] throughout.

Samples that are not finite are left out where a series has chains, never filled in.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def blocked_error(series: Float[np.ndarray, " t"]) -> tuple[float, np.ndarray]:
    """The error of the mean of one correlated series (Flyvbjerg & Petersen 1989).

    Neighbours are averaged in pairs again and again; the error grows until blocks are
    independent. Taken is the largest one among the levels with at least 16 blocks (the
    first level if there are fewer). It errs on the large side for series much longer than
    16 blocks of several autocorrelation times, and falls short for others: below 32
    members nothing is blocked at all. `chains_error` and `correlated_error` then help.

    Returns:
      error, and the errors of all levels (block sizes 1, 2, 4, ...).
    """
    x = np.asarray(series, float)
    levels, counts = [], []
    while len(x) >= 2:
        levels.append(np.std(x, ddof=1) / np.sqrt(len(x)))
        counts.append(len(x))
        x = x[: len(x) // 2 * 2].reshape(-1, 2).mean(axis=1)
    if not levels:
        return float("nan"), np.array([])
    trusted = [e for e, n in zip(levels, counts, strict=True) if n >= 16] or levels[:1]
    return float(max(trusted)), np.array(levels)


def chains_error(series: Float[np.ndarray, "t chains"]) -> tuple[float, np.ndarray]:
    """The error of the mean over all chains and times.

    Chains are independent, so that the scatter of their time means over sqrt(chains) is
    right at any autocorrelation time. Where chains are few that is noisy, and a start that
    all share does not show in it: taken is the larger of it and `blocked_error` of the
    mean over chains.

    Returns:
      error, and the levels of `blocked_error`.
    """
    x = _finite_or_nan(series)
    chains, blocks = (_means(x, axis) for axis in (0, 1))
    error, levels = blocked_error(blocks)
    if len(chains) > 1:
        error = np.fmax(error, chains.std(ddof=1) / np.sqrt(len(chains)))
    return float(error), levels


def correlated_error(series: Float[np.ndarray, " t"], tau: float = 0.5) -> float:
    """The error of the mean of one series, too short to be blocked.

    The naive error times sqrt(2 tau), with the larger of `tau` and the series' own time,
    and never below `blocked_error`. A correlated series scatters about its own mean by
    less than about the true one, by (n - 2 tau) / (n - 1), which is put back.

    Args:
      tau: an integrated autocorrelation time in members of the series, known from
        elsewhere: a single series tells its own only roughly.
    """
    x = np.asarray(series, float)
    n = len(x)
    tau = max(tau, autocorrelation_time(autocorrelation(x[:, None])))
    left = max(n - 2 * tau, n / 2)  # Beyond this no correction can be trusted.
    error = np.std(x, ddof=1) * np.sqrt(2 * tau * (n - 1) / left / n)
    return float(max(error, blocked_error(x)[0]))


def _finite_or_nan(series) -> np.ndarray:
    x = np.asarray(series, float)
    return np.where(np.isfinite(x), x, np.nan)


def _means(x: np.ndarray, axis: int) -> np.ndarray:
    """Means of what is finite, without the rows or columns where nothing is."""
    some = np.isfinite(x).any(axis=axis)
    return np.nanmean(np.compress(some, x, axis=1 - axis), axis=axis)


def autocorrelation(series: Float[np.ndarray, "t chains"]) -> np.ndarray:
    """Normalised autocorrelation function [t], averaged over chains, about one mean."""
    x = np.asarray(series, float)
    good = np.isfinite(x)
    n = len(x)
    if not good.any():
        return np.eye(1, n)[0]
    scale = np.abs(x[good]).max()
    x = np.where(good, x - x[good].mean(), 0.0)
    products, pairs = (
        np.fft.irfft(np.abs(np.fft.rfft(a, 2 * n, axis=0)) ** 2, axis=0)[:n].sum(axis=1)
        for a in (x, good.astype(float))
    )
    c = products / np.maximum(np.round(pairs), 1)
    # A constant series, to rounding, has no correlations: its noise is that of a sum.
    return c / c[0] if c[0] > (1e-13 * scale) ** 2 else np.eye(1, n)[0]


def autocorrelation_time(rho: np.ndarray, window: float = 5.0) -> float:
    """Integrated time 1/2 + sum rho, in steps, with Sokal's window; at least 1/2.

    The variance of a mean of n samples is 2 tau / n times that of a sample.
    """
    tau = 0.5 + np.cumsum(rho[1:])
    tau = np.concatenate([[0.5], tau])
    inside = np.arange(len(tau)) < window * tau
    end = np.argmin(inside) if not inside.all() else len(tau) - 1
    return float(max(tau[end], 0.5))


def split_r_hat(series: Float[np.ndarray, "t chains"]) -> float:
    """Gelman & Rubin's R-hat of half chains; 1 where all chains agree."""
    x = _finite_or_nan(series)
    half = len(x) // 2
    x = np.concatenate([x[:half], x[half : 2 * half]], axis=1)
    x = x[:, np.isfinite(x).sum(axis=0) >= 2]
    if x.shape[1] < 2:
        return float("nan")
    within = np.nanvar(x, axis=0, ddof=1).mean()
    between = np.nanmean(x, axis=0).var(ddof=1)
    if within == 0:
        return 1.0 if between == 0 else float("inf")
    return float(np.sqrt((half - 1) / half + between / within))


def v_score(energy: float, variance: float, n_electrons: int, infinite: float) -> float:
    """N_e Var / (E - E_infinity)^2 (Wu et al., arXiv:2302.04919).

    Args:
      energy, variance: totals.
      infinite: the energy at infinite temperature, U N_up N_dn / N.

    Returns:
      0 for an eigenstate, even at E = E_infinity, as with a full band; infinity for
      another state there.
    """
    if variance <= (1e-12 * max(abs(energy), abs(infinite))) ** 2:
        return 0.0
    if energy == infinite:
        return float("inf")
    return float(n_electrons * variance / (energy - infinite) ** 2)


def v_score_error(
    energy: float,
    energy_error: float,
    variance: float,
    variance_error: float,
    n_electrons: int,
    infinite: float,
) -> float:
    """One standard error of `v_score`, to first order, energy and variance taken as
    independent; 0 or infinity where the V-score is."""
    score = v_score(energy, variance, n_electrons, infinite)
    if score in (0.0, float("inf")):
        return score
    parts = variance_error / variance, 2 * energy_error / (energy - infinite)
    return float(score * np.hypot(*parts))


def combine(
    values: Sequence | np.ndarray, errors: Sequence | np.ndarray
) -> tuple[float, float]:
    """Mean over seeds, and its error: the larger of their scatter and their own errors."""
    values, errors = np.asarray(values, float), np.asarray(errors, float)
    n = len(values)
    own = np.sqrt(np.sum(errors**2)) / n
    with np.errstate(invalid="ignore"):  # Infinite V-scores have no scatter.
        scatter = values.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return float(values.mean()), float(max(own, scatter))


def digits(value: float | None, error: float | None) -> str:
    """`-0.74180(12)`: the error in units of the last digits; a dash for no number."""
    if value is None or not np.isfinite(value):
        return "–"
    if error is None:
        error = 0.0
    if not np.isfinite(error) or error <= 0:
        return f"{value:.6f}"
    places = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{places}f}({round(error * 10**places)})"

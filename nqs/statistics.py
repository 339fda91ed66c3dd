"""Error bars of Markov chains. NumPy on the host; `series` is [time, chains] throughout."""

import numpy as np
from jaxtyping import Float


def blocked_error(series: Float[np.ndarray, " t"]) -> tuple[float, np.ndarray]:
    """The error of the mean of one correlated series (Flyvbjerg & Petersen 1989).

    Neighbours are averaged in pairs again and again; the error grows until blocks are
    independent. Taken is the largest one among the levels with at least 16 blocks (the
    first level if there are fewer), which errs on the large side.

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


def autocorrelation(series: Float[np.ndarray, "t chains"]) -> np.ndarray:
    """Normalised autocorrelation function [t], averaged over chains, about one mean."""
    x = np.asarray(series, float)
    x = x - x.mean()
    n = len(x)
    power = np.abs(np.fft.rfft(x, 2 * n, axis=0)) ** 2
    c = np.fft.irfft(power, axis=0)[:n].mean(axis=1) / np.arange(n, 0, -1)
    return c / c[0] if c[0] > 0 else np.eye(1, n)[0]


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
    x = np.asarray(series, float)
    half = len(x) // 2
    if half < 2:
        return float("nan")
    x = np.concatenate([x[:half], x[half : 2 * half]], axis=1)
    within = x.var(axis=0, ddof=1).mean()
    between = x.mean(axis=0).var(ddof=1)
    if within == 0:
        return 1.0 if between == 0 else float("inf")
    return float(np.sqrt((half - 1) / half + between / within))


def v_score(energy: float, variance: float, n_electrons: int, infinite: float) -> float:
    """N_e Var / (E - E_infinity)^2 (Wu et al., arXiv:2302.04919).

    Args:
      energy, variance: totals.
      infinite: the energy at infinite temperature, U N_up N_dn / N.
    """
    return float(n_electrons * variance / (energy - infinite) ** 2)


def combine(values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Mean over seeds, and its error: the larger of their scatter and their own errors."""
    values, errors = np.asarray(values, float), np.asarray(errors, float)
    n = len(values)
    own = np.sqrt(np.sum(errors**2)) / n
    scatter = values.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return float(values.mean()), float(max(own, scatter))


def digits(value: float, error: float) -> str:
    """`-0.74180(12)`: the error in units of the last digits."""
    if not np.isfinite(error) or error <= 0:
        return f"{value:.6f}"
    places = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{places}f}({round(error * 10**places)})"

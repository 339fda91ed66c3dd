"""What a curve J*(s) tells: where it rises, its identities, totals, values in between.

Facts used (arXiv:2506.13763, and derived in the docstrings): J* is at least 0, does not fall
with s, tends to the variance V of the data, lies below the linear bound, and for N distinct
rows the integral of J*(s) s^-3 ds over all s is ln N nats.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from common.errors import UserError
from diffusion.estimators import OptimalLoss
from diffusion.preconditioning import check_sigmas

CLOSE = 0.06  # In log s.


class Curve(NamedTuple):
    """A monotone curve, float64.

    Attributes:
      log_sigma, value: [S], its points; value is a sum over coordinates.
      eigenvalues: [k] of the data's covariance, for the linear bound beyond the last point;
        empty: the variance alone.
      variance: V, the limit.
    """

    log_sigma: np.ndarray
    value: np.ndarray
    eigenvalues: np.ndarray
    variance: float


def smooth(loss: OptimalLoss, eigenvalues: np.ndarray | None = None) -> Curve:
    """The isotonic projection of an estimate, weighted by its errors, between 0 and V.

    Levels whose error is not known, NaN, have the least weight.
    """
    order = np.argsort(loss.sigmas)
    x, value, error = np.log(loss.sigmas[order]), loss.value[order], loss.stderr[order]
    variance = float(loss.variance)
    # A level at which no draw saw a second row has no error, and must not outweigh others.
    least = 1e-6 * (variance or 1.0)
    # Nothing between 0 and V is further off than V.
    most = np.max(error, initial=variance or 1.0, where=np.isfinite(error))
    weight = 1 / np.maximum(np.where(np.isfinite(error), error, most), least) ** 2
    x, value, weight = _merged(x, value, weight)
    fitted = isotonic_regression(value, weights=weight).x
    return Curve(
        x,
        np.clip(fitted, 0, variance),
        np.zeros(0) if eigenvalues is None else np.asarray(eigenvalues, float),
        variance,
    )


def _merged(x, value, weight):
    """Levels that lie closer than `CLOSE` as one: their slope would be noise, and a cubic
    through them wrong for a whole interval."""
    start = np.concatenate([[True], np.zeros(len(x) - 1, bool)])
    first = 0
    for i in range(1, len(x)):
        if x[i] - x[first] >= CLOSE:
            start[i], first = True, i
    group = np.cumsum(start) - 1
    total = np.bincount(group, weight)
    mean = lambda v: np.bincount(group, weight * v) / total
    return mean(x), mean(value), total


def interpolate(curve: Curve, sigmas: Any) -> np.ndarray:
    """J* at any noise level: monotone cubic in log s; 0 below the curve.

    Beyond its last point, J* there scaled as the linear bound grows, at most V.
    """
    s = check_sigmas(sigmas)
    x = np.log(s)
    inside = np.clip(x, curve.log_sigma[0], curve.log_sigma[-1])
    if len(curve.log_sigma) == 1:
        found = np.full(x.shape, curve.value[0])
    else:
        found = PchipInterpolator(curve.log_sigma, curve.value)(inside)
    found = np.where(x < curve.log_sigma[0], 0, np.maximum(found, 0))
    last = np.exp(curve.log_sigma[-1])
    if curve.eigenvalues.size:
        bound = linear_bound(curve.eigenvalues, s) / linear_bound(curve.eigenvalues, last)
        beyond = np.minimum(curve.value[-1] * bound, curve.variance)
    else:
        # V - J* falls as 1 / s^2.
        beyond = curve.variance - (curve.variance - curve.value[-1]) * (last / s) ** 2
    return np.where(x > curve.log_sigma[-1], beyond, found)


def linear_bound(eigenvalues: Float[np.ndarray, " k"], sigmas: Any) -> np.ndarray:
    """sum_k lam s^2 / (lam + s^2): the loss of the best linear denoiser, at least J*.

    Equal to J* for Gaussian data.

    Args:
      eigenvalues: lam, of the covariance of the data.
      sigmas: [S].
    """
    s2 = np.atleast_1d(np.asarray(sigmas, float))[:, None] ** 2
    return np.sum(eigenvalues * s2 / (eigenvalues + s2), -1)


def covariance_eigenvalues(
    data: Any, convert: Callable[[Any], Any] = np.asarray, chunk: int = 4096
) -> Float[np.ndarray, " d"]:
    """Of rows [N, ...], descending, float64 [min(N, D)].

    The rows are taken in pieces: D^2 float64 numbers are kept, not N D.

    Args:
      data: [N, ...] rows, a memory map as well.
      convert: of a piece, to the numbers it stands for.
      chunk: rows of a piece.
    """
    count = len(data)
    piece = lambda i: np.asarray(convert(data[i : i + chunk]), np.float64)
    pieces = lambda: (piece(i).reshape(-1, dim) for i in range(0, count, chunk))
    dim = int(np.prod(np.shape(data)[1:]))
    mean = sum(p.sum(0) for p in pieces()) / count
    if count < dim:  # The same values, but for zeros, and fewer numbers.
        rows = np.concatenate([p - mean for p in pieces()])
        gram = rows @ rows.T
    else:
        gram = np.zeros((dim, dim))
        for p in pieces():
            p = p - mean
            gram += p.T @ p
    return np.maximum(np.linalg.eigvalsh(gram)[::-1] / count, 0)


def sigma_star(curve: Curve, tau: float = 0.01) -> float:
    """The largest s with J*(s) <= tau V, linear in log s between points.

    The first or last noise level, where the curve is above or below throughout.
    """
    level = tau * curve.variance
    below = np.flatnonzero(curve.value <= level)
    if not below.size:
        return float(np.exp(curve.log_sigma[0]))
    i = below[-1]
    if i == len(curve.value) - 1:
        return float(np.exp(curve.log_sigma[-1]))
    low, high = curve.value[i], curve.value[i + 1]
    part = (level - low) / (high - low)
    return float(np.exp((1 - part) * curve.log_sigma[i] + part * curve.log_sigma[i + 1]))


def information(loss: OptimalLoss) -> tuple[float, float]:
    """The integral of J*(s) s^-3 ds, nats, and its standard error from independent levels.

    ln N for N distinct rows; the entropy of the frequencies where rows repeat (I-MMSE: Guo,
    Shamai, Verdu 2005). Trapezia in log s; above the last level J* = V, below the first 0.
    """
    order = np.argsort(loss.sigmas)
    s = loss.sigmas[order]
    x = np.log(s)
    weight = np.zeros(len(x))
    weight[1:] += np.diff(x) / 2
    weight[:-1] += np.diff(x) / 2
    weight = weight / s**2
    tail = float(loss.variance) / (2 * s[-1] ** 2)
    error = np.sqrt(np.sum((weight * loss.stderr[order]) ** 2))
    return float(np.sum(weight * loss.value[order]) + tail), float(error)


def weighted_total(
    curve: Curve, weight: Any, density: Any, low: float, high: float, points: int = 2048
) -> float:
    """E_{log s ~ density}[weight(s) J*(s)], a sum over coordinates.

    Args:
      curve: J*.
      weight: s [P] -> [P], of the loss in VE coordinates.
      density: s [P] -> [P], of log s; need not be normalised.
      low, high: range of s.
      points: of the grid, equal steps of log s.
    """
    x = np.linspace(np.log(low), np.log(high), points)
    s = np.exp(x)
    p = np.asarray(density(s), float)
    found = np.asarray(weight(s), float) * interpolate(curve, s)
    return float(np.trapezoid(p * found, x) / np.trapezoid(p, x))


def grid(
    low: float = 0.002, high: float = 80.0, points: int = 48, star: float = 0.0, more: int = 16
) -> Float[np.ndarray, " s"]:
    """Noise levels in equal steps of log s, and `more` from star / 3 to 4 star."""
    found = np.geomspace(low, high, points)
    if star:
        found = np.union1d(found, np.geomspace(star / 3, min(4 * star, high), more))
    return found


def save(path: Path, loss: OptimalLoss, record: dict) -> None:
    """Writes an .npz with the curve and what it is of, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        np.savez(temporary, record=json.dumps(record, default=str), **loss._asdict())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def load(path: Path) -> tuple[OptimalLoss, dict]:
    """What `save` wrote.

    Raises:
      UserError: the file is none of these.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            record = json.loads(str(found["record"]))
            return OptimalLoss(**{n: found[n] for n in OptimalLoss._fields}), record
    except (
        OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise UserError(f"{path} is no curve of an optimal loss.") from error

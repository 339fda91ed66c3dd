"""Power laws by least squares in logarithms, with an offset that is known or free."""

from typing import Any, NamedTuple

import numpy as np

from common.errors import reject

LEAST = 5  # Points of a fit.
MARGIN = 1e-3  # Of the losses' range: how far a free offset stays below the smallest.


class PowerLaw(NamedTuple):
    """A straight line through (log F, log(J - offset)), natural logarithms.

    Attributes:
      alpha, log_beta: J - offset = exp(log_beta) F^alpha.
      offset: what was subtracted.
      rho: Pearson's correlation of the logarithms, its absolute value; NaN if J is constant.
      r2: 1 - (sum of squared residuals) / (sum of squares about the mean), that is rho^2.
      residuals: [P] log(J - offset) minus the line.
    """

    alpha: float
    log_beta: float
    offset: float
    rho: float
    r2: float
    residuals: np.ndarray

    @property
    def beta(self) -> float:
        """The gap at F = 1, in the unit of the loss; infinite beyond floats."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.log_beta))

    def loss(self, flops: Any) -> np.ndarray:
        """J at any F."""
        return self.offset + np.exp(self.log_beta + self.alpha * np.log(flops))


def power_law(flops: Any, loss: Any, offset: float = 0.0, *, weights: Any = None) -> PowerLaw:
    """Least squares of log(loss - offset) on log(flops).

    Args:
      flops, loss: [P], at least 5 points, F > 0.
      offset: from 0 to below the smallest loss.
      weights: [P], above 0, of the squares; None: all one.

    Raises:
      UserError: the points cannot be fitted, or the offset is not below all of them.
    """
    flops, loss = measured("loss", flops, loss, least=LEAST)
    check_offset(offset, loss)
    x, y = np.log(flops), np.log(loss - offset)
    w = _shares(weights, loss)
    x_mean, y_mean = w @ x, w @ y
    dx, dy = x - x_mean, y - y_mean
    xx, xy, yy = w @ dx**2, w @ (dx * dy), w @ dy**2
    alpha = xy / xx
    residuals = dy - alpha * dx
    # The squares of a constant are rounding alone.
    constant = yy <= (1e-14 * max(1.0, abs(y_mean))) ** 2
    rho = np.nan if constant else min(abs(xy) / np.sqrt(xx * yy), 1.0)
    r2 = np.nan if constant else 1 - (w @ residuals**2) / yy
    log_beta = float(y_mean - alpha * x_mean)
    return PowerLaw(float(alpha), log_beta, float(offset), float(rho), float(r2), residuals)


def with_offset(flops: Any, loss: Any, *, weights: Any = None) -> PowerLaw:
    """`power_law` with the offset c in [0, min J) that fits best.

    c is that of least squares of (J - c - beta F^alpha) / J: maximum likelihood where errors
    are a small part of J. (Least squares of log(J - c) would prefer a c that shrinks the
    logarithms.) For each alpha < 0 the best beta and c are known in closed form, so the
    search has one dimension: a grid of alpha log(F_max / F_min) from -0.01 to -30, then
    finer ones about the best. c is 0 where the loss shows no floor, and at the other bound
    stays below min J by a thousandth of the range of J or of min J, whichever is less.

    Args:
      flops, loss, weights: as of `power_law`; losses above 0.

    Raises:
      UserError: the points cannot be fitted.
    """
    flops, loss = measured("loss", flops, loss, least=LEAST)
    check_offset(0.0, loss)
    x = np.log(flops)
    x = (x - x.mean()) / np.ptp(x)
    least = loss.min()
    top = min(least - MARGIN * min(np.ptp(loss), least), np.nextafter(least, 0))
    q = _shares(weights, loss) / loss**2

    def profile(steep):
        shape = np.exp(-steep[:, None] * x)
        s0, s1, s2 = q.sum(), shape @ q, shape**2 @ q
        t0, t1 = q @ loss, shape @ (q * loss)
        c = np.clip((t0 * s2 - t1 * s1) / (s0 * s2 - s1**2), 0, top)
        beta = np.maximum((t1 - c * s1) / s2, 0)
        return c, ((c[:, None] + beta[:, None] * shape - loss) ** 2) @ q

    c, steep = np.zeros(1), np.geomspace(0.01, 30, 64)
    best = 0
    for _ in range(6 if np.ptp(loss) > 0 else 0):
        c, squares = profile(steep)
        best, last = int(np.argmin(squares)), len(steep) - 1
        steep = np.linspace(steep[max(best - 1, 0)], steep[min(best + 1, last)], 17)
    return power_law(flops, loss, float(c[best]), weights=weights)


def measured(field: str, flops: Any, loss: Any, *, least: int = 1) -> tuple:
    """float64 vectors of one length: F finite and above 0, J finite.

    Raises:
      UserError: they are not, or fewer than `least`, or (`least` above 1) of one F alone.
    """
    flops, loss = (np.atleast_1d(np.asarray(each, float)) for each in (flops, loss))
    if flops.ndim != 1 or flops.shape != loss.shape or len(loss) < least:
        allowed = f"two vectors of one length, {least} or more"
        raise reject(f"scaling.{field}", (flops.shape, loss.shape), allowed)
    for name, each, good in (
        ("flops", flops, np.isfinite(flops) & (flops > 0)),
        ("loss", loss, np.isfinite(loss)),
    ):
        if not good.all():
            i = int(np.argmin(good))
            allowed = "finite" + " and above 0" * (name == "flops")
            raise reject(f"scaling.{field}: {name}[{i}]", float(each[i]), allowed)
    if least > 1 and np.ptp(flops) == 0:
        raise reject(f"scaling.{field}: flops", float(flops[0]), "of two values at least")
    return flops, loss


def check_offset(offset: float, loss: np.ndarray) -> None:
    """Raises UserError unless the offset is from 0 to below all losses."""
    if not 0 <= offset < loss.min():
        allowed = f"from 0 to below the smallest loss, {loss.min():.6g}"
        raise reject("scaling.offset", float(offset), allowed)


def _shares(weights: Any, loss: np.ndarray) -> np.ndarray:
    w = np.ones(len(loss)) if weights is None else np.asarray(weights, float)
    if w.shape != loss.shape or not (np.isfinite(w) & (w > 0)).all():
        raise reject("scaling.weights", w.tolist(), f"{len(loss)} numbers above 0")
    return w / w.sum()

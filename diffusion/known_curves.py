"""Optimal losses that were measured elsewhere, to stand beside ours in a report.

Both curves come from a separate program, with exact inner sums over all rows, no mirror
images and no classes. They are numbers to compare with, never a part of a result.
"""

import re
from typing import NamedTuple

import numpy as np

from diffusion.curve import interpolate, smooth
from diffusion.estimators import OptimalLoss
from diffusion.images import Images

NEAR = 1.4  # Ratio of levels between which J* may be interpolated to be compared.
SAME = 0.005  # Relative difference of variances of what counts as the same data.
CIFAR10 = r"cifar[-_]?10(?!0)"


class Known(NamedTuple):
    """A curve of a data set; `value` and `error` are per coordinate, float64 [S].

    Attributes:
      pattern: of a part of the data set's name, in small letters.
      rows, dim, variance: of the data set, the last per coordinate.
      source: a phrase for tables.
      sigmas, value, error: levels, J* / D and its standard error.
    """

    pattern: str
    rows: int
    dim: int
    variance: float
    source: str
    sigmas: np.ndarray
    value: np.ndarray
    error: np.ndarray


def known(images: Images) -> Known | None:
    """The curve for these images, told by name and size; None where there is none."""
    shape = len(images.rows), int(np.prod(images.rows.shape[1:]))
    for each in (_digits(), _cifar10(), _first_of_cifar10()):
        if re.search(each.pattern, images.name.lower()) and shape == (each.rows, each.dim):
            return each
    return None


def compared(found: OptimalLoss, other: Known) -> list[dict]:
    """Ours at the other's levels, where levels of ours are near on both sides, per coordinate.

    Returns:
      rows of sigma, ours, ours_error, known, known_error and `errors`, the difference in
      standard errors of both together, or None where there are none. No rows where the
      variance says that these are other data, or in other units.
    """
    dim, log = float(found.dim), np.log(found.sigmas)
    if abs(float(found.variance) / dim / other.variance - 1) > SAME:
        return []
    above = np.searchsorted(found.sigmas, other.sigmas)
    ends = found.sigmas[np.clip([above - 1, above], 0, len(log) - 1)]
    exact = np.isclose(other.sigmas, ends, rtol=1e-6).any(0)
    inside = exact | (
        (ends[0] < other.sigmas) & (other.sigmas < ends[1]) & (ends[1] < NEAR * ends[0])
    )
    rows = []
    for s, value, error in zip(
        *(a[inside] for a in (other.sigmas, other.value, other.error)), strict=True
    ):
        ours = float(interpolate(smooth(found), np.array([s]))[0]) / dim
        own = float(np.interp(np.log(s), log, found.stderr)) / dim
        both = float(np.hypot(own, error))
        row = dict(sigma=float(s), ours=ours, ours_error=own, known=float(value))
        away = (ours - float(value)) / both if both else None
        rows.append(row | dict(known_error=float(error), errors=away))
    return rows


def _digits() -> Known:
    s = [0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 80]
    value = [0.0078, 0.083, 0.32, 0.803, 2.51, 4.8, 9.9, 13.08, 16.01, 17.737, 18.512]
    error = [7e-4, 0.002, 0.006, 0.008, 0.02, 0.02, 0.03, 0.03, 0.02, 0.009, 0.004]
    value, error = np.array([*value, 18.709, 18.7696]), np.array([*error, 0.002, 4e-4])
    source = "digits of scikit-learn, exact sums"
    variance = 18.773105 / 64
    s = np.array(s, float)
    return Known("digits", 1797, 64, variance, source, s, value / 64, error / 64)


def _cifar10() -> Known:
    s = [1.5, 2, 2.5, 3, 3.49, 4, 5, 6, 8, 12, 20, 40]
    value = [2e-7, 5.6e-5, 6e-4, 0.0044, 0.012, 0.0265, 0.0663, 0.0991]
    value += [0.1397, 0.1767, 0.2086, 0.2334]
    error = [2e-7, 2.9e-5, 1.6e-4, 7e-4, 0.0012, 0.0017, 0.0022, 0.002]
    error += [0.0013, 9e-4, 8e-4, 6e-4]
    source = "CIFAR-10 after mild JPEG compression, exact sums, 300 draws"
    s, value, error = (np.array(a, float) for a in (s, value, error))
    return Known(CIFAR10, 50_000, 3072, 0.2456, source, s, value, error)


def _first_of_cifar10() -> Known:
    """Errors were given as about 10 % below 3.5 and 2 % above 6; between them we say 5 %."""
    s = np.array([2, 2.5, 3, 3.5, 4.5, 6, 9, 20])
    value = np.array([3e-5, 3.3e-4, 0.00144, 0.0054, 0.0252, 0.0725, 0.144, 0.2124])
    error = value * [0.1, 0.1, 0.1, 0.1, 0.05, 0.02, 0.02, 0.02]
    source = "first 4,000 images of CIFAR-10, exact sums, 1,000 draws"
    return Known(CIFAR10, 4000, 3072, 763.0278 / 3072, source, s, value, error)

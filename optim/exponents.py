"""How heavy the tail of a spectrum is: power-law exponents of eigenvalues.

AlphaDecay (He et al., arXiv:2506.14562) fits the upper half; two more fits are its
ablations. A small exponent is a heavy tail. Spectra are ascending along the last axis.

    median           `hill_alpha`, the tail is a fixed share of the spectrum (the default)
    goodness_of_fit  the start with the least Kolmogorov-Smirnov distance (Clauset et al.,
                     arXiv:0706.1062)
    fix_finger       the same among starts near the peak of the spectrum

An exponent that does not exist (no spread in the tail, nothing but zeros) is NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject

SPREAD = 1e-4  # Mean logarithm below which a tail is constant up to rounding.
BINS = 100  # Of fix_finger's histogram.
FITS = ("median", "goodness_of_fit", "fix_finger")
REFERENCES = ("mle", "hill")


def tail_start(r: int, tail: float = 0.5) -> int:
    """Index of the smallest of r ascending eigenvalues in the tail: floor(r (1 - tail)).

    Raises:
      UserError: `tail` is not between 0 and 1.
    """
    _require_share(tail)
    return min(int(r * (1 - tail) + 1e-9), r - 1)


def _require_share(tail):
    if not 0 < tail < 1:
        raise reject("optim.alphadecay.tail", tail, "between 0 and 1")


def hill_alpha(
    eigenvalues: Float[Array, "*batch r"], tail: float = 0.5, reference: str = "mle"
) -> Float[Array, "*batch"]:
    """PL_Alpha_Hill, 1 + k / sum_{j in tail} ln(lambda_j / lambda_ref) (section 2.2).

    Invariant to the scale of the matrix, to its transpose and to rotations, as long as the
    eigenvalues are neither 0 nor infinite (`bounded` of `spectra.esd` sees to that).

    Args:
      eigenvalues: ascending, above 0 (`spectra.esd` sees to that).
      tail: share of the spectrum that is fitted, k of r values.
      reference: "mle", lambda_ref is the smallest value of the tail, as in the release and
        the paper's appendix; "hill", the one just below it, as printed.

    Returns:
      the exponent, above 1; NaN where the tail has no spread or is not finite.

    Raises:
      UserError: no such reference, `tail` is not between 0 and 1, or no value is below it
        for "hill".
    """
    if reference not in REFERENCES:
        allowed = f"one of {', '.join(REFERENCES)}"
        raise reject("optim.alphadecay.reference", reference, allowed)
    r = eigenvalues.shape[-1]
    first = tail_start(r, tail)
    if first == 0 and reference == "hill":
        allowed = f"at most {1 - 1 / r:.4g}, for a value of {r} to lie below the tail"
        raise reject("optim.alphadecay.tail", tail, allowed)
    return tail_alpha(eigenvalues[..., first:], eigenvalues[..., first - (reference == "hill")])


def tail_alpha(
    tail: Float[Array, "*batch k"], reference: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """1 + k / sum ln(tail / reference), from the tail alone; NaN as in `hill_alpha`."""
    logs = jnp.log(tail) - jnp.log(reference)[..., None]
    mean = jnp.mean(logs, axis=-1)
    exists = jnp.isfinite(mean) & (mean > SPREAD)
    return jnp.where(exists, 1 + 1 / jnp.where(exists, mean, 1), jnp.nan)


def clauset_alpha(
    eigenvalues: Float[Array, "*batch r"], fit: str = "goodness_of_fit", slip: bool = False
) -> Float[Array, "*batch"]:
    """The `mle` exponent from the start i whose Kolmogorov-Smirnov distance is least.

        D_i = max_{j >= i} |1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i)/(r - i)|

    Args:
      eigenvalues: ascending, above 0. All are read, so take them from `spectra.esd` with
        "svd": the default vouches for the upper half alone.
      fit: "goodness_of_fit", i from 0 to r - 2; "fix_finger", lambda_i between 0.95 and
        1.5 times the left edge of the fullest of 100 equal bins of log10 lambda.
      slip: the release compares lambda_i with log10 of the lower bound instead.

    Returns:
      NaN where no start has an exponent.

    Raises:
      UserError: no such fit.
    """
    if fit not in FITS[1:]:
        raise reject("optim.alphadecay.fit", fit, f"one of {', '.join(FITS[1:])}")
    shape = eigenvalues.shape[:-1]
    flat = eigenvalues.reshape(-1, eigenvalues.shape[-1])
    one = lambda row: _clauset(row, fit, slip)
    return jax.lax.map(one, flat).reshape(shape)


def _clauset(row: Float[Array, " r"], fit: str, slip: bool) -> Float[Array, ""]:
    r = row.shape[-1]
    logs = jnp.log(row)
    n = jnp.arange(r, 0, -1)  # Members from each start on.
    # Sums of ln lambda_j - ln lambda_i; differences first, they are small.
    above = jnp.cumsum(logs[::-1])[::-1] - n * logs
    mean = above / n
    exists = jnp.isfinite(mean) & (mean > SPREAD) & (n >= 2)
    alpha = jnp.where(exists, 1 + 1 / jnp.where(exists, mean, 1), jnp.nan)

    def distance(i):
        j = jnp.arange(r)
        model = 1 - jnp.exp((1 - alpha[i]) * (logs - logs[i]))
        gap = jnp.abs(model - (j - i) / (r - i))
        return jnp.max(jnp.where(j >= i, gap, 0))

    # A matrix of r x r distances at once would be the largest thing in a refresh.
    gaps = jax.lax.map(distance, jnp.arange(r), batch_size=64)
    allowed = exists & (_near_peak(row, slip) if fit == "fix_finger" else True)
    best = jnp.argmin(jnp.where(allowed, gaps, jnp.inf))
    return jnp.where(allowed[best], alpha[best], jnp.nan)


def _near_peak(row, slip):
    scale = jnp.log10(row)
    low, high = scale[0], scale[-1]
    width = jnp.maximum(high - low, 1e-12) / BINS
    place = jnp.clip(((scale - low) / width).astype(jnp.int32), 0, BINS - 1)
    fullest = jnp.argmax(jnp.zeros(BINS, jnp.int32).at[place].add(1))
    peak = 10 ** (low + fullest * width)
    bottom = jnp.log10(0.95 * peak) if slip else 0.95 * peak
    return (row >= bottom) & (row <= 1.5 * peak)


def marchenko_pastur_alpha(n: int, m: int, tail: float = 0.5) -> float:
    """The `mle` exponent of a random matrix without structure, n x m large, i.i.d. entries.

    Shape alone puts an exponent between 2.12 (square) and 3.5 (one to four): a fresh
    network's MLP matrices look lighter-tailed than its attention. By quadrature.
    """
    _require_share(tail)
    q = min(n, m) / max(n, m)
    low, high = (1 - q**0.5) ** 2, (1 + q**0.5) ** 2
    # x = middle - radius cos(phi) takes the square roots out of the density's ends.
    phi = (np.arange(200_000) + 0.5) * np.pi / 200_000
    x = (low + high) / 2 - (high - low) / 2 * np.cos(phi)
    weight = np.sin(phi) ** 2 / x
    share = np.cumsum(weight) / weight.sum()
    first = np.searchsorted(share, 1 - tail)
    logs = np.log(x[first:] / x[first])
    return float(1 + weight[first:].sum() / (weight[first:] * logs).sum())

"""The information curve of a denoiser: one measurement that predicts every number of steps.

    h_n = E_x E_{S, |S| = n} mean_{i not in S} -log f(x_S)[i, x_i],    n = 0 ... L - 1
    NELBO / L   = (1/L) sum_n h_n
    NELBO_T / L = sum_k w_k sum_n Binomial(n; L - 1, a_k) h_n          ancestral, weights w
    NELBO_T / L = (1/L) sum_k |group k| h_{n_k}                          count, groups

(section 3 of the specification; arXiv:2502.09622 has the bounds.) With the exact denoiser
NELBO / L is the entropy of the language, H(q) / L. Texts are spread evenly over n, so that
every h_n has the same number of them; with a text's own -log q(x) / L as a control variate
the error of a gap is several times smaller.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from lm.masked.denoiser import Denoiser
from lm.masked.objective import Noised, chosen, masked_losses


class Curve(NamedTuple):
    """Sums over texts, by the number of visible tokens n = 0 ... L - 1.

    Attributes:
      texts: how many.
      loss: of the mean loss of their masked positions, nats, less the control.
      square: of its square.
    """

    texts: Float[Array, " length"]
    loss: Float[Array, " length"]
    square: Float[Array, " length"]


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def empty(length: int) -> Curve:
    """No texts yet."""
    return Curve(*(jnp.zeros(length) for _ in range(3)))


def measured(
    key: jax.Array,
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    start: Int[Array, ""] | int,
    control: Float[Array, " batch"] | float = 0.0,
    counted: Bool[Array, " batch"] | None = None,
    prompt: int = 0,
) -> Curve:
    """The curve of one batch: text b has (start + b) mod L tokens visible.

    Args:
      key: of the positions.
      x: clean texts.
      start: texts measured before, so that all n come in turn.
      control: taken off each text's mean loss, nats per token.
      counted: texts that count; all where it is not given.
      prompt: tokens at the start that are always visible; L counts the others.
    """
    noised, visible = prepared(key, x, start, denoiser.mask, prompt)
    mean = mean_loss(denoiser, params, x, noised)
    return tallied(visible, mean - control, x.shape[1] - prompt, counted)


def prepared(
    key: jax.Array, x: Int[Array, "batch length"], start: Any, mask: int, prompt: int = 0
) -> tuple[Noised, Int[Array, " batch"]]:
    """The noised batch of `measured`, and how many tokens of each text are visible."""
    batch, length = x.shape[0], x.shape[1] - prompt
    visible = (start + jnp.arange(batch)) % length
    free = jnp.broadcast_to(jnp.arange(x.shape[1]) >= prompt, x.shape)
    masked = chosen(jax.random.uniform(key, x.shape), free, length - visible)
    return Noised(jnp.where(masked, mask, x), masked, jnp.ones(batch)), visible


def mean_loss(
    denoiser: Denoiser, params: Any, x: Int[Array, "batch length"], noised: Noised
) -> Float[Array, " batch"]:
    """Mean of -log f over the masked positions of each text."""
    losses = masked_losses(denoiser, params, x, noised)
    return jnp.sum(losses, axis=1) / jnp.sum(noised.masked, axis=1)


def tallied(
    visible: Int[Array, " batch"],
    value: Float[Array, " batch"],
    length: int,
    counted: Bool[Array, " batch"] | None = None,
) -> Curve:
    """Sums of one value per text, by its number of visible tokens."""
    some = jnp.ones(value.shape, bool) if counted is None else counted
    add = lambda values: jnp.zeros(length).at[visible].add(jnp.where(some, values, 0.0))
    return Curve(add(jnp.ones(value.shape)), add(value), add(value * value))


def added(a: Curve, b: Curve) -> Curve:
    """The curve of both."""
    return jax.tree.map(jnp.add, a, b)


def information(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """h_n less the control and its standard error, float64 [L]; NaN where nothing is known."""
    texts, loss, square = (np.asarray(a, np.float64) for a in curve)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = loss / texts
        spread = np.maximum(square / texts - mean**2, 0) * texts / (texts - 1)
        return mean, np.sqrt(spread / texts)


def by_ratio(h: Float[np.ndarray, " length"], bins: int = 16) -> np.ndarray:
    """Mean of h_n by mask ratio, (0, 1/bins], ..., (1 - 1/bins, 1]; NaN where there is no n."""
    length = len(h)
    ratio = (length - np.arange(length)) / length
    place = np.clip(np.ceil(ratio * bins).astype(int) - 1, 0, bins - 1)
    with np.errstate(invalid="ignore"):
        return np.bincount(place, h, bins) / np.bincount(place, minlength=bins)


def combined(curve: Curve, coefficients: Float[np.ndarray, " length"]) -> Estimate:
    """sum_n c_n h_n, for instance NELBO_T / L with `ancestral` or `grouped`.

    Where c_n is 0, h_n need not be known.
    """
    return linear(*information(curve), coefficients)


def linear(
    mean: Float[np.ndarray, " length"],
    error: Float[np.ndarray, " length"],
    coefficients: Float[np.ndarray, " length"],
) -> Estimate:
    """`combined` of what `information` returned."""
    used = coefficients != 0
    value = np.sum(coefficients[used] * mean[used])
    return Estimate(float(value), float(np.sqrt(np.sum((coefficients * error)[used] ** 2))))


def whole(length: int) -> Float[np.ndarray, " length"]:
    """Coefficients of NELBO / L."""
    return np.full(length, 1 / length)


def ancestral(
    length: int, weights: Float[np.ndarray, " steps"]
) -> Float[np.ndarray, " length"]:
    """Coefficients of NELBO_T / L where each position draws its step by the weights."""
    visible = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    chance = stats.binom.pmf(np.arange(length)[:, None], length - 1, np.minimum(visible, 1))
    return chance @ weights


def grouped(length: int, sizes: Int[np.ndarray, " steps"]) -> Float[np.ndarray, " length"]:
    """Coefficients of NELBO_T / L where groups of these sizes are filled in at random."""
    found = np.zeros(length)
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    np.add.at(found, before[sizes > 0], sizes[sizes > 0] / length)
    return found


def excess(weights: Float[np.ndarray, " steps"], length: int) -> Float[np.ndarray, " length"]:
    """Coefficients of NELBO_T / L - NELBO / L, which sum up to 0.

    Nearly all errors of the h_n cancel at a large T; of the exact denoiser it is gap_T.
    """
    return ancestral(length, weights) - whole(length)

"""From one number per module to one decay ratio per module (section 3 of AlphaDecay).

All modules of the network stand in one vector. A ratio multiplies the base decay. Modules
without a score (NaN: no spectrum to speak of) take ratio 1 and do not take part.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import reject
from optim.weight_decay import check

ASSIGNMENTS = ("linear", "sqrt", "log2", "sigmoid", "uniform")
STEEP = 4.0  # beta of the sigmoid.
ROUNDING = 8.0  # In units of eps: numbers that differ by no more are equal.


def assign_decay(
    score: Float[Array, " modules"],
    assignment: str = "linear",
    s1: float = 0.67,
    s2: float = 3.0,
    *,
    quantiles: tuple[float, float] = (0.0, 1.0),
    layer: Int[Array, " modules"] | None = None,
    layers: int = 1,
) -> Float[Array, " modules"]:
    """Decay ratios (arXiv:2506.14562, its equation 3, and the ablations of its table 4).

        linear   (score - min)/(max - min) (s2 - s1) + s1
        sqrt     sqrt(score) / mean sqrt(score)
        log2     log2(score) / mean log2(score)
        sigmoid  2 / (1 + exp(-4 z)), z standardised within a layer
        uniform  1

    Args:
      score: one per module of the whole network, usually its exponent.
      s1, s2: ratios of the least and the largest score.
      quantiles: of the scores, that stand for min and max; scores beyond are clipped.
      layer, layers: which layer a module is of, and how many there are; for sigmoid.

    Returns:
      ratios; 1 for all where the scores are equal, 1 for a module without a score. One that
      is not finite, or of which sqrt or log2 is not, counts as none.

    Raises:
      UserError: the assignment is unknown, or not 0 <= s1 <= s2.
    """
    if assignment not in ASSIGNMENTS:
        allowed = f"one of {', '.join(ASSIGNMENTS)}"
        raise reject("optim.alphadecay.assignment", assignment, allowed)
    check_ends(s1, s2)
    there = jnp.isfinite(score)
    if assignment == "linear":
        low, high = _ends(score, there, quantiles)
        width = high - low
        place = jnp.clip((score - low) / jnp.where(width > 0, width, 1), 0, 1)
        ratio = jnp.where(width > 0, place * (s2 - s1) + s1, 1)
    elif assignment in ("sqrt", "log2"):
        if assignment == "sqrt":
            value, least = jnp.sqrt(score), 0.0
        else:  # Logarithms of scores that are 1 up to rounding are rounding.
            value, least = jnp.log2(score), ROUNDING * jnp.finfo(score.dtype).eps
        there = jnp.isfinite(value)
        mean = jnp.sum(jnp.where(there, value, 0)) / jnp.maximum(jnp.sum(there), 1)
        usable = jnp.isfinite(mean) & (jnp.abs(mean) > least)
        ratio = jnp.where(usable, value / jnp.where(usable, mean, 1), 1)
        ratio = jnp.maximum(ratio, 0)  # Scores on both sides of 1: decay never grows weights.
    elif assignment == "sigmoid":
        layer = jnp.zeros(len(score), jnp.int32) if layer is None else layer
        ratio = 2 / (1 + jnp.exp(-STEEP * _standard(score, there, layer, layers)))
    else:
        ratio = jnp.ones_like(score)
    return jnp.where(there, ratio, 1)


def _ends(score, there, quantiles):
    if quantiles == (0.0, 1.0):
        return (
            jnp.min(jnp.where(there, score, jnp.inf)),
            jnp.max(jnp.where(there, score, -jnp.inf)),
        )
    known = jnp.where(there, score, jnp.nan)
    return jnp.nanquantile(known, quantiles[0]), jnp.nanquantile(known, quantiles[1])


def _standard(score, there, layer, layers):
    """(score - mean)/(std + 1e-8) over the modules of the same layer, population std.

    0 where the scores of a layer are equal: their deviation is rounding and not always 0.
    """
    add = lambda x: jnp.zeros(layers, score.dtype).at[layer].add(jnp.where(there, x, 0))
    low = jnp.full(layers, jnp.inf, score.dtype).at[layer].min(jnp.where(there, score, jnp.inf))
    high = jnp.full_like(low, -jnp.inf).at[layer].max(jnp.where(there, score, -jnp.inf))
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    varied = high - low > ROUNDING * jnp.finfo(score.dtype).eps * size
    count = jnp.maximum(add(jnp.ones_like(score)), 1)
    mean = add(score) / count
    deviation = jnp.sqrt(add((score - mean[layer]) ** 2) / count)
    z = (score - mean[layer]) / (deviation[layer] + 1e-8)
    return jnp.where(varied[layer], z, 0)


def check_ends(s1: Any, s2: Any) -> None:
    """Rejects ratios other than 0 <= s1 <= s2. Arrays are known only later."""
    check("alphadecay.s1", s1)
    check("alphadecay.s2", s2)
    if not isinstance(s1, jax.Array) and not isinstance(s2, jax.Array) and s1 > s2:
        raise reject("optim.alphadecay.s2", s2, f"finite and at least s1 = {s1}")

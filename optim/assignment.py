"""From one number per module to one decay ratio per module (section 3 of AlphaDecay).

All modules of the network stand in one vector. A ratio multiplies the base decay. Modules
without a score (NaN: no spectrum to speak of) take ratio 1 and do not take part.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ASSIGNMENTS = ("linear", "sqrt", "log2", "sigmoid", "uniform")
STEEP = 4.0  # beta of the sigmoid.


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
      ratios; 1 for all where the scores are equal, 1 for a module without a score.
    """
    there = jnp.isfinite(score)
    if assignment == "linear":
        low, high = _ends(score, there, quantiles)
        width = high - low
        place = jnp.clip((score - low) / jnp.where(width > 0, width, 1), 0, 1)
        ratio = jnp.where(width > 0, place * (s2 - s1) + s1, 1)
    elif assignment in ("sqrt", "log2"):
        value = jnp.sqrt(score) if assignment == "sqrt" else jnp.log2(score)
        mean = jnp.sum(jnp.where(there, value, 0)) / jnp.maximum(jnp.sum(there), 1)
        ratio = value / jnp.where(mean == 0, 1, mean)
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
    """(score - mean)/(std + 1e-8) over the modules of the same layer, population std."""
    add = lambda x: jnp.zeros(layers, score.dtype).at[layer].add(jnp.where(there, x, 0))
    count = jnp.maximum(add(jnp.ones_like(score)), 1)
    mean = add(score) / count
    deviation = jnp.sqrt(add((score - mean[layer]) ** 2) / count)
    return (score - mean[layer]) / (deviation[layer] + 1e-8)

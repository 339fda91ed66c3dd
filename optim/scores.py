"""What a module is judged by: the exponent of its spectrum, or one of the ablations.

alpha        the exponent (`exponents`), the default
grad_norm    Frobenius norm of the gradient
frobenius    sum of the eigenvalues, the squared Frobenius norm of the weights
spectral     the largest eigenvalue
stable_rank  frobenius / spectral
alpha_hat    softplus(alpha log10 spectral)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject
from optim import exponents, spectra
from optim.modules import Leaf, matrices

SCORES = ("alpha", "grad_norm", "frobenius", "spectral", "stable_rank", "alpha_hat")


def of_modules(
    s: Any, leaves: list[Leaf], weights: list, gradients: list
) -> list[Float[Array, "..."]]:
    """One score per module of each leaf, [*modules]; NaN where there is none.

    Args:
      s: the settings of `alphadecay`: score, fit, tail, reference, method, ...
      leaves: what the arrays mean.
      weights, gradients: one array per leaf; the gradients matter to "grad_norm" alone.

    Raises:
      UserError: "mp", the correction of a median fit, with another fit.
    """
    if s.score == "grad_norm":
        return [_norm(leaf, g) for leaf, g in zip(leaves, gradients, strict=True)]
    fitted = s.score in ("alpha", "alpha_hat")
    clauset = fitted and s.fit != "median"
    if clauset and s.shape_correction == "mp":
        allowed = f"none or subsample with fit {s.fit}"
        raise reject("optim.alphadecay.shape_correction", s.shape_correction, allowed)
    # Those fits read the smallest values, and their choice of a start is no smooth function.
    method = "svd" if clauset and s.method == "auto" else s.method
    # Read from here on; a module's windows are pooled, but none has much less than its share.
    below = s.reference == "hill"
    exact = lambda r: min(exponents.tail_start(r, s.tail) - below, r // 2) if fitted else r // 2
    # Of what does not depend on scale.
    bounded = s.score in ("alpha", "stable_rank")
    if fitted and s.shape_correction == "subsample":
        values = [
            _windows(leaf, w, method, exact(leaf.rank), bounded)
            for leaf, w in zip(leaves, weights, strict=True)
        ]
    else:
        whole = s.fit != "median" or s.score in ("frobenius", "stable_rank")
        first = lambda r: 0 if whole else exponents.tail_start(r, s.tail) - 1
        values = spectra.eigenvalues(leaves, weights, method, first, exact, bounded)
    return [_score(s, leaf, v) for leaf, v in zip(leaves, values, strict=True)]


def _score(s, leaf, values):
    largest, total = values[..., -1], values.sum(axis=-1)
    if s.score == "frobenius":
        return total
    if s.score == "spectral":
        return largest
    if s.score == "stable_rank":
        return total / largest
    if s.fit != "median":
        alpha = exponents.clauset_alpha(values, s.fit, s.slip)
    elif s.shape_correction == "subsample":
        alpha = exponents.hill_alpha(values, s.tail, s.reference)
    else:  # Of the whole spectrum, one value below the tail and the tail are here.
        below = values[..., 0 if s.reference == "hill" else 1]
        alpha = exponents.tail_alpha(values[..., 1:], below)
    if s.shape_correction == "mp":
        alpha = alpha - exponents.marchenko_pastur_alpha(*leaf.sides, s.tail)
    if s.score == "alpha_hat":
        return jax.nn.softplus(alpha * jnp.log10(largest))
    return alpha


def _windows(leaf, w, method, exact, bounded):
    """Pooled eigenvalues of square windows that cover the long side, ascending."""
    w = matrices(leaf, w)
    n, m = leaf.sides
    w, r, long = (w, n, m) if n <= m else (jnp.swapaxes(w, -1, -2), m, n)
    count = -(-long // r)
    starts = np.linspace(0, long - r, count).round().astype(int)
    cut = jnp.stack([w[..., a : a + r] for a in starts], axis=-3)
    values = spectra.esd(cut, method, exact=exact, bounded=bounded)
    return jnp.sort(values.reshape(*leaf.modules, -1), axis=-1)


def _norm(leaf, g):
    g = matrices(leaf, g).astype(jnp.promote_types(g.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    return jnp.sqrt(jnp.sum((g / unit) ** 2, axis=(-2, -1))) * unit[..., 0, 0]

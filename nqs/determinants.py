"""Determinants of the occupied rows, and the logarithm of their sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def occupied(x: Int[Array, " modes"], n: int) -> Int[Array, " electrons"]:
    """The n occupied modes of a configuration, ascending."""
    return jnp.nonzero(x, size=n, fill_value=0)[0]


def log_det_sum(m: Float[Array, "k n n"]) -> tuple[jax.Array, jax.Array]:
    """Sign and logarithm of |sum_k det m[k]| (arXiv:2507.02644, S8).

    Returns:
      sign: -1, 0 or 1.
      log: -inf where the sum is zero.
    """
    signs, logs = jnp.linalg.slogdet(m)
    # Where all vanish, the sum's logarithm shall be -inf and not NaN.
    largest = jnp.max(logs)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(signs * jnp.exp(logs - shift))
    return jnp.sign(total), jnp.log(jnp.abs(total)) + shift

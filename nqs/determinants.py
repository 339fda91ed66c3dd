"""Determinants of many small matrices, and the logarithm of their sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNROLLED = 12  # Up to this size a batched elimination beats LAPACK's one by one on CPUs.


def occupied(x: Int[Array, " modes"], n: int) -> Int[Array, " electrons"]:
    """The n occupied modes of a configuration, ascending."""
    return jnp.nonzero(x, size=n, fill_value=0)[0]


def log_det_sum(m: Float[Array, "k n n"]) -> tuple[jax.Array, jax.Array]:
    """Sign and logarithm of |sum_k det m[k]|.

    Returns:
      sign: -1, 0 or 1.
      log: -inf where the sum is zero.
    """
    signs, logs = slogdet(m)
    # Without a finite largest one the sum is zero, and its logarithm is -inf, not NaN.
    largest = jnp.max(logs)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(signs * jnp.exp(logs - shift))
    return jnp.sign(total), jnp.log(jnp.abs(total)) + shift


def slogdet(m: Float[Array, "... n n"]) -> tuple[jax.Array, jax.Array]:
    """As `jnp.linalg.slogdet`, but fast for batches of small matrices on a CPU."""
    return jnp.linalg.slogdet(m)

"""Metropolis-Hastings on |psi|^2: one chain per sample, hops along the bonds.

The proposal takes one of the hops allowed now, with weight max(|t|, 0.05), so that no
proposal is wasted. It is not symmetric: with W(x) the sum of the weights,

    accept with min(1, |psi(x') / psi(x)|^2 W(x) / W(x')).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nqs import hops as hop

LEAST = 0.05  # No bond may be so weak that its hops are never proposed.


class Chains(NamedTuple):
    """Walkers with their amplitudes."""

    x: Int[Array, "b modes"]
    sign: Float[Array, " b"]
    log: Float[Array, " b"]
    moved: Float[Array, " b"]  # Share of the proposals that were accepted.


def scatter(key: jax.Array, n: int, n_sites: int, n_up: int, n_dn: int):
    """Random walkers, int8 [n, 2 n_sites]: each spin uniform over its placements."""

    def one_spin(key, electrons):
        order = jnp.argsort(jax.random.uniform(key, (n, n_sites)), axis=1)
        return (order < electrons).astype(jnp.int8)

    up, down = jax.random.split(key)
    return jnp.concatenate([one_spin(up, n_up), one_spin(down, n_dn)], axis=1)


def sample(
    log_psi: Callable,
    h: hop.Hops,
    x: Int[Array, "b modes"],
    uniforms: Float[Array, "moves b 2"],
) -> Chains:
    """Moves every walker `len(uniforms)` times.

    Args:
      log_psi: x [b, 2N] -> (sign, log|psi|), [b] each.
      h: the hops.
      x: where the walkers are.
      uniforms: in [0, 1): which hop, and whether it is accepted.

    A walker on a node (log -inf) always moves on; one without any allowed hop stays.
    A proposal whose amplitude is not a number is refused.
    """
    weight = jnp.maximum(jnp.abs(jnp.asarray(h.element, jnp.float32)), LEAST)

    def weights(x):
        return jnp.cumsum(hop.allowed(h, x) * weight, axis=-1)

    def move(state, u):
        x, sign, log, ahead, moved = state
        total = ahead[:, -1]
        chosen = jnp.argmax(ahead > (u[:, 0] * total)[:, None], axis=-1)
        possible = jnp.take_along_axis(hop.allowed(h, x), chosen[:, None], axis=-1)[:, 0]
        new = hop.apply(h, x, chosen)
        # An impossible move is not looked at, but its amplitude must exist.
        new = jnp.where(possible[:, None], new, x)
        new_sign, new_log = log_psi(new)
        new_ahead = weights(new)
        ratio = 2 * (new_log - log) + jnp.log(total) - jnp.log(new_ahead[:, -1])
        lost = ~jnp.isfinite(log) & ~jnp.isnan(new_log)
        # Zero stands for what is below the resolution; its logarithm would accept anything.
        least = jnp.finfo(u.dtype).eps / 4
        take = possible & (lost | (jnp.log(jnp.maximum(u[:, 1], least)) < ratio))
        x = jnp.where(take[:, None], new, x)
        sign, log = jnp.where(take, new_sign, sign), jnp.where(take, new_log, log)
        ahead = jnp.where(take[:, None], new_ahead, ahead)
        return (x, sign, log, ahead, moved + take), None

    sign, log = log_psi(x)
    if not len(h.source):
        return Chains(x, sign, log, jnp.zeros_like(log))
    start = (x, sign, log, weights(x), jnp.zeros_like(log))
    (x, sign, log, _, moved), _ = jax.lax.scan(move, start, uniforms)
    return Chains(x, sign, log, moved / max(len(uniforms), 1))

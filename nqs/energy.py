"""Local energies E_L(x) = sum_x' <x|H|x'> psi(x') / psi(x).

Of the hops of the Hamiltonian only about a quarter are allowed in a configuration. The
packed evaluation lists the allowed hops of all walkers, one behind the other, and
evaluates the list in chunks, as many as there are: no budget can be exceeded, nothing is
dropped and nothing recompiles when the list grows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nqs import hops as hop


def local_energy(
    log_psi: Callable,
    h: hop.Hops,
    x: Int[Array, "b modes"],
    sign: Float[Array, " b"],
    log: Float[Array, " b"],
    chunk: int,
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """Local energies by the packed list, in the widest float there is.

    Args:
      log_psi: x [n, 2N] -> (sign, log|psi|), [n] each.
      h: the hops.
      x, sign, log: configurations and their amplitudes.
      chunk: configurations evaluated at once.

    Returns:
      energies [b], not clipped; not finite where psi(x) = 0.
      number of allowed hops [b].

    The sum over hops runs in their order whatever the chunk, so the result does not
    depend on it.
    """
    mask = hop.allowed(h, x)
    n = mask.size
    if not n:  # One site has no bonds.
        return _marked(hop.diagonal(h, x), log), jnp.zeros(len(x), jnp.int32)
    chunk = min(chunk, n)
    listed = -(-n // chunk) * chunk  # Room for all of them: never too short.
    packed = jnp.nonzero(mask.ravel(), size=listed, fill_value=n)[0].astype(jnp.int32)
    count = jnp.sum(mask, dtype=jnp.int32)
    total = len(h.source)
    wide = jnp.result_type(float)

    def more(carry):
        return carry[0] * chunk < count

    def evaluate(carry):
        i, terms = carry
        where = jax.lax.dynamic_slice(packed, (i * chunk,), (chunk,))
        walker, chosen = where // total, where % total
        # Behind the list's end a walker's own configuration is evaluated, and dropped.
        real = where < n
        walker = jnp.where(real, walker, 0)
        here = x[walker]
        new = jnp.where(real[:, None], hop.apply(h, here, chosen), here)
        new_sign, new_log = log_psi(new)
        ratio = new_sign * sign[walker] * jnp.exp((new_log - log[walker]).astype(wide))
        term = hop.elements(h, here, chosen).astype(wide) * ratio.astype(wide)
        return i + 1, terms.at[where].set(term, mode="drop")

    # Zeros that inherit the placement of x, as a loop inside shard_map demands.
    terms = jnp.zeros(n, wide) + 0 * x[0, 0].astype(wide)
    first = 0 * count
    _, terms = jax.lax.while_loop(more, evaluate, (first, terms))
    kinetic = terms.reshape(mask.shape).sum(axis=1)
    energy = _marked(hop.diagonal(h, x) + kinetic, log)
    return energy, mask.sum(axis=1, dtype=jnp.int32)


def local_energy_padded(
    log_psi: Callable,
    h: hop.Hops,
    x: Int[Array, "b modes"],
    sign: Float[Array, " b"],
    log: Float[Array, " b"],
    chunk: int,
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """The same by evaluating every hop of every walker: the plain way, for comparison."""
    mask = hop.allowed(h, x)
    wide = jnp.result_type(float)
    if not mask.size:
        return _marked(hop.diagonal(h, x), log), jnp.zeros(len(x), jnp.int32)

    def one(pair):
        walker, chosen = pair
        here = x[walker][None]
        ok = mask[walker, chosen]
        new = jnp.where(ok, hop.apply(h, here, chosen[None]), here)
        new_sign, new_log = log_psi(new)
        ratio = new_sign * sign[walker] * jnp.exp((new_log - log[walker]).astype(wide))
        element = hop.elements(h, here, chosen[None]).astype(wide)
        return jnp.where(ok, (element * ratio)[0], 0.0)

    walkers, chosen = jnp.meshgrid(jnp.arange(len(x)), jnp.arange(len(h.source)), indexing="ij")
    terms = jax.lax.map(one, (walkers.ravel(), chosen.ravel()), batch_size=chunk)
    energy = _marked(hop.diagonal(h, x) + terms.reshape(mask.shape).sum(axis=1), log)
    return energy, mask.sum(axis=1, dtype=jnp.int32)


def _marked(energy, log):
    """Not a number where psi(x) = 0: no ratio exists, not even where no hop is allowed."""
    return jnp.where(jnp.isfinite(log), energy, jnp.nan)

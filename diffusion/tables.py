"""A sampler as a table: one row for each evaluation of the denoiser, and the loop over it.

Between two evaluations every sampler of this package does the same thing in VE coordinates,
x = x_0 + s eps: it adds up

    X  the state in which the present step began
    D  the newest value of the denoiser
    P  the value before it
    Q  the one before that
    Z  fresh standard normal noise

with factors that depend on the grid alone. So a method is a function that works these factors
out on the host in float64, and one loop serves them all: the network is compiled once whatever
the order of the method, and another grid, method or option of as many evaluations costs no
compilation.

The five names are unit vectors below, so formulas can be typed as they are printed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

Denoiser = Callable[[Array, Array], Array]  # (x [B, *shape], sigma [B]) -> x0_hat
Form = Float[np.ndarray, "5"]  # The factors of X, D, P, Q and Z.

X, D, P, Q, Z = np.eye(5)


class Table(NamedTuple):
    """A sampler on a grid, with E evaluations.

    Attributes:
      sigma: [E] noise level of each evaluation.
      form: [E, 5] factors of X, D, P, Q, Z in what follows it: where the denoiser is
        evaluated next, or the result.
      end: [E] whether a step ends there, so that what follows is the next X.
      scale: of the standard normal noise with which sampling begins.
      kick: standard deviation of noise that is added to this start.
    """

    sigma: Float[np.ndarray, " e"] | Float[Array, " e"]
    form: Float[np.ndarray, "e 5"] | Float[Array, "e 5"]
    end: Bool[np.ndarray, " e"] | Bool[Array, " e"]
    scale: float | Float[Array, ""]
    kick: float | Float[Array, ""]


def table(rows: list[tuple], scale: float, kick: float = 0.0) -> Table:
    """Of (sigma, form, end) rows, float64 on the host."""
    sigma, form, end = zip(*rows, strict=True)
    return Table(np.array(sigma), np.array(form), np.array(end), scale, kick)


def older(form: Form) -> Form:
    """The same value once the denoiser was evaluated again: D is called P, and P is Q."""
    x, d, p, q, z = form
    if q or z:
        raise ValueError("Values older than Q and noise are not kept.")
    return x * X + d * P + p * Q


def random(plan: Table) -> bool:
    """Whether any noise is added on the way."""
    return bool(plan.kick or plan.form[:, 4].any())


def run(
    denoiser: Denoiser,
    plan: Table,
    noise: Float[Array, " b *shape"],
    keys: Key[Array, " b"] | None = None,
    every: bool = False,
) -> tuple[Float[Array, " b *shape"], Float[Array, "e b *shape"] | None]:
    """Evaluates a table row by row; to be called within jit.

    Sample b draws from `fold_in(keys[b], row)`, whatever else is in the batch.

    Args:
      denoiser: gets sigma [B] in the dtype of x.
      plan: of arrays or NumPy arrays; used in the dtype of `noise`.
      noise: standard normal; sampling begins at scale * noise.
      keys: one for each sample; None where `random(plan)` is False.
      every: whether to keep what followed each evaluation.

    Returns:
      x0, and all of these states or None.
    """
    dtype = noise.dtype
    plan = jax.tree.map(jnp.asarray, plan)
    sigma, form = plan.sigma.astype(dtype), plan.form.astype(dtype)

    def draw(row):
        one = lambda key: jax.random.normal(
            jax.random.fold_in(key, row), noise.shape[1:], dtype
        )
        return jax.vmap(one)(keys)

    def body(carry, this):
        start, here, newest, before = carry
        row, sigma, (x, d, p, q, z), end = this
        value = denoiser(here, jnp.full(len(here), sigma)).astype(dtype)
        after = x * start + d * value + p * newest + q * before
        if keys is not None:
            after = after + z * draw(row)
        carry = jnp.where(end, after, start), after, value, newest
        return carry, after if every else None

    start = plan.scale.astype(dtype) * noise
    if keys is not None:
        start = start + plan.kick.astype(dtype) * draw(len(sigma))
    nothing = jnp.zeros_like(start)
    rows = (jnp.arange(len(sigma)), sigma, form, plan.end)
    (_, last, _, _), states = jax.lax.scan(body, (start, start, nothing, nothing), rows)
    return last, states


@partial(jax.jit, static_argnames="every")
def compiled(
    denoiser: jax.tree_util.Partial,
    plan: Table,
    noise: Float[Array, " b *shape"],
    keys: Key[Array, " b"] | None,
    every: bool,
):
    """`run`, compiled."""
    return run(denoiser, plan, noise, keys, every)


def portable(denoiser: Denoiser) -> jax.tree_util.Partial:
    """A denoiser as an argument of compiled functions.

    The arrays of a `jax.tree_util.Partial(function, params)` are arguments: other parameters
    are no compilation. A bare function is compiled with what it closes over, and anew for
    each function.
    """
    known = isinstance(denoiser, jax.tree_util.Partial)
    return denoiser if known else jax.tree_util.Partial(denoiser)

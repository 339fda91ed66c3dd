"""The loss of a denoiser, and its gradient over slices of a batch.

    mean of w(s) |D(x_0 + s eps; s, condition) - x_0|^2,   a mean over coordinates

and with a learned log loss u(s), w exp(-u) |...|^2 + u (Karras et al. 2024, Eq. 21).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks import Network
from diffusion.preconditioning import Preconditioning, denoiser, expand

KNOTS = 64  # Of the learned log loss of networks that have none of their own,
SPAN = (-7.0, 5.0)  # over this range of log s.


class Given(NamedTuple):
    """A batch as the loss takes it.

    Attributes:
      x0: [B, H, W, C], clean images.
      eps: the same shape, noise.
      s: [B], noise levels.
      weight: [B], w(s).
      cond: condition of the network.
    """

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    s: Float[Array, " b"]
    weight: Float[Array, " b"]
    cond: dict[str, Array]


def init(net: Network, key: jax.Array, learned: bool) -> dict[str, Any]:
    """{"net": parameters} and, where the log loss is to be learned beside it, "log_loss"."""
    params = {"net": net.normalized(net.init(key))}
    if learned and net.uncertainty is None:
        params["log_loss"] = jnp.zeros(KNOTS)
    return params


def log_loss(
    net: Network, wrap: Preconditioning, params: dict[str, Any], s: Float[Array, " b"]
) -> Float[Array, " b"]:
    """u(s), of the network's own head or piecewise linear in log s."""
    if net.uncertainty is not None:
        return net.uncertainty(params["net"], wrap.c_noise(s))
    return jnp.interp(jnp.log(s), jnp.linspace(*SPAN, KNOTS), params["log_loss"])


def loss(
    net: Network,
    wrap: Preconditioning,
    params: dict[str, Any],
    given: Given,
    key: jax.Array | None = None,
    learned: bool = False,
) -> tuple[Float[Array, ""], Float[Array, " b"]]:
    """The weighted loss, and the squared error of x_0 of each sample, a mean over coordinates.

    Args:
      net, wrap: the model.
      params: as `init` makes them.
      given: the batch.
      key: of dropout; None: off.
      learned: whether u(s) takes part.
    """
    of = denoiser(net.apply, params["net"], wrap, given.cond, key)
    x = given.x0 + expand(given.s, given.x0) * given.eps
    error = jnp.mean((of(x, given.s) - given.x0) ** 2, (1, 2, 3))
    weighted = given.weight * error
    if learned:
        u = log_loss(net, wrap, params, given.s)
        weighted = weighted * jnp.exp(-u) + u
    return jnp.mean(weighted), error


def gradient(
    function: Callable, params: Any, given: Given, key: jax.Array | None, slices: int
) -> tuple[tuple[Array, Array], Any]:
    """((loss, errors [B]), gradient) of `function(params, given, key)`.

    Args:
      slices: of the batch, one after the other, each with a key of its own; rows stay where
        they are, as axis 0 is split over the devices.
    """
    both = jax.value_and_grad(function, has_aux=True)
    if slices == 1:
        return both(params, given, key)
    split = lambda a: jnp.moveaxis(a.reshape(-1, slices, *a.shape[1:]), 1, 0)
    keys = None if key is None else jax.random.split(key, slices)

    def more(carry, part):
        (value, error), grads = both(params, *part)
        return jax.tree.map(lambda a, b: a + b / slices, carry, (value, grads)), error

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    parts = (jax.tree.map(split, given), keys)
    (value, grads), errors = jax.lax.scan(more, zero, parts)
    return (value, jnp.moveaxis(errors, 0, 1).reshape(-1)), grads

"""What a network predicts, and how one prediction and its loss become another's.

A target is T = a x_0 + b eps. With Delta = a sigma - b alpha, not zero,

    x0_hat  = (sigma T_hat - b x_t) / Delta
    eps_hat = (a x_t - alpha T_hat) / Delta
    T_hat   = (a - b alpha / sigma) x0_hat + (b / sigma) x_t
    |T_hat - T|^2 = kappa |x0_hat - x_0|^2,   kappa = (Delta / sigma)^2

The last line holds draw by draw, so kappa converts losses, optimal losses and gaps alike
(Xu et al., arXiv:2506.13763, Eqs. 3-5).

    x0        a = 1           b = 0
    eps       a = 0           b = 1
    score     a = 0           b = -1 / sigma
    v         a = -sigma      b = alpha             Salimans, Ho 2022
    velocity  a = d alpha/dt  b = d sigma/dt        eps - x_0 on the linear path
    F         a, b so that T has unit variance      Karras et al. 2022, in VE coordinates
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import UserError, reject
from diffusion.processes import Process, rates

TARGETS = ("x0", "eps", "score", "v", "velocity", "F")


def coefficients(
    target: str, process: Process, t: Float[Array, "..."], sigma_data: float = 0.5
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """a and b of a target at times t.

    Args:
      target: one of `TARGETS`.
      process: gives alpha and sigma.
      t: any shape.
      sigma_data: standard deviation of the data, for F.

    Raises:
      UserError: an unknown target; a velocity where time is discrete; a time that the process
        does not have, or at which the target says nothing about x_0 (Delta = 0). Of times
        that are not known, under `jit`, nothing is refused.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    s = sigma / alpha
    root = jnp.sqrt(s**2 + sigma_data**2)
    made = {
        "x0": lambda: (one, zero),
        "eps": lambda: (zero, one),
        "score": lambda: (zero, -1 / sigma),
        "v": lambda: (-sigma, alpha),
        "velocity": lambda: rates(process, t),
        # (1 - c_skip) / c_out and -c_skip s / c_out, with x_0 + s eps = x_t / alpha.
        "F": lambda: (s / (sigma_data * root), -sigma_data / root),
    }
    if target not in made:
        raise reject("target", target, f"one of {', '.join(made)}")
    a, b = made[target]()
    # The cosine at the end of gvp is a little below 0.
    known = (alpha > -1e-6) & (sigma > -1e-6)
    _check(known, t, f"alpha and sigma of the process {process.name} are no numbers from 0 up")
    delta = a * sigma - b * alpha
    good = (delta != 0) & jnp.isfinite(delta)
    _check(good, t, f"the target {target} does not determine x_0")
    return a, b


def x0_of(
    predicted: Float[Array, "..."],
    x_t: Float[Array, "..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The estimate of x_0 that a predicted target means."""
    return (sigma * predicted - b * x_t) / (a * sigma - b * alpha)


def eps_of(
    predicted: Float[Array, "..."],
    x_t: Float[Array, "..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The estimate of the noise that a predicted target means."""
    return (a * x_t - alpha * predicted) / (a * sigma - b * alpha)


def target_of(
    x0_hat: Float[Array, "..."],
    x_t: Float[Array, "..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The prediction of the target that an estimate of x_0 means."""
    return (a - b * alpha / sigma) * x0_hat + b / sigma * x_t


def kappa(
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Squared error of the target over that of x_0."""
    return ((a * sigma - b * alpha) / sigma) ** 2


def loss_factor(
    target: str, process: Process, t: Float[Array, "..."], sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """`kappa` of a target at times t.

    Raises:
      UserError: as `coefficients`; a time without noise, where kappa is infinite.
    """
    a, b = coefficients(target, process, t, sigma_data)
    factor = kappa(process.alpha(t), process.sigma(t), a, b)
    said = f"the error of the target {target} is no finite multiple of that of x_0"
    _check(jnp.isfinite(factor), t, said)
    return factor


def convert_loss(
    value: Float[Array, "..."],
    process: Process,
    t: Float[Array, "..."],
    source: str,
    target: str,
    sigma_data: float = 0.5,
) -> Float[Array, "..."]:
    """A loss, optimal loss or gap of one target at times t as that of another.

    Raises:
      UserError: as `loss_factor`.
    """
    of = lambda name: loss_factor(name, process, t, sigma_data)
    return value * of(target) / of(source)


def _check(good, t, said):
    if isinstance(good, jax.core.Tracer):
        return
    good = np.asarray(good)
    if not good.all():
        t = float(np.broadcast_to(np.asarray(t), good.shape)[~good].ravel()[0])
        raise UserError(f"At t = {t:g} {said}; choose another time, or another target.")

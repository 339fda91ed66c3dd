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
      UserError: an unknown target; a velocity where time is discrete; a time at which the
        target says nothing about x_0 (Delta = 0).
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
    _check_delta(a * sigma - b * alpha, t, target)
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
    """`kappa` of a target at times t."""
    a, b = coefficients(target, process, t, sigma_data)
    return kappa(process.alpha(t), process.sigma(t), a, b)


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
      UserError: as `coefficients`.
    """
    of = lambda name: loss_factor(name, process, t, sigma_data)
    return value * of(target) / of(source)


def _check_delta(delta, t, target):
    if isinstance(delta, jax.core.Tracer):
        return
    bad = ~(np.abs(np.asarray(delta)) > 0) | ~np.isfinite(np.asarray(delta))
    if bad.any():
        t = float(np.broadcast_to(np.asarray(t), bad.shape)[bad].ravel()[0])
        raise UserError(
            f"At t = {t:g} the target {target} does not determine x_0; choose another time, "
            "or another target."
        )

"""One denoiser for every family of models, in VE coordinates:

    D(x; s) = c_skip(s) x + c_out(s) F(c_in(s) x, c_noise(s), condition)

(Xu et al., arXiv:2506.13763, Eq. 12; Karras et al. 2022, table 1.) The network sees x_t, or x
of unit variance, and its output is the target; so c_skip and c_out follow from `predictions`:
c_skip = -b alpha / Delta, c_out = sigma / Delta. The squared error of the network's output is
that of D over c_out^2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.predictions import coefficients
from diffusion.processes import Process, iddpm_levels, rates

Denoiser = Callable[[Array, Array], Array]  # (x [B, ...], s [B]) -> x0_hat [B, ...]


class Preconditioning(NamedTuple):
    """Functions of s > 0, any shape, float32 or wider."""

    c_skip: Callable
    c_out: Callable
    c_in: Callable
    c_noise: Callable


def preconditioning(
    process: Process, target: str, sigma_data: float = 0.5, noise_scale: float = 1000.0
) -> Preconditioning:
    """How a network of a process and a target is wrapped.

    Args:
      process: of time s where it is edm; c_noise follows its convention.
      target: of `predictions.TARGETS`; of "score" the network's output is sigma times it,
        as in NCSN++.
      sigma_data: standard deviation of the data, for the targets F and x0.
      noise_scale: of times from 0 to 1, fm_linear and gvp; 1000 for sinusoids.

    Raises:
      UserError: as `predictions.coefficients`.
    """
    unit = lambda s: 1 / jnp.sqrt(s**2 + sigma_data**2)
    if target == "F":
        return Preconditioning(
            c_skip=lambda s: sigma_data**2 / (s**2 + sigma_data**2),
            c_out=lambda s: s * sigma_data / jnp.sqrt(s**2 + sigma_data**2),
            c_in=unit,
            c_noise=_noise(process, noise_scale),
        )
    if target == "x0":
        return Preconditioning(
            jnp.zeros_like, jnp.ones_like, unit, _noise(process, noise_scale)
        )

    def parts(s):
        alpha = process.scale(s)
        sigma = s * alpha
        if target == "velocity":
            a, b = coefficients(target, process, process.time(s))
        else:
            # By s itself: the time of a discrete process would round it.
            a, b = {
                "eps": (0, 1),
                "score": (0, -1),
                "v": (-sigma, alpha),
            }[target]
        delta = a * sigma - b * alpha
        return -b * alpha / delta, sigma / delta

    if target not in ("eps", "score", "v", "velocity"):
        coefficients(target, process, jnp.float32(process.last))  # Names what is known.
    if target == "velocity":
        rates(process, jnp.float32(process.last))  # Now, not when training begins.
    return Preconditioning(
        c_skip=lambda s: parts(s)[0],
        c_out=lambda s: parts(s)[1],
        c_in=process.scale,
        c_noise=_noise(process, noise_scale),
    )


def _noise(process, scale):
    if process.name == "iddpm":
        levels = iddpm_levels(process.steps)

        def nearest(s):
            u = jnp.asarray(levels, s.dtype)
            return process.steps - 1 - jnp.argmin(jnp.abs(u - s[..., None]), -1).astype(s.dtype)

        return nearest
    return {
        "edm": lambda s: jnp.log(s) / 4,
        "ve": lambda s: jnp.log(s / 2),
        "vp": lambda s: 999 * process.time(s),
        "ddpm": process.time,
        "fm_linear": lambda s: scale * process.time(s),
        "gvp": lambda s: scale * process.time(s),
    }[process.name]


def expand(values: Float[Array, " b"], x: Float[Array, "b ..."]) -> Array:
    """[B] -> [B, 1, ...] with as many axes as x."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def denoiser(
    apply: Callable, params: Any, wrap: Preconditioning, cond: dict | None = None, key=None
) -> Denoiser:
    """A network as a denoiser.

    Args:
      apply: of a `networks.Network`.
      params: its parameters.
      wrap: as it was trained.
      cond: condition of the batch, or None.
      key: for dropout, in training.

    Returns:
      (x [B, ...], s [B] or scalar) -> estimate of x_0 [B, ...], float32 or wider.
    """

    def denoise(x, s):
        s = jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape[:1])
        of = lambda f: expand(f(s).astype(x.dtype), x)
        out = apply(params, of(wrap.c_in) * x, wrap.c_noise(s), cond, key)
        return of(wrap.c_skip) * x + of(wrap.c_out) * out.astype(x.dtype)

    return denoise


def check_sigmas(sigmas: Any, field: str = "sigmas") -> np.ndarray:
    """Noise levels as float64 [n].

    Raises:
      UserError: there is none, or one that is not finite and above 0.
    """
    found = np.atleast_1d(np.asarray(sigmas, np.float64)).ravel()
    bad = ~(np.isfinite(found) & (found > 0))
    if not found.size:
        raise reject(field, sigmas, "at least one noise level")
    if bad.any():
        raise reject(field, float(found[bad][0]), "finite noise levels above 0")
    return found

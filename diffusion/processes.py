"""How data turn into noise: x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, 1).

What can be known about x_0 depends on the ratio s = sigma / alpha alone, as E[x_0 | x_t] is
a function of (x_t / alpha, s). So everything in this package is stored and compared in "VE
coordinates", x = x_0 + s eps, and a process is a way to name s by a time t:

    ve         0.02 ... 100 in equal steps of log s               Song et al. 2021, NCSN++
    vp         s^2 = exp(beta_d t^2 / 2 + beta_min t) - 1         Song et al. 2021, DDPM++
    iddpm      1000 times of a cosine, numbered from data         Nichol, Dhariwal 2021
    ddpm       `steps` times of linear betas, numbered from data  Ho et al. 2020
    edm        t = s                                              Karras et al. 2022
    fm_linear  alpha = 1 - t, sigma = t                           Lipman et al. 2023
    gvp        alpha = cos, sigma = sin of pi t / 2               Ma et al. 2024, SiT

Data are at the smallest t throughout. Codes with data at t = 1 are converted at the boundary.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject


class Process(NamedTuple):
    """A corruption process; functions of arrays of any shape, in their dtype.

    Attributes:
      name: as in the table above.
      alpha: t -> factor of the data.
      sigma: t -> standard deviation of the noise.
      time: s -> t, the inverse of sigma / alpha; of discrete processes, in between too.
      scale: s -> alpha(t(s)), directly.
      first, last: the times in use; ends where s would be 0 or infinite are left out.
      steps: of discrete time t = 0, 1, ... steps - 1; 0: time is continuous.
    """

    name: str
    alpha: Callable
    sigma: Callable
    time: Callable
    scale: Callable
    first: float
    last: float
    steps: int = 0


def process(
    name: str,
    *,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    sigma_min: float = 0.02,
    sigma_max: float = 100.0,
    steps: int = 1000,
    beta_first: float = 1e-4,
    beta_last: float = 0.02,
) -> Process:
    """The process of that name.

    Args:
      beta_d, beta_min: of vp.
      sigma_min, sigma_max: of ve, and the range of edm.
      steps: of iddpm and ddpm.
      beta_first, beta_last: of ddpm.

    Raises:
      UserError: an unknown name, or a constant out of its range.
    """
    positive = dict(beta_d=beta_d, sigma_min=sigma_min, beta_first=beta_first)
    for field, value in positive.items():
        if not 0 < value < np.inf:
            raise reject(f"process.{field}", value, "a finite number above 0")
    if not sigma_min < sigma_max < np.inf:
        raise reject("process.sigma_max", sigma_max, f"a finite number above {sigma_min}")
    if not 0 <= beta_min < np.inf:
        raise reject("process.beta_min", beta_min, "a finite number from 0 up")
    if not beta_first <= beta_last < 1:
        raise reject("process.beta_last", beta_last, f"from {beta_first} to below 1")
    if steps < 2:
        raise reject("process.steps", steps, "a whole number from 2 up")
    made = {
        "ve": lambda: _ve(sigma_min, sigma_max),
        "vp": lambda: _vp(beta_d, beta_min),
        "iddpm": lambda: _iddpm(steps),
        "ddpm": lambda: _ddpm(steps, beta_first, beta_last),
        "edm": lambda: _edm(sigma_min, sigma_max),
        "fm_linear": _fm_linear,
        "gvp": _gvp,
    }
    if name not in made:
        raise reject("process.name", name, f"one of {', '.join(made)}")
    return made[name]()


def ratio(process: Process, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """The noise-to-signal ratio s at time t; times beyond the ends are taken as the ends.

    Where the values of t are known, not under `jit`, a warning says so.
    """
    t = _clipped(process, t)
    return process.sigma(t) / process.alpha(t)


def _clipped(process: Process, t: Array) -> Array:
    inside = jnp.clip(t, process.first, process.last)
    if isinstance(t, jax.core.Tracer):
        return inside
    given, kept = np.asarray(t), np.asarray(inside)
    # By the ends in the dtype of t; of NaN nothing can be said.
    below, above = int(np.sum(given < kept)), int(np.sum(given > kept))
    said = [
        f"{count} to {end:g}"
        for count, end in ((below, process.first), (above, process.last))
        if count
    ]
    if said:
        taken = f"of {given.size} were clipped: {' and '.join(said)}"
        warnings.warn(f"Times of the process {process.name} {taken}.", stacklevel=3)
    return inside


def rates(process: Process, t: Float[Array, "..."]) -> tuple[Array, Array]:
    """d alpha / dt and d sigma / dt.

    Raises:
      UserError: time is discrete.
    """
    if process.steps:
        allowed = "a process of continuous time where a velocity is asked for"
        raise reject("process.name", process.name, allowed)
    one = jnp.ones_like(t)
    return jax.jvp(process.alpha, (t,), (one,))[1], jax.jvp(process.sigma, (t,), (one,))[1]


def _unit(s):
    """alpha where alpha^2 + sigma^2 = 1."""
    return 1 / jnp.sqrt(1 + s**2)


def _ve(low, high):
    log_range = float(np.log(high / low))
    return Process(
        name="ve",
        alpha=jnp.ones_like,
        sigma=lambda t: low * jnp.exp(log_range * t),
        time=lambda s: jnp.log(s / low) / log_range,
        scale=jnp.ones_like,
        first=0.0,
        last=1.0,
    )


def _edm(low, high):
    same = lambda s: s
    return Process("edm", jnp.ones_like, same, same, jnp.ones_like, low, high)


def _vp(beta_d, beta_min):
    twice = lambda t: 0.5 * beta_d * t**2 + beta_min * t  # -2 log alpha
    return Process(
        name="vp",
        alpha=lambda t: jnp.exp(-0.5 * twice(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(-twice(t))),
        # The root of the quadratic in a form that does not cancel at small s.
        time=lambda s: (
            2
            * jnp.log1p(s**2)
            / (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(s**2)) + beta_min)
        ),
        scale=_unit,
        first=1e-5,
        last=1.0,
    )


def _fm_linear():
    return Process(
        name="fm_linear",
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        time=lambda s: s / (1 + s),
        scale=lambda s: 1 / (1 + s),
        first=1e-5,
        last=1 - 1e-5,
    )


def _gvp():
    half = float(np.pi / 2)
    return Process(
        name="gvp",
        alpha=lambda t: jnp.cos(half * t),
        sigma=lambda t: jnp.sin(half * t),
        time=lambda s: jnp.arctan(s) / half,
        scale=_unit,
        first=1e-5,
        last=1 - 1e-5,
    )


def iddpm_levels(steps: int = 1000, c1: float = 1e-3, c2: float = 8e-3) -> np.ndarray:
    """s of every time of the cosine process, numbered from noise, float64 [steps + 1].

    The last is 0 (Karras et al. 2022, table 1).
    """
    bar = lambda j: np.sin(0.5 * np.pi * j / (steps * (1 + c2))) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(bar(j - 1) / bar(j), c1) - 1)
    return u


def ddpm_levels(steps: int, beta_first: float, beta_last: float) -> np.ndarray:
    """s of every time of linear betas, numbered from data, float64 [steps]."""
    log_bar = np.cumsum(np.log1p(-np.linspace(beta_first, beta_last, steps)))
    return np.sqrt(np.expm1(-log_bar))


def _iddpm(steps):
    return _discrete("iddpm", iddpm_levels(steps)[-2::-1])


def _ddpm(steps, beta_first, beta_last):
    return _discrete("ddpm", ddpm_levels(steps, beta_first, beta_last))


def _discrete(name, levels):
    """Times 0, 1, ... of given s, ascending; between them log alpha is linear in t."""
    log_alpha = -0.5 * np.log1p(levels**2)
    times = np.arange(len(levels), dtype=float)

    def alpha(t):
        return jnp.exp(jnp.interp(t, times.astype(t.dtype), log_alpha.astype(t.dtype)))

    def sigma(t):
        log = jnp.interp(t, times.astype(t.dtype), log_alpha.astype(t.dtype))
        return jnp.sqrt(-jnp.expm1(2 * log))

    def time(s):
        log = -0.5 * jnp.log1p(s**2)
        return jnp.interp(-log, -log_alpha.astype(s.dtype), times.astype(s.dtype))

    return Process(name, alpha, sigma, time, _unit, 0.0, float(len(levels) - 1), len(levels))

"""Samplers: from noise to data with a denoiser in VE coordinates, x = x_0 + s eps.

    euler           the probability flow dx/ds = (x - D) / s, one evaluation a step
    heun            with a trapezoid corrector; 2 n - 1 evaluations    Karras et al. 2022
    edm             heun with noise added before each step             Karras et al. 2022
    ddim            eta from 0, which is euler, to 1, which is ddpm     Song et al. 2021
    ddpm            ancestral sampling                                  Ho et al. 2020
    native_euler    the flow of a path in its own time and scale, as    Lipman et al. 2023
    native_heun     flow matching codes do it
    euler_maruyama  a reverse SDE with the same flow                    Ma et al. 2024, SiT
    dpm_2m, dpm_3s  DPM-Solver++, see `dpm_solver`                      Lu et al. 2022

All are tables (`tables`) over a falling grid of levels (`grids`). A grid usually ends in 0,
where the state is the sample; one that ends above 0 yields the state there.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key

from common.errors import reject
from diffusion import dpm_solver, grids
from diffusion.tables import (
    D,
    Denoiser,
    Form,
    Table,
    X,
    Z,
    compiled,
    older,
    portable,
    random,
    table,
)

# What standard normal noise is multiplied by to begin at level s: what x_t / alpha is where
# a process takes pure noise for x_t.
STARTS = {
    "ve": lambda s: s,
    "vp": lambda s: float(np.hypot(1, s)),
    "flow": lambda s: 1 + s,
}


class Path(NamedTuple):
    """A process by its own time, as functions of s: float64, on the host.

    Attributes:
      time, alpha: t and alpha.
      rates: d alpha / dt and d sigma / dt.
    """

    time: Callable
    alpha: Callable
    rates: Callable


PATHS = {
    "linear": Path(lambda s: s / (1 + s), lambda s: 1 / (1 + s), lambda s: (-1.0, 1.0)),
    "gvp": Path(
        lambda s: 2 / np.pi * np.arctan(s),
        lambda s: 1 / np.hypot(1, s),
        lambda s: (-np.pi / 2 * s / np.hypot(1, s), np.pi / 2 / np.hypot(1, s)),
    ),
    "ve": Path(lambda s: s, lambda s: 1.0, lambda s: (0.0, 1.0)),
}

DIFFUSIONS = {
    "constant": lambda path, s: 1.0,
    "sigma": lambda path, s: s * path.alpha(s),
    "linear": lambda path, s: path.time(s),
}


def sample(
    denoiser: Denoiser,
    noise: Float[Array, " b *shape"],
    sigmas: Float[np.ndarray, " m"],
    keys: Key[Array, " b"] | None = None,
    method: str = "heun",
    *,
    start: str = "ve",
    **options,
) -> Float[Array, " b *shape"]:
    """Samples from noise. One compiled loop; another grid or other keys use it again.

    Args:
      denoiser: (x [B, *shape], sigma [B]) -> x0_hat [B, *shape]. A
        `jax.tree_util.Partial(function, params)` is compiled once for all parameters.
      noise: standard normal; the arithmetic has its dtype.
      sigmas: [n + 1] falling levels, see `grids`. Its values are known on the host.
      keys: one for each sample, of whose noise nothing else decides; None for methods
        that add none.
      method: one of `METHODS`.
      start: what the noise is at the first level s: "ve", x / s; "vp", x_t of a process
        with alpha^2 + sigma^2 = 1; "flow", x_t at alpha + sigma = 1.
      options: of the method, see its function below.

    Returns:
      x0, or the state in VE coordinates at the last level where this is not 0.

    Raises:
      UserError: the grid does not fall, an unknown method or option, one that is out of
        range, or no keys for a method that adds noise.
    """
    plan = planned(sigmas, method, start=start, **options)
    return compiled(portable(denoiser), plan, noise, _needed(keys, plan, method), False)[0]


def trajectory(
    denoiser: Denoiser,
    noise: Float[Array, " b *shape"],
    sigmas: Float[np.ndarray, " m"],
    keys: Key[Array, " b"] | None = None,
    method: str = "heun",
    *,
    start: str = "ve",
    **options,
) -> Float[Array, "steps b *shape"]:
    """As `sample`, but the state after every step, in VE coordinates; the last is x0.

    With "edm" the noise that a step begins with belongs to the one before.
    """
    plan = planned(sigmas, method, start=start, **options)
    states = compiled(portable(denoiser), plan, noise, _needed(keys, plan, method), True)[1]
    return states[np.flatnonzero(plan.end)]


def planned(sigmas, method: str = "heun", *, start: str = "ve", **options) -> Table:
    """The table of a method on a grid; `len(planned(...).sigma)` evaluations.

    Raises:
      UserError: as `sample`.
    """
    sigmas = grids.check(sigmas)
    if method not in METHODS:
        raise reject("sampler.method", method, f"one of {', '.join(METHODS)}")
    if start not in STARTS:
        raise reject("sampler.start", start, f"one of {', '.join(STARTS)}")
    function = METHODS[method]
    known = [*inspect.signature(function).parameters][1:]
    for name, value in options.items():
        if name not in known:
            fitting = f"one of {', '.join(known)}" if known else "left out"
            raise reject(f"sampler.{name}", value, f"{fitting} with method {method!r}")
    rows, kick = function(sigmas, **options)
    return table(rows, STARTS[start](float(sigmas[0])), kick)


def _needed(keys, plan, method):
    if not random(plan):
        return None
    if keys is None:
        raise reject("sampler.method", method, "one that adds no noise where no keys are")
    return keys


def _pairs(sigmas):
    return pairwise(sigmas.tolist())


def euler(sigmas):
    """x' = x + (s' - s) (x - D) / s."""
    return [(s, _euler(s, t), True) for s, t in _pairs(sigmas)], 0.0


def _euler(s: float, t: float, x: Form = X) -> Form:
    return x + (t - s) * (x - D) / s


def _heun(s: float, t: float) -> list[tuple]:
    """Rows of a step; the one to 0 has no corrector."""
    predictor = _euler(s, t)
    if t == 0:
        return [(s, predictor, True)]
    first, second = older(X - D) / s, (older(predictor) - D) / t
    return [(s, predictor, False), (t, X + (t - s) * (first + second) / 2, True)]


def heun(sigmas):
    """Euler, then the mean of the slopes at both ends (Karras et al. 2022, Alg. 1)."""
    return [row for s, t in _pairs(sigmas) for row in _heun(s, t)], 0.0


def edm(
    sigmas,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
):
    """Heun from a raised level s (1 + gamma) (Karras et al. 2022, Alg. 2).

    gamma = min(s_churn / n, sqrt(2) - 1) where s_min <= s <= s_max, else 0; the noise that
    leads to the raised level is multiplied by s_noise.
    """
    _from_zero(s_churn=s_churn, s_min=s_min, s_noise=s_noise)
    if not s_max >= s_min:
        raise reject("sampler.s_max", s_max, f"a number from s_min = {s_min} up")
    n = len(sigmas) - 1
    rows, kicks = [], []
    for s, t in _pairs(sigmas):
        gamma = min(s_churn / n, 2**0.5 - 1) if s_min <= s <= s_max else 0.0
        raised = s * (1 + gamma)
        kicks.append(s_noise * (raised**2 - s**2) ** 0.5)
        if rows:  # The step before hands over the raised state.
            level, form, end = rows[-1]
            rows[-1] = (level, form + kicks[-1] * Z, end)
        rows += _heun(raised, t)
    return rows, kicks[0]


def ddim(sigmas, eta: float = 0.0):
    """x' = D + sqrt(s'^2 - c^2) (x - D) / s + c z, c = eta s' sqrt(1 - s'^2 / s^2).

    Song et al. 2021, Eq. 12 and 16, over alpha: in VE coordinates no process is left in it.
    """
    if not 0 <= eta <= 1:
        raise reject("sampler.eta", eta, "from 0 to 1")
    rows = []
    for s, t in _pairs(sigmas):
        c = eta * t * (1 - (t / s) ** 2) ** 0.5
        rows.append((s, D + (t**2 - c**2) ** 0.5 * (X - D) / s + c * Z, True))
    return rows, 0.0


def ddpm(sigmas, variance: str = "posterior"):
    """Draws from p(x_t' | x_t, x_0 = D) (Ho et al. 2020, Eq. 6 and 7).

    Args:
      variance: "posterior", the variance of this distribution; "beta", that of
        p(x_t | x_t') on a process with alpha^2 + sigma^2 = 1, but 0 in the step to 0.
    """
    variances = {
        "posterior": lambda s, t: t**2 * (s**2 - t**2) / s**2,
        "beta": lambda s, t: (s**2 - t**2) * (1 + t**2) / (1 + s**2) if t else 0.0,
    }
    if variance not in variances:
        raise reject("sampler.variance", variance, f"one of {', '.join(variances)}")
    rows = []
    for s, t in _pairs(sigmas):
        spread = variances[variance](s, t) ** 0.5
        rows.append((s, D + (t / s) ** 2 * (X - D) + spread * Z, True))
    return rows, 0.0


def _velocity(path: Path, s: float, x: Form = X) -> Form:
    """alpha' x_0 + sigma' eps with the denoiser's x_0 and eps."""
    of_data, of_noise = path.rates(s)
    return of_data * D + of_noise * (x - D) / s


def _path(name):
    if name not in PATHS:
        raise reject("sampler.path", name, f"one of {', '.join(PATHS)}")
    return PATHS[name]


def native_euler(sigmas, path: str = "linear"):
    """x_t' = x_t + (t' - t) v(x_t, t): equal to `euler` on the paths linear and ve.

    Args:
      path: "linear", alpha = 1 - t, sigma = t; "gvp", cos and sin of pi t / 2; "ve".
    """
    path = _path(path)
    rows = []
    for s, t in _pairs(sigmas):
        dt = path.time(t) - path.time(s)
        after = path.alpha(s) * X + dt * _velocity(path, s)
        rows.append((s, after / path.alpha(t), True))
    return rows, 0.0


def native_heun(sigmas, path: str = "linear"):
    """Heun's method on dx_t/dt = v(x_t, t); no corrector in the step to 0."""
    path = _path(path)
    rows = []
    for s, t in _pairs(sigmas):
        dt = path.time(t) - path.time(s)
        first = _velocity(path, s)
        predictor = (path.alpha(s) * X + dt * first) / path.alpha(t)
        rows.append((s, predictor, t == 0))
        if t > 0:
            mean = (older(first) + _velocity(path, t, older(predictor))) / 2
            rows.append((t, (path.alpha(s) * X + dt * mean) / path.alpha(t), True))
    return rows, 0.0


def euler_maruyama(
    sigmas,
    path: str = "linear",
    diffusion: str = "sigma",
    norm: float = 1.0,
    last: str = "mean",
):
    """x_t' = x_t + (v - w score) dt + sqrt(2 w |dt|) z, dt < 0 (Ma et al. 2024, SiT).

    Every w >= 0 keeps the marginals of the flow. With `path` "ve" and w = s it is the reverse
    SDE of Song et al. 2021.

    Args:
      path: as of `native_euler`.
      diffusion: w is norm times 1 ("constant"), sigma_t ("sigma") or t ("linear").
      norm: at least 0.
      last: the step to 0. "mean": as the others, without noise; "tweedie": D.
    """
    path = _path(path)
    if diffusion not in DIFFUSIONS:
        raise reject("sampler.diffusion", diffusion, f"one of {', '.join(DIFFUSIONS)}")
    if last not in ("mean", "tweedie"):
        raise reject("sampler.last", last, "one of mean, tweedie")
    _from_zero(norm=norm)
    rows = []
    for s, t in _pairs(sigmas):
        dt = path.time(t) - path.time(s)
        w = norm * DIFFUSIONS[diffusion](path, s)
        score = -(X - D) / s / (s * path.alpha(s))
        mean = path.alpha(s) * X + dt * (_velocity(path, s) - w * score)
        if t > 0:
            form = (mean + (2 * w * -dt) ** 0.5 * Z) / path.alpha(t)
        else:
            form = D if last == "tweedie" else mean / path.alpha(t)
        rows.append((s, form, True))
    return rows, 0.0


def _from_zero(**values):
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise reject(f"sampler.{name}", value, "a finite number from 0 up")


METHODS = {
    "euler": euler,
    "heun": heun,
    "edm": edm,
    "ddim": ddim,
    "ddpm": ddpm,
    "native_euler": native_euler,
    "native_heun": native_heun,
    "euler_maruyama": euler_maruyama,
    "dpm_2m": dpm_solver.multistep,
    "dpm_3s": dpm_solver.singlestep,
}

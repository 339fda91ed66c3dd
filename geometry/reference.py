"""Reference processes of bridges and their pinned laws: sections 2.1 and 2.3.

    dR_t = f(t) R_t dt + sigma(t) dB_t ,    R_t | R_s ~ N( rho(s,t) R_s , v(s,t) I )

    brownian   rho = 1                        v = sigma^2 (t - s)
    ve         rho = 1                        v = int_s^t sigma(u)^2 du, sigma(u) geometric
    vp         rho = exp(-int_s^t beta / 2)   v = 1 - rho^2, beta(u) linear

Time runs from the known state at 0 to the unknown one at T (Luo et al., arXiv:2410.24220).
Pinned at both ends, for s <= t <= T:

    R_t | R_s, R_T ~ N( a R_s + b R_T , c I )
    a = v(t,T) rho(s,t) / v(s,T)    b = v(s,t) rho(t,T) / v(s,T)    c = v(s,t) v(t,T) / v(s,T)

All functions take floats, NumPy arrays (float64 tables on the host) or JAX arrays, and keep
their dtype.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common.errors import reject


class Reference(NamedTuple):
    """A linear Gaussian process.

    Attributes:
      rho: (s, t) -> factor of the mean.
      v: (s, t) -> variance per coordinate, angstrom^2.
      variance: t -> sigma(t)^2, angstrom^2 per unit of time.
      rate: t -> f(t), of the drift f(t) x.
      end: T.
      translates: rho = 1, so that a translation of both ends translates all between; where
        not, positions have to be centred (section 2.3).
    """

    rho: Callable
    v: Callable
    variance: Callable
    rate: Callable
    end: float
    translates: bool


def reference(name: str = "brownian", **fields: float) -> Reference:
    """The process of that name.

    Args:
      name: one of `REFERENCES`.
      fields: of the process, see its function below.

    Raises:
      UserError: an unknown name or field, or a value out of its range.
    """
    if name not in REFERENCES:
        raise reject("reference.name", name, f"one of {', '.join(REFERENCES)}")
    function = REFERENCES[name]
    known = list(inspect.signature(function).parameters)
    for field, value in fields.items():
        if field not in known:
            allowed = f"left out: {name!r} has {', '.join(known)}"
            raise reject(f"reference.{field}", value, allowed)
    return function(**fields)


def brownian(sigma: float = 1.0, end: float = 1.0) -> Reference:
    """The Brownian bridge: mean (1 - t/T) R^0 + t/T R^T, variance sigma^2 t (T - t) / T."""
    _positive(sigma=sigma, end=end)
    unit = Reference(
        rho=lambda s, t: 1.0,
        v=lambda s, t: t - s,
        variance=lambda t: 1.0,
        rate=lambda t: 0.0,
        end=float(end),
        translates=True,
    )
    return scaled(unit, float(sigma) ** 2)


def ve(sigma_min: float = 0.1, sigma_max: float = 1.0, end: float = 1.0) -> Reference:
    """Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^(t/T)."""
    _positive(sigma_min=sigma_min, end=end)
    if not sigma_min < sigma_max < np.inf:
        raise reject("reference.sigma_max", sigma_max, f"a finite number above {sigma_min}")
    growth = 2 * math.log(sigma_max / sigma_min) / end
    variance = lambda t: float(sigma_min) ** 2 * _numpy(t).exp(growth * t)
    return Reference(
        rho=lambda s, t: 1.0,
        # expm1, as differences of exponentials cancel where t is near s.
        v=lambda s, t: variance(s) * _numpy(s, t).expm1(growth * (t - s)) / growth,
        variance=variance,
        rate=lambda t: 0.0,
        end=float(end),
        translates=True,
    )


def vp(beta_min: float = 0.1, beta_max: float = 6.0, end: float = 1.0) -> Reference:
    """Variance preserving: beta(t) = beta_min + (beta_max - beta_min) t/T, sigma^2 = beta."""
    _positive(beta_max=beta_max, end=end)
    if not 0 <= beta_min <= beta_max:
        raise reject("reference.beta_min", beta_min, f"a number from 0 to {beta_max}")
    low, slope = float(beta_min), (float(beta_max) - float(beta_min)) / end
    beta = lambda t: low + slope * t
    total = lambda s, t: (t - s) * (low + slope * (s + t) / 2)
    return Reference(
        rho=lambda s, t: _numpy(s, t).exp(-total(s, t) / 2),
        v=lambda s, t: -_numpy(s, t).expm1(-total(s, t)),
        variance=beta,
        rate=lambda t: -beta(t) / 2,
        end=float(end),
        translates=False,
    )


REFERENCES = {"brownian": brownian, "ve": ve, "vp": vp}


def scaled(reference: Reference, factor: Any) -> Reference:
    """The process with all its variances multiplied: noise of its own for each segment.

    Args:
      factor: a number, or an array that broadcasts against the times.
    """
    return reference._replace(
        v=lambda s, t: factor * reference.v(s, t),
        variance=lambda t: factor * reference.variance(t),
    )


def coefs(reference: Reference, s: Any, t: Any) -> tuple[Any, Any, Any]:
    """a, b, c of the law at t, pinned at (s, x_s) and (T, x_T); see the module.

    At t = s they are 1, 0, 0 and at t = T 0, 1, 0, also where both are.

    Args:
      s, t: times with s <= t <= T.
    """
    whole = reference.v(s, reference.end)
    xp = _numpy(whole, t)
    # Where s = T the quotients are 0/0: guarded in what is divided by.
    inside = whole > 0
    safe = xp.where(inside, whole, 1.0)
    after = reference.v(t, reference.end)
    a = after * reference.rho(s, t) / safe
    before = reference.v(s, t)
    b = xp.where(inside, before * reference.rho(t, reference.end) / safe, 1.0)
    return a, b, before * after / safe


def grid(
    name: str, steps: int, end: float = 1.0, power: float = 2.0
) -> Float[np.ndarray, " {steps}+1"]:
    """Rising times from 0 to T, float64 on the host: section 4.

    Args:
      name: "uniform"; "cosine", T (1 - cos(pi k/n)) / 2, dense at both ends; "power",
        T (1 - (1 - k/n)^p), dense at T for p > 1.
      steps: n, at least 1.
      end: T.
      power: p.

    Raises:
      UserError: an unknown name, no step, or a power or an end not above 0.
    """
    if not (isinstance(steps, int | np.integer) and steps >= 1):
        raise reject("sampler.steps", steps, "a whole number from 1 up")
    if not 0 < power < np.inf:
        raise reject("sampler.power", power, "a finite number above 0")
    _positive(end=end)
    forms = {
        "uniform": lambda u: u,
        "cosine": lambda u: (1 - np.cos(np.pi * u)) / 2,
        "power": lambda u: 1 - (1 - u) ** power,
    }
    if name not in forms:
        raise reject("sampler.grid", name, f"one of {', '.join(forms)}")
    return end * forms[name](np.linspace(0, 1, steps + 1))


def checked_time(t: Any, end: float, field: str = "time") -> float:
    """A time of the user's.

    Raises:
      UserError: it is not in [0, T).
    """
    if not 0 <= t < end:
        raise reject(field, t, f"a number from 0 to below T = {end}")
    return float(t)


def _numpy(*values: Any) -> Any:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _positive(**values: Any) -> None:
    for field, value in values.items():
        if not 0 < value < np.inf:
            raise reject(f"reference.{field}", value, "a finite number above 0")

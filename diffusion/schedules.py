"""Which noise levels are trained on, and how much each counts.

A schedule draws log s from a density p and multiplies the loss J(s) = |D(x; s) - x_0|^2 by
w(s). Gradients see p w; nothing divides by p. The defaults of the field, in VE coordinates:

    vp                t uniform on [1e-5, 1]           1 / s^2
    ve                log s uniform on [0.02, 100]     1 / s^2
    iddpm, ddpm       one of the process's times       1 / s^2
    edm, edm2         log s ~ N(p_mean, p_std^2)       (s^2 + sd^2) / (s sd)^2
    fm_uniform        t uniform on (0, 1)              ((1 + s) / s)^2
    fm_logit_normal   log s ~ N(0, 1)                  ((1 + s) / s)^2
    gvp               t uniform on (0, 1)              (pi / 2)^2 (1 + s^2) / s^2

"edm2" also learns u(s), the log of the loss: w exp(-u) J + u (Karras et al. 2024). And, from
the optimal loss (Xu et al., arXiv:2506.13763),

    w(s) = a min(1 / J*(s), w_star) + f(s) [s < sigma_star]
    p(s) ~ w(s) (J(s) - J*(s))

in the space of the network's output ("F": J and J* times kappa = 1 / c_out^2) or of x_0. J is
tracked in bins of log s; see `optimal`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject
from diffusion import optimal_schedule
from diffusion.preconditioning import Preconditioning
from diffusion.processes import Process, process, ratio

KINDS = (
    "edm",
    "edm2",
    "vp",
    "ve",
    "iddpm",
    "ddpm",
    "fm_uniform",
    "fm_logit_normal",
    "gvp",
    "optimal_loss",
)


class Schedule(NamedTuple):
    """A schedule as pure functions of its state, a pytree that lies in the checkpoint.

    Attributes:
      init: () -> state.
      sample: (key, n, state) -> s [n].
      weight: (s, state) -> w, of the mean squared error over coordinates, in x_0.
      update: (state, s [n], error [n], use = all) -> state; error is the unweighted mean
        squared error of x_0 at that level, `use` [n] says which samples count.
      learned: whether the loss has the term u(s) of edm2.
    """

    init: Callable[[], Any]
    sample: Callable[[jax.Array, int, Any], Array]
    weight: Callable[[Array, Any], Array]
    update: Callable[..., Any]
    learned: bool = False


def schedule(
    kind: str,
    wrap: Preconditioning,
    *,
    sigma_data: float,
    p_mean: float,
    p_std: float,
    sigma_min: float,
    sigma_max: float,
    optimal: dict,
    of: Process | None = None,
) -> Schedule:
    """The schedule of that kind.

    Args:
      kind: one of `KINDS`.
      wrap: of the network, for the space "F".
      sigma_data: standard deviation of the data, of edm's weight.
      p_mean, p_std: of edm and edm2, and of the start of optimal_loss.
      sigma_min, sigma_max: range of optimal_loss. Densities of other kinds keep their own.
      optimal: keyword arguments of `optimal_schedule.optimal`.
      of: the process that is trained; kinds named after a process take its constants where
        it is that one, and the published ones where it is another.

    Raises:
      UserError: an unknown kind, or a constant out of its range.
    """
    if kind not in KINDS:
        raise reject("schedule.kind", kind, f"one of {', '.join(KINDS)}")
    if not 0 < sigma_data < np.inf:
        raise reject("model.sigma_data", sigma_data, "a finite number above 0")
    if not np.isfinite(p_mean):
        raise reject("schedule.p_mean", p_mean, "a finite number")
    if not 0 < p_std < np.inf:
        raise reject("schedule.p_std", p_std, "a finite number above 0")
    if not 0 < sigma_min < np.inf:
        raise reject("schedule.sigma_min", sigma_min, "a finite number above 0")
    if not sigma_min < sigma_max < np.inf:
        raise reject("schedule.sigma_max", sigma_max, f"a finite number above {sigma_min}")
    if kind == "optimal_loss":
        return Schedule(
            *optimal_schedule.optimal(
                wrap,
                sigma_data=sigma_data,
                p_mean=p_mean,
                p_std=p_std,
                sigma_min=sigma_min,
                sigma_max=sigma_max,
                **optimal,
            )
        )
    named = of if of is not None and of.name == kind else None
    if named is None and kind in ("vp", "ve", "iddpm", "ddpm", "gvp"):
        named = process(kind)
    draw = {
        "edm": lambda key, n: _log_normal(key, n, p_mean, p_std),
        "edm2": lambda key, n: _log_normal(key, n, p_mean, p_std),
        "fm_logit_normal": lambda key, n: _log_normal(key, n, 0.0, 1.0),
        "fm_uniform": lambda key, n: _uniform(key, n, process("fm_linear")),
    }.get(kind, lambda key, n: _uniform(key, n, named))
    weight = {
        "edm": lambda s: (s**2 + sigma_data**2) / (s * sigma_data) ** 2,
        "edm2": lambda s: (s**2 + sigma_data**2) / (s * sigma_data) ** 2,
        "fm_logit_normal": lambda s: ((1 + s) / s) ** 2,
        "fm_uniform": lambda s: ((1 + s) / s) ** 2,
        "gvp": lambda s: (np.pi / 2) ** 2 * (1 + s**2) / s**2,
    }.get(kind, lambda s: 1 / s**2)
    return Schedule(
        init=lambda: (),
        sample=lambda key, n, state: draw(key, n),
        weight=lambda s, state: weight(s),
        update=lambda state, s, error, use=True: state,
        learned=kind == "edm2",
    )


def _log_normal(key, n, mean, std):
    return jnp.exp(mean + std * jax.random.normal(key, (n,)))


def _uniform(key, n, made):
    if made.steps:
        return ratio(made, jax.random.randint(key, (n,), 0, made.steps).astype(jnp.float32))
    # Open at the lower end: s = 0 has no weight.
    t = jax.random.uniform(key, (n,), minval=made.first, maxval=made.last)
    return ratio(made, t)


def density(
    made: Schedule, state: Any, sigmas: np.ndarray, key: jax.Array, draws: int = 200_000
) -> Float[np.ndarray, " s"]:
    """The density of log s at noise levels, by counting draws between their midpoints.

    For figures and totals: every kind can be drawn from, few have a formula in s.
    """
    x = np.log(sigmas)
    middle = 0.5 * (x[1:] + x[:-1])
    edges = np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])
    found = np.log(np.asarray(_drawn(made, draws, key, state), float))
    return np.histogram(found, edges)[0] / draws / np.diff(edges)


@partial(jax.jit, static_argnames=("made", "draws"))
def _drawn(made: Schedule, draws: int, key: jax.Array, state: Any) -> Float[Array, " draws"]:
    """Compiled once for all states of a schedule."""
    return made.sample(key, draws, state)

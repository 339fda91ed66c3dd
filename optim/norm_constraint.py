"""Bounds the length of a step, as MARCH and SPRING do instead of a learning rate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from common.errors import reject


class NormConstraintState(NamedTuple):
    count: Int[Array, ""]


def scale_by_norm_constraint(
    max_norm: float | optax.Schedule, mode: str = "cap"
) -> optax.GradientTransformationExtraArgs:
    """Rescales the updates by their L2 norm over the whole tree. Zero stays zero.

    Args:
      max_norm: C, a length or a schedule of lengths. SPRING (arXiv:2401.10190) states
        the *squared* norm: its 1e-3 is 0.0316 here. MARCH's (arXiv:2507.02644) 0.1 is
        0.316 if read as in its released code.
      mode: "cap" scales by min(1, C/‖u‖); "fixed" always rescales to ‖u‖ = C.

    Raises:
      UserError: `max_norm` is not positive, or `mode` is unknown.
    """
    if not callable(max_norm):
        _positive("max_norm", max_norm)
    if mode not in ("cap", "fixed"):
        raise reject("optim.norm_mode", mode, "'cap' or 'fixed'")

    def update(updates, state, params=None, **extra):
        limit = max_norm(state.count) if callable(max_norm) else max_norm
        # Dividing by the largest entry first keeps squares from over- and underflowing.
        largest = optax.tree.norm(updates, ord=jnp.inf)
        unit = jnp.where(largest > 0, largest, 1)
        norm = optax.tree.norm(jax.tree.map(lambda u: u / unit, updates))
        scale = limit / jnp.where(norm > 0, norm, 1)
        exempt = (mode == "cap") & (norm * unit <= limit)

        def rescale(u):
            return jnp.where(exempt, u, (u / unit * scale).astype(u.dtype))

        count = optax.safe_increment(state.count)
        return jax.tree.map(rescale, updates), NormConstraintState(count)

    def init(params):
        del params
        return NormConstraintState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def decayed_norm(
    max_norm: float, decay_start: int | float, decay_scale: int | float, warmup: int = 0
) -> Callable:
    """C_k = max_norm · min((k+1)/warmup, 1/(1 + max(k − decay_start, 0)/decay_scale)).

    arXiv:2507.02644: decay_start = decay_scale = 8000; its released code: 1000, 4000 to
    8000, warmup = 50. With `warmup` = 0 the first steps are not shortened.

    Raises:
      UserError: `max_norm` or `decay_scale` is not positive, or a step is negative.
    """
    _positive("max_norm", max_norm)
    _positive("decay_scale", decay_scale)
    for name, value in (("decay_start", decay_start), ("warmup", warmup)):
        if not 0 <= value < jnp.inf:
            raise reject(f"optim.{name}", value, "a finite number, at least 0")

    def schedule(count):
        after = jnp.asarray(count, jnp.result_type(float)) - float(decay_start)
        decay = 1 / (1 + jnp.maximum(after, 0) / decay_scale)
        return max_norm * (jnp.minimum((count + 1) / warmup, decay) if warmup else decay)

    return schedule


def _positive(name, value):
    if not 0 < value < jnp.inf:
        raise reject(f"optim.{name}", value, "a finite number above 0")

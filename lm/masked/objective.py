"""What a masked diffusion model is trained on, and by which a text is judged.

    continuous   NELBO(x) = E_t [-alpha'(t) / (1 - alpha(t)) sum_{i masked} -log f(x_t)[i, x_i]]
    finite       NELBO_T(x) = E_k [w_k / (r_k (1 - a_k)) sum_{i masked} -log f(x_k)[i, x_i]]
    count        NELBO(x) = E_n [L / n sum_{i masked} -log f(x_n)[i, x_i]]

(Sahoo et al., arXiv:2406.07524; Shi et al., arXiv:2406.04329; Nie et al., arXiv:2502.09992.)
alpha is the probability that a token is visible. `continuous` cuts t off below `floor`, which
drops floor * h(1) nats a token of a linear schedule. With p_mask = 1 - alpha and a floor of
1e-3 it is LLaDA's loss. `finite` bounds what the sampler of T steps promises: at step k a share
a_k = w_0 + ... + w_{k-1} is visible, and one that is still masked is filled in with probability
w_k / (1 - a_k); k is drawn evenly, r_k = 1 / T. `count` masks exactly n of the L free
positions, n even on 1 ... L: no floor, no weight beyond L.

Times are stratified over the *global* batch, t_b = (u + b / B) mod 1 with one u per step, so a
step sees all noise levels however many devices or hosts share it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from common.errors import reject
from lm.masked import schedules
from lm.masked.denoiser import Denoiser, target_log_f

KINDS = ("continuous", "finite", "count")


class Objective(NamedTuple):
    """A checked objective: static under jit.

    Attributes:
      kind: of `KINDS`.
      schedule: alpha and its weight.
      floor: the smallest t of `continuous`.
      weights: w_0 ... w_{T-1} of `finite`, else empty.
      stratify: whether times are spread over the batch.
    """

    kind: str
    schedule: schedules.Schedule
    floor: float
    weights: tuple[float, ...]
    stratify: bool


class Noised(NamedTuple):
    """A noised batch and what its loss is multiplied with."""

    x: Int[Array, "batch length"]
    masked: Bool[Array, "batch length"]
    weight: Float[Array, " batch"]


def objective(
    *, kind: str, schedule: str, grid: str, steps: int, floor: float, stratify: bool
) -> Objective:
    """The objective of a config.

    Args:
      kind: continuous, finite or count.
      schedule: of alpha, as `schedules.schedule` names it; count has none.
      grid, steps: of `finite`, as a sampler has them.
      floor: of t in `continuous`, above 0 and below 1.
      stratify: low-discrepancy times.

    Raises:
      UserError: a field is out of range.
    """
    if kind not in KINDS:
        raise reject("objective.kind", kind, f"one of {', '.join(KINDS)}")
    if not 0 < floor < 1:
        raise reject("objective.floor", floor, "above 0, where the weight is infinite, below 1")
    if steps < 1:
        raise reject("objective.steps", steps, "a whole number from 1 up")
    alpha = schedules.schedule(schedule, "objective.schedule")
    schedules.grid(grid, 1, "objective.grid")
    w = tuple(schedules.weights(alpha, grid, steps).tolist()) if kind == "finite" else ()
    return Objective(kind, alpha, floor, w, stratify)


def times(key: jax.Array, batch: int, stratify: bool) -> Float[Array, " batch"]:
    """Uniform on [0, 1), one per text of the global batch; stratified if so wanted."""
    if not stratify:
        return jax.random.uniform(key, (batch,))
    return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def noised(
    key: jax.Array,
    objective: Objective,
    x: Int[Array, "batch length"],
    free: Bool[Array, "batch length"],
    mask: int,
) -> Noised:
    """Masks free positions by the law of the objective.

    Args:
      key: of the times and of the positions.
      x: clean texts.
      free: which positions are part of the answer; the others stay visible.
      mask: the token that hides others.
    """
    batch = len(x)
    u = times(jax.random.fold_in(key, 0), batch, objective.stratify)
    noise = jax.random.uniform(jax.random.fold_in(key, 1), x.shape)
    total = jnp.sum(free, axis=1)
    if objective.kind == "count":
        n = 1 + jnp.minimum((u * total).astype(jnp.int32), jnp.maximum(total - 1, 0))
        masked = chosen(noise, free, n)
        weight = total / n
    elif objective.kind == "finite":
        w = np.array(objective.weights)
        visible = np.concatenate([[0.0], np.cumsum(w)[:-1]])
        k = jnp.minimum((u * len(w)).astype(jnp.int32), len(w) - 1)
        masked = free & (noise >= jnp.asarray(visible, jnp.float32)[k][:, None])
        weight = jnp.asarray(len(w) * w / (1 - visible), jnp.float32)[k]
    else:
        t = objective.floor + (1 - objective.floor) * u
        masked = free & (noise >= objective.schedule.alpha(t)[:, None])
        weight = (1 - objective.floor) * objective.schedule.weight(t)
    return Noised(jnp.where(masked, mask, x), masked, weight)


def chosen(
    noise: Float[Array, "batch length"],
    free: Bool[Array, "batch length"],
    count: Int[Array, " batch"],
) -> Bool[Array, "batch length"]:
    """The `count` free positions of the least noise: a random subset of exactly that size."""
    order = jnp.argsort(jnp.where(free, noise, jnp.inf), axis=1)
    rank = jnp.argsort(order, axis=1)
    return free & (rank < count[:, None])


def masked_losses(
    denoiser: Denoiser, params: Any, x: Int[Array, "batch length"], noise: Noised
) -> Float[Array, "batch length"]:
    """-log f(x_t)[i, x_i] where masked, 0 elsewhere; finite unless f excludes the token."""
    # Chosen before anything is multiplied: 0 * inf would be NaN.
    targets = jnp.where(noise.masked, x, 0)
    found = target_log_f(denoiser, params, noise.x, targets)
    return -jnp.where(noise.masked, found, 0.0)


def nelbo(
    key: jax.Array,
    objective: Objective,
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    free: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
    """One draw of the objective per text.

    Returns:
      NELBO in nats per text, unbiased; the share of free positions that was masked; and the
      mean loss of these, h_f at that share (0 where none was masked).
    """
    free = jnp.ones(x.shape, bool) if free is None else free
    noise = noised(key, objective, x, free, denoiser.mask)
    summed = jnp.sum(masked_losses(denoiser, params, x, noise), axis=1)
    number = jnp.sum(noise.masked, axis=1)
    share = number / jnp.maximum(jnp.sum(free, axis=1), 1)
    return noise.weight * summed, share, summed / jnp.maximum(number, 1)

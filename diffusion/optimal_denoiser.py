"""The best denoiser of a finite data set: the mean of its exact posterior."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from common.errors import UserError
from diffusion.posterior import Queries, counts
from diffusion.preconditioning import Denoiser
from diffusion.rows import ABSENT, Rows, fold


def optimal_denoiser(
    data: Rows, label: Int[Array, " b"] | None = None, precision: str = "highest"
) -> Denoiser:
    """The posterior mean E[x_0 | x] of the data set, as a denoiser for every sampler.

    Args:
      data: rows; all on each device, where the batch is split over devices.
      label: [B], class of each sample; None: rows of all classes count.
      precision: of the products.

    Returns:
      (x [B, ...], s [B] or scalar) -> [B, ...], weighted means of rows. Traced; jit with
      `data` as an argument, as a large constant takes XLA minutes to fold.

    Raises:
      UserError: a class has no rows; where neither it nor `data` is traced.
    """
    if label is not None:
        _check_classes(data, label)

    def denoise(x, s):
        wide = data.square.dtype
        flat = x.reshape(len(x), -1).astype(wide) - data.mean
        s = jnp.broadcast_to(jnp.asarray(s, wide), x.shape[:1])[:, None]
        s = jnp.maximum(s, jnp.sqrt(jnp.finfo(wide).tiny))
        none = jnp.full(len(x), -1, jnp.int32)
        queries = Queries(flat, flat, none, none if label is None else label)
        dot = partial(jnp.matmul, precision=precision)

        def add(carry, y, square, index, labels):
            top, weight, rows = carry
            # Of -|x - y|^2 / 2, what depends on the row; scaled afterwards, for tiny s.
            logit = dot(flat, y.T) - 0.5 * square
            logit = jnp.where(counts(queries, index, labels), logit, -jnp.inf)
            new = jnp.maximum(top, jnp.max(logit, -1, keepdims=True))
            before = jnp.exp((top - new) / s / s)
            w = jnp.exp((logit - new) / s / s)
            weight = before * weight + jnp.sum(w, -1, keepdims=True)
            return new, weight, before * rows + dot(w, y)

        zero = jnp.zeros((len(x), 1), wide)
        low = jnp.full_like(zero, jnp.finfo(wide).min / 2)
        _, weight, rows = fold(add, (low, zero, jnp.zeros_like(flat)), data)
        mean = rows / weight + data.mean
        return mean.reshape(x.shape).astype(x.dtype)

    return denoise


def _check_classes(data, label):
    known = lambda a: not isinstance(a, jax.core.Tracer) and a.is_fully_addressable
    if not all(known(jnp.asarray(a)) for a in (label, data.label, data.index)):
        return
    there = np.unique(np.asarray(data.label)[np.asarray(data.index) >= 0])
    missing = np.setdiff1d(np.asarray(label), [*there, ABSENT])
    if missing.size:
        raise UserError(f"No row of the data has the class {missing[0]} of a sample.")

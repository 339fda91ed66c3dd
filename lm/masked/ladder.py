"""One sampler with several numbers of steps, in one program: what changes is data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from lm.masked import plans, remask
from lm.masked.denoiser import Denoiser
from lm.masked.sample import Result, written
from lm.masked.settings import Settings, numbers, shape_of


def ladder(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Any,
    batch: int,
    length: int,
    rungs: list[Settings],
    first: int | Int[Array, ""] = 0,
) -> Result:
    """`sample` once for each rung, with a key of its own; to be traced.

    Args:
      rungs: fit for the length, and alike but for what is data: steps, schedule, grid, block,
        tau, gamma, eta.

    Returns:
      the fields of `Result` with an axis of rungs in front.
    """
    if rungs[0].kind == "remask":
        data = [remask.table(rung) for rung in rungs]
    else:
        data = [numbers(rung, length, plans.table(rung, length)) for rung in rungs]
    stacked = jax.tree.map(_stacked, *data)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(rungs)))
    x = jnp.full((batch, length), denoiser.mask, jnp.int32)

    def one(rung):
        key, data = rung
        return written(
            key, params, x, data, jnp.int32(first),
            denoiser=denoiser, settings=shape_of(rungs[0]), frames=0,
        )  # fmt: skip

    return jax.lax.map(one, (keys, stacked))


def _stacked(*leaves: Any) -> np.ndarray:
    """Tables of several sizes as one array: what is padded lies beyond the last step."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    if arrays[0].ndim == 0:
        return np.stack(arrays)
    longest = max(map(len, arrays))
    beyond = np.iinfo(np.uint32).max if arrays[0].dtype == np.uint32 else 0
    pad = lambda array: np.pad(array, (0, longest - len(array)), constant_values=beyond)
    return np.stack([pad(array) for array in arrays])

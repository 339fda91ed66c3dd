"""The nearest rows of every row of a data set, for estimators that treat them apart.

Only near neighbours of its source row matter to a draw at small noise, whatever the noise is,
so one pass over all pairs of rows serves every level and every draw.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from common import mesh as meshes
from common.errors import reject
from diffusion.draws import SPLIT, over_rows, whole_rows
from diffusion.rows import Rows, fold


@partial(jax.jit, static_argnames=("k", "precision"))
def _nearest(data: Rows, index, k: int, precision: str):
    def local(data, index):
        x = whole_rows(data, index)
        own = jnp.sum(x**2, -1)[:, None]

        def least(distance, places):
            low, at = jax.lax.top_k(-distance, k)
            return -low, jnp.take_along_axis(places, at, -1)

        def add(best, y, square, places, _):
            distance = own + square - 2 * jnp.matmul(x, y.T, precision=precision)
            there = (places >= 0) & (places != index[:, None])
            distance = jnp.where(there, distance, jnp.inf)
            here = (distance, jnp.broadcast_to(places, distance.shape))
            return least(*(jnp.concatenate(pair, -1) for pair in zip(best, here, strict=True)))

        none = jnp.full((len(index), k), jnp.inf, own.dtype)
        best = fold(add, (none, jnp.full(none.shape, -1, jnp.int32)), data)
        if meshes.current() > 1:
            best = least(*jax.lax.all_gather(best, "data", axis=1, tiled=True))
        return best[1]

    return over_rows(local, (SPLIT, P()), P())(data, index)


def nearest_neighbours(
    data: Rows, k: int, precision: str = "highest", block: int = 1024
) -> Int[Array, "n k"]:
    """Places of the k nearest other rows of each row, nearest first, int32 [N, k].

    Args:
      data: rows; split over the axis "data" of the mesh in use, if there is one.
      k: below N.
      precision: of the products.
      block: rows in work at a time.

    Raises:
      UserError: there are no k others.
    """
    count = int(data.count)
    if not 1 <= k < count:
        raise reject("estimator.neighbours", k, f"from 1 to {count - 1}")
    found = []
    for start in range(0, count, block):
        # The last block goes over its end: one program for all.
        index = jnp.minimum(jnp.arange(start, start + block, dtype=jnp.int32), count - 1)
        found.append(_nearest(data, index, k, precision))
    return jnp.concatenate(found)[:count]

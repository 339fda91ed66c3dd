"""The nearest rows of every row of a data set, for estimators that treat them apart.

Only near neighbours of its source row matter to a draw at small noise, whatever the noise is,
so one pass over all pairs of rows serves every level and every draw.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from common.errors import reject
from diffusion.rows import Rows, fetch, numbers


@partial(jax.jit, static_argnames=("k", "precision"))
def _nearest(data: Rows, index, k: int, precision: str):
    x = fetch(data, index)
    size = jnp.sum(x**2, -1)[:, None]

    def tile(best, part):
        stored, square, places, _ = part
        y = numbers(stored, data)
        distance = size + square - 2 * jnp.matmul(x, y.T, precision=precision)
        there = (places >= 0) & (places != index[:, None])
        distance = jnp.where(there, distance, jnp.inf)
        far = jnp.concatenate([best[0], distance], -1)
        here = jnp.broadcast_to(places, (len(index), len(places)))
        where = jnp.concatenate([best[1], here], -1)
        low, at = jax.lax.top_k(-far, k)
        return (-low, jnp.take_along_axis(where, at, -1)), None

    start = (
        jnp.full((len(index), k), jnp.inf, size.dtype),
        jnp.full((len(index), k), -1, jnp.int32),
    )
    parts = (data.tiles, data.square, data.index, data.label)
    return jax.lax.scan(tile, start, parts)[0][1]


def nearest_neighbours(
    data: Rows, k: int, precision: str = "highest", block: int = 1024
) -> Int[Array, "n k"]:
    """Places of the k nearest other rows of each row, nearest first, int32 [N, k].

    Args:
      data: rows.
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

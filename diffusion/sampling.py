"""Many samples, batch after batch, split over the devices that share the batch.

Sample number i takes its noise from `fold_in(key, i)` and nothing else: it is the same in any
batch, on any number of devices, and alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from common import mesh as meshes
from common.errors import reject
from diffusion.samplers import planned
from diffusion.tables import Table, portable, random, run


def generate(
    of_condition: Callable,
    indices: Int[np.ndarray, " n"],
    key: Key[Array, ""],
    *,
    shape: tuple[int, ...],
    sigmas: Float[np.ndarray, " m"],
    batch_size: int,
    condition: dict[str, Any] | None = None,
    method: str = "heun",
    start: str = "ve",
    **options,
) -> Float[np.ndarray, " n *shape"]:
    """Samples of the given numbers, in their order.

    Args:
      of_condition: condition -> denoiser (x [B, *shape], sigma [B]) -> x0_hat, called within
        jit. A `jax.tree_util.Partial(function, params)` is compiled once for all params.
      indices: whole numbers from 0 to 2^31 - 1.
      key: of the whole collection.
      shape: of one sample.
      sigmas, method, start, options: as of `samplers.sample`.
      batch_size: samples in one compiled call, a multiple of the devices that share it. The
        last batch is filled up, so there is one compilation.
      condition: arrays [n, ...] on the host, row by row for `indices`; None for none.

    Returns:
      float32 on the host of every process.

    Raises:
      UserError: as `samplers.sample`; the batch size does not fit the devices; numbers out
        of range; a condition of another length.
    """
    plan = planned(sigmas, method, start=start, **options)
    devices = meshes.current("data")
    if batch_size < 1 or batch_size % devices:
        raise reject("sampler.batch_size", batch_size, f"a multiple of {devices} devices")
    wrong = (indices < 0) | (indices >= 2**31)
    if wrong.any():
        allowed = "from 0 to 2^31 - 1"
        raise reject("sampler.indices", int(indices[wrong][0]), allowed)
    for name, value in (condition or {}).items():
        if len(value) != len(indices):
            allowed = f"as many rows as samples, {len(indices)}"
            raise reject(f"sampler.condition.{name}", f"{len(value)} rows", allowed)
    found = np.empty((len(indices), *shape), np.float32)
    for first in range(0, len(indices), batch_size):
        # Rows beyond the end repeat the last one.
        rows = np.minimum(np.arange(first, first + batch_size), len(indices) - 1)
        part = jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], condition)
        numbers = indices[rows].astype(np.int32)
        batch = _batch(
            portable(of_condition), part, numbers, key, plan, tuple(shape), random(plan)
        )
        found[first : first + batch_size] = np.asarray(batch)[: len(indices) - first]
    return found


@partial(jax.jit, static_argnames=("shape", "noisy"))
def _batch(of_condition, condition, indices, key, plan: Table, shape, noisy):
    condition, indices = _split((condition, indices))
    one = lambda index: jax.random.split(jax.random.fold_in(key, index))
    keys = jax.vmap(one)(indices)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys[:, 0])
    x0, _ = run(of_condition(condition), plan, _split(noise), keys[:, 1] if noisy else None)
    return meshes.replicate(x0)


def _split(tree):
    """Along axis 0 over "data" of the mesh in use; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: P("data"), tree))

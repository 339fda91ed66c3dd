"""What several processes agree on. Every process must make the same calls in order."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError


def agreed(value: int) -> int:
    """The first process's value: what a file says may differ between hosts."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first(function: Callable[[], None]) -> None:
    """Calls `function` on the first process; the others wait, and fail if it does."""
    error = None
    if jax.process_index() == 0:
        try:
            function()
        except Exception as caught:  # Whatever it is, nobody may wait for ever.
            error = caught
    if agreed(error is not None) and error is None:
        error = UserError("The first process refused; see its message.")
    if error:
        raise error


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(value: int) -> jax.Array:
    """The largest value of any process, on its way: reading the scalar waits for it."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    with jax.set_mesh(mesh):
        each = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.full(1, value, np.int32)
        )
        return _max(each)


@jax.jit
def _max(each: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(each.max(), P())

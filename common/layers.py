"""Building blocks that several networks share."""

from collections.abc import Callable
from typing import Any

import jax


def stack(layer: Any, depth: int) -> tuple[Callable, Callable]:
    """Repeats a Flax module with `lax.scan`: compiled once, whatever the depth.

    Args:
      layer: a module whose output has the shape of its input.
      depth: how often; 0 is the identity.

    Returns:
      `init(key, x) -> params` with a leading axis of size `depth`, and
      `apply(params, x) -> x`.
    """

    def init(key: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(key, depth)
        return jax.vmap(lambda k: layer.init(k, x)["params"])(keys)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        def body(h, p):
            return layer.apply({"params": p}, h), None

        return jax.lax.scan(body, x, params)[0]

    return init, apply

"""Low-rank adapters for any network's layers and 1x1 convolutions.

    W' = W + scale A B,   A [in, rank] random, B [rank, out] zero at the start

(Hu et al., arXiv:2106.09685.) An adapter is a tree of its own with a leaf pair under the path
of each kernel it changes, `blocks/qkv/kernel/{a,b}` for instance, so that it can be trained,
saved and averaged while the network's parameters stay as they are:

    loss(lora.merge(params, adapter, scale), batch), differentiated by the adapter
"""

import re
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from common.errors import reject

Params = Any


def init(key: jax.Array, params: Params, rank: int, pattern: str = "") -> Params:
    """A fresh adapter, which changes nothing: A is normal with deviation 1 / rank, B zero.

    Args:
      key: of A.
      params: dicts of arrays, or of shapes with dtypes.
      rank: at most in and out of every kernel it is for.
      pattern: regular expression, searched in paths such as `blocks/qkv/kernel`. Of what it
        finds, kernels are adapted: [in, out] of layers, [depth, in, out] of stacked layers
        (each its own A and B) and [1, 1, in, out] of 1x1 convolutions. "" finds all.

    Returns:
      {"a": [..., in, rank], "b": [..., rank, out]} for each kernel, float32 like it.

    Raises:
      UserError: a rank out of range, no regular expression, or one that finds no kernel.
    """
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise reject("lora.pattern", pattern, f"a regular expression ({error})") from error
    kernels = {
        path: leaf
        for path, leaf in flatten_dict(params).items()
        if _fits(path, leaf) and found("/".join(path))
    }
    if not kernels:
        allowed = "such that it finds the path of a layer's or a 1x1 convolution's kernel"
        raise reject("lora.pattern", pattern, allowed)
    most = min(min(leaf.shape[-2:]) for leaf in kernels.values())
    if not isinstance(rank, Integral) or isinstance(rank, bool) or not 1 <= rank <= most:
        allowed = f"a whole number from 1 to {most}, the smallest side of the kernels"
        raise reject("lora.rank", rank, allowed)
    keys = jax.random.split(key, len(kernels))
    pairs = zip(kernels.items(), keys, strict=True)
    return unflatten_dict({path: _fresh(k, leaf, rank) for (path, leaf), k in pairs})


def merge(params: Params, adapter: Params, scale: float | int | Float[Array, ""]) -> Params:
    """The parameters with W + scale A B for each kernel of the adapter.

    Args:
      params: those the adapter was made for; not changed.
      adapter: of `init`, trained or not.
      scale: alpha / rank in the paper's words.

    Raises:
      UserError: a kernel of the adapter is not there, or has another shape.
    """
    flat = dict(flatten_dict(params))
    halves = flatten_dict(adapter)
    for path in {path[:-1] for path in halves}:
        a, b = halves[*path, "a"], halves[*path, "b"]
        shape = (*a.shape[:-1], b.shape[-1])
        if path not in flat or flat[path].shape != shape:
            allowed = f"made for these parameters, which have no such kernel of shape {shape}"
            raise reject("lora.adapter", "/".join(path), allowed)
        flat[path] = flat[path] + (scale * jnp.matmul(a, b)).astype(flat[path].dtype)
    return unflatten_dict(flat)


def _fits(path: tuple[str, ...], leaf: Any) -> bool:
    """A matrix, stacked matrices, or a 1x1 convolution."""
    shape = leaf.shape
    one = len(shape) == 4 and shape[:2] == (1, 1)
    return path[-1] == "kernel" and (len(shape) in (2, 3) or one)


def _fresh(key: jax.Array, leaf: Any, rank: int) -> dict[str, jax.Array]:
    *rest, rows, columns = leaf.shape
    a = jax.random.normal(key, (*rest, rows, rank), leaf.dtype) / rank
    return {"a": a, "b": jnp.zeros((*rest, rank, columns), leaf.dtype)}

"""A data set as tiles of rows, ready for a pass over all of them.

The mean row is subtracted: differences of rows are what counts, and centred rows lose less to
rounding. float32 and float64 are stored centred; uint8 and bfloat16 are stored as they came,
and become centred numbers some rows at a time, so that a pass needs no copy of the data.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from common.errors import UserError, reject

ABSENT = -1  # The label of a row without one, and of a query that wants every class.


class Rows(NamedTuple):
    """N rows of D numbers in k tiles of T, the last ones empty where N is no multiple.

    Attributes:
      tiles: [k, T, D]; centred where they have the dtype of `square`. bfloat16 is kept as its
        bits, uint16, or a CPU would make all tiles wide to slice one.
      square: [k, T], squared norm of the centred row, in the dtype of computation.
      index: [k, T], place in the data set; -1 for an empty row.
      label: [k, T]; -1 for none.
      mean: [D], subtracted from every row, in units after scaling.
      scale, offset: what uint8 means: a stored number times scale plus offset.
      count: N, a number of its own, as N may differ between calls of one program.
    """

    tiles: Array
    square: Float[Array, "k t"]
    index: Int[Array, "k t"]
    label: Int[Array, "k t"]
    mean: Float[Array, " d"]
    scale: Float[Array, ""]
    offset: Float[Array, ""]
    count: Int[Array, ""]


def rows(
    data: Any,
    *,
    labels: Any = None,
    tile: int = 4096,
    scale: float | None = None,
    offset: float = 0.0,
    mean: np.ndarray | None = None,
    start: int = 0,
    tiles: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Rows:
    """Puts a data set on the device or devices.

    Args:
      data: [N, ...] of numbers; axes after the first are flattened. uint8 needs `scale`.
      labels: [N] whole numbers from 0 up, or None.
      tile: rows per tile; fewer if there are fewer rows.
      scale, offset: what stored numbers mean, for instance 1 / 127.5 and -1.
      mean: what to subtract; None: the mean row of `data`.
      start: index of the first row, where `data` is a part of a larger set.
      tiles: makes at least so many, so that sets of several sizes share a program.
      mesh: splits the tiles over its axis "data"; None: all on the default device.

    Raises:
      UserError: there are no numbers, integers come without a scale, numbers that are not
        finite, labels that do not fit.
    """
    data, scale = _checked(data, scale)
    count = len(data)
    labels = check_labels(labels, count)
    # Sets that share a program have tiles of one size.
    tile = max(1, tile if tiles else min(tile, count))
    devices = mesh.shape["data"] if mesh is not None else 1
    k = max(-(-count // tile), tiles)
    k += -k % devices
    if mean is None:
        mean = scale * _mean(data) + offset
    pad = k * tile - count
    wide = np.float64 if data.dtype == np.float64 else np.float32
    fill = lambda a, value: np.concatenate([a, np.full(pad, value, a.dtype)]).reshape(k, tile)
    kept = np.uint16 if data.dtype == jnp.bfloat16 else data.dtype
    stored = np.zeros((k * tile, data.shape[1]), kept)
    square = np.empty(count, wide)
    for at in range(0, count, 4096):
        here = slice(at, min(at + 4096, count))
        part = scale * data[here].astype(np.float64) + offset - mean
        square[here] = np.einsum("nd,nd->n", part, part)
        stored[here] = part if kept == wide else data[here].view(kept)
    check_size(float(square.max()), wide)
    placed = lambda a, spec: (
        jnp.asarray(a) if mesh is None else jax.device_put(a, NamedSharding(mesh, spec))
    )
    split = P("data")
    return Rows(
        tiles=placed(stored.reshape(k, tile, -1), split),
        square=placed(fill(square, 0), split),
        index=placed(fill(np.arange(start, start + count, dtype=np.int32), -1), split),
        label=placed(fill(labels, ABSENT), split),
        mean=placed(mean.astype(wide), P()),
        scale=placed(np.asarray(scale, wide), P()),
        offset=placed(np.asarray(offset, wide), P()),
        count=placed(np.int32(count), P()),
    )


def check_size(square: float, wide: Any) -> None:
    """Refuses rows of a squared norm whose sums are no numbers of the dtype `wide`."""
    if not square < 1e-3 * float(np.finfo(wide).max):
        raise UserError(
            f"The data are too large for {np.dtype(wide)}: a row has the norm "
            f"{square**0.5:.3g}; scale them."
        )


def numbers(stored: Shaped[Array, "..."], data: Rows) -> Float[Array, "..."]:
    """Stored rows [..., D] as centred numbers in the dtype of computation."""
    wide = data.square.dtype
    if stored.dtype == wide:
        return stored
    if stored.dtype == jnp.uint16:  # bfloat16 is the upper half of float32.
        stored = jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return data.scale * stored.astype(wide) + (data.offset - data.mean)


def fetch(data: Rows, index: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Centred rows of these places; zeros for those of other devices.

    Places count from the first row of the data set.
    """
    tile = data.index.shape[1]
    first = data.index[0, 0]
    local = index - first
    here = (local >= 0) & (local < data.index.size) & (first >= 0)
    at = jnp.where(here, local, 0)

    def some(given):
        at, here = given
        return jnp.where(here[:, None], numbers(data.tiles[at // tile, at % tile], data), 0)

    # Some at a time, or what is gathered and the numbers made of it would both be kept.
    size = len(at) // math.gcd(len(at), 8)
    found = jax.lax.map(some, (at.reshape(-1, size), here.reshape(-1, size)))
    return found.reshape(len(at), -1)


def fold(add: Callable, start: Any, data: Rows) -> Any:
    """Folds a function over all rows, some at a time; traced.

    Args:
      add: (carry, rows [t, D], square [t], index [t], label [t]) -> carry; the rows are
        centred numbers, the index of one that does not count is -1.
      start: the first carry, a pytree of arrays.
      data: rows; on a mesh, those of one device.
    """
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    stored, square, index, label = map(flat, (data.tiles, data.square, data.index, data.label))
    _, tile, dim = data.tiles.shape
    count = len(square)
    steps = -(-count // (_piece(tile, dim) if jax.default_backend() == "cpu" else tile))
    size = -(-count // steps)

    def step(i, carry):
        at = jnp.minimum(i * size, count - size)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, size)
        # The last rows may begin with some of those before.
        new = at + jnp.arange(size) >= i * size
        y = numbers(cut(stored), data)
        return add(carry, y, cut(square), jnp.where(new, cut(index), -1), cut(label))

    return jax.lax.fori_loop(0, steps, step, start)


def within_classes(
    data: Shaped[np.ndarray, "n ..."], labels: Int[np.ndarray, " n"], scale: float
) -> float:
    """The variance of rows about the mean of their class, a sum over coordinates.

    `scale` is what a stored unit means.
    """
    total = 0.0
    for c in np.unique(labels):
        # Some rows at a time, about one of them, so that little is lost to rounding.
        where = np.flatnonzero(labels == c)
        first = data[where[0]].astype(np.float64).ravel()
        shift, square = np.zeros_like(first), 0.0
        for at in range(0, len(where), 1024):
            part = data[where[at : at + 1024]].astype(np.float64).reshape(-1, first.size)
            part -= first
            shift += part.sum(0)
            square += float(np.einsum("nd,nd->", part, part))
        total += square - float(shift @ shift) / len(where)
    return scale**2 * max(total, 0.0) / len(data)


def _piece(tile: int, dim: int) -> int:
    """Rows of a tile at a time on a CPU.

    There a slice of an array is a copy. That of a whole tile goes through the memory once
    more; one of 5 MB stays in the cache, and a product with 256 rows is still efficient.
    """
    return min(tile, max(256, 9 * 2**17 // dim))


def _mean(data):
    total = np.zeros(data.shape[1])
    for at in range(0, len(data), 4096):
        total += data[at : at + 4096].sum(0, dtype=np.float64)
    return total / len(data)


def _checked(data, scale):
    try:
        data = np.asarray(data)
    except ValueError:
        raise UserError("The data must be rows of equal length.") from None
    if scale is not None and not (np.isfinite(scale) and scale != 0):
        raise reject("data.scale", scale, "a finite number that is not 0")
    if data.ndim < 2 or 0 in data.shape:
        raise reject("data", data.shape, "rows of numbers, a shape (N, ...) without zeros")
    data = data.reshape(len(data), -1)
    if np.issubdtype(data.dtype, np.integer) and scale is None:
        raise UserError(
            f"The data are whole numbers ({data.dtype}); say what they mean by data.scale, for "
            "instance 1/127.5 with an offset of -1."
        )
    if not (np.issubdtype(data.dtype, np.number) or data.dtype == jnp.bfloat16):
        raise reject("data", str(data.dtype), "real numbers")
    if np.iscomplexobj(data):
        raise reject("data", str(data.dtype), "real numbers")
    if data.dtype == np.float16:
        warnings.warn("Data of float16 are taken as float32.", stacklevel=3)
    if data.dtype == np.float16 or (data.dtype == np.float64 and not jax.config.jax_enable_x64):
        data = data.astype(np.float32)
    if np.issubdtype(data.dtype, np.integer) and data.dtype != np.uint8:
        data = data.astype(np.float32)
    bad, first = 0, -1
    for at in range(0, len(data), 4096):
        wrong = ~np.isfinite(data[at : at + 4096].astype(np.float32)).all(1)
        if wrong.any() and first < 0:
            first = at + int(np.argmax(wrong))
        bad += int(wrong.sum())
    if bad:
        raise UserError(
            f"{bad} rows of the data hold numbers that are not finite, row {first} first."
        )
    return data, 1.0 if scale is None else float(scale)


def check_labels(labels: Any, count: int) -> Int[np.ndarray, " n"]:
    """Labels as int32 [N]; -1 throughout for None.

    Raises:
      UserError: they are not N whole numbers from 0 up.
    """
    if labels is None:
        return np.full(count, ABSENT, np.int32)
    found = np.asarray(labels)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        raise reject("data.labels", f"{found.dtype} {found.shape}", f"{count} whole numbers")
    if (found < 0).any():
        missing = int((found < 0).sum())
        raise UserError(f"data.labels lack a class for {missing} of {count} rows.")
    return found.astype(np.int32)

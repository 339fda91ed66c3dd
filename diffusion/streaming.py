"""Exact posterior sums of a data set that stays in the host's memory or on its disk.

    data = on_host(np.load("images.npy", mmap_mode="r"), scale=1 / 127.5, offset=-1.0)
    parts = [draws.block(i, 256, len(data.rows), seed) for i in range(40)]
    found = exact_from_host(data, parts, key, sigmas, chunk=65536)

Chunks of rows come to the device one after the other, each while the sums over the one before
it are under way, and serve several blocks of draws. The sums are donated from chunk to chunk,
so what a device holds is two chunks and the sums, whatever N. The draws, their noise and the
result are those of `draws.exact`, to rounding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from common import mesh as meshes
from common.errors import UserError, reject
from diffusion import draws
from diffusion.posterior import (
    Posterior,
    Queries,
    Sums,
    accumulate,
    finish,
    merged,
    nothing,
)
from diffusion.preconditioning import check_sigmas
from diffusion.rows import ABSENT, Rows, check_size, numbers, rows

READ = 4096  # Rows that are in work on the host at a time.


class HostRows(NamedTuple):
    """N rows of D numbers on the host.

    Attributes:
      rows: [N, ...] as they came, an array or a memory map.
      mean: [D], subtracted from every row, in units after scaling, in the dtype of computation.
      variance: V, the mean squared norm of the centred rows.
      scale, offset: a stored number times scale plus offset is what it means.
      kept: dtype in which rows go to the device; that of `mean` where they are centred first,
        uint16 for the bits of bfloat16.
    """

    rows: np.ndarray
    mean: np.ndarray
    variance: float
    scale: float
    offset: float
    kept: np.dtype


def on_host(data: Any, *, scale: float | None = None, offset: float = 0.0) -> HostRows:
    """Looks once through a data set: its mean, its variance, and whether it is finite.

    Args:
      data: [N, ...] of numbers, for instance np.load(..., mmap_mode="r"); axes after the first
        are flattened. uint8 needs `scale`.
      scale, offset: what stored numbers mean, for instance 1 / 127.5 and -1.

    Raises:
      UserError: as `rows.rows`.
    """
    data = np.asarray(data)
    if data.ndim < 2 or 0 in data.shape:
        raise reject("data", data.shape, "rows of numbers, a shape (N, ...) without zeros")
    # One row tells which numbers may be, and how they are kept.
    like = rows(np.zeros((1, *data.shape[1:]), data.dtype), scale=scale, offset=offset)
    scale = 1.0 if scale is None else float(scale)
    centre, total, square = None, 0.0, 0.0
    bad, first = 0, -1
    for at in range(0, len(data), READ):
        part = data[at : at + READ]
        part = part.reshape(len(part), -1)
        wrong = ~np.isfinite(part.astype(np.float32)).all(1)
        if wrong.any():
            first = at + int(np.argmax(wrong)) if first < 0 else first
            bad += int(wrong.sum())
            continue
        part = part.astype(np.float64)
        # About some rows' mean, so that little is lost to rounding.
        centre = part.mean(0) if centre is None else centre
        part -= centre
        total = total + part.sum(0)
        each = np.einsum("nd,nd->n", part, part)
        check_size(scale**2 * float(each.max()), like.square.dtype)
        square += float(each.sum())
    if bad:
        raise UserError(
            f"{bad} rows of the data hold numbers that are not finite, row {first} first."
        )
    shift = total / len(data)
    return HostRows(
        rows=data,
        mean=(scale * (centre + shift) + offset).astype(like.square.dtype),
        variance=max(0.0, scale**2 * (square / len(data) - float(shift @ shift))),
        scale=scale,
        offset=float(offset),
        kept=np.dtype(like.tiles.dtype),
    )


def exact_from_host(
    data: HostRows,
    parts: Sequence[draws.Block],
    key: jax.Array,
    sigmas: Any,
    *,
    chunk: int = 65536,
    tile: int = 4096,
    together: int = 8,
    precision: str = "highest",
    mesh: jax.sharding.Mesh | None = None,
) -> list[Posterior]:
    """Posteriors by all rows, [S, B] of each block of draws, as of `draws.exact`.

    Args:
      data: the rows.
      parts: blocks of draws; of one size, or there is a program for each size.
      key: of all noise.
      sigmas: noise levels s > 0, [S], which share the draws.
      chunk: rows that go to the devices at a time, in whole tiles per device.
      tile: rows that a device works on at a time.
      together: blocks that share a pass over the host's rows; each has S x B x D sums on
        every device.
      precision: of the products, as in `jax.lax.Precision`.
      mesh: chunks are split over its axis "data"; None: the mesh in use, or one device.

    Raises:
      UserError: chunk, tile or together is below 1, or a noise level cannot be.
    """
    for name, value in dict(chunk=chunk, tile=tile, together=together).items():
        if value < 1:
            raise reject(f"estimator.{name}", value, "a whole number from 1 up")
    levels = jnp.asarray(check_sigmas(sigmas), data.mean.dtype)
    found = []
    with jax.set_mesh(mesh or jax.sharding.get_mesh()):
        devices = meshes.current()
        share = -(-min(chunk, len(data.rows)) // devices)
        tile = min(tile, share)
        read = partial(_chunk, data, -(-share // tile) * devices, tile)
        for at in range(0, len(parts), together):
            found += _one_pass(data, parts[at : at + together], key, levels, read, precision)
    return found


def _one_pass(data, parts, key, levels, read: Callable, precision) -> list[Posterior]:
    """All chunks, for these blocks."""
    count = len(data.rows)
    begun = [_begin(len(levels), p, key, _centred(data, data.rows[p.index])) for p in parts]
    queries, sums = map(list, zip(*begun, strict=True))
    here, start = read(0), 0
    while here is not None:
        sums = [_add(s, here, q, levels, precision) for s, q in zip(sums, queries, strict=True)]
        start += here.index.size
        ahead = read(start) if start < count else None
        # No more than one chunk ahead, or all of them would queue up on the device.
        jax.block_until_ready(sums)
        here = ahead
    return [_end(s, q, data.mean) for s, q in zip(sums, queries, strict=True)]


@partial(jax.jit, static_argnums=0)
def _begin(
    levels: int, part: draws.Block, key: jax.Array, x0: Float[Array, "b d"]
) -> tuple[Queries, Sums]:
    """The draws, and sums [devices, S, ...] before the first row."""
    queries = meshes.replicate(draws.queries(part, key, x0))
    devices = meshes.current()
    sums = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (devices, *a.shape)), nothing(levels, queries)
    )
    if devices > 1:
        sums = jax.lax.with_sharding_constraint(sums, Sums(*[P("data")] * len(sums)))
    return queries, sums


@partial(jax.jit, static_argnames="precision", donate_argnums=0)
def _add(
    sums: Sums, data: Rows, queries: Queries, sigmas: Float[Array, " s"], precision: str
) -> Sums:
    """Adds a chunk to the sums, on each device its own tiles to its own sums."""

    def local(sums, data, queries, sigmas):
        mine = jax.tree.map(lambda a: a[0], sums)
        mine = accumulate(mine, data, queries, sigmas, precision)
        return jax.tree.map(lambda a: a[None], mine)

    specs = (P("data"), draws.SPLIT, P(), P())
    return draws.over_rows(local, specs, P("data"))(sums, data, queries, sigmas)


@jax.jit
def _end(sums: Sums, queries: Queries, mean: Float[Array, " d"]) -> Posterior:
    found = finish(merged(sums), queries, mean)
    return meshes.replicate(found)


@jax.jit
def _squares(data: Rows) -> Float[Array, "k t"]:
    def local(data):
        # One by one, or all rows would be in memory as numbers.
        return jax.lax.map(lambda y: jnp.sum(numbers(y, data) ** 2, -1), data.tiles)

    return draws.over_rows(local, (draws.SPLIT,), P("data"))(data)


def _chunk(data: HostRows, tiles: int, tile: int, start: int) -> Rows:
    """Rows from `start` on, k tiles of T; empty ones where there are no more."""
    wide = data.mean.dtype

    def stored(first: int, last: int) -> Shaped[np.ndarray, "k t d"]:
        # A new array each time, as the device may be reading the last one.
        out = np.zeros(((last - first) * tile, len(data.mean)), data.kept)
        begin, end = (start + place * tile for place in (first, last))
        for at in range(begin, min(end, len(data.rows)), READ):
            part = data.rows[at : min(at + READ, end)]
            if data.kept == wide:
                part = _centred(data, part)
            part = part.view(data.kept)  # Bits, of bfloat16.
            out[at - begin : at - begin + len(part)] = part.reshape(len(part), -1)
        return out.reshape(-1, tile, len(data.mean))

    def index(first: int, last: int) -> Int[np.ndarray, "k t"]:
        place = np.arange(start + first * tile, start + last * tile, dtype=np.int32)
        return np.where(place < len(data.rows), place, -1).reshape(-1, tile)

    made = Rows(
        tiles=_split(stored, (tiles, tile, len(data.mean))),
        square=np.zeros((tiles, tile), wide),
        index=_split(index, (tiles, tile)),
        label=_split(lambda a, b: np.full((b - a, tile), ABSENT, np.int32), (tiles, tile)),
        mean=data.mean,
        scale=np.asarray(data.scale, wide),
        offset=np.asarray(data.offset, wide),
        count=np.int32(len(data.rows)),
    )
    return made._replace(square=_squares(made))


def _centred(data: HostRows, part: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n d"]:
    """Rows as centred numbers in the dtype of computation."""
    wide = data.mean.dtype
    part = part.reshape(len(part), -1)
    part = part.astype(np.promote_types(part.dtype, wide), copy=False)
    return (data.scale * part + (data.offset - data.mean)).astype(wide, copy=False)


def _split(make: Callable[[int, int], np.ndarray], shape: tuple) -> Array:
    """make(first, last), tiles, on the devices that are to have them."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(make(0, shape[0]))
    split = NamedSharding(mesh, P("data"))
    # Every process reads what its own devices need.
    return jax.make_array_from_callback(
        shape, split, lambda index: make(*index[0].indices(shape[0])[:2])
    )

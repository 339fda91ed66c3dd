"""Nearest rows: copies of the training data, precision and recall. In tiles, on devices.

    near = nearest(samples, rows)            who is each sample's nearest training row
    memorisation(near, nearest(rows, rows, skip_self=True))
    manifold(real_features, made_features)   precision, recall, density, coverage

Distances are found as |a|² + |b|² - 2 a·b about the rows' mean, for one tile of rows at a
time. That form rounds at 1e-7 of |a|², so the best few are then measured again as
|a - b|²: an exact copy is at 0, and what is close keeps its digits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from common.errors import UserError, reject
from diffusion.images import scaled

SPARE = 6  # Candidates beyond those asked for, against rounding.
ROUNDING = 4e-7  # Of |a|² + |b|², where two distances count as equal.


class Nearest(NamedTuple):
    """The k nearest rows of each query, nearest first; of equally near ones the first.

    Attributes:
      distance: float32 [M, k], Euclidean.
      index: int32 [M, k], of the row.
    """

    distance: np.ndarray
    index: np.ndarray


class Memorisation(NamedTuple):
    """How many samples are nearly training rows.

    Attributes:
      copies: share of samples nearer to their nearest row than `ratio` times to the second.
      close: share of samples nearer than `threshold`; NaN without a reference.
      threshold: the quantile of the distances between training rows; NaN without.
      median_ratio: of nearest to second nearest. Near 1 where nothing is remembered.
      flagged: bool [M], of `copies`.
    """

    copies: float
    close: float
    threshold: float
    median_ratio: float
    flagged: np.ndarray


class Manifold(NamedTuple):
    """Overlap of two sets by balls that reach to the k-th neighbour within a set.

    Attributes:
      precision: share of made features in some ball of the real ones.
      recall: share of real features in some ball of the made ones.
      density: mean number of real balls around a made feature, over k. May exceed 1.
      coverage: share of real balls with a made feature in them.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def nearest(
    queries: Shaped[np.ndarray, "m ..."],
    rows: Shaped[np.ndarray, "n ..."],
    count: int = 2,
    *,
    skip_self: bool = False,
    tile: int = 4096,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> Nearest:
    """The nearest rows of each query.

    Args:
      queries, rows: images or features; uint8 is scaled to [-1, 1] tile by tile.
      count: k.
      skip_self: queries are the rows themselves; row i is not its own neighbour. By
        place, not by value: of two equal rows each is the other's, at distance 0.
      tile: rows on the device at a time.
      block: queries at a time; block x tile distances are in memory.
      mesh: of this process's devices, a block's queries are split along "data"; None: one
        device.

    Raises:
      UserError: fewer than k rows (k + 1 with `skip_self`), queries of another shape than
        rows, or a tile is empty.
    """
    if queries.shape[1:] != rows.shape[1:]:
        raise UserError(
            f"Samples of shape {queries.shape[1:]} cannot be compared with rows of shape "
            f"{rows.shape[1:]}."
        )
    m, n = len(queries), len(rows)
    if count < 1 or n - skip_self < count:
        raise reject("eval.neighbours", count, f"from 1 to {n - skip_self}, for {n} rows")
    tile, block = _tiles(tile, block, mesh, m, n)
    kept = min(count + SPARE, n - skip_self)
    q, r = queries.reshape(m, -1), rows.reshape(n, -1)
    centre = _mean(r, tile)
    place = partial(_placed, mesh)
    starts = range(0, m, block)
    blocks = [place(_padded(q, s, block), P("data")) for s in starts]
    firsts = [place(np.arange(s, s + block, dtype=np.int32), P("data")) for s in starts]
    # Each made anew: the update writes into its buffers.
    empty = lambda: (jnp.full((block, kept), jnp.inf), jnp.full((block, kept), -1, jnp.int32))
    best = [place(empty(), P("data")) for _ in starts]
    for start in range(0, n, tile):
        part = place(_padded(r, start, tile), P())
        for i in range(len(best)):
            best[i] = _update(
                best[i], blocks[i], firsts[i], part, centre, start, n, skip_self=skip_self
            )
    found = np.concatenate([np.asarray(index) for _, index in best])[:m]
    parts = [_measured(q[s : s + block], r, found[s : s + block], count) for s in starts]
    return Nearest(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def memorisation(
    near: Nearest,
    reference: Nearest | None = None,
    *,
    ratio: float = 1 / 3,
    quantile: float = 0.05,
) -> Memorisation:
    """Copies by the ratio test (Yoon et al., 2023) and by distances between real rows.

    Where a training row stands twice, the second nearest row is as near as the first and
    the ratio misses its copies; the reference, taken from distinct rows, does not.

    Args:
      near: of samples among training rows, k >= 2.
      reference: of the training rows (or held-out ones) among the training rows.
      ratio: nearest over second nearest, below which a sample counts as a copy.
      quantile: of the reference's nearest distances, below which a sample is close.

    Raises:
      UserError: k < 2, or ratio or quantile is not between 0 and 1.
    """
    if near.distance.shape[1] < 2:
        raise reject("eval.neighbours", near.distance.shape[1], "2 at least")
    for name, value in dict(ratio=ratio, quantile=quantile).items():
        if not 0 < value < 1:
            raise reject(f"eval.memorisation.{name}", value, "above 0 and below 1")
    first, second = near.distance[:, 0], near.distance[:, 1]
    ratios = np.divide(first, second, out=np.zeros_like(first), where=first > 0)
    flagged = ratios < ratio
    close = threshold = float("nan")
    if reference is not None:
        threshold = float(np.quantile(reference.distance[:, 0], quantile))
        close = float(np.mean(first < threshold))
    median = float(np.median(ratios))
    return Memorisation(float(flagged.mean()), close, threshold, median, flagged)


def manifold(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m d"],
    *,
    neighbours: int = 3,
    tile: int = 4096,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> Manifold:
    """Precision and recall (Kynkäänniemi et al., arXiv:1904.06991), density and coverage
    (Naeem et al., arXiv:2002.09797).

    Balls are closed, up to 4e-7 of |a|² + |b|².

    Args:
      neighbours: k, of the radius.
      tile, block, mesh: as of `nearest`.

    Raises:
      UserError: a set has no more than k rows.
    """
    tiled = dict(tile=tile, block=block, mesh=mesh)
    radii = [
        nearest(x, x, neighbours, skip_self=True, **tiled).distance[:, -1] for x in (real, made)
    ]
    around_made, held_real = _inside(made, real, radii[0], **tiled)
    around_real, _ = _inside(real, made, radii[1], **tiled)
    return Manifold(
        precision=float(np.mean(around_made > 0)),
        recall=float(np.mean(around_real > 0)),
        density=float(np.mean(around_made)) / neighbours,
        coverage=float(np.mean(held_real > 0)),
    )


def _inside(points, rows, radii, *, tile, block, mesh) -> tuple[np.ndarray, np.ndarray]:
    """(balls around each point [M], points in each row's ball [N])."""
    m, n = len(points), len(rows)
    tile, block = _tiles(tile, block, mesh, m, n)
    centre = _mean(rows, tile)
    around, held = np.zeros(m, np.int64), np.zeros(n, np.int64)
    for start in range(0, n, tile):
        part = _placed(mesh, _padded(rows, start, tile), P())
        radius = _placed(mesh, _padded(radii, start, tile), P())
        for s in range(0, m, block):
            queries = _placed(mesh, _padded(points, s, block), P("data"))
            inside = np.asarray(_balls(queries, part, radius, centre))
            inside = inside[: m - s, : n - start]
            around[s : s + block] += inside.sum(1)
            held[start : start + tile] += inside.sum(0)
    return around, held


@partial(jax.jit, static_argnames="skip_self", donate_argnums=0)
def _update(
    best: tuple[Float[Array, "b k"], Int[Array, "b k"]],
    queries: Shaped[Array, "b d"],
    first: Int[Array, " b"],
    rows: Shaped[Array, "t d"],
    centre: Float[Array, " d"],
    start: int | Int[Array, ""],
    count: int | Int[Array, ""],
    *,
    skip_self: bool,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The best so far, with one more tile of rows."""
    distance, index = best
    square, _ = _squares(queries, rows, centre)
    at = (start + jnp.arange(len(rows))).astype(jnp.int32)
    left_out = (at >= count)[None]
    if skip_self:
        left_out = left_out | (at[None] == first[:, None])
    square = jnp.where(left_out, jnp.inf, square)
    square = jnp.concatenate([distance, square], axis=1)
    at = jnp.concatenate([index, jnp.broadcast_to(at, (len(queries), len(rows)))], axis=1)
    value, place = jax.lax.top_k(-square, distance.shape[1])
    return -value, jnp.take_along_axis(at, place, axis=1)


@jax.jit
def _balls(queries, rows, radius, centre):
    square, size = _squares(queries, rows, centre)
    return square <= jnp.square(radius) + ROUNDING * size


def _squares(queries, rows, centre):
    """(|a - b|², |a|² + |b|²) about the centre, float32 [b, t]."""
    a, b = scaled(queries) - centre, scaled(rows) - centre
    size = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(size - 2 * product, 0.0), size


def _measured(queries, rows, index, count) -> tuple[np.ndarray, np.ndarray]:
    """Distances by differences of the candidates [b, kept], sorted; the `count` nearest."""
    a = scaled(np.asarray(queries))
    squares = np.empty(index.shape, np.float32)
    for i in range(index.shape[1]):
        squares[:, i] = np.square(a - scaled(np.asarray(rows[index[:, i]]))).sum(axis=1)
    order = np.lexsort((index, squares))[:, :count]
    found = np.take_along_axis(index, order, axis=1)
    return np.sqrt(np.take_along_axis(squares, order, axis=1)), found


def _tiles(tile: int, block: int, mesh: Mesh | None, m: int, n: int) -> tuple[int, int]:
    """No larger than the data; blocks that the devices divide."""
    for name, value in dict(tile=tile, block=block).items():
        if value < 1:
            raise reject(f"eval.{name}", value, "a whole number from 1 up")
    devices = 1 if mesh is None else mesh.shape["data"]
    block = min(block, m)
    return min(tile, n), -(-block // devices) * devices


def _padded(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` rows from `start`, the last ones zero where there are no more."""
    part = np.asarray(rows[start : start + size])
    pad = [(0, size - len(part)), *[(0, 0)] * (part.ndim - 1)]
    return np.pad(part, pad)


def _mean(rows: np.ndarray, tile: int) -> np.ndarray:
    total = sum(
        scaled(np.asarray(rows[s : s + tile])).sum(axis=0, dtype=np.float64)
        for s in range(0, len(rows), tile)
    )
    return (total / len(rows)).astype(np.float32)


def _placed(mesh: Mesh | None, tree, spec: P):
    if mesh is None:
        return jax.device_put(tree)
    return jax.device_put(tree, NamedSharding(mesh, spec))

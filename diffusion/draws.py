"""Blocks of draws and their posteriors: the jitted programs behind the estimators.

Draw m comes from row `index[m]` with noise of the key folded with m, so its number does not
depend on the size of blocks or the number of devices. Rows of `Rows` placed on a mesh are
summed where they are, and partial sums merged; of subsets, which are small, every device has
all rows and takes its share of the draws.

Sums are [S, B, D], which for large images is too much at once: there levels go through in
groups (`in_groups`), each of which takes the two products that levels share anew.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from common import data as common_data
from common import mesh as meshes
from common.errors import reject
from diffusion.posterior import (
    Posterior,
    Queries,
    accumulate,
    accumulate_some,
    finish,
    merged,
    merged_over,
    nothing,
    of_own_rows,
)
from diffusion.rows import ABSENT, Rows, fetch

SUBSETS = 0x5B5E7  # Tag of a stream.
HELD = 2**30  # Bytes of an array [S, B, D] on a device; a program holds a few such at most.
GATHERED = 2**24  # Numbers of neighbours that are in work at a time, of all devices.
SPLIT = Rows(P("data"), P("data"), P("data"), P("data"), P(), P(), P(), P())


class Block(NamedTuple):
    """Which draws: host arrays [B].

    Attributes:
      index: place of each draw's row.
      number: of each draw's noise.
      sign: +1 or -1, of its noise.
      subset: [L] places of a subset that the block shares; empty: none is needed.
    """

    index: np.ndarray
    number: np.ndarray
    sign: np.ndarray
    subset: np.ndarray


class Subset(NamedTuple):
    """Posteriors by a subset, each [S, B].

    Attributes:
      corrected: by the rule for C, or stratified by neighbours.
      lower: C = 1; its mean is below J*, whatever the form.
      upper: the residual with the source taking part only where the subset holds it by
        chance; its mean is above J*.
    """

    corrected: Posterior
    lower: Posterior
    upper: Posterior


class Moments(NamedTuple):
    """Of the draws of one block, each field [S].

    Attributes:
      mean: over the draws.
      spread: sum of squared deviations from it.
    """

    mean: Posterior
    spread: Posterior


def moments(found: Posterior) -> Moments:
    """Moments over the last axis, the draws."""
    mean = jax.tree.map(lambda v: jnp.mean(v, -1), found)
    spread = jax.tree.map(lambda v, m: jnp.sum((v - m[..., None]) ** 2, -1), found, mean)
    return Moments(mean, spread)


def zeros(levels: int) -> Moments:
    """Moments of no draws, float32 [levels]."""
    # An array each: a run gives its state away leaf by leaf.
    none = lambda: Posterior(*(jnp.zeros(levels) for _ in Posterior._fields))
    return Moments(none(), none())


def block(
    step: int, size: int, count: int, seed: int, *, subset: int = 0, antithetic: bool = False
) -> Block:
    """The draws of one block: whole permutations of the rows, one after the other.

    Args:
      step: 0, 1, ...
      size: draws in a block; even where antithetic.
      count: rows of the data set.
      seed: of the order of rows and of the subsets.
      subset: L, drawn without replacement and anew for each block; 0: none.
      antithetic: draws come in pairs of one row, with noise of either sign.
    """
    fold = 2 if antithetic else 1
    if size % fold:
        raise reject("estimator.block", size, "even where antithetic")
    draws = size // fold
    index = common_data.indices(step, count, draws, seed)
    number = np.arange(step * draws, (step + 1) * draws)
    # Another stream than those of the orders, (seed, epoch), for every step.
    rng = np.random.default_rng((seed, step, SUBSETS))
    chosen = rng.choice(count, subset, replace=False) if subset else np.zeros(0)
    sign = np.tile([1, -1][:fold], draws)
    return Block(
        np.repeat(index, fold).astype(np.int32),
        np.repeat(number, fold).astype(np.uint32),
        sign.astype(np.float32),
        np.sort(chosen).astype(np.int32),
    )


def queries(part: Block, key: jax.Array, x0: Float[Array, "b d"]) -> Queries:
    """The draws of a block from its centred rows."""
    draw = lambda number: jax.random.normal(
        jax.random.fold_in(key, number), x0.shape[1:], x0.dtype
    )
    # Random bits take several times the room of the numbers made of them: some at a time.
    some = part.number.reshape(math.gcd(len(part.number), 8), -1)
    eps = jax.lax.map(jax.vmap(draw), some).reshape(x0.shape)
    eps = eps * part.sign.astype(x0.dtype)[:, None]
    return Queries(x0, eps, part.index, jnp.full_like(part.index, ABSENT))


@partial(jax.jit, static_argnames="precision")
def exact(
    data: Rows,
    part: Block,
    key: jax.Array,
    sigmas: Float[Array, " s"],
    precision: str = "highest",
    label: Int[Array, " b"] | None = None,
) -> Posterior:
    """Posteriors by all rows, [S, B].

    Args:
      data: rows; split over the axis "data" of the mesh in use, if there is one.
      part: the draws.
      key: of all noise.
      sigmas: noise levels, which share the draws.
      precision: of the products.
      label: [B], class of each draw's row: only its rows count. `data` has the labels, too.
    """

    def local(data, part, key, sigmas, label):
        some = queries(part, key, whole_rows(data, part.index))
        if label is not None:
            some = some._replace(label=label)

        def posteriors(sigmas):
            sums = accumulate(nothing(len(sigmas), some), data, some, sigmas, precision)
            if meshes.current() > 1:
                sums = merged_over(sums, "data")
            return finish(sums, some, data.mean)

        return in_groups(posteriors, sigmas, some.x0)

    return over_rows(local, (SPLIT, P(), P(), P(), P()), P())(data, part, key, sigmas, label)


@partial(jax.jit, static_argnames=("rule", "precision"))
def by_subset(
    data: Rows,
    part: Block,
    key: jax.Array,
    sigmas: Float[Array, " s"],
    rule: str = "tapered",
    constant: float | Array = 1.0,
    neighbours: Int[Array, "n k"] | None = None,
    precision: str = "highest",
) -> Subset:
    """Posteriors by the subset that the block shares, [S, B].

    Args:
      data, part, key, sigmas, precision: as in `exact`.
      rule: for C: "paper" 4 N / L; "ht" C0 = (N - 1) / (L - 1); "tapered"
        C0 (1 + 3 (1 - L / N)); "constant"; "snis", infinite unless the subset holds the
        source; "knn", none: neighbours have the weight 1 and the others stand for the rest.
      constant: C of the rule "constant".
      neighbours: [N, K], for "knn".
    """

    def local(data, part, key, sigmas, neighbours):
        gather = lambda i: whole_rows(data, i)
        mine = part._replace(
            index=_share(part.index), number=_share(part.number), sign=_share(part.sign)
        )
        # Every device must ask for the same rows, those of all draws.
        some = queries(mine, key, _share(gather(part.index)))
        few = _as_rows(gather(part.subset), part.subset, data.mean)
        held = jnp.any(part.subset == mine.index[:, None], -1)

        def posteriors(sigmas):
            plain = accumulate(nothing(len(sigmas), some), few, some, sigmas, precision)
            if rule == "knn":
                near = neighbours[part.index]
                sums = _stratified(data, few, some, near, sigmas, precision)
                corrected = finish(sums, some, data.mean)
            else:
                log_c = _log_c(rule, constant, _others(few, some), few, data.count, held)
                corrected = finish(plain, some, data.mean, -log_c)
            lower = finish(plain, some, data.mean)
            chance = jnp.where(held, 0.0, -jnp.inf)
            upper = finish(plain, some, data.mean, chance)
            return Subset(corrected, lower, upper)

        return in_groups(posteriors, sigmas, some.x0)

    specs = (SPLIT, P(), P(), P(), P())
    return over_rows(local, specs, P(None, "data"))(data, part, key, sigmas, neighbours)


def _stratified(data, few, queries, near, sigmas, precision):
    """Sums by the neighbours, and by the shared rows that are none for all of the rest.

    `near`, [B, K], is that of all devices, `queries` are this device's.
    """
    mine = _share(near)
    size, draw = few.index.size, jnp.arange(len(mine))[:, None]
    # Where in the subset a row stands; those of all others are dropped.
    rows = data.index.size * meshes.current()
    place = (
        jnp.full(rows, size, jnp.int32).at[few.index[0]].set(jnp.arange(size, dtype=jnp.int32))
    )
    away = jnp.ones((len(mine), size), bool).at[draw, place[mine]].set(False, mode="drop")
    away &= few.index[0][None] != queries.source[:, None]
    left = jnp.maximum(jnp.sum(away, -1), 1)
    rest = data.count - 1 - near.shape[1]
    log_rest = jnp.log(jnp.maximum(rest, 1) / left)
    log_rest = jnp.where(rest > 0, log_rest, -jnp.inf)
    begun = nothing(len(sigmas), queries)
    sums = accumulate_some(begun, few.tiles[0], few.square[0], away, queries, sigmas, precision)
    sums = sums._replace(top=sums.top + log_rest.astype(sums.top.dtype))
    near_sums = _by_neighbours(data, queries, near, sigmas, precision)
    return merged(jax.tree.map(lambda *a: jnp.stack(a), sums, near_sums))


def _by_neighbours(data, queries, near, sigmas, precision):
    """Sums [S, B] over the neighbours of each draw, some draws at a time."""
    devices, k, dim = meshes.current(), near.shape[1], queries.x0.shape[1]
    batch = len(queries.x0)
    fits = max(1, GATHERED // (devices * k * dim))
    size = max(n for n in range(1, min(batch, fits) + 1) if batch % n == 0)
    # All devices fetch the rows of all, and each then takes its own.
    asked = near.reshape(devices, -1, size, k).swapaxes(0, 1)
    cut = lambda a: a.reshape(-1, size, dim)

    def some(given):
        asked, x0, eps = given
        y = _share(whole_rows(data, asked.reshape(-1)).reshape(devices * size, k, dim))
        there = jnp.ones((size, k), bool)
        return of_own_rows(y, there, x0, eps, sigmas, precision)

    found = jax.lax.map(some, (asked, cut(queries.x0), cut(queries.eps)))
    return jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1).reshape(len(sigmas), batch, *a.shape[3:]), found
    )


def _as_rows(y, index, mean) -> Rows:
    one = jnp.ones((), y.dtype)
    return Rows(
        tiles=y[None],
        square=jnp.sum(y**2, -1)[None],
        index=index[None],
        label=jnp.full_like(index, ABSENT)[None],
        mean=mean,
        scale=one,
        offset=0 * one,
        count=jnp.int32(len(y)),
    )


def _others(few, queries):
    there = (few.index[0] != queries.source[:, None]) & (few.index[0] >= 0)
    return jnp.maximum(jnp.sum(there, -1), 1)


def _log_c(rule, constant, others, few, count, held):
    size, ideal = few.index.size, (count - 1) / others
    made = {
        "paper": lambda: jnp.log(4 * count / size) * jnp.ones_like(ideal),
        "ht": lambda: jnp.log(ideal),
        "tapered": lambda: jnp.log(ideal * (1 + 3 * (1 - size / count))),
        "constant": lambda: jnp.log(constant) * jnp.ones_like(ideal),
        "snis": lambda: jnp.where(held, 0.0, jnp.inf),
    }
    return made[rule]()


def over_rows(local: Callable, in_specs: tuple, out_specs) -> Callable:
    """`shard_map` over the axis "data" of the mesh in use; as it is on one device."""
    if meshes.current() == 1:
        return local
    return jax.shard_map(
        local, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}, check_vma=False
    )


def in_groups(of_levels: Callable, sigmas: Float[Array, " s"], x0: Float[Array, "b d"]):
    """A function of noise levels, some of them at a time where sums of all would not fit.

    Args:
      of_levels: levels [G] -> pytree of arrays [G, ...]; traced once.
      sigmas: noise levels, [S].
      x0: rows of the draws, as large as the sums of one level.

    Returns:
      what `of_levels` has of all levels, [S, ...].
    """
    levels = len(sigmas)
    size = group_size(levels, *x0.shape, x0.dtype)
    if size == levels:
        return of_levels(sigmas)
    found = jax.lax.map(of_levels, groups(sigmas, size))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:levels], found)


def group_size(levels: int, batch: int, dim: int, dtype) -> int:
    """Levels of which an array [G, batch, dim] fits into `HELD`: all, or groups as even as they
    can be, of one level at least."""
    fits = max(1, HELD // (batch * dim * jnp.dtype(dtype).itemsize))
    return -(-levels // -(-levels // fits))


def groups(sigmas: Float[Array, " s"], size: int) -> Float[Array, "n g"]:
    """Levels in groups of one size, the last filled up with its last one."""
    return jnp.pad(sigmas, (0, -len(sigmas) % size), mode="edge").reshape(-1, size)


def whole_rows(data: Rows, index: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Centred rows, wherever they are; inside `over_rows`."""
    rows = fetch(data, index)
    # Devices that lack a row have zeros there.
    return jax.lax.psum(rows, "data") if meshes.current() > 1 else rows


def _share(a):
    """This device's part of what all devices have."""
    devices = meshes.current()
    if devices == 1:
        return a
    size = len(a) // devices
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("data") * size, size)

"""The exact posterior of a finite data set, in one pass over its rows.

A query c = x_0 + s eps, made from row n of the data, has the posterior weights

    p_i = softmax_i(-d_i / (2 s^2) + g_i / s),   d_i = |x_0 - y_i|^2,   g_i = eps . (y_i - x_0)

so the row it came from has the logit 0. Measured from that row nothing cancels where the
posterior sits on it (Xu et al., arXiv:2506.13763, theorem 1; rows i != n are summed here and
row n joins in `finish`). Rows stream through a running maximum, so no N x N matrix exists;
partial sums of devices or hosts are merged by the same rule. Beside the data and the sums, a
pass has two or three arrays [B, D] and some rows as numbers, whatever N.

Cost of a pass: 2 D (2 + S) FLOPs per query and row for S noise levels that share draws, 4 D
for one alone that is not small, where both products are one.

Distances come from norms and products, which rounding leaves correct to about 1e-7 |y|^2. The
few rows nearer to a source than that allows are subtracted from it number by number.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion.rows import ABSENT, Rows, fold

SMALL = 1e-3  # Of the largest |y|^2: s^2 below it is small.
NEAR = 1024  # Roundings of |x_0|^2 + |y|^2: a distance below it is too inexact.
NEAREST = 16  # Of the rows of a query that a device works on at a time.


class Queries(NamedTuple):
    """B draws.

    Attributes:
      x0: [B, D], the centred row each came from.
      eps: [B, D], its noise.
      source: [B], the place of that row, which the sums leave out; -1: none.
      label: [B], class whose rows alone count; -1: all.
    """

    x0: Float[Array, "b d"]
    eps: Float[Array, "b d"]
    source: Int[Array, " b"]
    label: Int[Array, " b"]


class Sums(NamedTuple):
    """Sums over rows other than the source, per noise level and query.

    Attributes:
      top: [S, B], the largest logit so far; what follows is relative to exp(top).
      weight: [S, B], sum of w.
      rows: [S, B, D], sum of w y.
      distance: [S, B], sum of w d.
      square: [S, B], sum of w^2.
    """

    top: Float[Array, "s b"]
    weight: Float[Array, "s b"]
    rows: Float[Array, "s b d"]
    distance: Float[Array, "s b"]
    square: Float[Array, "s b"]


class Posterior(NamedTuple):
    """Statistics of the posterior, per noise level and query, all [S, B].

    Attributes:
      trcov: trace of its covariance, about x_0: sum_i p_i d_i - |mu - x_0|^2.
      residual: |x_0 - mu|^2.
      paired: |x_0|^2 - |mu|^2, of uncentred rows.
      mean_square: |mu|^2, of uncentred rows; A minus it is the unpaired form.
      p_self: weight of the row the query came from.
      ess: 1 / sum_i p_i^2.

    The first three, and A - mean_square, have the mean J*(s), a sum over coordinates.
    """

    trcov: Float[Array, "s b"]
    residual: Float[Array, "s b"]
    paired: Float[Array, "s b"]
    mean_square: Float[Array, "s b"]
    p_self: Float[Array, "s b"]
    ess: Float[Array, "s b"]


def nothing(levels: int, queries: Queries) -> Sums:
    """The sums before the first row."""
    batch, _ = queries.x0.shape
    zero = jnp.zeros((levels, batch), queries.x0.dtype)
    # Half the least number: finite, so that differences of two such are 0 and not NaN.
    low = jnp.full_like(zero, jnp.finfo(zero.dtype).min / 2)
    return Sums(low, zero, jnp.zeros((levels, *queries.x0.shape), zero.dtype), zero, zero)


def accumulate(
    sums: Sums,
    data: Rows,
    queries: Queries,
    sigmas: Float[Array, " s"],
    precision: str = "highest",
) -> Sums:
    """Adds the rows of `data`; traced. Rows of several calls must be different ones.

    Args:
      sums: so far.
      data: rows, or a part of them.
      queries: the draws.
      sigmas: noise levels s > 0.
      precision: of the products, as in `jax.lax.Precision`; sums are float32 or wider.
    """
    dot = partial(jnp.matmul, precision=precision)
    least = jnp.sqrt(jnp.finfo(sigmas.dtype).tiny)
    # The square of a smaller one is no number; all weights but the source's vanish before.
    sigmas = jnp.maximum(sigmas, least)
    counted = lambda add: _counted(add, queries)
    if len(sigmas) > 1:
        return fold(counted(_together(dot, queries, sigmas)), sums, data)

    def apart(sums):
        return fold(counted(_together(dot, queries, sigmas[0])), sums, data)

    def joint(sums):
        begun = _squared(sums, queries)
        return _about(fold(counted(_alone(dot, queries, sigmas[0])), begun, data), queries)

    # Where logits are large, what the joint product loses to rounding is not small to 1.
    small = sigmas[0] ** 2 < SMALL * jnp.max(data.square)
    # Without the axis of levels each sum takes the place of the one before it.
    begun = jax.tree.map(lambda a: a[0], sums)
    done = jax.lax.cond(small, apart, joint, begun)
    return jax.tree.map(lambda a: a[None], done)


def accumulate_some(
    sums: Sums,
    y: Float[Array, "t d"],
    square: Float[Array, " t"],
    there: Bool[Array, "b t"],
    queries: Queries,
    sigmas: Float[Array, " s"],
    precision: str = "highest",
) -> Sums:
    """Adds centred rows, all at once, each to the queries for which it is there; traced."""
    dot = partial(jnp.matmul, precision=precision)
    return _together(dot, queries, sigmas)(sums, y, square, there)


def of_own_rows(
    y: Float[Array, "b k d"],
    there: Bool[Array, "b k"],
    x0: Float[Array, "b d"],
    eps: Float[Array, "b d"],
    sigmas: Float[Array, " s"],
    precision: str = "highest",
) -> Sums:
    """Sums over centred rows that each query has for itself, `there` or left out; traced."""
    einsum = partial(jnp.einsum, precision=precision)
    distance = jnp.sum((y - x0[:, None]) ** 2, -1)
    gain = einsum("bkd,bd->bk", y, eps) - jnp.sum(x0 * eps, -1)[:, None]
    gain = jnp.where(distance > 0, gain, 0)
    s = sigmas[:, None, None]
    logit = jnp.where(there, -0.5 * distance / s**2 + gain / s, -jnp.inf)
    low = jnp.finfo(logit.dtype).min / 2
    top = jnp.maximum(jnp.max(logit, -1, initial=low), low)
    w = jnp.exp(logit - top[..., None])
    return Sums(
        top=top,
        weight=jnp.sum(w, -1),
        rows=jax.lax.map(lambda w: einsum("bk,bkd->bd", w, y), w),
        distance=jnp.sum(w * distance, -1),
        square=jnp.sum(w**2, -1),
    )


def _counted(add, queries):
    """`add` with what `fold` gives it."""
    return lambda sums, y, square, index, label: add(
        sums, y, square, counts(queries, index, label)
    )


def _alone(dot, queries, s):
    """|x_0 - y|^2 and eps . y in one product; the distance follows from the sums."""
    own, across = _own(queries)
    both = queries.x0 / s**2 + queries.eps / s
    shift = 0.5 * own / s**2 + across / s

    def add(sums, y, square, there):
        logit = dot(both, y.T) - 0.5 * square / s**2 - shift
        return _add(dot, sums, y, jnp.where(there, logit, -jnp.inf), square)

    return add


def _squared(sums, queries):
    """With sum w |y|^2 in place of sum w d; of one noise level, as is `_about`, its inverse."""
    x0 = queries.x0
    size = sums.weight * jnp.sum(x0**2, -1)
    return sums._replace(distance=sums.distance + 2 * jnp.sum(sums.rows * x0, -1) - size)


def _about(sums, queries):
    x0 = queries.x0
    size = sums.weight * jnp.sum(x0**2, -1)
    about = sums.distance - 2 * jnp.sum(sums.rows * x0, -1) + size
    return sums._replace(distance=jnp.maximum(about, 0))


def _together(dot, queries, sigmas):
    """The products with x_0 and with eps serve all levels, [S] or one of them, []."""
    own, across = _own(queries)

    def add(sums, y, square, there):
        size = own + square
        distance = size - 2 * dot(queries.x0, y.T)
        gain = dot(queries.eps, y.T) - across
        distance, gain = _subtracted(distance, gain, size, there, y, queries)

        def one(s, sums):
            logit = jnp.where(there, -0.5 * distance / s**2 + gain / s, -jnp.inf)
            return _add(dot, sums, y, logit, distance)

        if not sigmas.ndim:
            return one(sigmas, sums)

        def level(i, sums):
            take = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
            put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, i, 0)
            return jax.tree.map(put, sums, one(sigmas[i], jax.tree.map(take, sums)))

        # Unsigned: no index counts from the end, so that the updates can be in place.
        return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(len(sigmas)), level, sums)

    return add


def _subtracted(distance, gain, size, there, y, queries):
    """Distances [B, T] and gains, those of the nearest rows from differences.

    Each query's nearest one of the rows that are too near, then the next, up to `NEAREST`.
    """
    eps = jnp.finfo(distance.dtype).eps
    draw = jnp.arange(len(distance))
    left = jnp.where(there & (distance < NEAR * eps * size), distance, jnp.inf)
    # What is left in the end is a copy of the row, below rounding.
    copy = distance <= 4 * eps * size
    distance, gain = (jnp.where(copy, 0, a) for a in (distance, gain))

    # Differences of some draws at a time take little room.
    some = lambda a: a.reshape(math.gcd(len(draw), 8), -1, *a.shape[1:])

    def pair(given):
        at, x0, noise = given
        apart = y[at] - x0
        return jnp.sum(apart**2, -1), jnp.sum(apart * noise, -1)

    def more(carry):
        step, left, *_ = carry
        return (step < NEAREST) & jnp.any(left < jnp.inf)

    def subtract(carry):
        step, left, distance, gain = carry
        at = jnp.argmin(left, -1)
        exact, along = jax.lax.map(pair, (some(at), some(queries.x0), some(queries.eps)))
        exact, along = exact.ravel(), along.ravel()
        # Stored numbers of one kind may become two that differ in their last digit.
        other = (left[draw, at] < jnp.inf) & (exact > 16 * eps**2 * size[draw, at])
        same = (left[draw, at] < jnp.inf) & ~other
        put = lambda a, new: a.at[draw, at].set(
            jnp.where(other, new, jnp.where(same, 0, a[draw, at]))
        )
        left = left.at[draw, at].set(jnp.inf)
        return step + 1, left, put(distance, exact), put(gain, along)

    return jax.lax.while_loop(more, subtract, (0, left, distance, gain))[2:]


def _own(queries):
    """|x_0|^2 and x_0 . eps, [B, 1]."""
    return (
        jnp.sum(queries.x0**2, -1)[:, None],
        jnp.sum(queries.x0 * queries.eps, -1)[:, None],
    )


def counts(
    queries: Queries, index: Int[Array, " t"], label: Int[Array, " t"]
) -> Bool[Array, "b t"]:
    """[B, T]: which rows count for which query."""
    there = (index >= 0) & (index != queries.source[:, None])
    wanted = queries.label[:, None]
    return there & ((wanted == ABSENT) | (label == wanted))


def _add(dot, sums, y, logit, distance) -> Sums:
    """Some rows, for one noise level."""
    top, weight, rows, total, square = sums
    new = jnp.maximum(top, jnp.max(logit, -1))
    before = jnp.exp(top - new)
    w = jnp.exp(logit - new[:, None])
    return Sums(
        top=new,
        weight=before * weight + jnp.sum(w, -1),
        rows=before[:, None] * rows + dot(w, y),
        distance=before * total + jnp.sum(w * distance, -1),
        square=before**2 * square + jnp.sum(w**2, -1),
    )


def merged(parts: Sums) -> Sums:
    """Sums [P, S, ...] over disjoint parts of the data as sums [S, ...] over all of it."""
    top = jnp.max(parts.top, 0)
    factor = jnp.exp(parts.top - top)
    total = lambda a: jnp.sum(a * factor.reshape(factor.shape + (1,) * (a.ndim - 3)), 0)
    return Sums(
        top,
        total(parts.weight),
        total(parts.rows),
        total(parts.distance),
        jnp.sum(parts.square * factor**2, 0),
    )


def merged_over(sums: Sums, axis: str) -> Sums:
    """`merged` over a mesh axis, inside `shard_map`."""
    top = jax.lax.pmax(sums.top, axis)
    factor = jnp.exp(sums.top - top)
    add = partial(jax.lax.psum, axis_name=axis)
    return Sums(
        top,
        add(sums.weight * factor),
        add(sums.rows * factor[..., None]),
        add(sums.distance * factor),
        add(sums.square * factor**2),
    )


def finish(
    sums: Sums, queries: Queries, mean: Float[Array, " d"], log_source: float | Array = 0.0
) -> Posterior:
    """Lets the source row join, with a weight of exp(log_source), and takes the moments.

    Args:
      sums: of all other rows.
      queries: the draws.
      mean: what was subtracted from the rows.
      log_source: 0 for the posterior; -log C for the corrected estimator; -inf leaves the
        source out, for a subset that is independent of it.
    """
    x0 = queries.x0
    # No x_0 + mean, which would be kept from before the pass to here.
    with_mean = lambda a: jnp.matmul(a, mean, precision="highest")
    size = jnp.sum(x0**2, -1) + 2 * with_mean(x0) + jnp.sum(mean**2)

    def level(given):
        sums, log_source = given
        shift, others, own, whole = shifted(sums, queries, log_source)
        residual = jnp.sum(shift**2, -1)
        along = jnp.sum(shift * x0, -1) + with_mean(shift)
        return Posterior(
            trcov=jnp.maximum(others * sums.distance / whole - residual, 0),
            residual=residual,
            paired=-2 * along - residual,
            mean_square=size + 2 * along + residual,
            p_self=own / whole,
            ess=whole**2 / (others**2 * sums.square + own**2),
        )

    # One by one: shifts of all levels take as much room as the sums.
    return jax.lax.map(level, (sums, jnp.broadcast_to(log_source, sums.top.shape)))


def shifted(
    sums: Sums, queries: Queries, log_source: float | Array = 0.0
) -> tuple[Array, Array, Array, Array]:
    """mu - x_0 [S, B, D], and the weights [S, B] behind it: the factor of the other rows,
    the source's, and all of them together. Arguments as of `finish`."""
    log_source = jnp.asarray(log_source, sums.top.dtype)
    top = jnp.maximum(sums.top, log_source)
    others, own = jnp.exp(sums.top - top), jnp.exp(log_source - top)
    whole = others * sums.weight + own
    shift = sums.rows - sums.weight[..., None] * queries.x0
    return (others / whole)[..., None] * shift, others, own, whole

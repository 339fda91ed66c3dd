"""Reveal plans: the step K at which each position is filled in, drawn before any network call.

    ancestral        P(K = k) = w_k, each position by itself
    count            a random order, in T groups of n / T, one more in the first n mod T
    first_hitting    a random order, `per_call` positions at a time

The reverse process of T steps is exactly: draw K, then for k = 0, 1, ... fill in all positions
with K = k at once from f(x_k) (section 2 of the specification of arXiv:2502.09622). In
continuous time positions are hit one by one in a random order, and without a time input the
times do not matter (Zheng et al., arXiv:2409.02908): that is `count` with T = n.

In blocks, all steps of a block come after those of the block on its left. Who is revealed when
depends on neither tokens nor network, so steps that no position of a text has are never run.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt32

from lm.masked import schedules
from lm.masked.categorical import each
from lm.masked.settings import Numbers, Settings, numbers, per_block

NEVER = 2**30  # K of positions that are given.
LEAST_TABLE = 4096  # Up to so many steps need one compilation.


def table(settings: Settings, length: int) -> UInt32[np.ndarray, " size"] | tuple[()]:
    """Of ancestral, w_0 + ... + w_k in units of 2^-32 for k < S - 1, S steps of a block.

    Padded with the largest number: the size is that of few programs, not of every T. A weight
    is off by 2^-32 at most.
    """
    if settings.kind != "ancestral":
        return ()
    steps = per_block(settings, length)
    alpha = schedules.schedule(settings.schedule)
    inner = schedules.visible(alpha, settings.grid, steps)[1:-1]
    found = np.full(padded(steps), 2**32 - 1, np.uint32)
    found[: steps - 1] = np.minimum(np.rint(inner * 2.0**32), 2**32 - 1).astype(np.uint32)
    return found


def padded(steps: int) -> int:
    """The least power of two that holds so many steps, and at least `LEAST_TABLE`."""
    return max(LEAST_TABLE, 1 << (steps - 1).bit_length())


def plan(
    key: Key[Array, ""], settings: Settings, free: Bool[Array, "batch length"]
) -> Int[Array, "batch length"]:
    """K of every position.

    Args:
      key: text b's is folded from it by b.
      settings: of a planned kind, fit for the length.
      free: which positions are masked. Blocks are counted from position 0, free or not.

    Returns:
      int32; `NEVER` where not free. Steps of block b are b S ... b S + S - 1; those of
      first_hitting have gaps.
    """
    length = free.shape[1]
    data = numbers(settings, length, table(settings, length))
    return planned(each(key, len(free)), settings.kind, data, free)


@partial(jax.jit, static_argnames="kind")
def planned(
    keys: Key[Array, " batch"], kind: str, data: Numbers, free: Bool[Array, "batch length"]
) -> Int[Array, "batch length"]:
    """`plan` from the settings' data and one key per text: one program for every T."""
    length = free.shape[1]
    block = jnp.arange(length) // data.block

    def drawn(key):
        bits = jax.random.bits(key, (length,), jnp.uint32)
        inside = jnp.searchsorted(data.table, bits, side="right").astype(jnp.int32)
        # All ones in the bits would count the padding, too.
        return block * data.steps + jnp.minimum(inside, data.steps - 1)

    def ordered(key, free):
        priority = jax.random.permutation(key, length)
        rank = ranks(jnp.where(free, block * length + priority, NEVER))
        before, n = in_block(free, data.block)
        rank = rank - before
        if kind == "count":
            return block * data.steps + group(rank, n, data.steps)
        return block * length + rank // data.per_call

    k = jax.vmap(drawn)(keys) if kind == "ancestral" else jax.vmap(ordered)(keys, free)
    return jnp.where(free, k, NEVER).astype(jnp.int32)


def ranks(values: Int[Array, " length"]) -> Int[Array, " length"]:
    """The place of each value in ascending order."""
    return jnp.argsort(jnp.argsort(values))


def in_block(
    free: Bool[Array, " length"], block: Int[Array, ""]
) -> tuple[Int[Array, " length"], Int[Array, " length"]]:
    """For each position, the free ones left of its block, and those of its block."""
    length = len(free)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(free, dtype=jnp.int32)])
    start = jnp.arange(length) // block * block
    end = jnp.minimum(start + block, length)
    return before[start], before[end] - before[start]


def group(
    rank: Int[Array, "*shape"], n: Int[Array, "*shape"], steps: Int[Array, ""] | int
) -> Int[Array, "*shape"]:
    """The step of the rank-th of n positions: n // T a step, one more in the first n mod T."""
    small, extra = n // steps, n % steps
    first = extra * (small + 1)
    late = extra + (rank - first) // jnp.maximum(small, 1)
    return jnp.where(rank < first, rank // (small + 1), late)


def group_size(
    done: Int[Array, "*shape"], n: Int[Array, "*shape"], steps: Int[Array, ""] | int
) -> Int[Array, "*shape"]:
    """How many positions the step has that comes after `done` of n."""
    return n // steps + (group(done, n, steps) < n % steps)


def sizes(length: int, steps: int) -> Int[np.ndarray, " steps"]:
    """The groups of `count`: positions of each step."""
    return length // steps + (np.arange(steps) < length % steps)


def when(k: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """The number of the network call that fills a position in; -1 where it is given.

    A text's calls are its distinct steps, in their order: each text is on its own clock.
    """

    def one(k):
        order = jnp.argsort(k)
        sorted_k = k[order]
        new = jnp.concatenate([jnp.zeros(1, bool), sorted_k[1:] != sorted_k[:-1]])
        call = jnp.zeros_like(k).at[order].set(jnp.cumsum(new, dtype=k.dtype))
        return jnp.where(k == NEVER, -1, call)

    return jax.vmap(one)(k)


def calls(k: Int[Array, "batch length"]) -> Int[Array, " batch"]:
    """Network calls of each text: its distinct steps."""
    return jnp.max(when(k), axis=1) + 1

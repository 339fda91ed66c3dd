"""Block by block with a cache of keys and values: Fast-dLLM (Wu et al., arXiv:2505.22618).

At the start of a block one call reads the whole text and keeps all keys and values. Until the
block is written, further calls compute only

    prefix    the block and all that is on its right
    dual      the block

and see the others as the cache has them. With `lm.transformer`'s `block` a block sees nothing
on its right and nothing on its left changes: then both are exact, if its size divides that of
the sampler's blocks. For a model that sees both sides they are an approximation, better the
more often the cache is refreshed (sections 7 and 9 of the specification of arXiv:2502.09622).

All texts are at the same block, each on its own clock within it. What a call writes is what
`sample` would write from the same logits, with the same noise.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common import mesh as meshes
from common.errors import reject
from lm.masked import adaptive, networks, plans
from lm.masked.categorical import draw, each, fold
from lm.masked.denoiser import Denoiser
from lm.masked.reveal import over_rows
from lm.masked.sample import Result, check_prompt
from lm.masked.settings import (
    ADAPTIVE,
    QUOTA,
    Numbers,
    Settings,
    fit,
    numbers,
    rows,
    shape_of,
)
from lm.model import Model


def sample_cached(
    key: Key[Array, ""],
    model: Model,
    params: Any,
    batch: int,
    length: int,
    settings: Settings,
    mask: int,
    prompt: Int[Array, "batch length"] | Int[np.ndarray, "batch length"] | None = None,
    vocab: int | None = None,
    pad: int | None = None,
    refresh: int = 0,
    first: int | Int[Array, ""] = 0,
) -> Result:
    """Writes B texts of L tokens with a cache. Compiled whole.

    Args:
      key: of everything; text b's is folded from it by first + b.
      model: not causal.
      settings: of any kind but remask; cache is prefix or dual.
      mask: the token that hides another.
      prompt: int32, the mask where a token is to be written; None: all masks.
      vocab: V; None: mask.
      pad: a token of the prompt that stands for none, as in `networks.denoiser`.
      refresh: the whole text is read again every so many calls; 0: once per block.
      first: the number of the first text.

    Returns:
      with the calls of each text; rounds counts those of the batch, whole or not.

    Raises:
      UserError: the sizes, the settings or the prompt do not fit.
    """
    denoiser = networks.denoiser(model, mask if vocab is None else vocab, mask, pad)
    settings = fit(settings, length, denoiser.vocab)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise reject("batch", batch, "a whole number from 1 up")
    if settings.cache not in ("prefix", "dual"):
        raise reject("sampler.cache", settings.cache, "prefix or dual")
    if settings.kind == "remask":
        raise reject("sampler.kind", settings.kind, "another one with a cache")
    if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 0:
        raise reject("refresh", refresh, "a whole number from 0 up")
    if prompt is None:
        x = jnp.full((batch, length), mask, jnp.int32)
    else:
        check_prompt(prompt, batch, length, denoiser)
        x = jnp.array(prompt, jnp.int32)  # A copy: x is donated.
    return _run(
        key,
        params,
        x,
        numbers(settings, length, plans.table(settings, length)),
        jnp.int32(first),
        jnp.int32(refresh or length),
        model=model,
        denoiser=denoiser,
        settings=shape_of(settings),
        dual=settings.cache == "dual",
        block=settings.block or length,
        pad=pad,
    )


class _State(NamedTuple):
    x: Array
    when: Array  # The text's call that wrote a position.
    calls: Array  # Of each text.
    rounds: Array  # Of the batch.


@partial(
    jax.jit,
    static_argnames=("model", "denoiser", "settings", "dual", "block", "pad"),
    donate_argnames="x",
)
def _run(
    key, params, x, data, first, refresh, *, model, denoiser, settings, dual, block, pad
):  # fmt: skip
    x = meshes.shared(x)
    batch, length = x.shape
    blocks = length // block
    write = _writer(each(key, batch, first), denoiser, params, x, settings, data, block)
    where = networks.places(x, pad)
    block_of = jnp.arange(length) // block

    def current(x):
        """The leftmost block in which any text has a mask."""
        return jnp.min(jnp.where(x == denoiser.mask, block_of, blocks))

    def inside(width, start, s, cache):
        """Calls that compute `width` slots from `start` on, until the block is written."""
        slots = jnp.minimum(start + jnp.arange(width), length - 1)

        def body(carry):
            s, cache = carry
            h, cache = model.window(params, cache, s.x[:, slots], start, *where)
            return write(s, h[:, :block], start), cache

        fresh = s.rounds - 1  # The call that filled the cache.
        going = lambda carry: (
            (current(carry[0].x) == start // block) & (carry[0].rounds - fresh < refresh)
        )
        return jax.lax.while_loop(going, body, (s, cache))[0]

    def body(s):
        number = current(s.x)
        start = number * block
        h, cache = model.fill(params, s.x, *where)
        s = write(s, jax.lax.dynamic_slice_in_dim(h, start, block, axis=1), start)
        if dual:
            return inside(block, start, s, cache)
        # Few programs, not one per block: what is on the right is rounded up to 2^j blocks.
        sizes = [2**j for j in range(blocks.bit_length()) if 2**j < blocks] + [blocks]
        which = jnp.searchsorted(jnp.array(sizes), blocks - number)
        programs = [partial(inside, size * block) for size in sizes]
        return jax.lax.switch(which, programs, start, s, cache)

    nothing = jnp.zeros(batch, jnp.int32)
    start = _State(x, jnp.full(x.shape, -1), nothing, jnp.int32(0))
    s = jax.lax.while_loop(lambda s: current(s.x) < blocks, body, start)
    return meshes.replicate(Result(s.x, s.calls, s.rounds, s.when, None, jnp.int32(0)))


def _writer(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    settings: Settings,
    data: Numbers,
    block: int,
):
    """(state, features of the block at start, start) -> the state after this call."""
    length = x.shape[1]
    width = rows(settings, len(x), block, denoiser.vocab)
    cut = lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, block, axis=1)
    put = lambda a, new, start: jax.lax.dynamic_update_slice_in_dim(a, new, start, axis=1)
    head = partial(over_rows, denoiser, params)

    def finish(s, start, active, take, candidate):
        """Active and take are [B, L], candidates are those of the block."""
        x = jnp.where(take, put(s.x, candidate, start), s.x)
        when = jnp.where(take, s.calls[:, None], s.when)
        return _State(x, when, s.calls + jnp.any(active, axis=1), s.rounds + 1)

    def unwritten(s, start):
        return (s.x == denoiser.mask) & (jnp.arange(length) // block == start // block)

    if settings.kind in ADAPTIVE:
        settings = settings._replace(tau=data.tau, gamma=data.gamma)
        free = x == denoiser.mask
        total = jax.vmap(lambda row: plans.in_block(row, data.block)[1])(free)

        def choose(s, h: Float[Array, "batch n features"], start):
            active = unwritten(s, start)
            n = jnp.max(jnp.where(active, total, 0), axis=1)
            done = n - jnp.sum(active, axis=1, dtype=jnp.int32)
            key, greedy = fold(keys, s.calls), False
            if settings.final == "greedy" and settings.kind in QUOTA:
                step = start // block * data.steps + plans.group(done, n, data.steps)
                greedy = jnp.broadcast_to((step == data.last)[:, None], (len(x), width))

            def use(log_f, at):
                return adaptive.scored(settings, key, log_f, at + start, greedy)

            into = cut(jnp.zeros_like(x), start), jnp.zeros((len(x), block), score_type)
            candidate, score = head(h, cut(active, start), width, use, into)
            score = put(jnp.zeros(x.shape, score_type), score, start)
            quota = plans.group_size(done, n, data.steps)
            take = adaptive.taken(settings, key, score, active, quota)
            return finish(s, start, active, take, candidate)

        shape = jax.eval_shape(denoiser.hidden, params, x)
        shape = jax.eval_shape(denoiser.head, params, shape)
        score_type = jnp.promote_types(shape.dtype, jnp.float32)
        return choose

    k = plans.planned(fold(keys, 0), settings.kind, data, x == denoiser.mask)
    when, last = plans.when(k), k == data.last
    keys = fold(keys, 1)

    def reveal(s, h: Float[Array, "batch n features"], start):
        active = unwritten(s, start)
        take = active & (when == s.calls[:, None])

        def use(log_f, at):
            greedy = False
            if settings.final == "greedy" and settings.kind != "first_hitting":
                greedy = jnp.take_along_axis(last, at + start, axis=1)
            return (draw(keys, settings, log_f, at + start, greedy),)

        (token,) = head(h, cut(take, start), width, use, (cut(s.x, start),))
        return finish(s, start, active, take, token)

    return reveal

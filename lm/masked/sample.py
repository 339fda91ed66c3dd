"""Texts from a denoiser, by any of the samplers, in one program per shape and kind.

Steps, schedule, grid, block, tau, gamma and eta are data: changing them compiles nothing (up
to `plans.LEAST_TABLE` steps). A text depends on its key and its number only, not on the size
of the batch nor on the devices that share it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from common import mesh as meshes
from common.errors import UserError, reject
from lm.masked import adaptive, plans, remask, reveal
from lm.masked.categorical import each, fold
from lm.masked.denoiser import Denoiser
from lm.masked.settings import ADAPTIVE, Settings, fit, numbers, shape_of


class Result(NamedTuple):
    """What a sampler wrote and what it cost.

    Attributes:
      tokens: int32 [B, L].
      calls: network calls that each text needed, int32 [B].
      rounds: network calls of the batch, int32 []: the most that a text needed, or more.
      when: the text's call that wrote a position, int32 [B, L]; -1: it was given.
      history: of remask, if asked for: x before and after each step, int32 [T + 1, B, L].
        Of the other kinds `frames` makes it from `when`.
      clipped: of remask, steps whose eta was above sigma_max, int32 []; else 0.
    """

    tokens: Any
    calls: Any
    rounds: Any
    when: Any
    history: Any = None
    clipped: Any = 0


def sample(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Any,
    batch: int,
    length: int,
    settings: Settings,
    prompt: Int[Array, "batch length"] | Int[np.ndarray, "batch length"] | None = None,
    history: bool = False,
    first: int | Int[Array, ""] = 0,
) -> Result:
    """Writes B texts of L tokens. Compiled whole; may be part of a larger program.

    Args:
      key: of everything; text b's is folded from it by first + b.
      denoiser: static, made once.
      params: of the denoiser.
      settings: of `settings.settings`.
      prompt: int32, the mask where a token is to be written; the others stay as they are.
        None: all masks.
      history: keep x of every step of remask; then T is part of the shape.
      first: the number of the first text: batches of one key then make one set of texts,
        whatever their sizes.

    Returns:
      on every device of a mesh in use, whose axis "data" shares the texts.

    Raises:
      UserError: the sizes, the settings or the prompt do not fit.
    """
    settings = fit(settings, length, denoiser.vocab)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise reject("batch", batch, "a whole number from 1 up")
    if settings.cache != "none":
        raise reject("sampler.cache", settings.cache, "none: a denoiser has no cache")
    if prompt is None:
        x = jnp.full((batch, length), denoiser.mask, jnp.int32)
    else:
        check_prompt(prompt, batch, length, denoiser)
        x = jnp.array(prompt, jnp.int32)  # A copy: x is donated.
    if settings.kind == "remask":
        data = remask.table(settings)
        frames = settings.steps if history else 0
    else:
        data = numbers(settings, length, plans.table(settings, length))
        frames = 0
    return _run(
        key,
        params,
        x,
        data,
        jnp.int32(first),
        denoiser=denoiser,
        settings=shape_of(settings),
        frames=frames,
    )


def written(key, params, x, data, first, *, denoiser, settings, frames) -> Result:
    """`sample` with its settings as data, to be traced: arguments as `sample` makes them."""
    x = meshes.shared(x)
    keys = each(key, len(x), first)
    if settings.kind == "remask":
        found = remask.remask(keys, denoiser, params, x, settings, data, frames)
        tokens, when, calls, rounds, history = found
        return meshes.replicate(Result(tokens, calls, rounds, when, history, data.clipped))
    if settings.kind in ADAPTIVE:
        tokens, when = adaptive.adapt(keys, denoiser, params, x, settings, data)
    else:
        k = plans.planned(fold(keys, 0), settings.kind, data, x == denoiser.mask)
        when, greedy = plans.when(k), None
        if settings.final == "greedy" and settings.kind != "first_hitting":
            greedy = k == data.last
        tokens = reveal.reveal(fold(keys, 1), denoiser, params, x, when, settings, greedy)
    calls = jnp.max(when, axis=1) + 1
    found = Result(tokens, calls, jnp.max(calls), when, None, jnp.int32(0))
    return meshes.replicate(found)


_run = partial(
    jax.jit, static_argnames=("denoiser", "settings", "frames"), donate_argnames="x"
)(written)


def check_prompt(prompt: Any, batch: int, length: int, denoiser: Denoiser) -> None:
    """Refuses a prompt of another shape, or with tokens that are none.

    A prompt that is being traced has its shape checked only.

    Raises:
      UserError: with the first offending place.
    """
    if jnp.ndim(prompt) != 2 or prompt.shape[1] > length:
        raise UserError(
            f"The prompt has the shape {prompt.shape}, but must have at most {length} tokens "
            f"in each of {batch} rows."
        )
    if prompt.shape != (batch, length):
        raise UserError(
            f"The prompt has the shape {prompt.shape}, but must be {(batch, length)}, with the "
            f"mask, {denoiser.mask}, where tokens are to be written."
        )
    others = [denoiser.mask] + ([] if denoiser.pad is None else [denoiser.pad])
    said = f"tokens are 0 to {denoiser.vocab - 1}, and {denoiser.mask} is the mask"
    check_tokens(prompt, denoiser.vocab, others, said)


def check_tokens(prompt: Any, vocab: int, others: list[int], said: str) -> None:
    """Refuses a prompt with tokens that are neither below V nor among `others`.

    Of a prompt that is being traced, or lies on other hosts, nothing is known.

    Raises:
      UserError: with the first offending place, and what `said` says of tokens.
    """
    if isinstance(prompt, jax.core.Tracer):
        return
    if isinstance(prompt, jax.Array) and not prompt.is_fully_addressable:
        return
    host = np.asarray(prompt)
    known = (host >= 0) & (host < vocab) | np.isin(host, others)
    if not known.all():
        row, place = np.argwhere(~known)[0]
        raise UserError(
            f"The prompt has the token {host[row, place]} in row {row} at {place}, but {said}."
        )


def prompted(
    prefix: Any, suffix: Any, batch: int, length: int, mask: int
) -> Int[np.ndarray, "batch length"]:
    """A prompt for `sample`: given tokens at the start and at the end, masks between.

    Args:
      prefix: tokens [t], or [B, t]; None or empty: none.
      suffix: the same, at the end.

    Raises:
      UserError: they are longer than the text, or do not belong to B rows.
    """
    ends = []
    for name, part in (("prefix", prefix), ("suffix", suffix)):
        part = np.zeros(0, np.int32) if part is None else np.asarray(part)
        if part.size == 0:
            part = part.reshape(*part.shape[:-1], 0).astype(np.int32)
        if part.ndim not in (1, 2) or not np.issubdtype(part.dtype, np.integer):
            raise UserError(f"The {name} must be whole numbers, [t] or [{batch}, t].")
        if part.ndim == 2 and len(part) != batch:
            raise UserError(f"The {name} has {len(part)} rows, but there are {batch} texts.")
        ends.append(np.broadcast_to(part, (batch, part.shape[-1])))
    left, right = ends
    given = left.shape[1] + right.shape[1]
    if given > length:
        raise UserError(f"The prompt has {given} tokens, but a text has {length}.")
    x = np.full((batch, length), mask, np.int32)
    x[:, : left.shape[1]] = left
    x[:, length - right.shape[1] :] = right
    return x


def frames(result: Result, mask: int) -> Int[np.ndarray, "frames batch length"]:
    """x before and after every call of the batch, [rounds + 1, B, L], on the host."""
    if result.history is not None:
        return np.asarray(result.history)
    tokens, when = np.asarray(result.tokens), np.asarray(result.when)
    shown = np.arange(int(result.rounds) + 1)[:, None, None] > when
    return np.where(shown, tokens, np.int32(mask))

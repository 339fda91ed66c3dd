"""Carries out a reveal plan in one program: skips, and gathers before the head.

    for each call r:  h = hidden(x);  for positions of call r, `rows` at a time:
                      x_i ~ f_i = head(h_i)

A text's calls are the distinct steps of its plan, so a batch makes as many calls as its slowest
text has distinct steps, at most min(T, L) (section 9 of the specification). Logits exist for
the positions only that are filled in now. Both loops have traced bounds: one compilation serves
every T and every group size.

`literal` is the reverse process as it is written down, all T steps and all logits in each: the
same law, for comparison.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lm.masked import schedules
from lm.masked.categorical import draw, each, fold
from lm.masked.denoiser import Denoiser, denoise
from lm.masked.plans import padded
from lm.masked.settings import Settings, rows


def over_rows(
    denoiser: Denoiser,
    params: Any,
    features: Float[Array, "batch length features"],
    chosen: Bool[Array, "batch length"],
    width: int,
    use: Callable,
    into: tuple,
) -> tuple:
    """Calls the head for the chosen positions only, `width` of each text at a time.

    Args:
      features: of `denoiser.hidden`.
      chosen: the positions; each text may have another number of them.
      use: (log f [B, width, V], positions [B, width]) -> arrays [B, width].
      into: arrays [B, L].

    Returns:
      `into` with what `use` found at the chosen positions.
    """
    length = chosen.shape[1]
    count = jnp.sum(chosen, axis=1, dtype=jnp.int32)
    listed = jax.vmap(lambda row: jnp.nonzero(row, size=length, fill_value=length)[0])(chosen)
    put = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))

    def body(carry):
        first, into = carry
        place = first + jnp.arange(width)
        at = listed[:, jnp.minimum(place, length - 1)]
        inside = jnp.minimum(at, length - 1)
        part = jnp.take_along_axis(features, inside[..., None], axis=1)
        found = use(denoiser.head(params, part), inside)
        # Past the end of a text's list nothing is written.
        target = jnp.where(place < count[:, None], at, length)
        into = tuple(put(a, target, new) for a, new in zip(into, found, strict=True))
        return first + width, into

    widest = jnp.max(count)
    return jax.lax.while_loop(lambda c: c[0] < widest, body, (jnp.int32(0), into))[1]


def reveal(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    when: Int[Array, "batch length"],
    settings: Settings,
    greedy: Bool[Array, "batch length"] | None = None,
) -> Int[Array, "batch length"]:
    """Fills x in, call by call.

    Args:
      keys: of the texts.
      x: the mask where when >= 0.
      when: of `plans.when`.
      settings: how tokens are drawn, and rows.
      greedy: where the most probable token is taken; None: nowhere.
    """
    width = rows(settings, *x.shape, denoiser.vocab)
    rounds = jnp.max(when) + 1

    def use(log_f, at):
        best = False if greedy is None else jnp.take_along_axis(greedy, at, axis=1)
        return (draw(keys, settings, log_f, at, best),)

    def body(carry):
        r, x = carry
        features = denoiser.hidden(params, x)
        (x,) = over_rows(denoiser, params, features, when == r, width, use, (x,))
        return r + 1, x

    return jax.lax.while_loop(lambda c: c[0] < rounds, body, (jnp.int32(0), x))[1]


def literal(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    settings: Settings,
) -> Int[Array, "batch length"]:
    """The reverse process step by step: T calls, logits of all positions in each.

    From t to s a masked position stays so with probability (1 - alpha_s) / (1 - alpha_t), else
    it gets a token from f. T is data: compiled once for up to `plans.LEAST_TABLE` steps. x is
    donated.

    Args:
      key: of all draws.
      x: the mask where free.
      settings: T, schedule and grid, and how tokens are drawn; no blocks.
    """
    shown = ratios(settings)
    table = np.zeros(padded(settings.steps), np.float32)
    table[: settings.steps] = shown
    plain = settings._replace(steps=1, schedule="linear", grid="uniform")
    return _literal(key, denoiser, params, x, plain, table, np.int32(settings.steps))


def ratios(settings: Settings) -> Float[np.ndarray, " steps"]:
    """(alpha_s - alpha_t) / (1 - alpha_t) of each step, float64; 1 at the last."""
    alpha = schedules.schedule(settings.schedule)
    seen = schedules.visible(alpha, settings.grid, settings.steps)
    return np.diff(seen) / (1 - seen[:-1])


@partial(jax.jit, static_argnames=("denoiser", "settings"), donate_argnames="x")
def _literal(key, denoiser, params, x, settings, table, steps):
    batch, length = x.shape
    positions = jnp.broadcast_to(jnp.arange(length), x.shape)
    where, what = (
        each(jax.random.fold_in(key, 0), batch),
        each(jax.random.fold_in(key, 1), batch),
    )

    def body(k, x):
        u = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(fold(where, k))
        shown = (x == denoiser.mask) & (u < table[k])
        greedy = (k == steps - 1) if settings.final == "greedy" else False
        token = draw(fold(what, k), settings, denoise(denoiser, params, x), positions, greedy)
        return jnp.where(shown, token, x)

    return jax.lax.fori_loop(0, steps, body, x)

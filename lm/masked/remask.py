"""ReMDM: a sampler that takes tokens back (Wang et al., arXiv:2503.00307).

From t to s < t, at once and independently:

    visible    masked again with chance sigma
    masked     filled in from f with chance (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)
    0 <= sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t)

so a position is visible with chance alpha at every step, whatever sigma is. With s = 0
sigma_max is 0 and every mask is filled in.

    cap        sigma = min(eta, sigma_max)
    rescale    sigma = eta sigma_max
    conf       sigma_i = sigma_max softmax(-confidence)_i over the visible positions of a text,
               confidence = f_i(x_i) when x_i was written
    loop       alpha rises to alpha_on at t_on, stays, with cap, until t_off, then goes on to 1

With conf about sigma_max tokens of a text are taken back, and as many masked ones are filled in
more: (alpha_s - alpha_t) / (1 - alpha_t) + sigma_max / (number masked). So the expected number
of visible tokens is alpha L; nothing is taken back while nothing is masked.

Prompts are never masked. Steps in which a text writes nothing need no call, and a text goes
through them by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lm.masked import schedules
from lm.masked.categorical import draw, fold
from lm.masked.denoiser import Denoiser
from lm.masked.plans import padded
from lm.masked.reveal import over_rows
from lm.masked.settings import Settings, rows


class Table(NamedTuple):
    """The steps as data.

    Attributes:
      shown: chance of a masked position to be filled in, float32, padded.
      sigma: chance of a visible one to be masked; of conf, sigma_max.
      steps: T, int32 [].
      clipped: steps whose eta was above sigma_max, int32 [].
    """

    shown: Any
    sigma: Any
    steps: Any
    clipped: Any


class Written(NamedTuple):
    """What the texts became.

    Attributes:
      tokens: int32 [B, L].
      when: the text's call that wrote each token, int32 [B, L]; -1 where given.
      calls: of each text, int32 [B].
      rounds: network calls of the batch, int32 [].
      history: x before and after each step, int32 [T + 1, B, L], or None.
    """

    tokens: Any
    when: Any
    calls: Any
    rounds: Any
    history: Any


def alphas(settings: Settings) -> Float[np.ndarray, " times"]:
    """alpha(t_0) = 0 ... alpha(t_T) = 1, float64; of loop, with its level part."""
    schedule = schedules.schedule(settings.schedule)
    if settings.remask != "loop":
        return schedules.visible(schedule, settings.grid, settings.steps)
    t = schedules.grid(settings.grid, settings.steps)
    on, off = settings.t_on, settings.t_off
    alpha = lambda t: np.asarray(schedule.alpha(np.clip(t, 0, 1)), np.float64)
    rising = settings.alpha_on * alpha((t - on) / (1 - on))
    ending = settings.alpha_on + (1 - settings.alpha_on) * alpha(t / off if off else t * 0)
    found = np.where(t > on, rising, np.where(t >= off, settings.alpha_on, ending))
    found[[0, -1]] = 0, 1
    return found


def table(settings: Settings) -> Table:
    """The chances of every step, computed in float64 on the host."""
    seen = alphas(settings)
    before, after = seen[:-1], seen[1:]
    largest = np.minimum(1, (1 - after) / np.maximum(before, 1e-300))
    clipped = np.zeros(len(before), bool)
    if settings.remask == "rescale":
        sigma = settings.eta * largest
    elif settings.remask == "conf":
        sigma = largest
    else:
        asked = np.full(len(before), settings.eta)
        if settings.remask == "loop":
            asked[before != after] = 0
        sigma = np.minimum(asked, largest)
        clipped = (asked > largest)[:-1]  # Nobody expects the last step to take back.
    again = 0 if settings.remask == "conf" else sigma * before
    shown = np.clip((after - before + again) / (1 - before), 0, 1)
    shown[-1] = 1
    size = padded(len(before))
    fill = lambda a: np.pad(a, (0, size - len(a))).astype(np.float32)
    return Table(fill(shown), fill(sigma), np.int32(len(before)), np.int32(clipped.sum()))


def remask(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    settings: Settings,
    data: Table,
    frames: int = 0,
) -> Written:
    """Fills x in, with second thoughts.

    Args:
      keys: of the texts.
      x: the mask where free.
      data: of `table`.
      frames: T to keep x of every step, too: then all texts go step by step. 0: not.
    """
    width = rows(settings, *x.shape, denoiser.vocab)
    free = x == denoiser.mask
    where, what = fold(keys, 0), fold(keys, 1)

    def step(key, k, x, free, confidence):
        """What step k of a text fills in, and what it masks."""
        u = jax.random.uniform(jax.random.fold_in(key, k), x.shape)
        masked, on = x == denoiser.mask, k < data.steps
        shown, sigma = data.shown[k], data.sigma[k]
        if settings.remask == "conf":
            visible, left = free & ~masked, jnp.sum(masked)
            share = jnp.where(visible, jnp.exp(-confidence), 0.0)
            some = jnp.any(visible) & (left > 0)
            shown = shown + jnp.where(some, sigma, 0.0) / jnp.maximum(left, 1)
            sigma = jnp.where(some, sigma * share / jnp.maximum(jnp.sum(share), 1e-30), 0.0)
        return masked & (u < shown) & on, free & ~masked & (u < sigma) & on

    def advance(key, k, x, free, confidence):
        """From step k to the first of a text that fills something in; T if there is none."""

        def idle(k, x, reveal, hide):
            x = jnp.where(hide, denoiser.mask, x)
            return (k + 1, x, *step(key, k + 1, x, free, confidence))

        start = (k, x, *step(key, k, x, free, confidence))
        if frames:
            return start
        going = lambda c: (c[0] < data.steps) & ~jnp.any(c[2])
        return jax.lax.while_loop(going, lambda c: idle(*c), start)

    def planned(k, x, confidence):
        return jax.vmap(advance)(where, k, x, free, confidence)

    def body(carry):
        (k, x, reveal, hide), confidence, found = carry
        key = fold(what, k)

        def use(log_f, at):
            greedy = False
            if settings.final == "greedy":
                greedy = jnp.broadcast_to((k == data.steps - 1)[:, None], at.shape)
            token = draw(key, settings, log_f, at, greedy)
            chosen = jnp.take_along_axis(log_f, token[..., None], axis=-1)[..., 0]
            return token, jnp.exp(chosen.astype(jnp.float32))

        features = denoiser.hidden(params, x)
        into = x, confidence
        x, confidence = over_rows(denoiser, params, features, reveal, width, use, into)
        x = jnp.where(hide, denoiser.mask, x)
        found = found._replace(
            tokens=x,
            when=jnp.where(reveal, found.calls[:, None], found.when),
            calls=found.calls + jnp.any(reveal, axis=1),
            rounds=found.rounds + 1,
        )
        if frames:
            found = found._replace(history=found.history.at[k[0] + 1].set(x))
        return planned(k + 1, x, confidence), confidence, found

    batch = len(x)
    history = jnp.broadcast_to(x, (frames + 1, *x.shape)) if frames else None
    none = jnp.full(x.shape, -1, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.int32(0)
    confidence = jnp.zeros(x.shape)
    start = planned(jnp.zeros(batch, jnp.int32), x, confidence)
    carry = start, confidence, Written(x, *none, history)
    going = lambda carry: jnp.any(carry[0][0] < data.steps)
    return jax.lax.while_loop(going, body, carry)[2]

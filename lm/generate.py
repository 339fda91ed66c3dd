"""Text from a language model: token after token, with a cache of keys and values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common import mesh as meshes
from common.errors import UserError, reject
from lm.model import Model

SETTINGS = ("temperature", "top_k", "top_p", "stop", "vocab")


@partial(jax.jit, static_argnames=("model", "steps", *SETTINGS))
def generate(
    model: Model,
    params: Any,
    key: jax.Array,
    prompt: Int[Array, "batch t"],
    steps: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    vocab: int | None = None,
) -> Int[Array, "batch t+{steps}"]:
    """Continues every row of the prompt by `steps` tokens. Compiled whole.

    Args:
      model: of `transformer(...)`, made once: another one is another compilation.
      params: its parameters.
      key: of the draws; greedy generation does not look at it.
      prompt: [B, t], t >= 1, rows of equal length.
      steps: how many tokens to add.
      temperature: the logits' divisor; 0: always the most probable token (the first of
        equals).
      top_k: draw among the k most probable; 0: all.
      top_p: of those, draw among the fewest most probable whose probability reaches top_p.
      stop: a token after which a row only repeats it; one in the prompt does not count.
      vocab: tokens from this number on are never drawn; None: all may be.

    Returns:
      [B, t + steps]: the prompt and what follows, in the prompt's dtype; the same on every
      device of a mesh in use.

    Raises:
      UserError: a setting is out of range.
    """
    batch, t = prompt.shape
    if t < 1:
        raise UserError("The prompt has 0 tokens, but must have at least 1.")
    if steps < 0:
        raise reject("sample.steps", steps, "a whole number from 0 up")
    if not 0 <= temperature < float("inf"):
        raise reject("sample.temperature", temperature, "a finite number from 0 up")
    if top_k < 0:
        raise reject("sample.top_k", top_k, "a whole number from 0 up")
    if not 0 < top_p <= 1:
        raise reject("sample.top_p", top_p, "above 0 and at most 1")
    if steps == 0:
        return meshes.replicate(prompt)

    def draw(key, logits, done):
        if vocab is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            kept = restrict(logits / temperature, top_k, top_p)
            # float32 noise of one uniform would leave out what is rarer than 1e-6.
            token = jax.random.categorical(key, kept, mode="high")
        token = token.astype(prompt.dtype)
        if stop is None:
            return token, done
        return jnp.where(done, stop, token).astype(prompt.dtype), done | (token == stop)

    def body(carry, this):
        cache, token, done = carry
        key, position = this
        logits, cache = model.extend(params, cache, token[:, None], position[None, None])
        token, done = draw(key, logits[:, 0], done)
        return (cache, token, done), token

    keys = jax.random.split(key, steps)
    # The last token is never fed back: nobody asks for what follows it.
    cache = model.start(batch, t + steps - 1)
    logits, cache = model.extend(params, cache, prompt, jnp.arange(t)[None])
    token, done = draw(keys[0], logits[:, -1], jnp.zeros(batch, bool))
    positions = jnp.arange(t, t + steps - 1)
    _, rest = jax.lax.scan(body, (cache, token, done), (keys[1:], positions))
    return meshes.replicate(jnp.concatenate([prompt, token[:, None], rest.T], axis=1))


def sliding(
    model: Model,
    params: Any,
    key: jax.Array,
    prompt: Int[np.ndarray, "batch t"],
    steps: int,
    context: int,
    **settings,
) -> Int[np.ndarray, "batch t+{steps}"]:
    """`generate` past the length that a model was trained on: no position beyond it is seen.

    A window grows until it has `context` positions; its last half begins the next one. All
    windows but the first have one shape, so there are at most two compilations.

    Args:
      context: the longest row in training, at least 1. Of a longer prompt only its end is
        seen.
      settings: as of `generate`, by name.

    Returns:
      as `generate`, on the host.

    Raises:
      UserError: a setting is out of range.
    """
    keep = max(1, context // 2)
    row, left = prompt, steps
    stop = settings.get("stop")
    done = np.zeros(len(row), bool)
    seen = row[:, -context:]
    # The last token of a window is never fed back, so it needs no position of its own.
    new = min(steps, context - seen.shape[1] + 1)
    while True:
        key, this = jax.random.split(key)
        found = np.asarray(generate(model, params, this, seen, new, **settings))
        found = found[:, seen.shape[1] :][:, :left]
        if stop is not None:
            found = np.where(done[:, None], stop, found)
            done |= (found == stop).any(axis=1)
        row, left = np.concatenate([row, found], axis=1), left - found.shape[1]
        if left <= 0:
            return row
        if done.all():
            return np.pad(row, ((0, 0), (0, left)), constant_values=stop)
        seen = row[:, -keep:]
        new = context - keep + 1


def restrict(
    logits: Float[Array, "*batch vocab"], top_k: int, top_p: float
) -> Float[Array, "*batch vocab"]:
    """Logits with -inf where a token may not be drawn; among equals the first ones stay.

    First the `top_k` most probable stay (0: all), then, with their probabilities made to
    sum up to one, the shortest list from the top whose sum is at least `top_p` (nucleus
    sampling, Holtzman et al., arXiv:1904.09751). One token always stays.
    """
    if top_k == 0 and top_p == 1:
        return logits
    vocab = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    descending = jnp.take_along_axis(logits, order, axis=-1)
    kept = jnp.arange(vocab) < (top_k or vocab)
    if top_p < 1:
        p = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
        above = jnp.cumsum(p, axis=-1) - p
        # The most probable token stays however little of it was asked for.
        kept = kept & ((above < top_p) | (jnp.arange(vocab) == 0))
    kept = jnp.broadcast_to(kept, logits.shape)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)

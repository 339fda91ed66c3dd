"""Text from a language model: token after token, with a cache of keys and values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import reject
from lm.transformer import Model


@partial(jax.jit, static_argnames=("model", "steps", "temperature", "top_k", "top_p", "stop"))
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

    Returns:
      [B, t + steps]: the prompt and what follows, in the prompt's dtype.

    Raises:
      UserError: a setting is out of range.
    """
    batch, t = prompt.shape
    if t < 1:
        raise reject("generate.prompt", t, "at least one token long")
    if steps < 0:
        raise reject("generate.steps", steps, "a whole number from 0 up")
    if not 0 <= temperature < float("inf"):
        raise reject("generate.temperature", temperature, "a finite number from 0 up")
    if top_k < 0:
        raise reject("generate.top_k", top_k, "a whole number from 0 up")
    if not 0 < top_p <= 1:
        raise reject("generate.top_p", top_p, "above 0 and at most 1")
    if steps == 0:
        return prompt

    def draw(key, logits, done):
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            kept = restrict(logits / temperature, top_k, top_p)
            token = jax.random.categorical(key, kept)
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
    return jnp.concatenate([prompt, token[:, None], rest.T], axis=1)


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

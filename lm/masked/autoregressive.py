"""The autoregressive model beside a masked one: the same blocks, read left to right.

    -log p(x) = sum_i -log softmax(logits(m, x_0 ... x_{i-1}))[x_i]

The input is the text shifted right, with the mask m = V as the start symbol, which is no class
(section 3 of the specification of arXiv:2502.09622). `ar` keeps keys and values, `ar_nocache`
reads the whole row for every token, as a diffusion model does: for an honest comparison. Both
write the same texts from the same key, whatever the size of the batch is.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common import mesh as meshes
from common.errors import UserError, reject
from lm.masked.categorical import draw, each
from lm.masked.denoiser import by_chunks
from lm.masked.sample import Result, check_tokens
from lm.masked.settings import Settings
from lm.model import Model


def token_losses(
    model: Model,
    params: Any,
    x: Int[Array, "batch length"],
    start: int,
    vocab: int | None = None,
) -> Float[Array, "batch length"]:
    """-log p(x_i | x_0 ... x_{i-1}) in nats.

    Args:
      model: causal.
      x: tokens below V.
      start: the token before the text.
      vocab: V, logits from V on are left out; None: start.
    """
    vocab = start if vocab is None else vocab

    def of(h, x):
        logits = model.head(params, h)[..., :vocab]
        found = jnp.take_along_axis(logits, x[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - found

    return by_chunks(of, model.hidden(params, _shifted(x, start)), x, vocab)


def log_prob(
    model: Model,
    params: Any,
    x: Int[Array, "batch length"],
    start: int,
    vocab: int | None = None,
) -> Float[Array, " batch"]:
    """log p(x) in nats; arguments as of `token_losses`."""
    return -jnp.sum(token_losses(model, params, x, start, vocab), axis=1)


def ar(
    key: Key[Array, ""],
    model: Model,
    params: Any,
    batch: int,
    length: int,
    settings: Settings,
    start: int,
    vocab: int | None = None,
    prompt: Int[Array, "batch t"] | Int[np.ndarray, "batch t"] | None = None,
    stop: int | None = None,
    first: int | Int[Array, ""] = 0,
    cached: bool = True,
) -> Result:
    """Writes B texts of L tokens from left to right. Compiled whole.

    Args:
      key: of everything; text b's is folded from it by first + b.
      model: causal.
      settings: temperature, top_k and top_p; the others mean nothing here.
      start: the token before the text, V; never drawn unless `vocab` says so.
      vocab: V, tokens from V on are never drawn; None: start.
      prompt: int32, the first tokens of every text; None: none.
      stop: a token after which a text only repeats it, without calls; the batch ends when
        all texts have. One in the prompt does not count. None: there is none.
      first: the number of the first text.
      cached: with a cache of keys and values.

    Returns:
      calls of a text are its tokens that were drawn; `when` is -1 where none was.

    Raises:
      UserError: the sizes, the settings or the prompt do not fit.
    """
    for name, value in (("batch", batch), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise reject(name, value, "a whole number from 1 up")
    vocab = start if vocab is None else vocab
    if not (0 <= start < model.vocab and 1 <= vocab <= model.vocab):
        allowed = f"at least {max(start + 1, vocab)}, with a row for every token"
        raise reject("model.vocab", model.vocab, allowed)
    if settings.top_k > vocab:
        raise reject("sampler.top_k", settings.top_k, f"at most {vocab}, the vocabulary")
    if prompt is None:
        prompt = jnp.zeros((batch, 0), jnp.int32)
    if prompt.shape[0] != batch or prompt.shape[1] > length:
        raise UserError(
            f"The prompt has the shape {prompt.shape}, but must have at most {length} tokens "
            f"in each of {batch} rows."
        )
    check_tokens(prompt, vocab, [], f"tokens are 0 to {vocab - 1}")
    return _run(
        key,
        params,
        jnp.asarray(prompt, jnp.int32),
        jnp.int32(-1 if stop is None else stop),
        jnp.int32(first),
        cached=cached,
        model=model,
        length=length,
        settings=Settings(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        ),
        start=start,
        vocab=vocab,
    )


def ar_nocache(*arguments: Any, **rest: Any) -> Result:
    """`ar` without a cache: every call reads all L positions, and the head one of them."""
    return ar(*arguments, **rest, cached=False)


@partial(jax.jit, static_argnames=("cached", "model", "length", "settings", "start", "vocab"))
def _run(key, params, prompt, stop, first, *, cached, model, length, settings, start, vocab):
    batch, given = prompt.shape
    keys = each(key, batch, first)
    x = jnp.full((batch, length), jnp.maximum(stop, 0)).at[:, :given].set(prompt)
    x = meshes.shared(x)
    # The start symbol is no part of the text: token i is written from the row's first i + 1.
    row = _shifted(x, start)

    def by_cache(carry, i):
        x, cache = carry
        token = jnp.where(i == 0, start, x[:, jnp.maximum(i - 1, 0)])
        at = jnp.full((1, 1), i)
        logits, cache = model.extend(params, cache, token[:, None], at)
        return logits, cache

    def by_row(carry, i):
        x, cache = carry
        h = model.hidden(params, _shifted(x, start))
        return model.head(params, jax.lax.dynamic_slice_in_dim(h, i, 1, axis=1)), cache

    read, cache = by_row, ()
    if cached:
        read, cache = by_cache, model.start(batch, length)
        if 0 < given < length:
            _, cache = model.extend(params, cache, row[:, :given], jnp.arange(given)[None])

    def body(carry):
        i, x, cache, done, when = carry
        logits, cache = read((x, cache), i)
        at = jnp.full((batch, 1), i)
        token = draw(keys, settings, logits[..., :vocab], at)[:, 0]
        x = x.at[:, i].set(jnp.where(done, stop, token))
        when = when.at[:, i].set(jnp.where(done, -1, i - given))
        return i + 1, x, cache, done | (token == stop), when

    begin = jnp.int32(given), x, cache, jnp.zeros(batch, bool), jnp.full(x.shape, -1)
    unfinished = lambda carry: (carry[0] < length) & ~jnp.all(carry[3])
    i, x, _, _, when = jax.lax.while_loop(unfinished, body, begin)
    calls = jnp.max(when, axis=1) + 1
    return meshes.replicate(Result(x, calls, i - given, when, None, jnp.int32(0)))


def _shifted(x: Int[Array, "batch length"], start: int) -> Int[Array, "batch length"]:
    """The row that a causal model reads: the start symbol, then all but the last token."""
    return jnp.concatenate([jnp.full_like(x[:, :1], start), x[:, :-1]], axis=1)

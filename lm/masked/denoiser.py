"""What every sampler, objective and metric takes: a denoiser, never a model class.

    log f(x_t)[i, v]    log-probability of the clean token v at position i, given the visible

The masked positions of a text matter only; at visible ones a denoiser may say anything, and
`carry_over` puts the token there (the SUBS parameterisation of Sahoo et al.,
arXiv:2406.07524). A denoiser has two parts, so that a sampler can ask for the head of a few
positions only: logits of a whole batch are the largest array there is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS = 2**28  # Numbers in one part of [B, L, V], 1 GiB in float32, of all devices together.


class Denoiser(NamedTuple):
    """A denoiser as pure functions; hashable, made once, static under jit.

    Attributes:
      vocab: V, classes are 0 ... V - 1.
      mask: the token that hides another; V, or a class whose log-probability is -inf.
      hidden: (params, x int32 [B, L]) -> features [B, L, F], any floating type.
      head: (params, features [B, R, F]) -> log f [B, R, V], float32 (float64 with x64):
        normalised; -inf is an exact zero.
      pad: a token that stands for none, seen by no other and never written; None: no such.
    """

    vocab: int
    mask: int
    hidden: Callable[[Any, Array], Array]
    head: Callable[[Any, Array], Array]
    pad: int | None = None


def denoise(
    denoiser: Denoiser, params: Any, x: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """log f at every position."""
    return denoiser.head(params, denoiser.hidden(params, x))


def target_log_f(
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    y: Int[Array, "batch length"],
) -> Float[Array, "batch length"]:
    """log f(x)[i, y_i], without ever holding all of [B, L, V]: see `by_chunks`."""

    def of(h, y):
        return jnp.take_along_axis(denoiser.head(params, h), y[..., None], axis=-1)[..., 0]

    return by_chunks(of, denoiser.hidden(params, x), y, denoiser.vocab)


def by_chunks(
    function: Callable, h: Float[Array, "batch length width"], y: Array, vocab: int
) -> Float[Array, "batch length"]:
    """function(features, tokens) of some positions after others, so that logits stay small.

    Logits of a part are made anew for its gradient, not kept. Parts are as long as `LOGITS`
    numbers allow and divide L.
    """
    batch, length = y.shape
    fits = max(1, LOGITS // (batch * vocab))
    width = max(n for n in range(1, length + 1) if length % n == 0 and n <= fits)
    if width == length:
        return function(h, y)
    # Axis 0 is split over devices, so parts are cut along the length.
    cut = lambda a: jnp.moveaxis(a.reshape(batch, -1, width, *a.shape[2:]), 1, 0)
    body = jax.checkpoint(lambda part: function(*part), prevent_cse=False)
    found = jax.lax.map(body, (cut(h), cut(y)))
    return jnp.moveaxis(found, 0, 1).reshape(batch, length)


def plain(function: Callable[[Any, Array], Array], vocab: int, mask: int = -1) -> Denoiser:
    """A denoiser from one function (params, x) -> log f [B, L, V]; mask -1 means V."""
    return Denoiser(vocab, vocab if mask < 0 else mask, function, lambda params, found: found)


def carry_over(
    log_f: Float[Array, "batch length vocab"], x: Int[Array, "batch length"], mask: int
) -> Float[Array, "batch length vocab"]:
    """log f with all of the probability on the token where one is visible."""
    visible = (x != mask)[..., None]
    same = jnp.arange(log_f.shape[-1]) == x[..., None]
    return jnp.where(visible, jnp.where(same, 0.0, -jnp.inf), log_f)

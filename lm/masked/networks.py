"""A network as a denoiser: log f = log_softmax of the logits of all tokens but the mask.

The mask is no class (the SUBS parameterisation of Sahoo et al., arXiv:2406.07524), and the
network is not told the time: the best denoiser does not depend on it (section 3 of the
specification of arXiv:2502.09622). Texts of different lengths are padded on any side; what
stands there changes nothing.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import reject
from lm.masked.denoiser import Denoiser
from lm.model import Model


@cache
def denoiser(model: Model, vocab: int, mask: int = -1, pad: int | None = None) -> Denoiser:
    """The denoiser of a model that is not causal; one and the same for the same arguments.

    Args:
      model: with a row of the embedding for every token, the mask and `pad`.
      vocab: V; logits from V on are left out.
      mask: the token that hides another; -1: V. One below V gets a log-probability of -inf.
      pad: a token that no other sees, that takes no position and is never written; None:
        there is none.

    Raises:
      UserError: the model has no such tokens, or the mask is the pad.
    """
    mask = vocab if mask < 0 else mask
    if not 1 <= vocab <= model.vocab:
        raise reject("model.vocab", model.vocab, f"at least {vocab}, the tokens of the texts")
    if mask >= model.vocab:
        allowed = f"at least {mask + 1}, with a row for the mask, {mask}"
        raise reject("model.vocab", model.vocab, allowed)
    if pad is not None and (pad == mask or not 0 <= pad < model.vocab):
        allowed = f"from 0 to {model.vocab - 1} and not the mask, {mask}"
        raise reject("pad", pad, allowed)
    hidden, head = partial(_hidden, model, pad), partial(_head, model, vocab, (mask, pad))
    return Denoiser(vocab, mask, hidden, head, pad)


def places(
    x: Int[Array, "batch length"], pad: int | None
) -> tuple[Int[Array, "batch length"] | None, Int[Array, "batch length"] | None]:
    """Positions and segments of a model's `hidden`: pads are apart, and are not counted."""
    if pad is None:
        return None, None
    real = (x != pad).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0), real


def _hidden(
    model: Model, pad: int | None, params: Any, x: Int[Array, "batch length"]
) -> Float[Array, "batch length features"]:
    return model.hidden(params, x, *places(x, pad))


def _head(
    model: Model, vocab: int, never: tuple, params: Any, h: Float[Array, "batch n features"]
) -> Float[Array, "batch n {vocab}"]:
    logits = model.head(params, h)[..., :vocab]
    for token in never:
        if token is not None and token < vocab:
            logits = jnp.where(jnp.arange(vocab) == token, -jnp.inf, logits)
    return jax.nn.log_softmax(logits)

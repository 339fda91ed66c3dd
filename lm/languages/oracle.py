"""The exact denoiser: q(x_i | visible tokens) by messages from both sides.

    phi_i(s) = 1 if position i is masked, else B[s, x_i]
    c_0 = pi,       c_{i+1} = normalise(c_i phi_i) A         of what is left of i
    b_{L-1} = 1,    b_i = normalise(A (phi_{i+1} b_{i+1}))    of what is right of i
    q(x_i = v | visible) ~ sum_s c_i(s) b_i(s) B[s, v]

(Section 6.2 of the specification of arXiv:2502.09622.) Two scans, O(L S^2) per text, O(L V^n)
for an n-gram. Probabilities are scaled, not logarithms, so an exact zero stays zero. If a text
cannot be, because an earlier parallel step made a slip, the message starts anew as uniform: its
sequence error is decided already, and cannot depend on that choice.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.languages import hmm
from lm.masked.denoiser import Denoiser, plain


@cache
def oracle(vocab: int) -> Denoiser:
    """The denoiser of all languages of V tokens: its `params` are the language, on the device.

    So another table of the same shape is no other program.
    """
    return plain(lambda language, x: posterior(language, x)[0], vocab)


def posterior(
    language: Any, x: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length vocab"], Bool[Array, " batch"]]:
    """log q(x_i | visible) and whether the visible tokens of a text are impossible.

    Args:
      language: of `hmm.on_device`; its type is that of the result.
      x: tokens, V where masked.

    Returns:
      log-probabilities, -inf for exact zeros; at visible positions all is on the token.
    """
    v, count = hmm.vocab(language), hmm.states(language)
    first = hmm.start(language)
    ones = jnp.ones((len(x), count), first.dtype)

    def phi(token):
        seen = hmm.emission(language, jnp.minimum(token, v - 1))
        return jnp.where((token == v)[:, None], 1.0, seen)

    def right(b, token):
        # What comes out is of this position, what is carried on of the one before.
        return _scaled(hmm.backward(language, phi(token) * b))[0], b

    def left(carry, this):
        c, bad = carry
        token, b = this
        belief, none = _scaled(c * b)
        p = hmm.marginal(language, belief)
        p = jnp.where((token == v)[:, None], p, jnp.arange(v) == token[:, None])
        seen, never = _scaled(c * phi(token))
        return (hmm.forward(language, seen), bad | none | never), p

    _, after = jax.lax.scan(right, ones, x.T, reverse=True)
    begin = jnp.broadcast_to(first, ones.shape), jnp.zeros(len(x), bool)
    (_, bad), p = jax.lax.scan(left, begin, (x.T, after))
    return jnp.log(p / p.sum(axis=-1, keepdims=True)).swapaxes(0, 1), bad


def _scaled(
    message: Float[Array, "batch states"],
) -> tuple[Float[Array, "batch states"], Bool[Array, " batch"]]:
    """The message with the sum 1; a message of zeros becomes uniform, and is told."""
    total = message.sum(axis=-1, keepdims=True)
    none = total == 0
    uniform = 1 / message.shape[-1]
    return jnp.where(none, uniform, message / jnp.where(none, 1.0, total)), none[:, 0]

"""The exact denoiser of a language: q(x_i | visible tokens) by scaled forward-backward.

    phi_i(s) = B(s, x_i), or 1 where position i is masked
    c_0 = pi,         c_{i+1} = normalise(c_i phi_i) A        given the tokens before i
    b_{L-1} = 1,      b_{i-1} = A normalise(phi_i b_i)        those after i
    q(x_i = v | visible) = normalise(sum_s c_i(s) b_i(s) B(s, v))

(section 6.2 of the specification of arXiv:2502.09622.) Neither c_i nor b_i knows x_i, so what
is said of a visible position is q(x_i | the other visible ones): true at every position, where
a sampler needs it at the masked ones only. Messages are probabilities, not logarithms, so what
cannot be stays exactly 0.

Where the visible tokens are impossible, by an earlier slip of a parallel step, a message that
is 0 goes on as the uniform one. The text is outside of the language anyway.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.languages.evaluate import supported
from lm.languages.hmm import (
    Language,
    backward,
    emission,
    forward,
    initial,
    messages,
    normalised,
    symbols,
    vocab,
)
from lm.masked.denoiser import Denoiser, carry_over


@cache
def oracle(vocab: int) -> Denoiser:
    """The exact denoiser of all languages of V tokens, the mask being V; a static object.

    Its parameters are the language on the device, data under jit. Two scans over the text,
    each B S^2 products a position, or B V^n.
    """
    return Denoiser(vocab, vocab, marginals, lambda language, p: jnp.log(p))


def marginals(
    language: Language, x: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """q(x_i = v | the visible tokens but x_i) at every position, in the language's type.

    Args:
      language: of `hmm.on_device`.
      x: tokens, V where masked.
    """
    tokens = x.T

    def ahead(c, x):
        return forward(language, normalised(c * emission(language, x))), c

    def back(b, this):
        x, c = this
        found = symbols(language, normalised(c * b))
        return backward(language, normalised(emission(language, x) * b)), normalised(found)

    start = messages(len(x), initial(language))
    _, before = jax.lax.scan(ahead, start, tokens)
    last = jnp.ones_like(start)
    _, found = jax.lax.scan(back, last, (tokens, before), reverse=True)
    return jnp.swapaxes(found, 0, 1)


@jax.jit
def posterior(
    language: Language, x: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length vocab"], Bool[Array, " batch"]]:
    """log q(x_i = v | visible tokens), with visible tokens certain.

    Args:
      language: of `hmm.on_device`.
      x: tokens, V where masked.

    Returns:
      log f, -inf where exactly 0, never NaN; and whether the visible tokens are impossible,
      which makes the text's log f arbitrary.
    """
    log_f = jnp.log(marginals(language, x))
    return carry_over(log_f, x, vocab(language)), ~supported(language, x)

"""Classifier-free guidance: a denoiser that leans towards what the prompt says.

    log f = log_softmax(log f_u + (1 + w) (log f_c - log f_u))

(Ho and Salimans, arXiv:2207.12598; of masked diffusion Nie et al., arXiv:2410.18514.) f_c sees
the text, f_u the text with its prompt masked. Both are halves of one doubled batch, so a call
is one call. w = 0 is f_c, w = -1 is f_u.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.masked.denoiser import Denoiser


class Guided(NamedTuple):
    """The parameters of a guided denoiser.

    Attributes:
      params: of the denoiser.
      prompted: bool [B, L], the positions of the prompt.
      weight: w, a number: data, so that one compilation serves all.
    """

    params: Any
    prompted: Bool[Array, "batch length"]
    weight: Float[Array, ""] | float


@cache
def guided(denoiser: Denoiser) -> Denoiser:
    """A denoiser of `Guided` parameters; one and the same for the same denoiser."""
    hidden, head = partial(_hidden, denoiser), partial(_head, denoiser)
    return denoiser._replace(hidden=hidden, head=head)


def _hidden(
    denoiser: Denoiser, guided: Guided, x: Int[Array, "batch length"]
) -> Float[Array, "batch length both"]:
    prompted = (
        guided.prompted if denoiser.pad is None else guided.prompted & (x != denoiser.pad)
    )
    without = jnp.where(prompted, denoiser.mask, x)
    # A text's two halves are neighbours, so that a batch that is split over devices stays so.
    both = jnp.stack([x, without], axis=1).reshape(-1, x.shape[1])
    h = denoiser.hidden(guided.params, both)
    h = h.reshape(len(x), 2, *h.shape[1:])
    return jnp.concatenate([h[:, 0], h[:, 1]], axis=-1)


def _head(
    denoiser: Denoiser, guided: Guided, features: Float[Array, "batch n both"]
) -> Float[Array, "batch n vocab"]:
    b, n, width = features.shape
    both = features.reshape(b, 2 * n, width // 2)
    log_f = denoiser.head(guided.params, both).reshape(b, n, 2, -1)
    given, free = log_f[:, :, 0], log_f[:, :, 1]
    # What is impossible with the prompt stays so; inf - inf would be NaN.
    known = jnp.isfinite(given) & jnp.isfinite(free)
    lean = jnp.where(known, guided.weight * (given - free), 0.0)
    return jax.nn.log_softmax(given + lean.astype(given.dtype))

"""Attention, who sees whom, and rotary positions: what all networks for text share.

    softmax(q k^T / sqrt(c)) v,    q and k turned by position * base^(-2i/c) (Su et al.,
                                   arXiv:2104.09864), pairs (i, i + c/2)

Arrays are [batch, time, heads, c]. Queries may share keys and values (GQA).
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KINDS = ("auto", "xla", "cudnn")


def attention(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b u g c"],
    v: Float[Array, "b u g c"],
    mask: Bool[Array, "#b 1 t u"] | None = None,
    causal: bool = False,
    kind: str = "auto",
) -> Float[Array, "b t h c"]:
    """Values mixed by attention, in the type of q.

    Args:
      mask: True where a query sees a key; None: everywhere.
      causal: no query sees a key that is further on in the row.
      kind: xla; cudnn (flash attention, bfloat16 only); auto: cudnn where it can be.
    """
    if q.dtype == jnp.float64:
        return _wide(q, k, v, mask, causal)
    if kind == "auto":
        # What cuDNN can do on every GPU of the last years; odd lengths not with a mask.
        fits = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        fits = fits and (mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0))
        gpu = q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
        kind = "cudnn" if gpu and fits else "xla"
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=kind
    )


def _wide(q, k, v, mask, causal):
    """In float64 to the end: the softmax of `jax.nn.dot_product_attention` is float32."""
    b, t, h, c = q.shape
    k, v = (jnp.repeat(a, h // a.shape[2], axis=2) for a in (k, v))
    seen = jnp.ones((b, 1, t, k.shape[1]), bool) if mask is None else mask
    seen = jnp.tril(seen) if causal else seen
    scores = jnp.einsum("bthc,buhc->bhtu", q, k) / jnp.sqrt(c).astype(q.dtype)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhtu,buhc->bthc", weights, v)


def seen(
    positions: Int[Array, "#b u"],
    segments: Int[Array, "b u"] | None = None,
    block: int = 0,
    queries: Int[Array, " t"] | None = None,
) -> Bool[Array, "#b 1 t u"] | None:
    """Which keys a query sees: those of its segment, and no later block.

    Args:
      positions: of the keys.
      segments: of the keys; None: they are of one.
      block: position i sees j iff j // block <= i // block; 0: any.
      queries: the places of the queries among the keys; None: all, in their order.

    Returns:
      None if nothing is hidden.
    """
    mine = lambda a: (a if queries is None else a[:, queries])[:, None, :, None]
    theirs = lambda a: a[:, None, None, :]
    mask = None
    if segments is not None:
        mask = mine(segments) == theirs(segments)
    if block:
        number = positions // block
        earlier = theirs(number) <= mine(number)
        mask = earlier if mask is None else mask & earlier
    return mask


def rotation(
    positions: Int[Array, "#b t"], width: int, base: float, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Cosine and sine of position * base^(-2i/c), [b, t, 1, c / 2], for heads of c = width."""
    pair = jnp.arange(0, width, 2, dtype=dtype) / width
    frequency = jnp.asarray(base, dtype) ** -pair
    angle = positions.astype(dtype)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotated(x: Float[Array, "b t h c"], turn: tuple[Array, Array]) -> Float[Array, "b t h c"]:
    """Pairs are (i, i + c/2): `rotate_half` of Hugging Face, not Meta's (2i, 2i + 1)."""
    cos, sin = turn
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def precisely(dtype: str) -> AbstractContextManager:
    """Float32 is float32: no TF32 on GPUs, no bfloat16 passes on TPUs."""
    return nullcontext() if dtype == "bfloat16" else jax.default_matmul_precision("highest")

"""Pieces that the networks share: conditions, embeddings of the noise, resampling, attention.

Images are NHWC. Statistics of norms and softmax are float32 whatever the dtype of the rest.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import reject

DTYPES = ("float32", "bfloat16")
# Entries of `cond` and the option that says how wide each one is.
OPTION = {
    "label": "label_dim",
    "vector": "vector_dim",
    "augment": "augment_dim",
    "channels": "cond_channels",
}


def conditions(
    cond: Mapping[str, Any] | None, x: Float[Array, "b h w c"], widths: Mapping[str, int]
) -> dict[str, Array]:
    """The conditions a network was built for, filled with "absent" where none is given.

    Args:
      cond: some of label int [B], -1 = absent; vector [B, V]; augment [B, A];
        channels [B, H, W, K]. None counts as not given.
      x: the images, for their batch and size.
      widths: entry -> number of classes, V, A, K; 0 or missing where the network has none.

    Returns:
      label (int32, -1 where not given), vector, augment, channels (zeros where not given)
      for the entries with a width, and no others.

    Raises:
      UserError: an entry the network has no input for, or of another shape.
    """
    given = {name: value for name, value in (cond or {}).items() if value is not None}
    for name in given:
        if not widths.get(name, 0):
            field = OPTION.get(name, name)
            takes = [entry for entry, width in widths.items() if width] or ["none"]
            allowed = f"the width of cond[{name!r}]; this network takes {', '.join(takes)}"
            raise reject(f"model.{field}", widths.get(name, 0), allowed)
    b, h, w, _ = x.shape
    filled = {}
    for name, width in widths.items():
        if not width:
            continue
        shape = {"label": (b,), "channels": (b, h, w, width)}.get(name, (b, width))
        fill, dtype = (-1, jnp.int32) if name == "label" else (0, jnp.float32)
        value = jnp.asarray(given.get(name, jnp.full(shape, fill, dtype)), dtype)
        if value.shape != shape:
            raise reject(f"cond.{name}", value.shape, f"an array of shape {shape}")
        filled[name] = value
    return filled


def one_hot(label: Int[Array, " b"], classes: int, dtype: Any) -> Float[Array, "b classes"]:
    """Rows of the unit matrix; -1, the absent label, gives zeros."""
    return jax.nn.one_hot(label, classes, dtype=dtype)


def whole(field: str, value: Any, least: int) -> int:
    """`value` if it is a whole number from `least` up; a UserError that names it if not."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise reject(f"model.{field}", value, f"a whole number from {least} up")
    return value


def one_of(field: str, value: Any, names: Sequence[str]) -> Any:
    """`value` if it is among `names`; a UserError that names the field if not."""
    if value not in names:
        raise reject(f"model.{field}", value, f"one of {', '.join(names)}")
    return value


def checked_levels(s: Any, height: int, width: int) -> None:
    """What the U-Nets have in common: `s` has their fields channel_mult, attn_resolutions,
    dropout and resample_filter. A UserError names the one that cannot be."""
    mult, taps = s.channel_mult, s.resample_filter
    if not mult or not all(isinstance(m, Integral) and m > 0 for m in mult):
        raise reject("model.channel_mult", mult, "whole numbers from 1 up, one for each level")
    parts = 2 ** (len(mult) - 1)
    if height % parts or width % parts:
        allowed = f"so short that 2^(levels - 1) divides the image, {height} x {width}"
        raise reject("model.channel_mult", mult, allowed)
    sides = [height >> level for level in range(len(mult))]
    if not set(s.attn_resolutions) <= set(sides):
        allowed = f"heights of levels, of {', '.join(map(str, sides))}"
        raise reject("model.attn_resolutions", s.attn_resolutions, allowed)
    if not 0 <= s.dropout < 1:
        raise reject("model.dropout", s.dropout, "from 0 to below 1")
    if len(taps) % 2 or not sum(taps) > 0:
        allowed = "an even number of taps with a positive sum, such as [1, 1]"
        raise reject("model.resample_filter", taps, allowed)


def positional(
    noise: Float[Array, " b"],
    channels: int,
    *,
    max_period: float = 1e4,
    endpoint: bool = False,
) -> Float[Array, "b channels"]:
    """cos and sin of noise * max_period^-(i / n), i < n = channels / 2; nothing is trained.

    (Vaswani et al., arXiv:1706.03762.) Float32.

    Args:
      channels: even.
      endpoint: the slowest frequency is 1 / max_period itself: i / (n - 1) instead of i / n.
    """
    half = channels // 2
    exponent = np.arange(half) / max(half - endpoint, 1)
    return _waves(noise, max_period**-exponent)


def fourier(
    noise: Float[Array, " b"], channels: int, *, scale: float = 16.0, seed: int = 0
) -> Float[Array, "b channels"]:
    """cos and sin of 2 pi f noise with fixed random f ~ N(0, scale^2), float32.

    (Tancik et al., arXiv:2006.10739.) The frequencies are a constant of (channels, seed),
    not parameters: neither trained nor in the checkpoint.
    """
    f = np.random.default_rng(seed).standard_normal(channels // 2) * scale
    return _waves(noise, 2 * np.pi * f)


def _waves(noise: Array, frequencies: np.ndarray) -> Array:
    angle = noise.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def group_norm(channels: int, *, name: str, dtype: Any, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation with 32 groups, fewer where a group would have below 4 channels.

    (Wu & He, arXiv:1803.08494; the groups of Karras et al., arXiv:2206.00364.) Where that
    number does not divide the channels, the next smaller one that does.
    """
    most = max(min(32, channels // 4), 1)
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    # The fast formula, E x^2 - (E x)^2, loses digits where the mean is large.
    return nn.GroupNorm(
        num_groups=groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name
    )


def downsample(
    x: Float[Array, "b h w c"], taps: Sequence[int | float] = (1, 1)
) -> Float[Array, "b h/2 w/2 c"]:
    """Halves both sides: every second value of x filtered by `taps`, zeros beyond the rim.

    Args:
      taps: of the separable filter, an even number of them, scaled to sum 1. (1, 1) takes
        means of 2 x 2 pixels.
    """
    taps = np.asarray(taps, np.float64) / np.sum(taps)
    rim = (len(taps) - 1) // 2
    for axis in (1, 2):
        n = x.shape[axis] // 2
        padding = [(rim, rim) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, padding)
        x = sum(
            float(tap) * jax.lax.slice_in_dim(padded, k, k + 2 * n - 1, 2, axis)
            for k, tap in enumerate(taps)
        )
    return x


def upsample(
    x: Float[Array, "b h w c"], taps: Sequence[int | float] = (1, 1)
) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles both sides: four times the transpose of `downsample`.

    (1, 1) repeats each pixel. Away from the rim a constant image stays what it is.
    """
    taps = 2 * np.asarray(taps, np.float64) / np.sum(taps)
    rim = (len(taps) - 1) // 2
    for axis in (1, 2):
        n = 2 * x.shape[axis]
        # Zeros between the values, and around them as far as the filter reaches.
        spread = [
            (len(taps) - 1 - rim, rim + 1, 1) if a == axis else (0, 0, 0) for a in range(4)
        ]
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), spread)
        x = sum(
            float(tap) * jax.lax.slice_in_dim(padded, k, k + n, 1, axis)
            for k, tap in enumerate(taps[::-1])
        )
    return x


def attention(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b u h c"],
    v: Float[Array, "b u h d"],
    block: int = 1024,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(c)) v per head, without ever holding the whole map.

    Exact. A map of up to block^2 entries is computed in one piece; a larger one in tiles of
    that size with a running maximum and normaliser (Rabe & Staats, arXiv:2112.05682; Dao et
    al., arXiv:2205.14135). Tiles are computed again for the gradient, so memory is linear in
    t + u both ways, and any derivative of JAX, forward or backward, can be taken.

    Args:
      q: queries; k, v: keys and values. Scores, softmax and sums are float32, products of
        the dtype of q and v.
      block: queries and keys in a tile.
    """
    q = q / math.sqrt(q.shape[-1])
    if q.shape[1] * k.shape[1] <= block * block:
        scores = jnp.einsum("bthc,buhc->bhtu", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return jnp.einsum("bhtu,buhd->bthd", weights, v)
    length = q.shape[1]
    keys = min(block, k.shape[1])
    seen = k.shape[1]
    numbers = jnp.arange(seen + -seen % keys).reshape(-1, keys)
    tiles = (_tiles(k, keys), _tiles(v, keys), numbers)

    @jax.checkpoint
    def one(q):
        return _over_keys(q, tiles, seen)

    mixed = jax.lax.map(one, _tiles(q, min(block, length)))
    joined = jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], -1, *v.shape[2:])
    return joined[:, :length].astype(v.dtype)


def _over_keys(q: Array, tiles: tuple[Array, Array, Array], seen: int) -> Array:
    """The values mixed for a tile of queries, [b, t, h, d], float32."""
    b, t, h, _ = q.shape

    @jax.checkpoint
    def body(state, tile):
        top, total, mixed = state
        k, v, numbers = tile
        scores = jnp.einsum("bthc,buhc->bhtu", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(numbers < seen, scores, -jnp.inf)
        # The maximum cancels in the quotient, so its gradient may be left out.
        higher = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
        shrink = jnp.exp(top - higher)
        weights = jnp.exp(scores - higher[..., None])
        part = jnp.einsum(
            "bhtu,buhd->bhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        total = total * shrink + weights.sum(axis=-1)
        return (higher, total, mixed * shrink[..., None] + part), None

    zeros = jnp.zeros((b, h, t), jnp.float32)
    start = (zeros - jnp.inf, zeros, jnp.zeros((b, h, t, tiles[1].shape[-1]), jnp.float32))
    (_, total, mixed), _ = jax.lax.scan(body, start, tiles)
    return jnp.swapaxes(mixed / total[..., None], 1, 2)


def _tiles(x: Array, size: int) -> Array:
    """[b, t, h, c] -> [tiles, b, size, h, c], zeros after the end."""
    b, t, *rest = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
    return jnp.moveaxis(padded.reshape(b, -1, size, *rest), 1, 0)

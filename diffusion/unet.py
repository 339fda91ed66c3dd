"""The U-Nets of EDM: DDPM++, NCSN++ and ADM as settings of one module.

(Karras et al., arXiv:2206.00364, tables 1 and 8; Song et al., arXiv:2011.13456; Dhariwal &
Nichol, arXiv:2105.05233.) Levels go from the full size down, each half as large. A block:

    y = conv(silu(norm(x)))                       at half or twice the size between levels
    y = conv(dropout(silu(norm(y + e))))          or norm(y) (1 + scale) + shift
    x = skip_scale (shortcut(x) + y),   x = skip_scale (x + Attention(norm(x)))

where e, or scale and shift, is linear in the embedding of the noise and the conditions.
The way up joins what the way down left behind. Submodules are named by the side of their
images: `enc32_conv`, `enc16_down`, `enc16_block0`, ..., `dec8_in0`, `dec16_up`, `dec16_block0`.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.blocks import (
    DTYPES,
    attention,
    checked_levels,
    conditions,
    downsample,
    fourier,
    group_norm,
    one_hot,
    one_of,
    positional,
    upsample,
    whole,
)

STYLES = ("song", "adm")
# Where the way up attends, of the levels in `attn_resolutions`.
DECODER_ATTENTION = ("last", "all", "none")


class _Settings(NamedTuple):
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int
    channel_mult_noise: int
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    decoder_attention: str
    channels_per_head: int
    attn_block: int
    dropout: float
    label_dim: int
    augment_dim: int
    vector_dim: int
    cond_channels: int
    style: str
    embedding: str
    encoder: str
    resample_filter: tuple[float, ...]
    resample_proj: bool
    adaptive_scale: bool
    skip_scale: float
    zero_init: float
    norm_eps: float
    remat: bool
    dtype: str

    @property
    def widths(self) -> dict[str, int]:
        return {
            "label": self.label_dim,
            "vector": self.vector_dim,
            "augment": self.augment_dim,
            "channels": self.cond_channels,
        }


def unet(
    shape: Sequence[int],
    *,
    out_channels: int = 0,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (2, 2, 2),
    channel_mult_emb: int = 4,
    channel_mult_noise: int = 1,
    num_blocks: int = 4,
    attn_resolutions: Sequence[int] = (16,),
    decoder_attention: str = "last",
    channels_per_head: int = 0,
    attn_block: int = 1024,
    dropout: float = 0.0,
    label_dim: int = 0,
    augment_dim: int = 0,
    vector_dim: int = 0,
    cond_channels: int = 0,
    style: str = "song",
    embedding: str = "positional",
    encoder: str = "standard",
    resample_filter: Sequence[int | float] = (1, 1),
    resample_proj: bool = True,
    adaptive_scale: bool = False,
    skip_scale: float = sqrt(0.5),
    zero_init: float = 1e-5,
    norm_eps: float = 1e-6,
    remat: bool = False,
    dtype: str = "float32",
) -> tuple[Callable, Callable]:
    """A U-Net for images of `shape` = (H, W, C).

    Args:
      out_channels: of the result; 0: C.
      model_channels, channel_mult: level i has model_channels * channel_mult[i] channels.
      channel_mult_emb, channel_mult_noise: widths of the embedding and of the waves it is
        made from, in model_channels.
      num_blocks: a level on the way down; one more on the way up.
      attn_resolutions: heights of the images, on the way down, whose blocks attend.
      decoder_attention: of those levels on the way up: the last block, all or none attend.
        The first middle block always does.
      channels_per_head: 0: one head.
      attn_block: tiles of `blocks.attention`.
      dropout: probability, in force where `apply` gets a key.
      label_dim, augment_dim, vector_dim, cond_channels: classes, and widths of `cond`.
      style: song or adm: the start of the weights (biases start at 0), and whether a label
        joins the waves or the embedding.
      embedding: of the noise: positional or fourier.
      encoder: standard; residual adds the resampled input at each level (NCSN++).
      resample_filter: taps, (1, 1) or (1, 3, 3, 1).
      resample_proj: shortcuts that resample have a 1x1 convolution too.
      adaptive_scale: the embedding scales and shifts, instead of shifting only.
      skip_scale: of the sum of a block and its shortcut.
      zero_init: scale of the last convolution of each branch at the start.
      norm_eps: added to variances.
      remat: keep only each block's input for the gradient.
      dtype: of the products. Parameters, norms' statistics and the result are float32.

    Returns:
      `init(key) -> params` and `apply(params, x, noise, cond=None, key=None) -> y`, as in
      `diffusion.networks.Network`.

    Raises:
      UserError: a field is out of range, or sides that the levels cannot halve.
    """
    fields = dict(locals())
    h, w, c = fields.pop("shape")
    for name in ("channel_mult", "attn_resolutions", "resample_filter"):
        fields[name] = tuple(fields[name])
    s = _checked(_Settings(**fields | {"out_channels": out_channels or c}), h, w)

    def init(key: jax.Array) -> Any:
        x, noise = jnp.zeros((1, h, w, c)), jnp.zeros(1)
        cond = conditions(None, x, s.widths)
        return UNet(s._replace(dropout=0.0)).init(key, x, noise, cond)["params"]

    def apply(params, x, noise, cond=None, key=None):
        module = UNet(s if key is not None else s._replace(dropout=0.0))
        rngs = {} if key is None else {"dropout": key}
        filled = conditions(cond, x, s.widths)
        return module.apply({"params": params}, x, noise, filled, rngs=rngs)

    return init, apply


def rules(fsdp: bool) -> tuple[tuple[str, P], ...]:
    """Placements for `Experiment.rules`: with `fsdp` the outputs of every matrix of a block
    over "data", which must divide model_channels; without, all parameters are everywhere."""
    block = r"_(block\d+|in\d|up|down)"
    split = (
        (rf"{block}/affine/kernel", P(None, "data")),
        (rf"{block}/(conv0|conv1|shortcut|qkv|proj)/kernel", P(None, None, None, "data")),
    )
    return split if fsdp else ()


def _checked(s: _Settings, h: int, w: int) -> _Settings:
    counts = ("model_channels", "channel_mult_emb", "channel_mult_noise", "num_blocks")
    for name in (*counts, "out_channels", "attn_block"):
        whole(name, getattr(s, name), 1)
    for name in ("label_dim", "augment_dim", "vector_dim", "cond_channels"):
        whole(name, getattr(s, name), 0)
    whole("channels_per_head", s.channels_per_head, 0)
    if s.model_channels % 2:
        raise reject("model.model_channels", s.model_channels, "even")
    checked_levels(s, h, w)
    heads = s.channels_per_head
    if heads and any(s.model_channels * m % heads for m in s.channel_mult):
        allowed = "0 or a divisor of the channels of every level"
        raise reject("model.channels_per_head", heads, allowed)
    one_of("style", s.style, STYLES)
    one_of("embedding", s.embedding, ("positional", "fourier"))
    one_of("encoder", s.encoder, ("standard", "residual"))
    one_of("decoder_attention", s.decoder_attention, DECODER_ATTENTION)
    one_of("dtype", s.dtype, DTYPES)
    return s


def _starts(s: _Settings, kind: str = "") -> dict[str, Callable]:
    """Initialisers: of most kernels, of "zero" ones, of "attention"'s, of a "label"'s."""
    uniform = nn.initializers.variance_scaling
    if s.style == "song":
        # Xavier; 1e-5 and sqrt(0.2) there are factors of the weights, squared of variances.
        factor = {"zero": s.zero_init, "attention": sqrt(0.2)}.get(kind, 1.0)
        weights = uniform(factor**2, "fan_avg", "uniform") if factor else nn.initializers.zeros
        return dict(kernel_init=weights)
    if kind == "zero" and not s.zero_init:
        return dict(kernel_init=nn.initializers.zeros)
    if kind == "label":
        return dict(kernel_init=nn.initializers.normal(1.0))
    scale = s.zero_init**2 if kind == "zero" else 1.0
    return dict(kernel_init=uniform(scale / 3, "fan_in", "uniform"))


class Block(nn.Module):
    """A residual block, optionally resampled and with attention after it.

    [b, h, w, c] and the embedding [b, e] -> [b, h', w', channels].
    """

    s: _Settings
    channels: int
    attend: bool = False
    resample: str = ""

    def _resampled(self, x: Array) -> Array:
        by = {"down": downsample, "up": upsample}
        return by[self.resample](x, self.s.resample_filter) if self.resample else x

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedded: Float[Array, "b e"]
    ) -> Float[Array, "b h2 w2 d"]:
        s, d, dtype = self.s, self.channels, self.s.dtype
        norm = lambda n, name: group_norm(n, name=name, dtype=dtype, eps=s.norm_eps)
        conv = lambda name, kind="": nn.Conv(
            d, (3, 3), dtype=dtype, name=name, **_starts(s, kind)
        )
        y = self._resampled(nn.silu(norm(x.shape[-1], "norm0")(x)))
        y = conv("conv0")(y)
        width = 2 * d if s.adaptive_scale else d
        e = nn.Dense(width, dtype=dtype, name="affine", **_starts(s))(embedded)[:, None, None]
        if s.adaptive_scale:
            scale, shift = jnp.split(e, 2, axis=-1)
            y = nn.silu(norm(d, "norm1")(y) * (1 + scale) + shift)
        else:
            y = nn.silu(norm(d, "norm1")(y + e))
        y = nn.Dropout(s.dropout, name="dropout")(y, deterministic=s.dropout == 0)
        y = conv("conv1", "zero")(y)
        x = self._resampled(x)
        if x.shape[-1] != d or (self.resample and s.resample_proj):
            x = nn.Conv(d, (1, 1), dtype=dtype, name="shortcut", **_starts(s))(x)
        x = (x + y) * s.skip_scale
        return self._attended(x) if self.attend else x

    def _attended(self, x: Array) -> Array:
        s, d = self.s, self.channels
        b, h, w, _ = x.shape
        dense = lambda n, name, kind: nn.Conv(
            n, (1, 1), dtype=s.dtype, name=name, **_starts(s, kind)
        )
        y = group_norm(d, name="norm2", dtype=s.dtype, eps=s.norm_eps)(x)
        qkv = dense(3 * d, "qkv", "attention")(y)
        heads = d // s.channels_per_head if s.channels_per_head else 1
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, heads, 3, d // heads), 3, 0)
        mixed = attention(q, k, v, s.attn_block).reshape(b, h, w, d)
        return (x + dense(d, "proj", "zero")(mixed)) * s.skip_scale


class UNet(nn.Module):
    """The network; conditions as `blocks.conditions` gives them."""

    s: _Settings

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise: Float[Array, " b"],
        cond: dict[str, Array],
    ) -> Float[Array, "b h w d"]:
        s, height = self.s, x.shape[1]
        e = self._embedding(noise, cond)
        block = nn.remat(Block) if s.remat else Block
        last = len(s.channel_mult) - 1
        if s.cond_channels:
            x = jnp.concatenate([x, cond["channels"].astype(x.dtype)], axis=-1)
        x = x.astype(s.dtype)
        rest, left = x, []
        for level, mult in enumerate(s.channel_mult):
            side, channels = height >> level, s.model_channels * mult
            if level == 0:
                first = s.model_channels if s.style == "song" else channels
                x = self._conv(first, f"enc{side}_conv")(x)
            else:
                x = block(s, x.shape[-1], resample="down", name=f"enc{side}_down")(x, e)
                if s.encoder == "residual":
                    # The convolution comes before the filter, which then halves its result.
                    rest = self._conv(x.shape[-1], f"enc{side}_residual")(rest)
                    x = rest = (x + downsample(rest, s.resample_filter)) * sqrt(0.5)
            left.append(x)
            attend = side in s.attn_resolutions
            for i in range(s.num_blocks):
                x = block(s, channels, attend, name=f"enc{side}_block{i}")(x, e)
                left.append(x)

        for level, mult in reversed(list(enumerate(s.channel_mult))):
            side, channels = height >> level, s.model_channels * mult
            if level == last:
                x = block(s, x.shape[-1], True, name=f"dec{side}_in0")(x, e)
                x = block(s, x.shape[-1], name=f"dec{side}_in1")(x, e)
            else:
                x = block(s, x.shape[-1], resample="up", name=f"dec{side}_up")(x, e)
            for i in range(s.num_blocks + 1):
                here = {"all": True, "none": False, "last": i == s.num_blocks}
                attend = side in s.attn_resolutions and here[s.decoder_attention]
                x = jnp.concatenate([x, left.pop()], axis=-1)
                x = block(s, channels, attend, name=f"dec{side}_block{i}")(x, e)
        x = group_norm(x.shape[-1], name="out_norm", dtype=s.dtype, eps=s.norm_eps)(x)
        out = self._conv(s.out_channels, "out_conv", "zero")(nn.silu(x))
        return out.astype(jnp.float32)

    def _conv(self, channels: int, name: str, kind: str = "") -> nn.Conv:
        starts = _starts(self.s, kind)
        return nn.Conv(channels, (3, 3), dtype=self.s.dtype, name=name, **starts)

    def _embedding(self, noise: Array, cond: dict[str, Array]) -> Float[Array, "b e"]:
        """Of noise and conditions, after the last silu."""
        s = self.s
        waves = s.model_channels * s.channel_mult_noise
        width = s.model_channels * s.channel_mult_emb
        dense = lambda n, name, kind="", **more: nn.Dense(
            n, dtype=s.dtype, name=name, **(_starts(s, kind) | more)
        )
        if s.embedding == "positional":
            e = positional(noise, waves, endpoint=s.style == "song")
        else:
            e = fourier(noise, waves)
        hot = one_hot(cond["label"], s.label_dim, e.dtype) if s.label_dim else None
        if s.label_dim and s.style == "song":
            e = e + dense(waves, "label")(hot * sqrt(s.label_dim))
        if s.augment_dim:
            kind = "zero" if s.style == "adm" else ""
            e = e + dense(waves, "augment", kind, use_bias=False)(cond["augment"])
        e = dense(width, "embed1")(nn.silu(dense(width, "embed0")(e)))
        if s.label_dim and s.style == "adm":
            e = e + dense(width, "label", "label", use_bias=False)(hot)
        if s.vector_dim:
            e = e + dense(width, "vector")(cond["vector"])
        return nn.silu(e)

"""The magnitude-preserving U-Net of EDM2.

(Karras et al., arXiv:2312.02696, configuration G.) No norms, no biases: every layer keeps
the mean square of its input at 1 by itself.

    weights     w / |w|: a unit vector for each output, in the forward pass and, by
                `normalized` after each step of training, in the parameters
    silu        silu(x) / 0.596
    sum         ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    concat      both parts weighted so that they contribute 1 - t and t
    attention   queries, keys and values of mean square 1 (cosine attention)

A stored `kernel` [..., in, out] has mean square 1 per output, sqrt(fan-in) times the unit
vector, which is what the learning rates of the paper are meant for. A constant channel of
ones is appended to the image. Submodules are named by the side of their images, as in
`diffusion.unet`. The head `uncertainty` is u(noise), the log variance of the loss.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.blocks import (
    DTYPES,
    attention,
    checked_levels,
    conditions,
    downsample,
    one_hot,
    one_of,
    upsample,
    whole,
)

HEAD = 128  # Waves of the uncertainty's embedding.
CLIP = 256.0  # Of activations, far within what bfloat16 and float16 hold.


class _Settings(NamedTuple):
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    channels_per_head: int
    attn_block: int
    dropout: float
    label_dim: int
    vector_dim: int
    cond_channels: int
    label_balance: float
    concat_balance: float
    res_balance: float
    attn_balance: float
    resample_filter: tuple[float, ...]
    remat: bool
    dtype: str

    @property
    def widths(self) -> dict[str, int]:
        return {
            "label": self.label_dim,
            "vector": self.vector_dim,
            "channels": self.cond_channels,
        }


def edm2(
    shape: Sequence[int],
    *,
    out_channels: int = 0,
    model_channels: int = 192,
    channel_mult: Sequence[int] = (1, 2, 3, 4),
    num_blocks: int = 3,
    attn_resolutions: Sequence[int] = (16, 8),
    channels_per_head: int = 64,
    attn_block: int = 1024,
    dropout: float = 0.0,
    label_dim: int = 0,
    vector_dim: int = 0,
    cond_channels: int = 0,
    label_balance: float = 0.5,
    concat_balance: float = 0.5,
    res_balance: float = 0.3,
    attn_balance: float = 0.3,
    resample_filter: Sequence[int | float] = (1, 1),
    remat: bool = False,
    dtype: str = "float32",
) -> tuple[Callable, Callable]:
    """The U-Net for images of `shape` = (H, W, C), of mean square about 1.

    Args:
      label_balance, concat_balance, res_balance, attn_balance: t of the sum of noise and
        conditions (an absent one adds zeros), of the concatenation, of residual branches,
        of attention.
      The other arguments are those of `diffusion.unet.unet`.

    Returns:
      `init(key) -> params` and `apply(params, x, noise, cond=None, key=None) -> y`, as in
      `diffusion.networks.Network`. A fresh network gives 0: its last gain starts there.

    Raises:
      UserError: a field is out of range, or sides that the levels cannot halve.
    """
    fields = dict(locals())
    h, w, c = fields.pop("shape")
    for name in ("channel_mult", "attn_resolutions", "resample_filter"):
        fields[name] = tuple(fields[name])
    s = _checked(_Settings(**fields | {"out_channels": out_channels or c}), h, w)

    def init(key: jax.Array) -> Any:
        trunk, head = jax.random.split(key)
        x, noise = jnp.zeros((1, h, w, c)), jnp.zeros(1)
        cond = conditions(None, x, s.widths)
        params = UNet(s._replace(dropout=0.0)).init(trunk, x, noise, cond)["params"]
        kernel = jax.random.normal(head, (HEAD, 1))
        return normalized(params | {"uncertainty": {"kernel": kernel}})

    def apply(params, x, noise, cond=None, key=None):
        module = UNet(s if key is not None else s._replace(dropout=0.0))
        rngs = {} if key is None else {"dropout": key}
        filled = conditions(cond, x, s.widths)
        return module.apply({"params": params}, x, noise, filled, rngs=rngs)

    return init, apply


def uncertainty(params: Any, noise: Float[Array, " b"]) -> Float[Array, " b"]:
    """u(noise) of the loss exp(-u) L + u, from the head of `params` (Eq. 21).

    Args:
      params: of an EDM2 network.
      noise: c_noise, as the network gets it.
    """
    kernel = params["uncertainty"]["kernel"]
    return (_waves(noise, HEAD, seed=1) @ _unit(kernel))[:, 0]


def normalized(params: Any) -> Any:
    """Forced weight normalisation (Eq. 66): all weights of an output to mean square 1.

    To be applied after each step of training: the size of the weights, which the forward
    pass divides out, then cannot grow and slow down learning. The gains,
    leaves not called `kernel`, stay as they are.
    """

    def scaled(path, leaf):
        return _standard(leaf) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


def rules(fsdp: bool) -> tuple[tuple[str, P], ...]:
    """Placements for `Experiment.rules`: with `fsdp` the outputs of every matrix of a block
    over "data", which must divide model_channels; without, all parameters are everywhere."""
    block = r"_(block\d+|in\d|up|down)"
    split = (
        (rf"{block}/embed/kernel", P(None, "data")),
        (rf"{block}/(conv0|conv1|shortcut|qkv|proj)/kernel", P(None, None, None, "data")),
    )
    return split if fsdp else ()


def _checked(s: _Settings, h: int, w: int) -> _Settings:
    counts = ("model_channels", "num_blocks", "out_channels", "attn_block", "channels_per_head")
    for name in counts:
        whole(name, getattr(s, name), 1)
    for name in ("label_dim", "vector_dim", "cond_channels"):
        whole(name, getattr(s, name), 0)
    checked_levels(s, h, w)
    if any(s.model_channels * m % s.channels_per_head for m in s.channel_mult):
        allowed = "a divisor of the channels of every level"
        raise reject("model.channels_per_head", s.channels_per_head, allowed)
    for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
        if not 0 <= getattr(s, name) <= 1:
            raise reject(f"model.{name}", getattr(s, name), "from 0 to 1")
    one_of("dtype", s.dtype, DTYPES)
    return s


def mp_silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(x) / 0.596: of mean square 1 for a standard normal x."""
    return nn.silu(x) / 0.596


def mp_sum(a: Float[Array, "..."], b: Float[Array, "..."], t: float) -> Float[Array, "..."]:
    """(1 - t) a + t b, of mean square 1 if a and b are so and independent (Eq. 88)."""
    return ((1 - t) * a + t * b) / sqrt((1 - t) ** 2 + t**2)


def mp_concat(
    a: Float[Array, "*b c"], b: Float[Array, "*b d"], t: float
) -> Float[Array, "*b cd"]:
    """Along the last axis, with shares of 1 - t and t in amplitude (Eq. 103)."""
    c, d = a.shape[-1], b.shape[-1]
    size = sqrt((c + d) / ((1 - t) ** 2 + t**2))
    parts = [a * ((1 - t) * size / sqrt(c)), b * (t * size / sqrt(d))]
    return jnp.concatenate(parts, axis=-1)


def _standard(kernel: Array) -> Array:
    """Mean square 1 over all axes but the last."""
    axes = tuple(range(kernel.ndim - 1))
    return kernel * jax.lax.rsqrt(jnp.mean(kernel**2, axes, keepdims=True) + 1e-12)


def _unit(kernel: Array) -> Array:
    """Norm 1 over all axes but the last."""
    return _standard(kernel) / sqrt(prod(kernel.shape[:-1]))


def _pixel_norm(x: Array) -> Array:
    """Mean square 1 along the last axis."""
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-8)
    return (wide * size).astype(x.dtype)


def _waves(noise: Array, channels: int, seed: int = 0) -> Array:
    """sqrt(2) cos(2 pi (f noise + phase)), f ~ N(0, 1) and phases fixed (Eq. 75)."""
    rng = np.random.default_rng(seed)
    f = (2 * np.pi * rng.standard_normal(channels)).astype(np.float32)
    phase = (2 * np.pi * rng.random(channels)).astype(np.float32)
    return sqrt(2) * jnp.cos(noise.astype(jnp.float32)[:, None] * f + phase)


class Weights(nn.Module):
    """A convolution of `size`, or a layer where that is (), with weights of norm 1."""

    channels: int
    size: tuple[int, ...] = ()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        shape = (*self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        kernel = (_unit(kernel) * gain).astype(self.dtype)
        x = x.astype(self.dtype)
        if not self.size:
            return x @ kernel
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


class Block(nn.Module):
    """A residual block of the way down ("enc") or up ("dec"), resampled before all else."""

    s: _Settings
    channels: int
    flavour: str
    attend: bool = False
    resample: str = ""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedded: Float[Array, "b e"]
    ) -> Float[Array, "b h2 w2 d"]:
        s, d, dtype = self.s, self.channels, self.s.dtype
        if self.resample:
            by = {"down": downsample, "up": upsample}
            x = by[self.resample](x, s.resample_filter)
        shortcut = Weights(d, (1, 1), dtype, name="shortcut") if x.shape[-1] != d else None
        if self.flavour == "enc":
            x = _pixel_norm(shortcut(x) if shortcut else x)
        y = Weights(d, (3, 3), dtype, name="conv0")(mp_silu(x))
        gain = self.param("gain", nn.initializers.zeros, ())
        scale = 1 + Weights(d, (), dtype, name="embed")(embedded, gain)
        y = mp_silu(y * scale[:, None, None])
        y = nn.Dropout(s.dropout, name="dropout")(y, deterministic=s.dropout == 0)
        y = Weights(d, (3, 3), dtype, name="conv1")(y)
        if self.flavour == "dec" and shortcut:
            x = shortcut(x)
        x = mp_sum(x, y, s.res_balance)
        if self.attend:
            x = mp_sum(x, self._mixed(x), s.attn_balance)
        return jnp.clip(x, -CLIP, CLIP)

    def _mixed(self, x: Array) -> Array:
        s, d = self.s, self.channels
        b, h, w, _ = x.shape
        qkv = Weights(3 * d, (1, 1), s.dtype, name="qkv")(x)
        heads = qkv.reshape(b, h * w, -1, 3, s.channels_per_head)
        q, k, v = jnp.moveaxis(_pixel_norm(heads), 3, 0)
        mixed = attention(q, k, v, s.attn_block).reshape(b, h, w, d)
        return Weights(d, (1, 1), s.dtype, name="proj")(mixed)


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
        extra = [cond["channels"]] if s.cond_channels else []
        x = jnp.concatenate([x, *extra, jnp.ones_like(x[..., :1])], axis=-1)
        levels, left = list(enumerate(s.channel_mult)), []
        for level, mult in levels:
            side, channels = height >> level, s.model_channels * mult
            if level == 0:
                x = Weights(channels, (3, 3), s.dtype, name=f"enc{side}_conv")(x)
            else:
                name = f"enc{side}_down"
                x = block(s, x.shape[-1], "enc", resample="down", name=name)(x, e)
            left.append(x)
            for i in range(s.num_blocks):
                attend, name = side in s.attn_resolutions, f"enc{side}_block{i}"
                x = block(s, channels, "enc", attend, name=name)(x, e)
                left.append(x)

        for level, mult in reversed(levels):
            side, channels = height >> level, s.model_channels * mult
            if level == levels[-1][0]:
                x = block(s, x.shape[-1], "dec", True, name=f"dec{side}_in0")(x, e)
                x = block(s, x.shape[-1], "dec", name=f"dec{side}_in1")(x, e)
            else:
                name = f"dec{side}_up"
                x = block(s, x.shape[-1], "dec", resample="up", name=name)(x, e)
            for i in range(s.num_blocks + 1):
                x = mp_concat(x, left.pop(), s.concat_balance)
                attend, name = side in s.attn_resolutions, f"dec{side}_block{i}"
                x = block(s, channels, "dec", attend, name=name)(x, e)
        gain = self.param("gain", nn.initializers.zeros, ())
        out = Weights(s.out_channels, (3, 3), s.dtype, name="out_conv")(x, gain)
        return out.astype(jnp.float32)

    def _embedding(self, noise: Array, cond: dict[str, Array]) -> Float[Array, "b e"]:
        s = self.s
        width = s.model_channels * max(s.channel_mult)
        dense = lambda name: Weights(width, (), s.dtype, name=name)
        e = dense("noise")(_waves(noise, s.model_channels * s.channel_mult[0]))
        if s.label_dim:
            hot = one_hot(cond["label"], s.label_dim, e.dtype) * sqrt(s.label_dim)
            e = mp_sum(e, dense("label")(hot), s.label_balance)
        if s.vector_dim:
            e = mp_sum(e, dense("vector")(cond["vector"]), s.label_balance)
        return mp_silu(e)

"""Transformers over patches: DiT, SiT and LightningDiT.

    h = patches(x) W + positions
    h <- h + gate1 Attention(norm(h) (1 + scale1) + shift1)
    h <- h + gate2 MLP(norm(h) (1 + scale2) + shift2)
    y = unpatched((norm(h) (1 + scale) + shift) W_out)

where scales, shifts and gates are linear in silu(noise + label): adaLN-Zero, which starts at
zero as W_out does, so that a fresh network gives exactly 0 (Peebles & Xie, arXiv:2212.09748;
SiT, arXiv:2401.08740, is the same network). LightningDiT (Yao et al., arXiv:2501.01423) has
trained RMS norms, SwiGLU and rotary positions. Blocks are stacked along axis 0 and scanned:

    patch/kernel [p p C, d]      noise0, noise1/kernel      label/embedding [classes + 1, d]
    blocks/qkv/kernel [L, d, 3 d], outputs ordered head, (q, k, v), channel
    blocks/proj/kernel [L, d, d]                blocks/modulation/kernel [L, d, 6 d]
    blocks/{up,down}/kernel [L, d, f], [L, f, d], with SwiGLU blocks/gate/kernel too
    final/modulation/kernel [d, 2 d]            final/out/kernel [d, p p C_out]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.blocks import DTYPES, attention, conditions, one_of, positional, whole

WAVES = 256  # Of the embedding of the noise.
EPS = 1e-6


class _Settings(NamedTuple):
    height: int
    width: int
    channels: int
    out_channels: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp: int
    label_dim: int
    vector_dim: int
    cond_channels: int
    norm: str
    activation: str
    rope: bool
    attn_block: int
    remat: bool
    dtype: str

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // self.patch, self.width // self.patch

    @property
    def widths(self) -> dict[str, int]:
        return {
            "label": self.label_dim,
            "vector": self.vector_dim,
            "channels": self.cond_channels,
        }


def dit(
    shape: Sequence[int],
    *,
    patch: int = 2,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    mlp: int = 0,
    learn_variance: bool = False,
    label_dim: int = 0,
    vector_dim: int = 0,
    cond_channels: int = 0,
    norm: str = "layer",
    activation: str = "gelu",
    rope: bool = False,
    attn_block: int = 1024,
    remat: bool = False,
    dtype: str = "float32",
) -> tuple[Callable, Callable]:
    """A transformer for images or latents of `shape` = (H, W, C).

    Args:
      patch: side of a token's square, in pixels; 1 for latents at their own resolution, 4
        to 16 for pixels.
      dim, depth, heads: d, L, heads.
      mlp: f; 0: 4 d, with swiglu 8 d / 3 rounded down.
      learn_variance: twice the channels come out: the prediction, then what DiT's learned
        variance is made from.
      label_dim, vector_dim, cond_channels: classes, and widths of `cond`. One more row of
        the table of labels stands for the absent one.
      norm: layer (nothing trained) or rms (with trained scales).
      activation: gelu or swiglu.
      rope: rotates queries and keys by row and column, besides the fixed table of positions.
      attn_block: tiles of `blocks.attention`.
      remat: keep only each block's input for the gradient.
      dtype: of the products. Parameters, norms' statistics and the result are float32.

    Returns:
      `init(key) -> params` and `apply(params, x, noise, cond=None, key=None) -> y`, as in
      `diffusion.networks.Network`. There is no dropout; `key` changes nothing.

    Raises:
      UserError: a field is out of range, or fields do not fit each other.
    """
    h, w, c = shape
    s = _Settings(
        height=h,
        width=w,
        channels=c,
        out_channels=2 * c if learn_variance else c,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp=mlp or (8 * dim // 3 if activation == "swiglu" else 4 * dim),
        label_dim=label_dim,
        vector_dim=vector_dim,
        cond_channels=cond_channels,
        norm=norm,
        activation=activation,
        rope=rope,
        attn_block=attn_block,
        remat=remat,
        dtype=dtype,
    )
    s = _checked(s)
    block = (nn.remat(Block, prevent_cse=False) if remat else Block)(s)

    def init(key: jax.Array) -> Any:
        front_key, blocks_key, final_key = jax.random.split(key, 3)
        x = jnp.zeros((1, h, w, c))
        cond = conditions(None, x, s.widths)
        (h0, e), front = Front(s).init_with_output(front_key, x, jnp.zeros(1), cond)
        keys = jax.random.split(blocks_key, depth)
        blocks = jax.vmap(lambda k: block.init(k, h0, e)["params"])(keys)
        final = Final(s).init(final_key, h0, e)["params"]
        return front["params"] | {"blocks": blocks, "final": final}

    def apply(params, x, noise, cond=None, key=None):
        del key  # No dropout.
        filled = conditions(cond, x, s.widths)
        hidden, e = Front(s).apply({"params": params}, x, noise, filled)

        def body(hidden, p):
            return block.apply({"params": p}, hidden, e), None

        hidden, _ = jax.lax.scan(body, hidden, params["blocks"])
        return Final(s).apply({"params": params["final"]}, hidden, e)

    return init, apply


def rules(fsdp: bool) -> tuple[tuple[str, P], ...]:
    """Placements for `Experiment.rules`: tensor parallel over "model", and with `fsdp` the
    other axis of every matrix over "data".

    First matrices are split by columns, second ones by rows: two sums over "model" a block.
    "model" must divide heads and the width of the MLP, "data" the width d.
    """
    data = "data" if fsdp else None
    return (
        (r"blocks/(qkv|up|gate)/kernel", P(None, data, "model")),  # Axis 0 is depth.
        (r"blocks/(qkv|up|gate)/bias", P(None, "model")),
        (r"blocks/(proj|down)/kernel", P(None, "model", data)),
        (r"blocks/modulation/kernel", P(None, data, "model")),
        (r"blocks/modulation/bias", P(None, "model")),
    )


def _checked(s: _Settings) -> _Settings:
    for name in ("patch", "dim", "depth", "heads", "mlp", "attn_block"):
        whole(name, getattr(s, name), 1)
    for name in ("label_dim", "vector_dim", "cond_channels"):
        whole(name, getattr(s, name), 0)
    if s.height % s.patch or s.width % s.patch:
        allowed = f"a divisor of both sides of the image, {s.height} x {s.width}"
        raise reject("model.patch", s.patch, allowed)
    if s.dim % 4 or s.dim % s.heads:
        allowed = f"a multiple of 4 and of heads = {s.heads}"
        raise reject("model.dim", s.dim, allowed)
    if s.rope and s.dim // s.heads % 4:
        allowed = f"such that dim / heads is a multiple of 4 with rope, not {s.dim // s.heads}"
        raise reject("model.heads", s.heads, allowed)
    one_of("norm", s.norm, ("layer", "rms"))
    one_of("activation", s.activation, ("gelu", "swiglu"))
    one_of("dtype", s.dtype, DTYPES)
    return s


def _xavier(scale: float = 1.0) -> Callable:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def _dense(s: _Settings, features: int, name: str, start: Callable | None = None) -> nn.Dense:
    return nn.Dense(features, dtype=s.dtype, kernel_init=start or _xavier(), name=name)


def _norm(s: _Settings, name: str) -> nn.Module:
    if s.norm == "rms":
        return nn.RMSNorm(epsilon=EPS, dtype=s.dtype, name=name)
    kind = dict(use_scale=False, use_bias=False, use_fast_variance=False)
    return nn.LayerNorm(epsilon=EPS, dtype=s.dtype, name=name, **kind)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale[:, None]) + shift[:, None]


class Front(nn.Module):
    """Image, noise and conditions -> tokens [b, t, d] and silu of the embedding [b, d]."""

    s: _Settings

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], noise: Float[Array, " b"], cond: dict[str, Array]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
        s = self.s
        if s.cond_channels:
            x = jnp.concatenate([x, cond["channels"].astype(x.dtype)], axis=-1)
        tokens = _dense(s, s.dim, "patch")(_patches(x, s.patch))
        tokens = tokens + jnp.asarray(_places(s), s.dtype)
        normal = nn.initializers.normal(0.02)
        waves = positional(noise, WAVES)
        e = nn.silu(_dense(s, s.dim, "noise0", normal)(waves))
        e = _dense(s, s.dim, "noise1", normal)(e)
        if s.label_dim:
            table = nn.Embed(
                s.label_dim + 1, s.dim, dtype=s.dtype, embedding_init=normal, name="label"
            )
            label = cond["label"]
            # The last row is the absent label's.
            e = e + table(jnp.where(label < 0, s.label_dim, label))
        if s.vector_dim:
            e = e + _dense(s, s.dim, "vector", normal)(cond["vector"])
        return tokens, nn.silu(e)


class Block(nn.Module):
    """Attention and MLP with adaLN-Zero; [b, t, d] and [b, d] -> [b, t, d]."""

    s: _Settings

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], e: Float[Array, "b d"]
    ) -> Float[Array, "b t d"]:
        s, d = self.s, self.s.dim
        zeros = nn.initializers.zeros
        modulation = _dense(s, 6 * d, "modulation", zeros)(e)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y = self._mixed(_modulated(_norm(s, "norm1")(x), shift1, scale1))
        x = x + gate1[:, None] * y
        y = _modulated(_norm(s, "norm2")(x), shift2, scale2)
        if s.activation == "swiglu":
            # The start of one matrix for both, which is how the released code holds them.
            start = _xavier((d + s.mlp) / (d + 2 * s.mlp))
            gate = nn.silu(_dense(s, s.mlp, "gate", start)(y))
            y = gate * _dense(s, s.mlp, "up", start)(y)
        else:
            y = nn.gelu(_dense(s, s.mlp, "up")(y), approximate=True)
        return x + gate2[:, None] * _dense(s, d, "down")(y)

    def _mixed(self, x: Array) -> Array:
        s = self.s
        b, t, d = x.shape
        qkv = _dense(s, 3 * d, "qkv")(x).reshape(b, t, s.heads, 3, d // s.heads)
        q, k, v = jnp.moveaxis(qkv, 3, 0)
        if s.rope:
            rotation = _rotation(s)
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        return _dense(s, d, "proj")(attention(q, k, v, s.attn_block).reshape(b, t, d))


class Final(nn.Module):
    """Tokens -> image [b, h, w, out], float32."""

    s: _Settings

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], e: Float[Array, "b d"]
    ) -> Float[Array, "b h w c"]:
        s, zeros = self.s, nn.initializers.zeros
        shift, scale = jnp.split(_dense(s, 2 * s.dim, "modulation", zeros)(e), 2, axis=-1)
        x = _modulated(_norm(s, "norm")(x), shift, scale)
        x = _dense(s, s.patch**2 * s.out_channels, "out", zeros)(x)
        return _image(x.astype(jnp.float32), s.grid, s.patch)


def _patches(x: Array, p: int) -> Float[Array, "b t d"]:
    """Squares of the image as rows, ordered row, column, channel within."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, -1, p * p * c)


def _image(tokens: Array, grid: tuple[int, int], p: int) -> Float[Array, "b h w c"]:
    """The inverse of `_patches`."""
    b, (rows, columns) = len(tokens), grid
    squares = tokens.reshape(b, rows, columns, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, rows * p, columns * p, -1)


def _places(s: _Settings) -> np.ndarray:
    """Sines and cosines of row and column, [t, d]; nothing is trained.

    The first half of the channels belongs to the column, as in DiT's table.
    """
    rows, columns = np.indices(s.grid).reshape(2, -1)
    quarter = s.dim // 4
    frequency = 1e4 ** -(np.arange(quarter) / quarter)
    angles = [place[:, None] * frequency for place in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def _rotation(s: _Settings) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angle of each pair of channels of a head, [t, 1, c / 2].

    The first half of the pairs turns with the row, the other with the column.
    """
    rows, columns = np.indices(s.grid).reshape(2, -1)
    quarter = s.dim // s.heads // 4
    frequency = 1e4 ** -(np.arange(quarter) / quarter)
    angle = np.concatenate([place[:, None] * frequency for place in (rows, columns)], axis=1)
    angle = angle[:, None].astype(np.float32)
    return np.cos(angle), np.sin(angle)


def _rotated(x: Float[Array, "b t h c"], rotation: tuple) -> Float[Array, "b t h c"]:
    """Pairs are neighbours, (2i, 2i + 1); float32 inside."""
    cos, sin = rotation
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)

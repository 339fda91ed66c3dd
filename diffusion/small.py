"""For small data and slow machines: a perceptron and a U-Net of under 1M parameters."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.blocks import DTYPES, conditions, one_hot, one_of, whole
from diffusion.unet import unet


class _Settings(NamedTuple):
    width: int
    layers: int
    waves: int
    frequencies: tuple[float, float]
    label_dim: int
    vector_dim: int
    cond_channels: int
    dtype: str

    @property
    def widths(self) -> dict[str, int]:
        return {
            "label": self.label_dim,
            "vector": self.vector_dim,
            "channels": self.cond_channels,
        }


def mlp(
    shape: Sequence[int],
    *,
    width: int = 256,
    layers: int = 3,
    waves: int = 16,
    frequencies: Sequence[int | float] = (0.0625, 8.0),
    label_dim: int = 0,
    vector_dim: int = 0,
    cond_channels: int = 0,
    dtype: str = "float32",
) -> tuple[Callable, Callable]:
    """A perceptron on all pixels, waves of the noise and the conditions, with silu between.

    (n + waves) width + width + (layers - 1) (width^2 + width) + width n + n parameters
    without conditions, n = H W C: 168,768 for n = 64 and the rest as it is.

    Args:
      shape: (H, W, C).
      width, layers: of the hidden layers.
      waves: width of the fixed embedding, even: cos and sin of f noise.
      frequencies: lowest and highest f, spaced evenly in log f. The default suits noise of
        order 1, such as log(sigma) / 4.
      label_dim, vector_dim, cond_channels: classes, and widths of `cond`.
      dtype: of the products. Parameters and the result are float32.

    Returns:
      `init(key) -> params` and `apply(params, x, noise, cond=None, key=None) -> y`, as in
      `diffusion.networks.Network`. There is no dropout; `key` changes nothing.

    Raises:
      UserError: a field is out of range.
    """
    fields = dict(locals())
    h, w, c = fields.pop("shape")
    s = _checked(_Settings(**fields | {"frequencies": tuple(frequencies)}))
    module = Perceptron(s)

    def init(key: jax.Array) -> Any:
        x = jnp.zeros((1, h, w, c))
        return module.init(key, x, jnp.zeros(1), conditions(None, x, s.widths))["params"]

    def apply(params, x, noise, cond=None, key=None):
        del key  # No dropout.
        return module.apply({"params": params}, x, noise, conditions(cond, x, s.widths))

    return init, apply


def tiny_unet(
    shape: Sequence[int],
    *,
    model_channels: int = 32,
    channel_mult: Sequence[int] = (),
    channel_mult_emb: int = 4,
    num_blocks: int = 1,
    attn_resolutions: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Callable, Callable]:
    """`diffusion.unet.unet` with under 1M parameters, for images from 8 x 8 to 64 x 64.

    Args:
      channel_mult: (): (1, 2), from sides of 16 up (1, 1, 2).
      attn_resolutions: None: the smallest level's.
      The other arguments, `options` too, are those of `unet`.
    """
    mult = tuple(channel_mult) or ((1, 1, 2) if min(shape[:2]) >= 16 else (1, 2))
    smallest = shape[0] >> (len(mult) - 1)
    return unet(
        shape,
        model_channels=model_channels,
        channel_mult=mult,
        channel_mult_emb=channel_mult_emb,
        num_blocks=num_blocks,
        attn_resolutions=(smallest,) if attn_resolutions is None else attn_resolutions,
        **options,
    )


def _checked(s: _Settings) -> _Settings:
    for name in ("width", "layers"):
        whole(name, getattr(s, name), 1)
    for name in ("label_dim", "vector_dim", "cond_channels"):
        whole(name, getattr(s, name), 0)
    if whole("waves", s.waves, 2) % 2:
        raise reject("model.waves", s.waves, "even")
    if len(s.frequencies) != 2 or not 0 < s.frequencies[0] <= s.frequencies[1] < np.inf:
        raise reject("model.frequencies", s.frequencies, "two finite ones above 0, ascending")
    one_of("dtype", s.dtype, DTYPES)
    return s


class Perceptron(nn.Module):
    """The network of `mlp`; conditions as `blocks.conditions` gives them."""

    s: _Settings

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], noise: Float[Array, " b"], cond: dict[str, Array]
    ) -> Float[Array, "b h w c"]:
        s, b = self.s, len(x)
        angle = noise[:, None] * np.geomspace(*s.frequencies, s.waves // 2, dtype=np.float32)
        parts = [x.reshape(b, -1), jnp.cos(angle), jnp.sin(angle)]
        if s.label_dim:
            parts.append(one_hot(cond["label"], s.label_dim, jnp.float32))
        parts += [cond[n].reshape(b, -1) for n in ("vector", "channels") if n in cond]
        y = jnp.concatenate(parts, axis=-1).astype(s.dtype)
        for i in range(s.layers):
            y = nn.silu(nn.Dense(s.width, dtype=s.dtype, name=f"hidden{i}")(y))
        y = nn.Dense(prod(x.shape[1:]), dtype=s.dtype, name="out")(y)
        return y.reshape(x.shape).astype(jnp.float32)

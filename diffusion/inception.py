"""The Inception network of FID, with weights from a user's file.

Heusel et al. (arXiv:1706.08500) take the last pooled layer, 2048 wide, of Inception V3
(Szegedy et al., arXiv:1512.00567) in TensorFlow's release of 2015-12-05. That network
differs from others of its name: average pools leave the padding out, and the last block
pools by maximum.

The file has the names of the PyTorch port, `pt_inception-2015-12-05`, saved as safetensors
or npz. A layer NAME of `SHAPES`, for instance `Mixed_5b.branch1x1`, is

    NAME.conv.weight [out, in, height, width]     NAME.bn.weight, .bias [out]
    NAME.bn.running_mean, .running_var [out]

and `fc.weight` [1008, 2048], used for the inception score only, may be absent.
"""

from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import reject
from diffusion.features import Features
from diffusion.pretrained import coloured, read_weights, require, resampling, resized

FIELD = "eval.weights"
SIDE = 299
DIM = 2048
CLASSES = 1008
EPS = 1e-3  # Of the batch normalisation.
VARIANTS = ("tensorflow", "pytorch")


class Conv(NamedTuple):
    """A convolution without bias, batch normalisation, ReLU."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# A branch is a path of convolutions and pools: "mean" and "max" keep the size, "half" is a
# maximum of stride two. A tuple inside it stands for layers side by side, concatenated.
Branch = tuple


def _thin(name: str, out: int, *, across: bool, length: int = 7) -> Conv:
    return Conv(name, out, (1, length) if across else (length, 1))


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("mean", Conv("branch_pool", pooled)),
    )


def _b() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        ("half",),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", inner),
            _thin("branch7x7_2", inner, across=True),
            _thin("branch7x7_3", 192, across=False),
        ),
        (
            Conv("branch7x7dbl_1", inner),
            _thin("branch7x7dbl_2", inner, across=False),
            _thin("branch7x7dbl_3", inner, across=True),
            _thin("branch7x7dbl_4", inner, across=False),
            _thin("branch7x7dbl_5", 192, across=True),
        ),
        ("mean", Conv("branch_pool", 192)),
    )


def _d() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            Conv("branch7x7x3_1", 192),
            _thin("branch7x7x3_2", 192, across=True),
            _thin("branch7x7x3_3", 192, across=False),
            Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        ("half",),
    )


def _e(pool: str) -> tuple[Branch, ...]:
    sides = lambda stem: (
        _thin(f"{stem}a", 384, across=True, length=3),
        _thin(f"{stem}b", 384, across=False, length=3),
    )
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), sides("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            sides("branch3x3dbl_3"),
        ),
        (pool, Conv("branch_pool", 192)),
    )


STEM: Branch = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "half",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "half",
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("max"),
}


def _walk(prefix: str, branch: Branch, width: int) -> Iterator[tuple[str, tuple, int]]:
    """(full name, shape of the kernel, width after it) along a branch."""
    for part in branch:
        if isinstance(part, Conv):
            yield prefix + part.name, (part.out, width, *part.kernel), part.out
            width = part.out
        elif isinstance(part, tuple):
            for side in part:
                yield prefix + side.name, (side.out, width, *side.kernel), side.out
            width = sum(side.out for side in part)


def _width(branch: Branch, width: int) -> int:
    for part in branch:
        if isinstance(part, Conv):
            width = part.out
        elif isinstance(part, tuple):
            width = sum(side.out for side in part)
    return width


def _shapes() -> dict[str, tuple[int, int, int, int]]:
    """The shape [out, in, height, width] of every layer's kernel by the layer's name."""
    shapes = {name: shape for name, shape, _ in _walk("", STEM, 3)}
    width = _width(STEM, 3)
    for block, branches in BLOCKS.items():
        for branch in branches:
            shapes |= {n: shape for n, shape, _ in _walk(f"{block}.", branch, width)}
        width = sum(_width(branch, width) for branch in branches)
    return shapes


SHAPES = _shapes()


def inception(path: str, variant: str = "tensorflow") -> Features:
    """The features of FID, dim 2048, for `diffusion.quality`.

    Args:
      path: of the weights, see the module.
      variant: how pixels become the network's input. "tensorflow": (x - 128) / 128 for x in
        0 ... 255, and a resize whose pixels have no centres, as in the original and in EDM;
        "pytorch": x / 127.5 - 1, pixels with centres, as in the port's own command. Both
        are bilinear and do not antialias. Their distances differ in the third digit.

    Raises:
      UserError: the file or the variant is not one of these.
    """
    if variant not in VARIANTS:
        raise reject("eval.inception", variant, f"one of {', '.join(VARIANTS)}")
    params = convert(read_weights(path, FIELD), path)
    head = lambda params, f: jnp.matmul(f, params["fc"], precision="highest")
    head = head if "fc" in params else None
    return Features("inception", DIM, params, lambda p, x: apply(p, x, variant), head)


def convert(tensors: dict[str, np.ndarray], path: str = "the file") -> dict:
    """Parameters of the port's tensors: {NAME: {"kernel" [h, w, in, out], "scale", "shift"}}.

    Batch normalisation is folded in: scale = weight / sqrt(var + eps), shift = bias - mean
    scale. `fc` [2048, 1008] is there if the file has it, without its bias: the inception
    score was defined so (Salimans et al., arXiv:1606.03498, and their code).

    Raises:
      UserError: a tensor is missing, has another shape or is not finite.
    """
    parts = ("weight", "bias", "running_mean", "running_var")
    shapes = {}
    for name, shape in SHAPES.items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{part}": shape[:1] for part in parts}
    if "fc.weight" in tensors:
        shapes["fc.weight"] = (CLASSES, DIM)
    found = require(tensors, shapes, path, FIELD)
    params = {}
    for name in SHAPES:
        weight, bias, mean, var = (found[f"{name}.bn.{p}"].astype(np.float64) for p in parts)
        scale = weight / np.sqrt(var + EPS)
        params[name] = {
            "kernel": np.transpose(found[f"{name}.conv.weight"], (2, 3, 1, 0)),
            "scale": scale.astype(np.float32),
            "shift": (bias - mean * scale).astype(np.float32),
        }
    if "fc.weight" in found:
        params["fc"] = found["fc.weight"].T
    return jax.tree.map(jnp.asarray, params)


def apply(
    params: dict, images: Float[Array, "b h w c"], variant: str = "tensorflow"
) -> Float[Array, "b 2048"]:
    """Pooled features of images in [-1, 1] (grey ones as three equal channels)."""
    offset = {"tensorflow": 0.0, "pytorch": 0.5}[variant]
    axes = (resampling(size, SIDE, "linear", offset) for size in images.shape[1:3])
    x = resized(coloured(images), *axes)
    if variant == "tensorflow":
        x = (x * 127.5 - 0.5) / 128
    x = _branch(params, "", STEM, x)
    for block, branches in BLOCKS.items():
        x = block_apply(params, block, branches, x)
    return x.mean((1, 2))


def block_apply(
    params: dict, name: str, branches: tuple[Branch, ...], x: Float[Array, "b h w c"]
) -> Float[Array, "b p q d"]:
    """The branches of a block side by side."""
    return jnp.concatenate([_branch(params, f"{name}.", b, x) for b in branches], axis=-1)


def _branch(params: dict, prefix: str, branch: Branch, x: Array) -> Array:
    pools = {
        "mean": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
        "max": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
        "half": lambda x: nn.max_pool(x, (3, 3), strides=(2, 2)),
    }
    for part in branch:
        if isinstance(part, str):
            x = pools[part](x)
        elif isinstance(part, Conv):
            x = _conv(params[prefix + part.name], part, x)
        else:
            sides = [_conv(params[prefix + side.name], side, x) for side in part]
            x = jnp.concatenate(sides, axis=-1)
    return x


def _conv(p: dict, conv: Conv, x: Array) -> Array:
    x = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return jax.nn.relu(x * p["scale"] + p["shift"])

"""DINOv2 features (Oquab et al., arXiv:2304.07193), with weights from a user's file.

The distance of Stein et al. (arXiv:2306.04675): the class token after the last norm, of
images resized to 224 pixels. ViT-S, B or L with patches of 14; the sizes come from the file.

The file is a `model.safetensors` (or an npz) with the names of Hugging Face's
`Dinov2Model`, of a prefix `dinov2.` or none. In a layer, the attention may have its older
names (`attention.attention.query`, `attention.output.dense`) or the newer ones
(`attention.q_proj`, `attention.o_proj`); see `LAYER`. Models with registers or gated
perceptrons (ViT-g) are other networks.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import UserError
from diffusion.features import Features
from diffusion.pretrained import coloured, read_weights, require, resampling

FIELD = "eval.weights"
PREFIX = "dinov2."
PATCH, SIDE, HEAD = 14, 224, 64
EPS = 1e-6  # Of the layer norms.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # Of ImageNet, for values in [0, 1].
STD = np.array([0.229, 0.224, 0.225], np.float32)

# Our leaf of a block -> name of theirs below `encoder.layer.N`, and its shape in units of
# the width: matrices are [out, in].
LAYER = {
    "norm1/scale": ("norm1.weight", (1,)),
    "norm1/bias": ("norm1.bias", (1,)),
    "q/kernel": ("attention.attention.query.weight", (1, 1)),
    "q/bias": ("attention.attention.query.bias", (1,)),
    "k/kernel": ("attention.attention.key.weight", (1, 1)),
    "k/bias": ("attention.attention.key.bias", (1,)),
    "v/kernel": ("attention.attention.value.weight", (1, 1)),
    "v/bias": ("attention.attention.value.bias", (1,)),
    "o/kernel": ("attention.output.dense.weight", (1, 1)),
    "o/bias": ("attention.output.dense.bias", (1,)),
    "scale1": ("layer_scale1.lambda1", (1,)),
    "norm2/scale": ("norm2.weight", (1,)),
    "norm2/bias": ("norm2.bias", (1,)),
    "fc1/kernel": ("mlp.fc1.weight", (4, 1)),
    "fc1/bias": ("mlp.fc1.bias", (4,)),
    "fc2/kernel": ("mlp.fc2.weight", (1, 4)),
    "fc2/bias": ("mlp.fc2.bias", (1,)),
    "scale2": ("layer_scale2.lambda1", (1,)),
}
NEWER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
TOKEN = "embeddings.cls_token"
POSITIONS = "embeddings.position_embeddings"
PROJECTION = "embeddings.patch_embeddings.projection"


def dinov2(path: str) -> Features:
    """The features, dim 384, 768 or 1024, for `diffusion.quality`.

    Args:
      path: of the weights, see the module.

    Raises:
      UserError: the file is not that of such a network.
    """
    params = convert(read_weights(path, FIELD), path)
    return Features("dinov2", params["token"].size, params, apply)


def convert(tensors: dict[str, np.ndarray], path: str = "the file") -> dict:
    """Our parameters of theirs. Layers are stacked, matrices [L, in, out].

    The table of positions, for images of 518 pixels in the published files, is resized to
    that of 224 pixels here, once: cubic with a = -3/4 and no antialiasing, as theirs is.

    Raises:
      UserError: a tensor is missing, has another shape or is not finite.
    """
    tensors = {_renamed(name): array for name, array in tensors.items()}
    if TOKEN not in tensors or POSITIONS not in tensors:
        missing = TOKEN if TOKEN not in tensors else POSITIONS
        raise UserError(f"config.{FIELD}: {path} lacks the tensor {missing}.")
    dim = tensors[TOKEN].size
    grid = math.isqrt(max(tensors[POSITIONS].size // max(dim, 1) - 1, 1))
    layers = {m[1] for m in (re.match(r"encoder\.layer\.(\d+)\.", n) for n in tensors) if m}
    if not layers or dim % HEAD:
        raise UserError(
            f"config.{FIELD}: {path} has {len(layers)} layers of width {dim}, but must have "
            f"one at least, of a width that {HEAD} divides."
        )
    shapes = {
        TOKEN: (1, 1, dim),
        POSITIONS: (1, 1 + grid * grid, dim),
        f"{PROJECTION}.weight": (dim, 3, PATCH, PATCH),
        f"{PROJECTION}.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }
    for layer in range(len(layers)):
        for name, units in LAYER.values():
            shapes[f"encoder.layer.{layer}.{name}"] = tuple(u * dim for u in units)
    found = require(tensors, shapes, path, FIELD)

    blocks: dict = {}
    for leaf, (name, units) in LAYER.items():
        layered = [found[f"encoder.layer.{layer}.{name}"] for layer in range(len(layers))]
        stacked = np.stack([each.T if len(units) == 2 else each for each in layered])
        group, _, last = leaf.rpartition("/")
        if group:
            blocks.setdefault(group, {})[last] = stacked
        else:
            blocks[last] = stacked
    first, table = np.split(found[POSITIONS][0], [1])
    to = resampling(grid, SIDE // PATCH, "cubic")
    table = np.einsum("ph,hwd,qw->pqd", to, table.reshape(grid, grid, dim), to)
    params = {
        "token": found[TOKEN][0, 0] + first[0],
        "positions": table.reshape(-1, dim).astype(np.float32),
        "patch": {
            "kernel": np.transpose(found[f"{PROJECTION}.weight"], (2, 3, 1, 0)),
            "bias": found[f"{PROJECTION}.bias"],
        },
        "blocks": blocks,
        "norm": {"scale": found["layernorm.weight"], "bias": found["layernorm.bias"]},
    }
    return jax.tree.map(jnp.asarray, params)


def apply(params: dict, images: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
    """The class token of images in [-1, 1] (grey ones as three equal channels).

    They are resized to 224 x 224, cubic with a = -1/2 and antialiased, as Pillow does.
    """
    x = coloured(images)
    if x.shape[1:3] != (SIDE, SIDE):
        x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "cubic", precision="highest")
    x = (jnp.clip(x, -1, 1) + 1) / 2
    return encode(params, (x - MEAN) / STD)


def encode(params: dict, x: Float[Array, "b 224 224 3"]) -> Float[Array, "b dim"]:
    """The class token of normalised images."""
    with jax.default_matmul_precision("highest"):
        h = jax.lax.conv_general_dilated(
            x,
            params["patch"]["kernel"],
            (PATCH, PATCH),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = h.reshape(len(x), *params["positions"].shape)
        h = h + params["patch"]["bias"] + params["positions"]
        token = jnp.broadcast_to(params["token"], (len(x), 1, h.shape[-1]))
        h = jnp.concatenate([token, h], axis=1)
        h, _ = jax.lax.scan(lambda h, p: (block(p, h), None), h, params["blocks"])
        return _norm(params["norm"], h[:, 0])


def block(p: dict, h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """One layer: h + s1 attention(norm(h)), then h + s2 mlp(norm(h)); GELU is exact."""
    b, t, d = h.shape
    x = _norm(p["norm1"], h)
    q, k, v = (_dense(p[name], x).reshape(b, t, d // HEAD, HEAD) for name in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v).reshape(b, t, d)
    h = h + p["scale1"] * _dense(p["o"], mixed)
    x = jax.nn.gelu(_dense(p["fc1"], _norm(p["norm2"], h)), approximate=False)
    return h + p["scale2"] * _dense(p["fc2"], x)


def _renamed(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for newer, older in NEWER.items():
        name = name.replace(f".{newer}.", f".{older}.")
    return name


def _dense(p: dict, x: Array) -> Array:
    return x @ p["kernel"] + p["bias"]


def _norm(p: dict, x: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + EPS) * p["scale"] + p["bias"]

"""What feature networks with a user's weights share: their files, and resizing.

Weights are never downloaded. A file is read whole, and every tensor is looked at before
the first is used, so that a wrong file is a sentence and not a strange distance.
"""

from pathlib import Path
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import UserError, reject

DTYPES = ("float16", "bfloat16", "float32", "float64")


def read_weights(path: str, field: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors or npz file by name.

    Args:
      path: ends in .safetensors or .npz.
      field: of the config, that the path comes from.

    Raises:
      UserError: the file is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    place = Path(path).expanduser()
    if not place.is_file():
        raise reject(field, path, "a .safetensors or .npz file that exists")
    if place.suffix not in (".safetensors", ".npz"):
        raise reject(field, path, "a file that ends in .safetensors or .npz")
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        with np.load(place, allow_pickle=False) as stored:
            return dict(stored)
    except (SafetensorError, BadZipFile, OSError, ValueError, KeyError) as error:
        raise UserError(f"config.{field}: {path} is damaged: {error}.") from error


def require(
    tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], path: str, field: str
) -> dict[str, np.ndarray]:
    """The tensors of these names as float32, once all are there in these shapes.

    Raises:
      UserError: some are missing, of another shape or type, or not finite.
    """
    missing = [name for name in shapes if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"config.{field}: {path} lacks the tensor {missing[0]}{more}.")
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape:
            raise UserError(
                f"config.{field}: {name} of {path} has the shape {found.shape}, but must have "
                f"{shape}."
            )
        if str(found.dtype) not in DTYPES:
            raise UserError(f"config.{field}: {name} of {path} is of type {found.dtype}.")
        if not np.all(np.isfinite(found.astype(np.float32))):
            raise UserError(f"config.{field}: {name} of {path} is not finite.")
    return {name: tensors[name].astype(np.float32) for name in shapes}


def resampling(
    size: int, out: int, kernel: str = "linear", offset: float = 0.5
) -> Float[np.ndarray, "out size"]:
    """The matrix that resizes one axis, as PyTorch and TensorFlow do without antialiasing.

    Pixel i of the result is taken at (i + offset) size / out - offset; what would come from
    beyond the border comes from the last pixel.

    Args:
      size, out: pixels before and after.
      kernel: linear, or cubic with a = -3/4.
      offset: 0.5 where pixels have centres, 0 for the first TensorFlow's.
    """
    at = (np.arange(out) + offset) * size / out - offset
    first = np.floor(at).astype(int)
    weights = {"linear": _linear, "cubic": _cubic}[kernel]
    matrix = np.zeros((out, size))
    for step in (-1, 0, 1, 2):
        column = np.clip(first + step, 0, size - 1)
        np.add.at(matrix, (np.arange(out), column), weights(np.abs(at - first - step)))
    return matrix.astype(np.float32)


def resized(
    x: Float[Array, "b h w c"],
    rows: Float[np.ndarray, "p h"],
    columns: Float[np.ndarray, "q w"],
) -> Float[Array, "b p q c"]:
    """x resized by the matrices of its two axes, in full float32."""
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, precision="highest")


def coloured(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Grey images as three equal channels; others pass.

    Raises:
      UserError: neither one nor three channels.
    """
    if x.shape[-1] == 3:
        return x
    if x.shape[-1] != 1:
        raise reject("eval.features", f"for {x.shape[-1]} channels", "local unless 1 or 3")
    return jnp.repeat(x, 3, axis=-1)


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys, IEEE Trans. ASSP 29 (1981), equation 4, with a = -3/4."""
    t = distance
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

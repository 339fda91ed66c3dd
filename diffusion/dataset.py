"""The data set of a config: images, and all their rows on the devices."""

import hashlib
import sys
from functools import lru_cache

import jax
import numpy as np

from common.errors import reject
from diffusion import images as im
from diffusion.rows import Rows, rows

FLOAT_BYTES = 2**32  # Data sets up to this size are kept on the devices as float32.


def dataset(
    path: str,
    scaling: str,
    resolution: int,
    channels: int,
    num_rows: int,
    shuffle: bool,
    class_cond: bool,
    flip: bool,
    cache: str,
    seed: int = 0,
) -> im.Images:
    """The images of `config.data`, read once per process.

    Args:
      path: "" for the digits, a file or folder as in `images.load`, or "gaussian:HxWxC",
        independent normal numbers, for trying sizes out.
      flip: adds the mirror image of every row.

    The other fields are those of `images.load`.

    Raises:
      UserError: the data cannot be used.
    """
    options = dict(
        scaling=scaling,
        resolution=resolution,
        channels=channels,
        num_rows=num_rows,
        shuffle=shuffle,
        class_cond=class_cond,
        flip=flip,
        cache=cache,
        seed=seed,
    )
    return _read(path, tuple(options.items()))


@lru_cache(maxsize=2)
def _read(path: str, options: tuple) -> im.Images:
    given = dict(options)
    if path.startswith("gaussian:"):
        return _gaussian(path, given["num_rows"] or 512, given["seed"])
    return im.load(path, **given)


def _gaussian(path: str, count: int, seed: int) -> im.Images:
    try:
        shape = tuple(int(n) for n in path.removeprefix("gaussian:").split("x"))
        assert len(shape) == 3 and min(shape) > 0  # noqa: PT018
    except (ValueError, AssertionError):
        raise reject("data.path", path, "gaussian:HxWxC, such as gaussian:64x64x3") from None
    if jax.process_index() == 0:
        print(f"note: config.data.path is {path}: random numbers, no images", file=sys.stderr)
    rng = np.random.default_rng(seed)
    pixels = 0.5 * rng.standard_normal((count, *shape), np.float32)
    labels = np.arange(count, dtype=np.int32) % 10
    one = np.ones(shape[-1], np.float32)
    name = f"{path} {count} {seed}"
    return im.Images(pixels, labels, (), "", 0 * one, one, path, name, name, 0)


def fingerprint(images: im.Images, conditional: bool) -> np.ndarray:
    """What a curve is of, uint32 [8]: rows and scaling, and whether the class is told."""
    text = f"{images.sha256} {conditional}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)


def placed(
    images: im.Images, mesh: jax.sharding.Mesh | None, tile: int, conditional: bool
) -> Rows:
    """All rows on the devices of a mesh, split over its axis "data".

    Args:
      images: the data set.
      mesh: None or one device: all on the default device.
      tile: rows per tile.
      conditional: with the labels.
    """
    labels = images.labels if conditional else None
    several = mesh is not None and mesh.shape["data"] > 1
    place = dict(tile=tile, labels=labels, mesh=mesh if several else None)
    stored = images.rows
    if stored.dtype == np.uint8 and images.scaling == "x/127.5-1":
        if 4 * stored.nbytes > FLOAT_BYTES:
            return rows(stored, scale=1 / 127.5, offset=-1.0, **place)
        stored = np.asarray(im.scaled(stored))
    return rows(stored, **place)

"""The data set of a config: images, and all their rows on the devices."""

import hashlib
import sys
import warnings
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
        independent normal numbers, for trying sizes out. They have labels, their order is
        random, and nothing is decoded: class_cond, shuffle and cache change nothing.
      num_rows: of random numbers, 0 is 512.
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
    random = path.startswith("gaussian:")
    images = _gaussian(path, given) if random else im.load(path, **given)
    _tell_of_single_rows(images, given["class_cond"])
    return images


def _tell_of_single_rows(images: im.Images, conditional: bool) -> None:
    said = "of which nothing can be lost: J* is 0."
    if len(images.rows) == 1:
        warnings.warn(f"data.path: {images.name} has one row, {said}", stacklevel=4)
    elif conditional:
        alone = int(np.sum(np.bincount(images.labels) == 1))
        if alone:
            warnings.warn(
                f"data.class_cond: {alone} classes have one row, {said}", stacklevel=4
            )


def _gaussian(path: str, given: dict) -> im.Images:
    try:
        shape = tuple(int(n) for n in path.removeprefix("gaussian:").split("x"))
        assert len(shape) == 3 and min(shape) > 0  # noqa: PT018
    except (ValueError, AssertionError):
        raise reject("data.path", path, "gaussian:HxWxC, such as gaussian:64x64x3") from None
    im.check_options(given)
    height, width, channels = shape
    for name, found in (("resolution", (height, width)), ("channels", (channels, channels))):
        if given[name] and (given[name], given[name]) != found:
            allowed = f"0, or what {path} says"
            raise reject(f"data.{name}", given[name], allowed)
    if jax.process_index() == 0:
        print(f"note: config.data.path is {path}: random numbers, no images", file=sys.stderr)
    count, seed = given["num_rows"] or 512, given["seed"]
    rng = np.random.default_rng(seed)
    pixels = 0.5 * rng.standard_normal((count, *shape), np.float32)
    labels = np.arange(count, dtype=np.int32) % 10
    one = np.ones(channels, np.float32)
    name = f"{path} {count} {seed}"
    images = im.Images(pixels, labels, (), "", 0 * one, one, path, name, name, 0)
    return im.flipped(images) if given["flip"] else images


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

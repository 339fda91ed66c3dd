"""Image data: rows of equal shape, what was done to them, and a hash to know them by.

    images = load("", scaling="x/127.5-1")          the digits of scikit-learn, 8 x 8 x 1
    x = scaled(images.rows[:64])                    float32, what everything works with
    pictures = restored(images, x)                  back in the units of the file

Rows stay uint8 where the file has uint8, and are scaled when used, so that the data take
a quarter of the memory. Float rows are scaled once, here.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from common.errors import UserError, reject
from diffusion import image_files

SCALINGS = ("x/127.5-1", "")
CHUNK = 4096  # Rows looked at together.
WIDEST = 16.0  # Float values beyond this are no images in [-1, 1].
LARGEST = 1e15  # Squares of float values up to this add up to a float32.


class Images(NamedTuple):
    """A data set in memory, or a memory map.

    Attributes:
      rows: [N, H, W, C], uint8 (0 to 255, see `scaled`) or float32 (already scaled).
      labels: int32 [N], from 0 up, or None.
      classes: their names; empty where the file has none.
      scaling: x/127.5-1, x/8-1, "" (none) or "per channel".
      mean, std: float32 [C], scaled = (x - mean) / std of the values in the file.
      name: of the file or folder, for titles.
      sha256: of rows, labels and scaling: two data sets with one hash are the same.
      source: sha256 of the bytes of the pixels as they were read, before any scaling.
      duplicates: rows that equal an earlier row.
    """

    rows: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    scaling: str
    mean: np.ndarray
    std: np.ndarray
    name: str
    sha256: str
    source: str
    duplicates: int


def load(
    path: str = "",
    *,
    scaling: str,
    resolution: int = 0,
    channels: int = 0,
    num_rows: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    class_cond: bool = False,
    flip: bool = False,
    cache: str = "",
) -> Images:
    """The data of a config's `data`.

    Args:
      path: "" or "digits" is scikit-learn's `load_digits` by x/8-1; else a folder or a file
        as in `diffusion.image_files`. Rows may also be [N, H, W] (one channel) or [N, D]
        (points: D channels of one pixel). Latents are standardised per channel.
      scaling: of integer images: x/127.5-1 takes 0 ... 255 to [-1, 1]; with "" they are
        refused. Float images are taken as they are, float16 and float64 as float32, with
        a warning where they lie in [0, 1] or far beyond [-1, 1].
      resolution: images become squares of this side: the centre, resized by Lanczos.
        0: as they are. Float arrays and latents are only checked.
      channels: 1 or 3 converts 8-bit images; else it is checked. 0: as they are.
      num_rows: that many; 0: all.
      shuffle, seed: a random order instead of the file's, before the first `num_rows` are
        taken. (A file sorted by class needs it.)
      class_cond: labels are needed.
      flip: adds the mirror images, see `flipped`.
      cache: an .npy, where decoded images are kept and mapped from; "": in memory only.

    Raises:
      UserError: whatever is missing, damaged, empty, not finite or does not fit together.
    """
    counts = dict(resolution=resolution, channels=channels, num_rows=num_rows)
    check_options(dict(scaling=scaling) | counts)
    digits = path in ("", "digits")
    path = "digits" if digits else path
    source = _digits() if digits else image_files.opened(path)
    if num_rows > source.count:
        raise reject("data.num_rows", num_rows, f"from 0 to the {source.count} rows there are")
    chosen = np.arange(source.count)
    if shuffle:
        chosen = np.random.default_rng(seed).permutation(source.count)
    chosen = chosen[: num_rows or source.count]
    labels = _labels(source, path, class_cond)
    if cache:
        rows = image_files.cached(source, chosen, resolution, channels, cache)
    else:
        rows = source.read(chosen, resolution, channels)
    rows = _shaped(rows, path, resolution, channels, source.kind)
    _finite(rows, path)
    pixels = _sha256(rows)
    rows, scaling, mean, std = _prepared(rows, "x/8-1" if digits else scaling, source.kind)
    images = Images(
        rows=rows,
        labels=None if labels is None else labels[chosen],
        classes=source.classes,
        scaling=scaling,
        mean=mean,
        std=std,
        name=Path(path).expanduser().resolve().stem,
        sha256="",
        source=pixels,
        duplicates=_duplicates(rows),
    )
    images = _signed(images)
    return flipped(images) if flip else images


def check_options(given: Mapping[str, Any]) -> None:
    """Refuses what no data can have: arguments of `load`, by name.

    Raises:
      UserError: resolution, channels or num_rows is below 0, or there is no such scaling.
    """
    for name in ("resolution", "channels", "num_rows"):
        if given[name] < 0:
            raise reject(f"data.{name}", given[name], "a whole number from 0 up")
    scaling = given["scaling"]
    if scaling not in SCALINGS:
        raise reject("data.scaling", scaling, "x/127.5-1, or empty for images that are floats")


def scaled(rows: Shaped[Array, "*shape"] | Shaped[np.ndarray, "*shape"]) -> Any:
    """float32 rows in the units of the network: uint8 by x/127.5-1, floats as they are.

    Works on NumPy and JAX arrays alike, of any shape, also under `jit`.
    """
    xp = np if isinstance(rows, np.ndarray) else jnp
    if rows.dtype == xp.uint8:
        return rows.astype(xp.float32) / xp.float32(127.5) - xp.float32(1)
    return rows.astype(xp.float32)


def restored(images: Images, x: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"]) -> Any:
    """x back in the units of the file: x * std + mean, float32 [B, H, W, C]."""
    return x * images.std + images.mean


def to_uint8(x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"]) -> UInt8[Any, "*shape"]:
    """Samples in [-1, 1] as pixels: clip(127.5 x + 127.5, 0, 255), rounded."""
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.round(xp.clip(127.5 * x + 127.5, 0, 255)).astype(xp.uint8)


def flipped(images: Images) -> Images:
    """Twice the rows: row N + i is row i mirrored left to right, with the same label.

    The optimal loss of training with random flips is that of these 2 N rows.
    """
    rows = np.concatenate([images.rows, images.rows[:, :, ::-1]])
    labels = images.labels
    labels = None if labels is None else np.concatenate([labels, labels])
    doubled = images._replace(rows=rows, labels=labels, duplicates=_duplicates(rows))
    return _signed(doubled)


def _digits() -> image_files.Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = found.images.astype(np.float32)[..., None]
    names = tuple(str(name) for name in found.target_names)

    def read(chosen, resolution, channels):
        return pixels[chosen]

    return image_files.Source(
        len(pixels), read, found.target, names, "images", f"digits of {len(pixels)}"
    )


def _labels(source: image_files.Source, path: str, needed: bool) -> np.ndarray | None:
    labels = source.labels
    if labels is None:
        if needed:
            raise reject("data.class_cond", True, f"False: there are no labels in {path}")
        return None
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (source.count,):
        allowed = f"one label a row, but there are {labels.shape} labels, {source.count} rows"
        raise UserError(f"config.data.path: {path} must have {allowed}.")
    if labels.dtype.kind not in "iu":
        raise UserError(f"config.data.path: labels of {path} are {labels.dtype}, not integers.")
    if np.any(labels < 0):
        first = int(np.argmax(labels < 0))
        missing = (
            f"{int(np.sum(labels < 0))} rows have none (below 0), the first is row {first}"
        )
        raise UserError(f"config.data.path: {path} must have a label for all rows; {missing}.")
    return labels.astype(np.int32)


def _shaped(
    rows: np.ndarray, path: str, resolution: int, channels: int, kind: str
) -> np.ndarray:
    """[N, H, W, C] of what was read."""
    if rows.ndim == 2:
        rows = rows[:, None, None, :]
    elif rows.ndim == 3:
        rows = rows[..., None]
    if rows.ndim != 4 or 0 in rows.shape:
        raise UserError(
            f"config.data.path: {path} must hold rows [N, H, W, C], but has the shape "
            f"{rows.shape}."
        )
    _, height, width, found = rows.shape
    if not channels and found > 4 and height in (1, 3) and kind == "images" and width > 1:
        allowed = (
            f"the number of channels: is {rows.shape} [N, C, H, W]? It must be [N, H, W, C]"
        )
        raise reject("data.channels", channels, allowed)
    if channels and found != channels:
        hint = f"{found}, which the rows have"
        if rows.shape[1] == channels:
            hint += " (is the array [N, C, H, W]? It must be [N, H, W, C])"
        raise reject("data.channels", channels, hint)
    if resolution and (height, width) != (resolution, resolution):
        allowed = f"0: the rows are {width} x {height}, and only 8-bit images are resized"
        raise reject("data.resolution", resolution, allowed)
    return rows


def _finite(rows: np.ndarray, path: str) -> None:
    if rows.dtype.kind != "f":
        return
    count, first = 0, None
    for start in range(0, len(rows), CHUNK):
        bad = ~np.isfinite(rows[start : start + CHUNK])
        if bad.any():
            count += int(bad.sum())
            if first is None:
                at = np.argwhere(bad)[0]
                first = (start + int(at[0]), *(int(i) for i in at[1:]))
    if count:
        raise UserError(
            f"config.data.path: {path} must hold finite numbers, but {count} are NaN or "
            f"infinite, the first at index {first}."
        )


def _prepared(rows: np.ndarray, scaling: str, kind: str) -> tuple:
    """(rows, scaling, mean, std): uint8 as they are, all others float32 and scaled."""
    channels = rows.shape[-1]
    constant = lambda value: np.full(channels, value, np.float32)
    if scaling == "x/8-1":
        return rows / np.float32(8) - np.float32(1), scaling, constant(8), constant(8)
    if rows.dtype.kind == "f":
        if rows.dtype == np.float16:
            warnings.warn("data.path: float16 rows are promoted to float32.", stacklevel=3)
        if kind == "latents":
            mean = rows.mean((0, 1, 2), dtype=np.float64)
            std = rows.astype(np.float64).std((0, 1, 2))
            if not np.all(std > 0):
                flat = int(np.argmin(std))
                raise UserError(f"config.data.path: channel {flat} of the latents is constant.")
            rows = ((rows - mean) / std).astype(np.float32)
            return rows, "per channel", mean.astype(np.float32), std.astype(np.float32)
        low, high = float(rows.min()), float(rows.max())
        if max(-low, high) > LARGEST:
            allowed = f"numbers up to {LARGEST:g}, but they go from {low:g} to {high:g}"
            raise UserError(f"config.data.path: images must be {allowed}.")
        unit = low >= 0 and high <= 1
        if unit or max(-low, high) > WIDEST:
            hint = ", which 2 x - 1 makes of [0, 1]" if unit else ""
            warnings.warn(
                f"data.path: float rows from {low:g} to {high:g} are taken as they are; "
                f"images should be in [-1, 1]{hint}.",
                stacklevel=3,
            )
        return rows.astype(np.float32, copy=False), "", constant(0), constant(1)
    if rows.dtype.kind not in "iu" or kind == "latents":
        raise UserError(f"config.data.path: {kind} must not be of type {rows.dtype}.")
    if not scaling:
        raise reject("data.scaling", scaling, f"x/127.5-1, as the images are {rows.dtype}")
    if rows.dtype != np.uint8:
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high > 255:
            allowed = f"from 0 to 255, but go from {low} to {high}"
            raise UserError(f"config.data.path: {rows.dtype} images must be {allowed}.")
        rows = rows.astype(np.uint8)
    return rows, scaling, constant(127.5), constant(127.5)


def _chunks(rows: np.ndarray):
    for start in range(0, len(rows), CHUNK):
        yield np.ascontiguousarray(rows[start : start + CHUNK])


def _sha256(rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(rows):
        digest.update(chunk)
    return digest.hexdigest()


def _duplicates(rows: np.ndarray) -> int:
    seen = set()
    for chunk in _chunks(rows):
        seen.update(hashlib.blake2b(row, digest_size=16).digest() for row in chunk)
    return len(rows) - len(seen)


def _signed(images: Images) -> Images:
    labels = images.labels
    facts = [
        _sha256(images.rows),
        list(images.rows.shape),
        str(images.rows.dtype),
        None if labels is None else _sha256(labels),
        images.mean.tolist(),
        images.std.tolist(),
    ]
    return images._replace(sha256=hashlib.sha256(json.dumps(facts).encode()).hexdigest())

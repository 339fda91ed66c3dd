"""Readers of image files: what a path holds, and its rows by index, decoded when asked for.

    a folder      png, jpg, jpeg, webp, bmp; classes are the folders right below, if any
    x.npz         `images` [N, H, W, C], or `latents` [N, h, w, c], with or without `labels`
    x.npz         JPEG streams that share a header: `header`, `bodies`, `offsets` (, `labels`)
    x.npy         one array

Nothing is scaled here. Every failure is a `UserError` that names the field or the file.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from common.errors import UserError, reject

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GREY = ("1", "L", "LA")
WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # More than eight bits a value.
THREADS = 8
FIELD = "data.path"


class Source(NamedTuple):
    """What a path holds.

    Attributes:
      count: N.
      read: (indices [n], resolution, channels) -> array [n, ...]; 0 is: as it is.
      labels: [N], as they were found, or None.
      classes: names of the classes, where there are any.
      kind: images or latents.
      stamp: of the files and their times, to tell whether a cache is still good.
    """

    count: int
    read: Callable[[np.ndarray, int, int], np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    kind: str
    stamp: str


def opened(path: str) -> Source:
    """The source at a path.

    Raises:
      UserError: it is not there, is no kind of the list above, or cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise reject(FIELD, path, "a folder of images, an .npz or an .npy that exists")
    if place.is_dir():
        return _folder(place)
    kinds = {".npz": _npz, ".npy": _npy}
    if place.suffix.lower() not in kinds:
        raise reject(FIELD, path, "a folder of images, or end in .npz or .npy")
    try:
        return kinds[place.suffix.lower()](place)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path} is damaged or no NumPy file: {reason}.") from error


def fitted(picture: Any, resolution: int, channels: int) -> np.ndarray:
    """A Pillow image as uint8 [H, W, C]: the centre square, by Lanczos to the resolution.

    Args:
      picture: of eight bits a value; transparent parts come out white.
      resolution: 0 keeps the size and the shape.
      channels: 1 (luminance) or 3.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise reject("data.channels", channels, "0, 1 or 3 where images are decoded")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if resolution:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        box = (left, top, left + side, top + side)
        if picture.size != (resolution, resolution):
            size = (resolution, resolution)
            picture = picture.resize(size, Image.Resampling.LANCZOS, box=box)
    array = np.asarray(picture, np.uint8)
    return array[:, :, None] if channels == 1 else array


def cached(source: Source, chosen: np.ndarray, resolution: int, channels: int, cache: str):
    """`source.read(chosen, ...)`, kept as `cache` (an .npy) and memory-mapped from there.

    Beside it stands a .json with what it was made from; where that differs, it is made
    again. Both are written under other names first, and the .json goes in last.

    Raises:
      UserError: `cache` does not end in .npy or cannot be written.
    """
    target = Path(cache).expanduser()
    if target.suffix != ".npy":
        raise reject("data.cache", cache, "a path that ends in .npy")
    note = target.with_suffix(".json")
    order = hashlib.sha256(np.ascontiguousarray(chosen, np.int64)).hexdigest()
    made_from = dict(files=source.stamp, rows=order, resolution=resolution, channels=channels)
    try:
        if target.exists() and note.exists() and json.loads(note.read_text()) == made_from:
            return np.load(target, mmap_mode="r")
    except (OSError, ValueError):
        pass  # Torn or not ours: made again.
    rows = source.read(chosen, resolution, channels)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        with _whole(target) as file:
            np.save(file, rows)
        with _whole(note) as file:
            file.write(json.dumps(made_from).encode())
        return np.load(target, mmap_mode="r")
    except OSError as error:
        raise UserError(f"config.data.cache: {cache} cannot be written: {error}.") from error


@contextmanager
def _whole(path: Path) -> Iterator:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _folder(place: Path) -> Source:
    found = [
        p
        for p in sorted(place.rglob("*"))
        if p.suffix.lower() in ENDINGS
        and p.is_file()
        and not any(part.startswith((".", "__")) for part in p.relative_to(place).parts)
    ]
    if not found:
        raise reject(FIELD, str(place), f"a folder with {', '.join(ENDINGS)} files in it")
    tops = [p.relative_to(place).parts[0] if p.parent != place else "" for p in found]
    classes = tuple(sorted(set(tops)))
    if "" in classes and len(classes) > 1:
        loose = found[tops.index("")]
        allowed = f"all images in class folders or none, but {loose.name} is outside of them"
        raise UserError(f"config.data.path is {str(place)!r}, which must have {allowed}.")
    labels = None
    if classes == ("",):
        classes = ()
    else:
        labels = np.array([classes.index(top) for top in tops], np.int32)

    def read(chosen, resolution, channels):
        files = [found[i] for i in chosen]
        return _decoded(files, [str(f) for f in files], resolution, channels)

    facts = ((str(p.relative_to(place)), p.stat()) for p in found)
    listing = [(name, s.st_size, s.st_mtime_ns) for name, s in facts]
    return Source(len(found), read, labels, classes, "images", _digest(listing))


def _decoded(streams: list, names: list[str], resolution: int, channels: int) -> np.ndarray:
    """uint8 [n, H, W, C] of files or bytes; all of one size unless `resolution` makes it so."""
    from PIL import ImageOps

    def is_grey(at: int) -> bool:
        with _picture(streams[at], names[at]) as picture:
            return picture.mode in GREY

    def one(at: int) -> np.ndarray:
        with _picture(streams[at], names[at]) as picture:
            if picture.mode in WIDE:
                raise UserError(
                    f"{names[at]} has more than eight bits a value (mode {picture.mode}): "
                    "give such images as an .npz of floats."
                )
            return fitted(ImageOps.exif_transpose(picture), resolution, channels)

    if not channels:
        channels = 1 if all(map(is_grey, range(len(streams)))) else 3
    first = one(0)
    rows = np.empty((len(streams), *first.shape), np.uint8)
    with ThreadPoolExecutor(THREADS) as pool:
        images = pool.map(one, range(len(streams)))
        bar = tqdm(images, "decoding", len(streams), disable=None, unit="image", delay=2)
        for at, image in enumerate(bar):
            if image.shape != first.shape:
                sizes = f"{names[0]} is {_size(first)}, {names[at]} is {_size(image)}"
                raise reject(
                    "data.resolution", resolution, f"above 0, as sizes differ: {sizes}"
                )
            rows[at] = image
    return rows


@contextmanager
def _picture(stream: Any, name: str) -> Iterator:
    """A Pillow image of a file or of bytes."""
    from PIL import Image

    broken = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    try:
        with Image.open(io.BytesIO(stream) if isinstance(stream, bytes) else stream) as picture:
            yield picture
    except broken as error:
        raise UserError(f"{name} cannot be read as an image: {error}.") from error


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _npz(place: Path) -> Source:
    with np.load(place, allow_pickle=False) as stored:
        keys = set(stored.keys())
        labels = stored["labels"] if "labels" in keys else None
        if {"header", "bodies", "offsets"} <= keys:
            packed = (stored["header"], stored["bodies"], stored["offsets"])
            return _jpegs(place, *packed, labels)
        for name in ("images", "latents"):
            if name in keys:
                return _array(place, stored[name], labels, name)
    allowed = "an .npz with images, latents, or header, bodies and offsets"
    raise UserError(f"config.data.path: {place} holds {sorted(keys)}, but must be {allowed}.")


def _npy(place: Path) -> Source:
    return _array(place, np.load(place, mmap_mode="r", allow_pickle=False), None, "images")


def _array(place: Path, array: np.ndarray, labels: Any, kind: str) -> Source:
    if array.ndim < 2 or 0 in array.shape:
        allowed = f"rows of images [N, H, W, C], but {kind} has the shape {array.shape}"
        raise UserError(f"config.data.path: {place} must hold {allowed}.")

    def read(chosen, resolution, channels):
        # All rows in their order stay as they are: a memory map is not copied.
        whole = np.array_equal(chosen, np.arange(len(array)))
        rows = array if whole else array[chosen]
        resize = rows.dtype == np.uint8 and rows.ndim in (3, 4) and kind == "images"
        return _resized(rows, resolution, channels) if resize else rows

    return Source(len(array), read, labels, (), kind, _digest(_stat(place)))


def _resized(rows: np.ndarray, resolution: int, channels: int) -> np.ndarray:
    from PIL import Image

    rows = rows[..., None] if rows.ndim == 3 else rows
    found = rows.shape[-1]
    same = not resolution or rows.shape[1:3] == (resolution, resolution)
    if found not in (1, 3) or channels not in (0, 1, 3) or (same and channels in (0, found)):
        return rows
    pictures = (Image.fromarray(np.ascontiguousarray(row.squeeze())) for row in rows)
    return np.stack([fitted(each, resolution, channels or found) for each in pictures])


def _jpegs(place: Path, header, bodies, offsets, labels) -> Source:
    good = offsets.ndim == 1 and len(offsets) > 1 and offsets[0] == 0
    if not (good and np.all(np.diff(offsets) > 0) and offsets[-1] == len(bodies)):
        raise UserError(f"{place} is damaged: its offsets do not divide its bodies.")
    if header.dtype != np.uint8 or bodies.dtype != np.uint8:
        raise UserError(f"{place} is damaged: header and bodies must be uint8.")
    start, body = header.tobytes(), bodies.tobytes()

    def read(chosen, resolution, channels):
        streams = [start + body[offsets[i] : offsets[i + 1]] for i in chosen]
        return _decoded(streams, [f"{place}[{i}]" for i in chosen], resolution, channels)

    return Source(len(offsets) - 1, read, labels, (), "images", _digest(_stat(place)))


def _stat(place: Path) -> list:
    facts = place.stat()
    return [place.name, facts.st_size, facts.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

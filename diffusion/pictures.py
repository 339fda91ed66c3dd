"""Images in the files of a report: grids, real beside generated, samples and their nearest.

Values are in [-1, 1]. One channel is grey, three are colours; of others the first three
are shown, each stretched over its own range (latents have no colours of their own).
"""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from diffusion.images import scaled
from diffusion.neighbours import Nearest

GAP = 1  # Pixels between images.
INCHES = 0.55  # Of one image in a figure.


def mosaic(
    images: Shaped[np.ndarray, "n h w c"], columns: int = 0
) -> Float[np.ndarray, "height width 3"]:
    """All images in one, row by row, float32 in [0, 1], gaps and empty places white.

    Args:
      images: uint8, or float in [-1, 1]; beyond is clipped. NaN shows as black.
      columns: of the grid; 0: nearly square.
    """
    n, h, w, _ = images.shape
    columns = columns or math.ceil(math.sqrt(max(n, 1)))
    rows = max(-(-n // columns), 1)
    shape = (rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3)
    canvas = np.ones(shape, np.float32)
    for at, image in enumerate(_visible(images)):
        top, left = (at // columns) * (h + GAP), (at % columns) * (w + GAP)
        canvas[top : top + h, left : left + w] = image
    return canvas


def grid(
    path: Path, images: Shaped[np.ndarray, "n h w c"], *, title: str = "", columns: int = 0
) -> None:
    """One mosaic as a PNG."""
    _draw(path, {title: images}, columns or math.ceil(math.sqrt(max(len(images), 1))))


def side_by_side(
    path: Path,
    real: Shaped[np.ndarray, "n h w c"],
    made: Shaped[np.ndarray, "m h w c"],
    *,
    columns: int = 8,
) -> None:
    """Training data on the left, samples on the right, as a PNG."""
    _draw(path, {"training data": real, "samples": made}, columns)


def nearest_rows(
    path: Path,
    samples: Shaped[np.ndarray, "m h w c"],
    rows: Shaped[np.ndarray, "n h w c"],
    near: Nearest,
    *,
    count: int = 8,
) -> None:
    """The `count` samples that are nearest to a training row, above that row, as a PNG.

    Args:
      near: of `samples` among `rows`, from `diffusion.neighbours.nearest`. The figure below
        each pair is the distance, over that to the second nearest where k >= 2.
      count: pairs.
    """
    from common.plots import figure

    order = np.argsort(near.distance[:, 0], kind="stable")[:count]
    pairs = [(scaled(samples[i]), scaled(rows[near.index[i, 0]])) for i in order]
    size = (max(2.0, 2 * INCHES * len(order)), 5 * INCHES)
    with figure(path, len(order), 2, squeeze=False, figsize=size) as axes:
        for at, (i, pair) in enumerate(zip(order, pairs, strict=True)):
            for axis, image in zip(axes[:, at], pair, strict=True):
                _show(axis, mosaic(image[None], 1))
            distances = near.distance[i]
            words = f"{distances[0]:.3g}"
            if len(distances) > 1 and distances[1] > 0:
                words += f"\nratio {distances[0] / distances[1]:.2f}"
            axes[1, at].set_xlabel(words, fontsize=7)
        if len(order):
            axes[0, 0].set_ylabel("sample", fontsize=8)
            axes[1, 0].set_ylabel("nearest row", fontsize=8)


def _draw(path: Path, parts: dict[str, np.ndarray], columns: int) -> None:
    from common.plots import figure

    pictures = {title: mosaic(images, columns) for title, images in parts.items()}
    height = max(-(-len(images) // columns) for images in parts.values())
    size = (INCHES * columns * len(parts) + 0.5, INCHES * max(height, 1) + 0.5)
    with figure(path, len(parts), 1, squeeze=False, figsize=size) as axes:
        for axis, (title, picture) in zip(axes[0], pictures.items(), strict=True):
            _show(axis, picture)
            axis.set_title(title)


def _show(axis, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    axis.grid(False)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _visible(images: np.ndarray) -> np.ndarray:
    """float32 [N, H, W, 3] in [0, 1]."""
    x = np.nan_to_num(scaled(images), nan=-1.0, posinf=1.0, neginf=-1.0)
    channels = x.shape[-1]
    if channels == 1:
        x = np.repeat(x, 3, axis=-1)
    elif channels != 3:
        x = x[..., :3]
        low, high = (f(x, axis=(0, 1, 2), initial=0.0) for f in (np.min, np.max))
        x = 2 * (x - low) / np.maximum(high - low, 1e-6) - 1
        x = np.concatenate([x, np.repeat(x[..., -1:], 3 - x.shape[-1], axis=-1)], axis=-1)
    return (np.clip(x, -1, 1) + 1) / 2

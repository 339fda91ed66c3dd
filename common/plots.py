"""One figure style. Matplotlib loads here, and only when a report is made."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 120,
    "savefig.bbox": "tight",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
    "axes.prop_cycle": matplotlib.cycler(
        color=["#1b6ca8", "#d1495b", "#2e8b57", "#e3a018", "#6a4c93", "#444444"]
    ),
}


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, **kwargs) -> Iterator:
    """Yields the axes of a new figure and writes it to `path`, whole or not at all.

    Args:
      path: ends in .png; its folder is made.
      columns, rows: of the axes; one axes alone comes without an array.
      **kwargs: for `plt.subplots`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        width, height = STYLE["figure.figsize"]
        size = (width * (1 if columns == 1 else 0.72 * columns), height * rows)
        kwargs = {"figsize": size, "layout": "constrained", **kwargs}
        drawn, axes = plt.subplots(rows, columns, **kwargs)
        try:
            yield axes
            temporary = path.with_name(f".{path.name}")
            drawn.savefig(temporary, format="png", metadata={"Software": None})
            os.replace(temporary, path)
        finally:
            plt.close(drawn)


@contextmanager
def panels(path: Path, count: int, columns: int = 3, **kwargs) -> Iterator:
    """`figure` with `count` axes, a flat array, in as many rows as it takes."""
    columns = min(columns, count)
    with figure(path, columns, -(-count // columns), squeeze=False, **kwargs) as axes:
        for axis in axes.ravel()[count:]:
            axis.set_axis_off()
        yield axes.ravel()[:count]


def colour(i: int) -> str:
    """The i-th colour, beyond the style's own where there are many lines."""
    wheel = matplotlib.color_sequences["tab10"]
    return matplotlib.colors.to_hex(wheel[i % len(wheel)])


@contextmanager
def animation(path: Path, fps: int = 8, **kwargs) -> Iterator:
    """Yields axes and a function that adds them, as they are then, as a frame of a GIF.

    Args:
      path: ends in .gif; its folder is made.
      fps: frames per second.
      **kwargs: for `plt.subplots`.
    """
    from matplotlib.animation import PillowWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with plt.rc_context(STYLE | {"savefig.bbox": "standard"}):
        drawn, axes = plt.subplots(**kwargs)
        writer = PillowWriter(fps=fps)
        try:
            with writer.saving(drawn, str(temporary), dpi=100):
                yield axes, writer.grab_frame
            os.replace(temporary, path)
        finally:
            plt.close(drawn)

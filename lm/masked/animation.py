"""How a text was written: a strip of its frames, and the same as a moving picture."""

from pathlib import Path

import jax
import numpy as np

from common import plots
from lm.masked import sample, settings, sweep
from lm.masked.parts import Parts, reader

ROWS, FRAMES, COLUMNS = 12, 48, 64
HIDDEN, BREAK = "·", "⏎"


def text(config, parts: Parts, params) -> sample.Result:
    """One text by `config.sampler`, on the host."""
    made = settings.fit(settings.settings(**config.sampler), config.length, parts.source.vocab)
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    found = sweep.write(config, parts, params, made, key, 1)
    return jax.tree.map(np.asarray, jax.device_get(found))


def draw(config, parts: Parts, result: sample.Result, folder: Path) -> list[tuple[str, str]]:
    """Writes writing.png and writing.gif.

    Returns:
      (caption, file).
    """
    frames = sample.frames(result, parts.mask)[:, 0]
    decode = reader(parts.source.train).decode if parts.source.train else _symbols
    lines = [letters(row, decode, parts.mask) for row in frames]
    strip(lines, folder / "writing.png")
    moving(lines, folder / "writing.gif")
    made = config.sampler.kind
    caption = f"One text of {config.length} tokens by {made}, from the first call to the last"
    return [(f"{caption}.", "writing.png"), (f"{caption}, moving.", "writing.gif")]


def letters(row: np.ndarray, decode, mask: int) -> str:
    """A text on one line, a dot for each token that is not yet written."""
    pieces, run = [], []
    for token in [*row.tolist(), mask]:
        if token == mask:
            pieces += [decode(run) if run else "", HIDDEN]
            run = []
        else:
            run.append(token)
    return "".join(pieces)[:-1].replace("\n", BREAK).replace("\t", " ")


def _symbols(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + t) if t < 26 else f"<{t}>" for t in tokens)


def strip(lines: list[str], path: Path) -> None:
    """Up to `ROWS` frames below each other, each cut at `COLUMNS` letters."""
    shown = np.unique(np.linspace(0, len(lines) - 1, min(ROWS, len(lines))).astype(int))
    with plots.figure(path, figsize=(8.4, 0.26 * len(shown) + 0.4)) as axis:
        for place, i in enumerate(shown.tolist()):
            _put(axis, -place, f"{i:5d}  {lines[i][:COLUMNS]}")
        axis.set(xlim=(0, 1), ylim=(-len(shown) + 0.2, 0.9))
        axis.set_axis_off()


def moving(lines: list[str], path: Path) -> None:
    """All of the text, frame by frame; the last one stays."""
    shown = np.unique(np.linspace(0, len(lines) - 1, min(FRAMES, len(lines))).astype(int))
    wrapped = [[f"call {i}", *_wrapped(lines[i])] for i in shown.tolist()]
    height = max(map(len, wrapped))
    with plots.animation(path, figsize=(8.4, 0.26 * height + 0.4)) as (axis, grab):
        for page in [*wrapped, *[wrapped[-1]] * 8]:
            axis.clear()
            axis.set(xlim=(0, 1), ylim=(-height + 0.2, 0.9))
            axis.set_axis_off()
            for place, line in enumerate(page):
                _put(axis, -place, line)
            grab()


def _wrapped(line: str) -> list[str]:
    return [line[i : i + COLUMNS] for i in range(0, len(line), COLUMNS)]


def _put(axis, height: int, line: str) -> None:
    axis.text(0, height, line, family="monospace", fontsize=9, parse_math=False)

"""Batches as a pure function of the step: no iterator, no state, cost O(batch).

Every batch is a dict

    tokens   int32 [batch, width]      inputs are [:, :-1], targets are [:, 1:]
    mask     bool [batch, width - 1]   which targets carry loss

**Packed.** Windows of `length` targets over the concatenated tokens, each beginning with
the last target of the one before. In every epoch each token but the very first is a target
exactly once. Epochs differ in the order of the windows and in where the windows fall: the
grid is shifted by a random offset, so that a token is not always seen in the same context.
The first and the last window of a shifted grid stick out; they are moved back inside, where
`mask` keeps the targets that are theirs. So tokens are always text, never padding.

**Rows.** One document per row, cut or padded; the published recipe.

The order of an epoch is a keyed Feistel network with cycle walking (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002): a bijection of 0..n-1 that gives the image of
one number without making the others. `common.data.indices` permutes the whole epoch on every
call, which for windows of C4 would take seconds and gigabytes per step.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from common.errors import UserError, reject
from lm import corpus as corpora
from lm.corpus import Corpus

Batch = dict[str, np.ndarray]
ROUNDS = 8


class Grid(NamedTuple):
    """Windows of `length` targets: `count` of them, shifted by `low` to `high` tokens."""

    targets: int
    length: int
    count: int
    low: int
    high: int


def packed(
    corpus: Corpus, batch: int, length: int, seed: int, segments: bool = False
) -> Callable[[int], Batch]:
    """Windows over the concatenated documents.

    Args:
      corpus: of more than `length` tokens.
      batch: rows per step; may exceed an epoch.
      length: targets per row.
      seed: of order and offsets; not negative.
      segments: also return `segments`, int32 [batch, length + 1]: the document of each
        token, counted from 0 within its row. Attention and loss that shall not cross
        documents compare them.

    Returns:
      step -> dict(tokens [batch, length + 1], mask [batch, length]).

    Raises:
      UserError: the corpus is too short; later, a damaged token.
    """
    _check(batch, seed, length, least=1)
    grid = _grid(corpus, length)

    def rows_of(step: int) -> Batch:
        epochs, places = np.divmod(step * batch + np.arange(batch), grid.count)
        first = np.empty(batch, np.int64)  # First target of each window; may stick out.
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shift = _shift(grid, seed, int(epoch))
            order = permute(places[here], grid.count, (seed, int(epoch)))
            first[here] = order * grid.length - shift
        start = np.clip(first, 0, grid.targets - grid.length)
        positions = start[:, None] + np.arange(grid.length + 1)
        targets = positions[:, :-1]
        own = (targets >= first[:, None]) & (targets < first[:, None] + grid.length)
        found = dict(tokens=_gather(corpus, positions), mask=own)
        if segments:
            found["segments"] = _segments(corpus, positions)
        return found

    return rows_of


def rows(
    corpus: Corpus, batch: int, length: int, seed: int, end_cut: bool = False
) -> Callable[[int], Batch]:
    """One document per row, cut or padded: no packing.

    Args:
      corpus: of `batch` documents or more. Of fewer, step 0 alone is given, for its shapes.
      batch: rows per step.
      length: tokens per row; a row has `length - 1` targets.
      seed: of the order; not negative.
      end_cut: end cut documents, too, in the end-of-text token, as Hugging Face tokenizers
        cut and so the published recipe; without effect where there is no such token.

    Returns:
      step -> dict(tokens [batch, length], mask [batch, length - 1]); padding is `pad`, or
      0 for tokenizers without one, and never a target.

    Raises:
      UserError: `length` is below 2; later, a damaged token or too few documents.
    """
    _check(batch, seed, length)
    count = len(corpus.offsets) - 1

    def rows_of(step: int) -> Batch:
        if step and count < batch:
            allowed = (
                f"True, or a text of {batch} documents or more (form feeds or files part "
                f"them): this one has {count}, and rows of a batch would repeat"
            )
            raise reject("data.pack", False, allowed)
        epochs, places = np.divmod(step * batch + np.arange(batch), count)
        which = np.empty(batch, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            which[here] = permute(places[here], count, (seed, int(epoch)))
        return _documents(corpus, which, length, end_cut)

    return rows_of


def validation(
    corpus: Corpus,
    batch: int,
    length: int,
    tokens: int,
    pack: bool = True,
    end_cut: bool = False,
) -> list[Batch]:
    """A fixed budget of targets, from the start of the corpus, in order.

    Args:
      corpus: any.
      batch: rows per batch; the last batch is filled up with masked rows.
      length: targets per row if packed, else tokens per row, as in training.
      tokens: targets in all; 0, or more than there are, means every target.
      pack: windows over the concatenated tokens, without offset, or documents as rows.
      end_cut: as in `rows`.

    Returns:
      Batches as in training. Over all of them, `mask` counts exactly `tokens`, and each
      target once.

    Raises:
      UserError: `length` is below 1 (2 for rows), or `tokens` is negative.
    """
    _check(batch, 0, length, least=1 if pack else 2, field="eval.batch_size")
    if tokens < 0:
        raise reject("eval.tokens", tokens, "0 (all) or more")
    total, documents = len(corpus.tokens), len(corpus.offsets) - 1
    count = -(-(total - 1) // length) if pack else documents
    left = tokens or total
    found = []
    for first in range(0, count, batch):
        which = first + np.arange(batch)
        if pack:
            positions = which[:, None] * length + np.arange(length + 1)
            inside = positions < total
            row = _gather(corpus, np.minimum(positions, total - 1))
            one = dict(tokens=np.where(inside, row, _fill(corpus)), mask=inside[:, 1:])
        else:
            one = _documents(corpus, np.minimum(which, documents - 1), length, end_cut)
            real = which < documents
            one["tokens"] = np.where(real[:, None], one["tokens"], _fill(corpus))
            one["mask"] &= real[:, None]
        seen = np.cumsum(one["mask"]).reshape(one["mask"].shape)
        one["mask"] &= seen <= left
        found.append(one)
        left -= int(one["mask"].sum())
        if left <= 0:
            break
    return found


def permute(
    places: Int[np.ndarray, " k"], count: int, key: tuple[int, ...]
) -> Int[np.ndarray, " k"]:
    """The images of some numbers under a pseudo-random bijection of 0..count-1.

    Args:
      places: numbers from 0 to count - 1.
      count: at most 2^62.
      key: whole numbers that are not negative; another key is another bijection.

    Returns:
      int64, in the order of `places`. Takes O(k) on average, whatever `count` is.
    """
    bits = max(2, (count - 1).bit_length())
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    found = _feistel(places.astype(np.uint64), bits, keys)
    # The network permutes 2^bits < 2 count numbers. Walking along its cycle from a number
    # inside 0..count-1 to the next one inside is a bijection of these.
    while (outside := np.flatnonzero(found >= count)).size:
        found[outside] = _feistel(found[outside], bits, keys)
    return found.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of 0..2^bits-1: each half in turn is changed by a hash of the other."""
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1)
    left, right = numbers >> low, numbers & masks[1]
    for i in range(0, ROUNDS, 2):
        left = left ^ (_hash(right + keys[i]) & masks[0])
        right = right ^ (_hash(left + keys[i + 1]) & masks[1])
    return (left << low) | right


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _grid(corpus: Corpus, length: int) -> Grid:
    """All epochs must have equally many windows, and every window a target of its own.

    With ceil(targets / length) windows the offset is from 0 to the last one's free places,
    with one window more from there to length - 1. Whichever gives more offsets is taken.
    """
    targets = len(corpus.tokens) - 1
    if targets < length:
        allowed = f"at most {targets} for the {targets + 1} tokens of {corpus.path}"
        raise reject("data.length", length, allowed)
    count = -(-targets // length)
    free = count * length - targets
    if free + 1 >= length - 1 - free:
        return Grid(targets, length, count, 0, free)
    return Grid(targets, length, count + 1, free + 1, length - 1)


def _shift(grid: Grid, seed: int, epoch: int) -> int:
    generator = np.random.default_rng((seed, epoch, 1))  # Not the stream of `permute`.
    return int(generator.integers(grid.low, grid.high, endpoint=True))


def _gather(corpus: Corpus, positions: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
    found = np.asarray(corpus.tokens)[positions]
    corpora.check(corpus, found)
    return found.astype(np.int32)


def _segments(corpus: Corpus, positions: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
    document = np.searchsorted(corpus.offsets, positions, side="right")
    return (document - document[:, :1]).astype(np.int32)


def _documents(
    corpus: Corpus, which: Int[np.ndarray, " b"], length: int, end_cut: bool
) -> dict[str, Int[np.ndarray, "b n"] | Bool[np.ndarray, "b m"]]:
    start = np.asarray(corpus.offsets[which])
    size = np.asarray(corpus.offsets[which + 1]) - start
    column = np.arange(length)
    real = column < size[:, None]
    found = _gather(corpus, start[:, None] + np.minimum(column, size[:, None] - 1))
    found = np.where(real, found, _fill(corpus))
    if end_cut and corpus.eos >= 0:
        found[size > length, -1] = corpus.eos
    return dict(tokens=found, mask=real[:, 1:])


def _fill(corpus: Corpus) -> np.int32:
    return np.int32(max(corpus.pad, 0))


def _check(
    batch: int, seed: int, length: int, least: int = 2, field: str = "batch_size"
) -> None:
    if batch < 1:
        raise reject(field, batch, "at least 1")
    if seed < 0:
        raise UserError(
            f"config.data.order_seed and config.seed add up to {seed}, but must add up to 0 or "
            "more."
        )
    if length < least:
        # One token and one target.
        raise reject("data.length", length, f"at least {least}")

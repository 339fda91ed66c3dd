"""Structures of a config: read, checked, aligned, split."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from common.errors import UserError, reject
from geometry import chain
from geometry.data import align, checks, packed, splits, structures
from geometry.data.edges import Reach, reach
from geometry.records import Record

BUNDLED = Path(__file__).parent / "data" / "relax_gfn2.npz"
PARTS = ("train", "valid", "test")


class Sets(NamedTuple):
    """Attributes:
    train, valid, test: records with both ends, aligned; with paths of K + 1 frames or none.
    dropped: id -> reason, of records that are of no use.
    """

    train: list[Record]
    valid: list[Record]
    test: list[Record]
    dropped: dict[str, str]


def sets(config) -> Sets:
    """The structures of `config.data`; read once for all runs that share them.

    Raises:
      UserError: a file, a record or a field cannot be.
    """
    data = config.data
    if data.stands_for and not data.path:
        # Shapes can be checked, and programs compiled, without the set.
        warnings.warn(
            f"config.data.path is '': relax_gfn2 stands in for {data.stands_for}; make that "
            "with `python -m geometry.prepare`.",
            stacklevel=2,
        )
        return _read("", "x_final", "hash", *_rest(config))
    return _read(data.path, data.target, data.split, *_rest(config))


def _rest(config) -> tuple:
    names = ("split_seed", "labels", "mirror", "limit")
    segments = config.chain.segments if config.kind == "chain" else 0
    return *(config.data[name] for name in names), config.network.species, segments


@lru_cache(4)
def _read(path, target, split, split_seed, labels, mirror, limit, species, segments) -> Sets:
    if limit < 0:
        raise reject("data.limit", limit, "0 (all) or a number of structures")
    if labels not in ("given", "matched"):
        raise reject("data.labels", labels, "given or matched")
    file, given = Path(path) if path else BUNDLED, None
    if file.suffix == ".npz":
        records, given = packed.read(file, target)
    else:
        records = structures.read(file)
    kept, dropped = checks.checked_set(records, range(1, species), labels, mirror)
    without = [record.id for record in kept if record.end is None]
    if without:
        raise UserError(f"Record {without[0]} of {file} has no end: a bridge needs both.")
    if split == "file":
        if given is None:
            raise reject("data.split", split, f"another rule: {file} says nothing of splits")
        by_id = dict(zip([r.id for r in records], given.tolist(), strict=True))
        part = np.array([by_id[record.id] for record in kept])
    else:
        part = splits.split(kept, split, seed=split_seed)
    found = [[r for r, p in zip(kept, part, strict=True) if p == k] for k in range(3)]
    if not found[0]:
        raise UserError(f"{file} has no structures for training by the rule {split}.")
    found[0] = found[0][: limit or None]
    if segments:
        found = [[_path(record, segments) for record in some] for some in found]
    return Sets(*found, dropped)


def _path(record: Record, segments: int) -> Record:
    if record.frames is None:
        return record
    frames = chain.resample(record.frames, segments, rotate=align.centred(record))
    return record._replace(frames=frames)


def reach_of(config) -> Reach:
    """Which atoms see each other."""
    data = config.data
    names = ("cutoff", "margin", "n_full", "max_neighbours")
    return reach(**{name: data[name] for name in names})


def mean_square(records: list[Record]) -> float:
    """s^2, the mean square displacement per free coordinate, angstrom^2."""
    total, count = 0.0, 0
    for record in records:
        total += float(np.square(record.end - record.start)[record.free].sum())
        count += 3 * int(record.free.sum())
    return total / max(count, 1)


def segments_of(records: list[Record], segments: int) -> Float[np.ndarray, " segments"]:
    """m_i of each segment; of records without a path a straight one.

    Raises:
      UserError: no record has a path.
    """
    if all(record.frames is None for record in records):
        raise reject("kind", "chain", "bridge or direct: no structure has a path")
    share = np.linspace(0, 1, segments + 1)[:, None, None]
    frames = (
        r.start + share * (r.end - r.start) if r.frames is None else r.frames for r in records
    )
    return chain.mean_squares(zip(frames, (r.free for r in records), strict=True))

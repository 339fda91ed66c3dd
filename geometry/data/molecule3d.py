"""Molecule3D: about 3.9 million molecules in SDF shards, read by pieces.

    combined_mols_0_to_1000000.sdf, ...         the shards, by their first molecule
    random_split_inds.json, scaffold_split_inds.json
                                                {"train": [...], "valid": [...], "test": [...]}

A shard is opened by an index of byte offsets, made once and kept beside it, so a molecule is
read alone and nothing is loaded at once.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rdkit import Chem

from common.errors import UserError, reject
from geometry.data import molecules, sdf
from geometry.data.splits import NAMES
from geometry.records import Record


class Shards(NamedTuple):
    """All shards of a folder.

    Attributes:
      paths: in the order of their molecules.
      offsets: of each shard [molecules + 1], bytes.
      begins: number of the first molecule of each shard, and of all molecules.
    """

    paths: tuple[Path, ...]
    offsets: tuple[Int[np.ndarray, " entries"], ...]
    begins: Int[np.ndarray, " begins"]


def shards(folder: str | Path) -> Shards:
    """Opens a folder; makes the indices that are not there yet.

    Raises:
      UserError: no shards, or a gap between them.
    """
    pattern = re.compile(r"combined_mols_(\d+)_to_(\d+)\.sdf$")
    found = sorted(
        (int(hit.group(1)), path)
        for path in Path(folder).glob("*.sdf")
        if (hit := pattern.search(path.name))
    )
    if not found:
        raise UserError(f"There is no combined_mols_*_to_*.sdf of Molecule3D in {folder}.")
    made = [sdf.offsets(path) for _, path in found]
    begins = np.concatenate([[0], np.cumsum([len(o) - 1 for o in made])])
    for (first, path), begin in zip(found, begins.tolist(), strict=False):
        if first != begin:
            raise UserError(
                f"{path} should begin with molecule {first}, but the shards before it hold "
                f"{begin}: one is missing or cut off."
            )
    return Shards(tuple(p for _, p in found), tuple(made), begins)


def molecule(store: Shards, number: int) -> Chem.Mol | None:
    """The molecule of that number, hydrogens included; None where RDKit cannot read it.

    Raises:
      UserError: there are fewer.
    """
    if not 0 <= number < store.begins[-1]:
        raise UserError(f"There are {store.begins[-1]} molecules, but no number {number}.")
    shard = int(np.searchsorted(store.begins, number, side="right")) - 1
    begin, end = store.offsets[shard][number - store.begins[shard] :][:2].tolist()
    return sdf.molecule(store.paths[shard], begin, end)


def split(folder: str | Path, rule: str, part: str) -> Int[np.ndarray, " molecules"]:
    """Numbers of the molecules of a part.

    Args:
      rule: "random" or "scaffold".
      part: "train", "valid" or "test".

    Raises:
      UserError: other words, or no such file.
    """
    if rule not in ("random", "scaffold"):
        raise reject("data.split", rule, "random or scaffold")
    if part not in NAMES:
        raise reject("data.part", part, f"one of {', '.join(NAMES)}")
    path = Path(folder) / f"{rule}_split_inds.json"
    try:
        found = json.loads(path.read_text())
        return np.array(found[part], np.int64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no split of Molecule3D.") from error


def read(
    folder: str | Path,
    rule: str = "random",
    part: str = "train",
    seed: int = molecules.SEED,
    first: int = 0,
    count: int | None = None,
) -> Iterator[Record]:
    """Pairs of a part, one after the other: ETKDGv3 conformer and DFT minimum.

    Args:
      rule, part: see `split`.
      seed: of the embedding; that of molecule k is seed + k.
      first, count: of the part's molecules, to share the work.

    Raises:
      UserError: see `shards` and `split`.
    """
    store = shards(folder)
    last = None if count is None else first + count
    for number in split(folder, rule, part)[first:last].tolist():
        found = molecule(store, number)
        made = found and molecules.pair(found, f"m3d_{number}", seed + number)
        if made is not None:
            yield made

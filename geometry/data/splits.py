"""Splits into 0 train, 1 valid, 2 test in which no group stands twice.

The default is a hash, so that a molecule's split never depends on the others:

    h = crc32(group) % 20:   {0, 1} test, {2} valid, the rest train        (section 8.4)
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from common.errors import reject
from geometry.records import Record

NAMES = ("train", "valid", "test")


def of_group(group: str) -> int:
    """The split of a group, for instance a canonical SMILES."""
    h = zlib.crc32(group.encode()) % 20
    return 2 if h < 2 else 1 if h == 2 else 0


def split(
    records: Sequence[Record],
    rule: str = "hash",
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Int[np.ndarray, " records"]:
    """The split of each record.

    Args:
      rule: "hash" (or "group") as above; "random" and "scaffold" by shares: groups, or sets
        of one Murcko scaffold, are shuffled and dealt out whole. Scaffolds of more than half
        a split's share go to train, as is usual, for the held-out ones shall be many.
      shares: of train, valid, test.
      seed: of the shuffle.

    Raises:
      UserError: unknown rule, or shares that do not add up to 1.
    """
    groups = [record.group or record.smiles or record.id for record in records]
    if rule in ("hash", "group"):
        return np.array([of_group(g) for g in groups], np.int64)
    if rule not in ("random", "scaffold"):
        raise reject("data.split", rule, "one of hash, group, random, scaffold")
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise reject("data.shares", shares, "three numbers from 0 on that add up to 1")
    if rule == "scaffold":
        groups = [
            scaffold(record.smiles) if record.smiles else g
            for record, g in zip(records, groups, strict=True)
        ]
    return deal(groups, shares, seed, large_to_train=rule == "scaffold")


def deal(
    groups: Sequence[str],
    shares: tuple[float, float, float],
    seed: int,
    large_to_train: bool = False,
) -> Int[np.ndarray, " records"]:
    """Groups whole, in a shuffled order, to the split that lacks most of its share."""
    names, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    wanted = np.array(shares) * len(groups)
    if large_to_train:
        large = counts[order] > min(wanted[1], wanted[2]) / 2
        order = np.concatenate([order[large], order[~large]])
    filled, of = np.zeros(3), np.zeros(len(names), np.int64)
    for g in order:
        forced = large_to_train and counts[g] > min(wanted[1], wanted[2]) / 2
        of[g] = 0 if forced else np.argmax(wanted - filled)
        filled[of[g]] += counts[g]
    return of[which]


def scaffold(smiles: str) -> str:
    """The Murcko scaffold: rings and what joins them; of a chain the empty string.

    Chains would be one group of a quarter of small sets, so they keep their own SMILES.
    """
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return MurckoScaffold.MurckoScaffoldSmiles(smiles=smiles) or smiles

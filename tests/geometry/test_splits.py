"""Splits: the rule, shares, and groups that stay whole."""

import zlib

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import splits
from tests.geometry.molecules_made import water


def records(groups, smiles=None):
    smiles = smiles or [""] * len(groups)
    return [
        water()._replace(id=str(k), group=g, smiles=s)
        for k, (g, s) in enumerate(zip(groups, smiles, strict=True))
    ]


def test_hash_rule():
    names = [f"C{'C' * k}O" for k in range(200)]
    found = splits.split(records(names))
    for name, part in zip(names, found, strict=True):
        h = zlib.crc32(name.encode("utf-8")) % 20
        assert part == (2 if h in (0, 1) else 1 if h == 2 else 0)
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize("rule", ["hash", "group", "random", "scaffold"])
def test_groups_stay_whole(rule):
    rng = np.random.default_rng(0)
    groups = [f"g{k}" for k in rng.integers(0, 60, 400)]
    found = splits.split(records(groups), rule)
    for g in set(groups):
        assert len({int(p) for p, h in zip(found, groups, strict=True) if h == g}) == 1


def test_random_shares_and_seed():
    groups = [f"g{k}" for k in range(1000)]
    first = splits.split(records(groups), "random", (0.6, 0.2, 0.2), 1)
    np.testing.assert_array_equal(np.bincount(first), [600, 200, 200])
    np.testing.assert_array_equal(
        first, splits.split(records(groups), "random", (0.6, 0.2, 0.2), 1)
    )
    assert np.any(first != splits.split(records(groups), "random", (0.6, 0.2, 0.2), 2))


def test_scaffolds_are_not_shared():
    rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CC1", "C1CCNCC1", "c1ccoc1"]
    smiles = ["C" * n + r for r in rings for n in range(1, 6)] + ["C" * n for n in range(1, 31)]
    found = splits.split(records(smiles, smiles), "scaffold", (0.6, 0.2, 0.2), 3)
    assert splits.scaffold("CCc1ccccc1") == splits.scaffold("CCCc1ccccc1") == "c1ccccc1"
    for r in rings:
        assert len({int(p) for p, s in zip(found, smiles, strict=True) if s.endswith(r)}) == 1
    # Chains are their own scaffolds, so they do not all stand on one side.
    assert set(found[-30:]) == {0, 1, 2}
    assert set(found) == {0, 1, 2}


def test_a_large_scaffold_goes_to_train():
    rings = ["c1ccccc1", "C1CCCCC1"]
    smiles = ["C" * n + r for r in rings for n in range(1, 21)]
    smiles += ["C" * n for n in range(1, 61)]
    for seed in range(4):
        found = splits.split(records(smiles, smiles), "scaffold", (0.4, 0.3, 0.3), seed)
        assert not found[:40].any()
        np.testing.assert_array_equal(np.bincount(found), [40, 30, 30])


def test_what_cannot_be():
    with pytest.raises(UserError, match="hash, group, random, scaffold"):
        splits.split(records("a"), "time")
    with pytest.raises(UserError, match="add up to 1"):
        splits.split(records("a"), "random", (0.5, 0.2, 0.2))

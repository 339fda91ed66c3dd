"""Shards read by pieces, on made files."""

import json

import numpy as np
import pytest
from rdkit import Chem

from common.errors import UserError
from geometry.data import align, molecule3d, molecules, sdf

SMILES = ("CCO", "CC=O", "C#N", "C[C@H](O)F", "O", "CCN", "C1CC1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("m3d")
    for first, last in ((0, 3), (3, 7)):
        path = made / f"combined_mols_{first}_to_{last}.sdf"
        with Chem.SDWriter(str(path)) as writer:
            for k in range(first, last):
                molecule = molecules.to_rdkit(molecules.of_smiles(SMILES[k], 50 + k))
                molecule.SetProp("note", "a line with $$$$ inside")
                writer.write(molecule)
    for rule, train in (("random", [6, 0, 3]), ("scaffold", [1, 2])):
        parts = dict(train=train, valid=[4], test=[5])
        (made / f"{rule}_split_inds.json").write_text(json.dumps(parts))
    return made


def test_each_molecule_is_found_alone(folder):
    store = molecule3d.shards(folder)
    assert store.begins.tolist() == [0, 3, 7]
    for k in (6, 0, 3, 2, 5):
        found = molecule3d.molecule(store, k)
        assert Chem.MolToSmiles(Chem.RemoveAllHs(found)) == Chem.CanonSmiles(SMILES[k])
        assert found.GetNumAtoms() == len(molecules.of_smiles(SMILES[k], 1).numbers)
    for k in (-1, 7):
        with pytest.raises(UserError, match=f"no number {k}"):
            molecule3d.molecule(store, k)


def test_pairs_of_a_part(folder):
    records = list(molecule3d.read(folder, "random", "train", seed=3))
    assert [r.id for r in records] == ["m3d_6", "m3d_0", "m3d_3"]
    for k, r in zip((6, 0, 3), records, strict=True):
        assert float(align.rmsd(r.end, molecules.of_smiles(SMILES[k], 50 + k).start)) < 1e-3
    (one,) = molecule3d.read(folder, "random", "train", 3, first=1, count=1)
    np.testing.assert_array_equal(one.start, records[1].start)
    assert [r.id for r in molecule3d.read(folder, "scaffold", "test")] == ["m3d_5"]


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(tmp_path):
    path = tmp_path / "a.sdf"
    path.write_bytes(b"one\n$$$$\ntwo $$$$\n$$$$\nthree\n$$$$")
    assert sdf.offsets(path).tolist() == [0, 9, 23, 33]
    kept = tmp_path / "a.sdf.offsets.npy"
    stamp = kept.stat().st_mtime_ns
    sdf.offsets(path)
    assert kept.stat().st_mtime_ns == stamp
    path.write_bytes(b"one\r\n$$$$\r\n")
    assert sdf.offsets(path).tolist() == [0, 11]
    (tmp_path / "b.sdf").write_bytes(b"$$$$ first\n$$$$\n")
    assert sdf.offsets(tmp_path / "b.sdf").tolist() == [0, 16]


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no combined_mols"):
        molecule3d.shards(tmp_path)
    (tmp_path / "combined_mols_5_to_9.sdf").write_bytes(b"x\n$$$$\n")
    with pytest.raises(UserError, match="should begin with molecule 5"):
        molecule3d.shards(tmp_path)
    with pytest.raises(UserError, match="random or scaffold"):
        molecule3d.split(folder, "time", "train")
    with pytest.raises(UserError, match="train, valid, test"):
        molecule3d.split(folder, "random", "dev")
    with pytest.raises(UserError, match="cannot be read"):
        molecule3d.split(tmp_path, "random", "train")
    (tmp_path / "random_split_inds.json").write_text("{}")
    with pytest.raises(UserError, match="no split"):
        molecule3d.split(tmp_path, "random", "train")

"""RDKit: records to molecules and back, conformers, bonds, validity."""

import numpy as np
import pytest
from rdkit import Chem

from common.errors import UserError
from geometry.data import align, molecules, packed, symmetry
from tests.geometry.molecules_made import BUNDLED, WATER, data_folder, record, turned, water


@pytest.fixture(scope="module")
def records():
    return packed.read(BUNDLED)[0]


def flat(smiles):
    molecule = Chem.RemoveAllHs(Chem.MolFromSmiles(smiles))
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def of(record):
    return Chem.MolToSmiles(Chem.RemoveAllHs(molecules.to_rdkit(record)), isomericSmiles=False)


def test_records_are_the_molecules_of_their_smiles(records):
    for r in records[::4]:
        assert of(r) == flat(r.smiles)
        back = molecules.from_rdkit(molecules.to_rdkit(r), r.id)
        np.testing.assert_array_equal(back.numbers, r.numbers)
        np.testing.assert_allclose(back.start, r.start)
        pairs = lambda m: {(*sorted(row[:2]), row[2]) for row in m.bonds.tolist()}
        assert pairs(back) == pairs(r)
        assert back.group == flat(r.smiles)


def test_charges_and_aromatic_sulphur():
    for smiles in ("C[N+](=O)[O-]", "C[N+]#[C-]", "c1cc[nH]c1", "c1ccncc1", "CS(C)(=O)=O"):
        r = molecules.of_smiles(smiles, 1)
        assert of(r) == flat(smiles)
    if data_folder() is not None:
        path = data_folder() / "molecules" / "qm7_etkdg_to_pbe0.npz"
        for r in packed.read(path)[0][6900:]:
            assert of(r) == flat(r.smiles)


def test_bonds_are_found_from_positions(records):
    for r in records[::20]:
        found = molecules.perceived_bonds(r._replace(bonds=r.bonds[:0]), r.end)
        assert of(r._replace(bonds=found, start=r.end)) == flat(r.smiles)
    x = [[0, 0, 0], [1.3, 0, 0], [-1.3, 0, 0], [0, 1.3, 0], [0, -1.3, 0], [0, 0, 1.3]]
    with pytest.raises(
        UserError, match="No bond orders of a neutral molecule CF5 fit record x"
    ):
        molecules.to_rdkit(record([6, *[9] * 5], x, name="x"))


def test_validity(records):
    assert molecules.validity(records[:50], [r.end for r in records[:50]]) == 1.0
    far = WATER * [[1], [1], [1.9]]
    assert molecules.valid(water(), WATER)
    assert not molecules.valid(water(), far)
    assert molecules.validity([water(), water()], [WATER, far]) == 0.5
    # An extra bond is a fault as well as a missing one.
    near = np.array([[0, 0, 0], [0.96, 0, 0], [0.9, 0.5, 0]])
    assert not molecules.valid(water(), near)
    loose = water()._replace(bonds=water().bonds[:0])
    assert molecules.valid(loose, WATER)
    assert not molecules.valid(loose, far)


def test_conformers_keep_the_hand_of_the_positions():
    for smiles in ("C[C@H](O)F", "C[C@@H](O)F", r"F/C=C\C"):
        r = molecules.of_smiles(smiles, 5)
        assert Chem.CanonSmiles(smiles) == r.smiles
        assert r.group == flat(smiles)
        found = molecules.conformers(r, 3, 7)
        assert found.shape == (3, len(r.numbers), 3)
        np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-9)
        for x in found:
            assert symmetry.stereo(r.numbers, r.bonds, r.start, x) == "same"
        np.testing.assert_array_equal(found, molecules.conformers(r, 3, 7))
        turned_round = molecules.conformers(
            r._replace(start=turned(r.start, 1, reflect=True)), 1, 7
        )
        wanted = "same" if "C=C" in smiles else "mirror"
        assert symmetry.stereo(r.numbers, r.bonds, r.start, turned_round[0]) == wanted


def test_pairs_start_from_the_stereoisomer_of_the_target():
    target = molecules.to_rdkit(molecules.of_smiles("C[C@H](O)CF", 5))
    made = molecules.pair(target, "x", 11)
    assert symmetry.stereo(made.numbers, made.bonds, made.start, made.end) == "same"
    np.testing.assert_allclose(made.start.mean(axis=0), 0, atol=1e-9)
    assert float(align.rmsd(made.end, target.GetConformer().GetPositions())) < 1e-6
    np.testing.assert_allclose(align.kabsch(made.end, made.start), made.end, atol=1e-9)
    torn = molecules.parsed("C12C3C4C1C5C2C3C45")  # Cubane, but its atoms are anywhere.
    places = Chem.Conformer(torn.GetNumAtoms())
    for k in range(torn.GetNumAtoms()):
        places.SetAtomPosition(k, (2.0 * k, 0.1 * k * k, 0.3 * (-1) ** k))
    torn.AddConformer(places)
    assert molecules.pair(torn, "torn", 1) is None


def test_mmff94_goes_downhill_and_leaves_its_input():
    from rdkit.Chem import AllChem

    molecule = molecules.embedded(molecules.parsed("CC(O)C=O"), 1, 3)
    before = molecule.GetConformer().GetPositions()
    after = molecules.mmff94(molecule)
    np.testing.assert_array_equal(molecule.GetConformer().GetPositions(), before)
    copy = Chem.Mol(molecule)
    properties = AllChem.MMFFGetMoleculeProperties(copy)
    energy = lambda: AllChem.MMFFGetMoleculeForceField(copy, properties).CalcEnergy()
    high = energy()
    AllChem.MMFFOptimizeMolecule(copy, maxIters=2000)
    np.testing.assert_allclose(after, copy.GetConformer().GetPositions(), atol=1e-3)
    assert energy() < high - 0.1
    assert molecules.mmff94(molecules.embedded(molecules.parsed("C[Si](C)(C)B"), 1, 1)) is None


def test_sdf_without_hydrogens_warns(tmp_path):
    r = molecules.of_smiles("CCO", 1)
    bare = Chem.RemoveHs(molecules.to_rdkit(r))
    with Chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        writer.write(bare)
        writer.write(molecules.to_rdkit(r))
    with pytest.warns(UserWarning, match="1 of 2 molecules .* lack hydrogens"):
        first, second = molecules.read_sdf(tmp_path / "a.sdf")
    assert (len(first.numbers), len(second.numbers)) == (3, 9)
    drawing = Chem.MolFromSmiles("CCO")
    Chem.rdDepictor.Compute2DCoords(drawing)
    (tmp_path / "b.mol").write_text(Chem.MolToMolBlock(drawing))
    with pytest.raises(UserError, match="drawing"):
        molecules.read_sdf(tmp_path / "b.mol")
    (tmp_path / "c.sdf").write_text("nothing\n\n\nno counts\n$$$$\n")
    with pytest.raises(UserError, match="cannot be read"):
        molecules.read_sdf(tmp_path / "c.sdf")
    with pytest.raises(UserError, match="no file"):
        molecules.read_sdf(tmp_path / "d.sdf")


def test_smiles_that_are_none(tmp_path):
    with pytest.raises(UserError, match="'C1CC' is no valid SMILES"):
        molecules.of_smiles("C1CC", 1)
    (tmp_path / "a.smi").write_text("\n")
    with pytest.raises(UserError, match="holds no SMILES"):
        molecules.read_smiles(tmp_path / "a.smi")
    with pytest.raises(UserError, match="no file"):
        molecules.read_smiles(tmp_path / "b.smi")

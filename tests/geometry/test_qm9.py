"""QM9's two formats, on made files of a few molecules."""

import numpy as np
import pytest
from rdkit import Chem

from common.errors import UserError
from geometry.data import align, molecules, qm9, symmetry

SMILES = ("C", "CCO", "C[C@H](O)F", "CC=O", "C#N")
RAW = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 1.9761204*^-3\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 2.765748*^-4\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def listed(folder, numbers):
    rows = "".join(f"{k:6d} C{k} NC {k} 1.0\n" for k in numbers)
    text = f"title of the table\n=======\n Index SMILES\n{rows}-------\n{len(numbers)}\n"
    (folder / "uncharacterized.txt").write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qm9")
    with Chem.SDWriter(str(made / "gdb9.sdf")) as writer:
        for k, smiles in enumerate(SMILES):
            writer.write(molecules.to_rdkit(molecules.of_smiles(smiles, 50 + k)))
    listed(made, [2, *range(1000, 4053)])
    return made


def test_pairs_without_the_uncharacterised(folder):
    records = list(qm9.read(folder, seed=7))
    assert [r.id for r in records] == ["gdb_1", "gdb_3", "gdb_4", "gdb_5"]
    assert [r.smiles for r in records] == [Chem.CanonSmiles(s) for s in SMILES if s != "CCO"]
    for k, r in zip((0, 2, 3, 4), records, strict=True):
        target = molecules.of_smiles(SMILES[k], 50 + k).start
        assert float(align.rmsd(r.end, target)) < 1e-3
        assert symmetry.stereo(r.numbers, r.bonds, r.start, r.end) == "same"
        assert len(r.bonds) >= 2
    assert qm9.entries(folder) == 5


def test_a_part_is_that_of_the_whole(folder):
    whole = {r.id: r for r in qm9.read(folder, seed=7)}
    for r in qm9.read(folder, seed=7, first=2, count=2):
        np.testing.assert_array_equal(r.start, whole[r.id].start)
    assert [r.id for r in qm9.read(folder, first=2, count=2)] == ["gdb_3", "gdb_4"]


def test_raw_files(tmp_path):
    path = tmp_path / "dsgdb9nsd_000001.xyz"
    path.write_text(RAW)
    r = qm9.read_xyz(path)
    assert (r.id, r.smiles, r.numbers.tolist()) == ("gdb_1", "C", [6, 1, 1, 1, 1])
    assert r.start[1, 2] == 1.9761204e-3
    assert r.start[2, 2] == 2.765748e-4
    assert qm9.number("-6.*^-1") == -0.6
    path.write_text(RAW.replace("1.9761204*^-3", "soon"))
    with pytest.raises(UserError, match="no file of QM9"):
        qm9.read_xyz(path)
    with pytest.raises(UserError, match="cannot be read"):
        qm9.read_xyz(tmp_path / "none.xyz")


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no gdb9.sdf"):
        list(qm9.read(tmp_path))
    (tmp_path / "gdb9.sdf").write_text("")
    with pytest.raises(UserError, match=r"no uncharacterized.txt .* 3054"):
        list(qm9.read(tmp_path))
    listed(tmp_path, range(1, 100))
    with pytest.raises(UserError, match="names 99 entries"):
        list(qm9.read(tmp_path))
    assert len(qm9.uncharacterised(tmp_path, 0)) == 99

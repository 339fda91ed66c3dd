"""Sets made on the spot: enumeration, pairs, slabs, clusters; the command and its resume."""

import sys

import numpy as np
import pytest
from rdkit import Chem

from common.errors import UserError
from geometry import prepare
from geometry.data import align, enumeration, generate, molecules, packed, slabs
from tests.geometry.molecules_made import BUNDLED


@pytest.mark.parametrize(("heavy", "count"), [(2, 9), (3, 36), (4, 175), (5, 938)])
def test_all_small_molecules(heavy, count):
    found = enumeration.smiles(heavy)
    assert len(found) == len(set(found)) == count
    for smiles in found[:: 1 + count // 100]:
        molecule = Chem.MolFromSmiles(smiles)
        assert molecule.GetNumHeavyAtoms() == heavy
        assert molecule.GetRingInfo().NumRings() <= 1
        for bond in molecule.GetBonds():
            assert "C" in (bond.GetBeginAtom().GetSymbol(), bond.GetEndAtom().GetSymbol())
        assert Chem.MolToSmiles(molecule) == smiles


def test_the_bundled_molecules_are_among_them():
    found = {s for k in range(2, 6) for s in enumeration.smiles(k)}
    for r in packed.read(BUNDLED)[0]:
        assert (r.numbers != 1).sum() == 6 or r.smiles in found
    with pytest.raises(UserError, match="2 on"):
        enumeration.smiles(1)


def test_mmff94_pairs_end_in_the_minimum():
    from rdkit.Chem import AllChem

    made = generate.pair("CC(O)C=O", 4, "mmff94")
    molecule = molecules.embedded(molecules.parsed("CC(O)C=O"), 1, molecules.SEED + 4)
    assert float(align.rmsd(made.start, molecule.GetConformer().GetPositions())) < 1e-7
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=5000)
    assert float(align.rmsd(made.end, molecule.GetConformer().GetPositions())) < 2e-2
    assert made.frames.shape == (9, len(made.numbers), 3)
    np.testing.assert_allclose(made.frames[0], made.start, atol=1e-9)
    assert float(align.rmsd(made.frames[-1], made.end)) < 1e-6
    steps = np.sqrt(np.mean(np.sum(np.diff(made.frames, axis=0) ** 2, -1), -1))
    assert steps.max() < 1.5 * steps.min()
    again = generate.pair("CC(O)C=O", 4, "mmff94")
    np.testing.assert_array_equal(again.frames, made.frames)
    assert np.abs(generate.pair("CC(O)C=O", 5, "mmff94").start - made.start).max() > 1e-3


def test_gfn2_makes_the_bundled_set():
    pytest.importorskip("tblite")
    for r in packed.read(BUNDLED)[0][2:4]:
        made = generate.pair(r.smiles, int(r.id), "gfn2")
        np.testing.assert_allclose(made.start, r.start, atol=1e-4)
        assert float(align.rmsd(made.end, r.end)) < 2e-3
        assert float(align.rmsd(made.frames[4], r.frames[4])) < 5e-3


def test_pairs_that_are_none(monkeypatch):
    assert "did not relax" in generate.pair("C[Si](C)(C)B", 1, "mmff94")
    x = [np.zeros((3, 3)), np.array([[0, 0, 0], [0.96, 0, 0], [9, 0, 0.0]])]
    monkeypatch.setattr(generate, "by_mmff94", lambda molecule: x)
    assert "other bonds" in generate.pair("O", 1, "mmff94")
    with pytest.raises(UserError, match="mmff94, gfn2"):
        generate.pair("O", 1, "dft")
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(UserError, match="uv sync --extra xtb"):
        generate.pair("O", 1, "gfn2")


def test_slabs():
    made = slabs.slab(1, seed=3)
    assert len(made.numbers) == 28
    assert made.free.sum() == 10
    np.testing.assert_array_equal(
        made.frames[:, ~made.free], made.frames[:1, ~made.free].repeat(9, 0)
    )
    np.testing.assert_array_equal(made.end[~made.free], made.start[~made.free])
    assert made.pbc.tolist() == [True, True, False]
    assert np.abs(made.end - made.start).max() > 0.02
    from ase.calculators.emt import EMT

    from geometry.data.structures import to_atoms

    atoms = to_atoms(made, made.end)
    atoms.calc = EMT()
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.021
    np.testing.assert_array_equal(slabs.slab(1, seed=3).frames, made.frames)


def test_clusters():
    found = [slabs.cluster(k, seed=1) for k in range(6)]
    for r in found:
        assert 7 <= len(r.numbers) <= 13
        energy, gradient = slabs._energy(r.end / slabs.SIGMA)
        assert np.abs(gradient).max() < 1e-3
        assert energy < slabs._energy(r.start / slabs.SIGMA)[0]
    # The gradient is that of the energy, which is Lennard and Jones's.
    x = found[0].start / slabs.SIGMA
    energy, gradient = slabs._energy(x)
    pairs = [np.linalg.norm(x[i] - x[j]) for i in range(len(x)) for j in range(i)]
    assert energy == pytest.approx(sum(4 * (d**-12 - d**-6) for d in pairs))
    step = np.zeros_like(x)
    step[2, 1] = 1e-6
    slope = (slabs._energy(x + step)[0] - slabs._energy(x - step)[0]) / 2e-6
    assert slope == pytest.approx(gradient.reshape(-1, 3)[2, 1], rel=1e-5)
    np.testing.assert_array_equal(slabs.cluster(0, seed=1).end, found[0].end)


def flags(tmp_path, *more, out="a.npz"):
    return prepare.parse(["--method=mmff94", f"--out={tmp_path / out}", "--heavy=3", *more])


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "PIECE", 8)
    said = prepare.prepare(flags(tmp_path, "--count=20"))
    assert "a.npz: 1" in said or "a.npz: 20 pairs" in said
    true, count = prepare.piece, []

    def killed(job):
        count.append(job.first)
        if len(count) == 2:
            raise KeyboardInterrupt
        true(job)

    monkeypatch.setattr(prepare, "piece", killed)
    arguments = ["--method=mmff94", f"--out={tmp_path / 'b.npz'}", "--heavy=3", "--count=20"]
    assert prepare.main(arguments) == 130
    assert (tmp_path / "b.npz.pieces").exists()
    assert prepare.main([*arguments, "--seed=4"]) == 2
    assert "begun with another seed" in capsys.readouterr().err
    assert prepare.main(arguments) == 0
    assert count == [0, 8, 8, 16]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert prepare.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_users_list_and_a_folder_of_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 2)
    (tmp_path / "mine.smi").write_text(
        "CCO ethanol\n\nCC=O\n# none\nC[Si](C)(C)B\nC[C@H](O)F\n"
    )
    given = flags(tmp_path, f"--source={tmp_path / 'mine.smi'}", out="set")
    assert "3 pairs, 1 left out (1: mmff94 did not relax it)" in prepare.prepare(given)
    records = list(packed.stream(tmp_path / "set"))
    assert [r.smiles for r in records] == ["CCO", "CC=O", "C[C@H](O)F"]
    (tmp_path / "bad.smi").write_text("CCO\nC1CC\n")
    with pytest.raises(UserError, match="'C1CC' is no valid SMILES"):
        prepare.prepare(flags(tmp_path, f"--source={tmp_path / 'bad.smi'}"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        prepare.prepare(flags(tmp_path, out="full"))
    (tmp_path / "si.smi").write_text("C[Si](C)(C)B\n")
    with pytest.raises(UserError, match="No pair was made"):
        prepare.prepare(flags(tmp_path, f"--source={tmp_path / 'si.smi'}", out="none.npz"))


def test_other_methods_by_the_command(tmp_path):
    for method, count in (("clusters", 3), ("slabs", 1)):
        out = tmp_path / f"{method}.npz"
        assert prepare.main([f"--method={method}", f"--out={out}", f"--count={count}"]) == 0
        records, _ = packed.read(out)
        assert len(records) == count
        np.testing.assert_allclose(
            records[0].end,
            getattr(slabs, method[:-1])(0, 1_000_003).end.astype(np.float32),
        )


@pytest.mark.parametrize(("arguments", "words"), [
    (["--method=mmff94"], "--out=... is missing"),
    (["--method=dft", "--out=a"], "must be one of mmff94"),
    (["--method=qm9", "--out=a"], "needs --source"),
    (["--method=gfn2", "--out=a", "--heavy=1"], "--heavy is '1'"),
    (["--method=gfn2", "--out=a", "--out=b"], "stands twice"),
    (["--steps=3"], "Unknown argument"),
    (["--method=molecule3d", "--out=a", "--source=b", "--part=dev"], "train, valid, test"),
])  # fmt: skip
def test_flags(arguments, words, capsys):
    assert prepare.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_help(capsys):
    assert prepare.main([]) == 0
    assert "--method" in capsys.readouterr().out

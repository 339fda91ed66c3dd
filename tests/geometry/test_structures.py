"""Files of ASE: what is written is read; pairs, paths, constraints; what is refused."""

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import packed, structures
from tests.geometry.molecules_made import BUNDLED, MOVED, WATER, record, water


def slab(name="slab-7"):
    x = np.array([[0, 0, 0], [2.5, 0, 0], [1.2, 0, 1.9]])
    return record(
        [29, 29, 8],
        x,
        x + np.array([[0, 0, 0], [0, 0, 0.1], [0, 0.1, 0]]),
        name=name,
        cell=np.array([[5.0, 0, 0], [1, 5, 0], [0, 0, 20]]),
        pbc=np.array([True, True, False]),
        free=np.array([False, True, True]),
    )


@pytest.mark.parametrize("ending", ["xyz", "extxyz", "db"])
def test_pairs_come_back(tmp_path, ending):
    given = [slab(), water()._replace(id="w1"), slab("slab-8")]
    file = tmp_path / f"pairs.{ending}"
    structures.write(file, given, [np.stack([r.start, r.end]) for r in given])
    back = structures.read(file, perceive=False)
    assert [r.id for r in back] == ["slab-7", "w1", "slab-8"]
    for a, b in zip(given, back, strict=True):
        for name in ("numbers", "start", "end", "cell", "pbc", "free"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-7)
        assert b.frames is None
    assert back[0].group == "Cu2O"
    structures.write(file, given[:1], [given[0].start[None]])
    assert len(structures.read(file)) == 1  # Written anew, not added to.


def test_a_trajectory_is_one_record(tmp_path):
    x = np.stack([slab().start + k * (slab().end - slab().start) / 3 for k in range(4)])
    for file in (tmp_path / "a.traj", tmp_path / "a.extxyz"):
        structures.write(file, [slab()], [x])
        (back,) = structures.read(file)
        np.testing.assert_allclose(back.frames, x, atol=1e-7)
        np.testing.assert_allclose(back.start, x[0], atol=1e-7)
        np.testing.assert_allclose(back.end, x[-1], atol=1e-7)
        np.testing.assert_array_equal(back.free, [False, True, True])
    with pytest.raises(UserError, match="takes one record"):
        structures.write(tmp_path / "b.traj", [slab(), slab()], [x, x])


def test_a_plain_xyz_is_a_list_of_starts_with_bonds(tmp_path):
    rows = "".join(
        "3\n\n" + "".join(f"{s} {a} {b} {c}\n" for s, (a, b, c) in zip("OHH", x, strict=True))
        for x in (WATER, MOVED)
    )  # fmt: skip
    (tmp_path / "two.xyz").write_text(rows)
    first, second = structures.read(tmp_path / "two.xyz")
    assert (first.id, second.id) == ("two-0", "two-1")
    assert first.end is None
    assert first.smiles == first.group == "O"
    assert {tuple(row) for row in first.bonds.tolist()} == {(0, 1, 1), (0, 2, 1)}
    np.testing.assert_allclose(second.start, MOVED)
    assert not len(structures.read(tmp_path / "two.xyz", perceive=False)[0].bonds)


def test_what_is_written_alone_is_wrapped(tmp_path):
    x = slab().start - [3.0, 0, 0]
    structures.write(tmp_path / "a.xyz", [slab()], [x[None]])
    back = structures.read(tmp_path / "a.xyz")[0].start
    inside = back @ np.linalg.inv(slab().cell)
    assert np.all(inside[:, :2] > -1e-6)
    assert np.all(inside[:, :2] < 1)
    whole = (back - x) @ np.linalg.inv(slab().cell)
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-6)
    structures.write(tmp_path / "b.xyz", [slab()], [np.stack([x, x])])
    np.testing.assert_allclose(structures.read(tmp_path / "b.xyz")[0].start, x, atol=1e-6)


def test_other_endings_lead_elsewhere(tmp_path):
    records = packed.read(BUNDLED)[0]
    assert len(structures.read(BUNDLED)) == len(records)
    (tmp_path / "a.smi").write_text("CCO ethanol\n\n# none\nO\n")
    first, second = structures.read(tmp_path / "a.smi", seed=3)
    assert (first.id, second.id) == ("ethanol", "a-3")
    assert len(first.numbers) == 9
    np.testing.assert_array_equal(
        structures.read(tmp_path / "a.smi", seed=3)[0].start, first.start
    )
    assert (
        np.abs(structures.read(tmp_path / "a.smi", seed=4)[0].start - first.start).max() > 1e-3
    )
    structures.write(
        tmp_path / "a.sdf", [first, second], [r.start[None] for r in (first, second)]
    )
    back = structures.read(tmp_path / "a.sdf")
    assert [r.smiles for r in back] == ["CCO", "O"]
    np.testing.assert_allclose(back[0].start, first.start, atol=1e-4)
    np.testing.assert_array_equal(back[0].bonds, first.bonds)


def test_bonds_that_fit_no_molecule_are_left_out(tmp_path):
    lone = record([6, 9, 9, 9, 9, 9], np.concatenate([[[0, 0, 0]], 1.35 * _directions(5)]))
    with pytest.warns(UserWarning, match="used without bonds"):
        assert not len(structures.with_bonds(lone).bonds)
    argon = record([18, 18], [[0, 0, 0], [0, 0, 3.8]])
    assert not len(structures.with_bonds(argon).bonds)


def _directions(n):
    x = np.array([[1, 0, 0], [-0.5, 0.866, 0], [-0.5, -0.866, 0], [0, 0, 1], [0, 0, -1.0]])
    return x[:n]


def test_what_is_refused(tmp_path):
    from ase import Atoms
    from ase.constraints import FixCartesian

    for path, words in (
        (tmp_path / "a.pdb", r"ends in '.pdb'"),
        (tmp_path / "a.xyz", "no file"),
    ):
        with pytest.raises(UserError, match=words):
            structures.read(path)
    for name in ("a.xyz", "a.traj", "a.db"):
        (tmp_path / name).write_text("nonsense\nof a file\n")
        with pytest.raises(UserError, match="cannot be read"):
            structures.read(tmp_path / name)
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(UserError, match=r"holds no structure|cannot be read"):
        structures.read(tmp_path / "a.xyz")
    with pytest.raises(UserError, match=r"to \.xyz"):
        structures.write(tmp_path / "a.cif", [water()], [WATER[None]])
    with pytest.raises(UserError, match="one state"):
        structures.write(tmp_path / "a.sdf", [water()], [np.stack([WATER, MOVED])])
    half = Atoms("OH", [[0, 0, 0], [0, 0, 1]], constraint=FixCartesian(0, (True, False, False)))
    with pytest.raises(UserError, match="FixCartesian"):
        structures.from_atoms(half, "half")
    whole = Atoms("OH", [[0, 0, 0], [0, 0, 1]], constraint=FixCartesian(0))
    np.testing.assert_array_equal(structures.from_atoms(whole, "whole").free, [False, True])
    text = "2\npair_id=a\nO 0 0 0\nH 0 0 1\n3\npair_id=a\nO 0 0 0\nH 0 0 1\nH 0 1 0\n"
    (tmp_path / "b.xyz").write_text(text)
    with pytest.raises(UserError, match="two ends of a differ: HO at the start, H2O"):
        structures.read(tmp_path / "b.xyz")
    cell = '1\nLattice="{0} 0 0 0 5 0 0 0 5" pair_id=a\nO 0 0 0\n'
    (tmp_path / "c.xyz").write_text(cell.format(5) + cell.format(6))
    with pytest.raises(UserError, match="cell of record a changes"):
        structures.read(tmp_path / "c.xyz")

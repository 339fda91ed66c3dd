"""The packed format, and the check values that come with the bundled sets."""

import numpy as np
import pytest

from common.errors import UserError
from geometry import metrics
from geometry.data import packed, splits
from tests.geometry.molecules_made import BUNDLED, data_folder, record, water

# Molecules, atoms, D-MAE, D-RMSE, C-RMSD (Kabsch), RMSD, displacement per coordinate of the
# unchanged start, by split.
CHECKS = {
    ("relax_gfn2", "x_final"): {
        0: (1327, 14384, 0.1104, 0.2013, 0.1235, 0.3038, 0.2187),
        1: (63, 656, 0.1149, 0.2098, 0.1273, 0.3092, 0.2204),
        2: (154, 1667, 0.1024, 0.1829, 0.1045, 0.2728, 0.1954),
    },
    ("qm7_etkdg_to_pbe0", "x_final"): {
        0: (5995, 92725, 0.3239, 0.5738, 0.5060, 1.1697, 0.7411),
        1: (333, 5105, 0.3194, 0.5703, 0.5057, 1.1567, 0.7339),
        2: (713, 10918, 0.3147, 0.5598, 0.4702, 1.1310, 0.7184),
    },
    ("qm7_etkdg_to_pbe0", "x_final_matched"): {
        0: (5995, 92725, 0.2430, 0.4599, 0.4445, 0.7996, 0.5433),
        1: (333, 5105, 0.2474, 0.4691, 0.4457, 0.8126, 0.5521),
        2: (713, 10918, 0.2310, 0.4409, 0.4174, 0.7698, 0.5262),
    },
}


def compare(path, target, wanted):
    records, split = packed.read(path, target)
    for part, (molecules, atoms, *figures) in wanted.items():
        chosen = [r for r, s in zip(records, split, strict=True) if s == part]
        assert len(chosen) == molecules
        assert sum(len(r.numbers) for r in chosen) == atoms
        found = metrics.evaluate(
            chosen,
            [r.start for r in chosen],
            found=[np.arange(metrics.heavy(r.numbers).sum())[None] for r in chosen],
        )
        moved = np.concatenate([(r.end - r.start).ravel() for r in chosen])
        got = [found[k] for k in ("d_mae", "d_rmse", "c_rmsd_kabsch", "rmsd")]
        got.append(np.sqrt(np.mean(moved**2)))
        assert [f"{v:.4f}" for v in got] == [f"{v:.4f}" for v in figures]
        assert found["c_rmsd"] == pytest.approx(found["c_rmsd_kabsch"])


def test_bundled_set_has_its_check_values():
    compare(BUNDLED, "x_final", CHECKS["relax_gfn2", "x_final"])


@pytest.mark.parametrize("target", ["x_final", "x_final_matched"])
def test_qm7_has_its_check_values(target):
    if data_folder() is None:
        pytest.skip("needs TENFOLD_DATA")
    path = data_folder() / "molecules" / "qm7_etkdg_to_pbe0.npz"
    compare(path, target, CHECKS["qm7_etkdg_to_pbe0", target])


def test_splits_are_those_of_the_rule_and_no_smiles_is_in_two():
    records, split = packed.read(BUNDLED)
    np.testing.assert_array_equal(split, splits.split(records))
    of = {}
    for r, s in zip(records, split, strict=True):
        assert of.setdefault(r.smiles, s) == s


def test_paths_lead_from_start_to_end():
    from geometry.data import align

    for r in packed.read(BUNDLED)[0][:30]:
        assert r.frames.shape == (9, len(r.numbers), 3)
        assert float(align.rmsd(r.frames[0], r.start)) < 1e-3
        assert float(align.rmsd(r.frames[-1], r.end)) < 1e-3


def same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        if isinstance(x, np.ndarray):
            np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=name)
        else:
            assert x == y, name


def test_what_is_written_is_read(tmp_path):
    records = packed.read(BUNDLED)[0][:5]
    slab = record(
        [29, 1],
        [[0, 0, 0], [0, 0, 1.5]],
        [[0, 0, 0], [0, 0.1, 1.5]],
        name="slab",
        cell=np.diag([3.0, 3, 10]),
        pbc=np.array([True, True, False]),
        free=np.array([False, True]),
    )
    mixed = [*records, water(), slab, water()._replace(id="open", end=None)]
    packed.write(tmp_path / "a.npz", mixed)
    packed.write(tmp_path / "b.npz", mixed)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    back, split = packed.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(split, splits.split(mixed))
    for a, b in zip(mixed, back, strict=True):
        same(a, b)
    packed.write(tmp_path / "c.npz", [water()._replace(end=None)])
    assert packed.read(tmp_path / "c.npz", "")[0][0].end is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no file"):
        packed.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match="no packed set"):
        packed.read(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", y=np.zeros(3))
    with pytest.raises(UserError, match="'n_atoms'"):
        packed.read(tmp_path / "other.npz")
    with pytest.raises(UserError, match="x_final"):
        packed.read(BUNDLED, "x_final_matched")
    data = dict(np.load(BUNDLED))
    np.savez(tmp_path / "short.npz", **{**data, "z": data["z"][:-1]})
    with pytest.raises(UserError, match="'z' has 16706 rows"):
        packed.read(tmp_path / "short.npz")
    with pytest.raises(UserError, match="no record"):
        packed.write(tmp_path / "x.npz", [])
    paths = [water()._replace(frames=np.zeros((k, 3, 3))) for k in (2, 3)]
    with pytest.raises(UserError, match="2, 3 frames"):
        packed.write(tmp_path / "x.npz", paths)

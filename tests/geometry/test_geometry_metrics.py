"""Metrics: the worked values, brute force, RDKit."""

import numpy as np
import pytest

from common.errors import UserError
from geometry import metrics
from geometry.data import align, packed
from tests.geometry.molecules_made import BUNDLED, MOVED, WATER, record, turned, water


def test_worked_values():
    mae, rmse = metrics.distance_errors([MOVED], [WATER])
    assert (mae, rmse) == pytest.approx((0.040480, 0.053970), abs=5e-7)
    mae, rmse = metrics.distance_errors([MOVED], [WATER], "offdiag")
    assert (mae, rmse) == pytest.approx((0.060720, 0.066099), abs=5e-7)
    assert float(align.rmsd(MOVED, WATER)) == pytest.approx(0.039949, abs=5e-7)
    assert metrics.adwt(np.array([0.005, 0.05, 0.2, 0.4999, 0.7])) == pytest.approx(
        50.5306, abs=5e-5
    )
    assert len(metrics.THRESHOLDS) == 490


def test_pooled_over_the_set_not_averaged_over_molecules():
    rng = np.random.default_rng(0)
    p, r = ([rng.standard_normal((n, 3)) for n in (3, 7)] for _ in range(2))
    total = square = 0.0
    for a, b in zip(p, r, strict=True):
        for i in range(len(a)):
            for j in range(len(a)):
                d = abs(np.linalg.norm(a[i] - a[j]) - np.linalg.norm(b[i] - b[j]))
                total, square = total + d, square + d * d
    mae, rmse = metrics.distance_errors(p, r)
    assert mae == pytest.approx(total / (9 + 49))
    assert rmse == pytest.approx(np.sqrt(square / (9 + 49)))


def test_c_rmsd_agrees_with_rdkit():
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    from geometry.data import molecules

    count = 0
    for r in packed.read(BUNDLED)[0][::30]:
        if metrics.heavy(r.numbers).sum() < 3:
            continue
        p, q = (Chem.RemoveAllHs(molecules.to_rdkit(r, x)) for x in (r.start, r.end))
        for mol in (p, q):
            Chem.RemoveStereochemistry(mol)
        expected = rdMolAlign.GetBestRMS(Chem.Mol(p), q)
        assert metrics.c_rmsd(r, r.start) == pytest.approx(expected, abs=1e-6)
        count += 1
    assert count >= 20


def test_symmetries_know_acids():
    """Both oxygens of a formic acid without its hydrogens are alike, as for RDKit."""
    bonds = [(0, 1, 2), (0, 2, 1), (0, 3, 1), (2, 4, 1)]
    acid = record([6, 8, 8, 1, 1], np.zeros((5, 3)), bonds=bonds)
    assert metrics.symmetries(acid).tolist() == [[0, 1, 2], [0, 2, 1]]
    ester = record([6, 8, 8, 1, 6], np.zeros((5, 3)), bonds=bonds)
    assert metrics.symmetries(ester).tolist() == [[0, 1, 2, 3]]


def test_evaluate_of_turned_predictions():
    """Metrics of molecules do not see the frame; of relabelled ones only with labels."""
    records = packed.read(BUNDLED)[0][:20]
    given = metrics.evaluate(records, [r.start for r in records])
    moved = metrics.evaluate(records, [turned(r.start, k) for k, r in enumerate(records)])
    for name in ("d_mae", "d_rmse", "c_rmsd", "c_rmsd_kabsch", "rmsd"):
        assert moved[name] == pytest.approx(given[name], abs=1e-6), name
    assert given["c_rmsd"] <= given["c_rmsd_kabsch"] + 1e-9
    swapped = water()._replace(start=WATER[[0, 2, 1]])
    same = metrics.evaluate([swapped._replace(end=WATER)], [WATER[[0, 2, 1]]])
    matched = metrics.evaluate(
        [swapped._replace(end=WATER)], [WATER[[0, 2, 1]]], labels="matched"
    )
    assert matched["d_mae"] == pytest.approx(0, abs=1e-9)
    assert same["d_mae"] > 0


def test_fixed_atoms_and_images_do_not_count():
    r = record(
        [29, 1],
        np.zeros((2, 3)),
        [[0, 0, 0], [0.1, 0, 2]],
        cell=np.diag([5.0, 5, 9]),
        pbc=np.array([True, True, False]),
        free=np.array([False, True]),
    )
    predicted = np.array([[3.0, 3, 3], [4.8955, 0, 2]])
    assert metrics.mean_distance(r, predicted) == pytest.approx(0.2045)
    found = metrics.evaluate([r], [predicted])
    assert found["rmsd"] == pytest.approx(0.2045)
    assert found["adwt"] == pytest.approx(100 * 295 / 490)


def test_several_samples():
    r = water()
    samples = np.stack([turned(r.end, 1), r.start, r.start])
    found = metrics.several(r, samples)
    # One heavy atom has no C-RMSD; ethanol-like heavy chain below does.
    assert found["best_d_mae"] == pytest.approx(0, abs=1e-9)
    assert found["mean_d_mae"] == pytest.approx(2 / 3 * 0.040480, abs=1e-6)
    chain = record([6, 6, 8], WATER, MOVED, [(0, 1, 1), (0, 2, 1)])
    found = metrics.several(chain, samples)
    assert found["best"] == pytest.approx(0, abs=1e-7)
    assert found["mean"] == pytest.approx(2 / 3 * 0.039949, abs=1e-6)
    assert found["diversity"] == pytest.approx(2 / 3 * 0.039949, abs=1e-6)
    assert metrics.several(chain, samples[:1])["diversity"] == 0


def test_what_cannot_be():
    with pytest.raises(UserError, match="n2 or offdiag"):
        metrics.distance_errors([WATER], [WATER], "all")
    with pytest.raises(UserError, match="given or matched"):
        metrics.evaluate([water()], [WATER], labels="all")
    with pytest.raises(UserError, match="at least one"):
        metrics.distance_errors([], [])

"""Every kind of structure that must not be learned from, and the sentence it gets."""

import warnings

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import checks, elements, packed
from tests.geometry.molecules_made import BUNDLED, MOVED, WATER, chiral, record, turned, water


@pytest.fixture(autouse=True)
def _loud():
    """A warning that no test expects is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def slab(*moves, **fields):
    """Two copper atoms, the first fixed, and oxygen, which move as told."""
    x = np.array([[0, 0, 0], [2.5, 0, 0], [1.2, 0, 1.9]])
    moves = np.array(moves or [[0, 0, 0], [0, 0, 0.1], [0, 0.1, 0]])
    given = dict(
        cell=np.diag([5.0, 5, 20]),
        pbc=np.array([True, True, False]),
        free=np.array([False, True, True]),
        name="slab",
    )
    return record([29, 29, 8], x, x + moves, **{**given, **fields})


def replaced(**fields):
    return water()._replace(**fields)


TOUCH = np.array([[1], [0.05], [1]])
NONE = dict(numbers=np.zeros(0, np.int32), start=np.zeros((0, 3)), end=None)
EQUAL = np.array([[5.0, 0, 0], [5, 0, 0], [0, 0, 9]])


def path(*scales):
    return np.stack([WATER + s * (MOVED - WATER) for s in scales])


def test_good_records_stay_what_they_are():
    made = checks.checked(water())
    assert np.abs(made.end - made.start).max() < 0.11
    np.testing.assert_allclose(checks.checked(slab()).end, slab().end, atol=1e-12)
    np.testing.assert_array_equal(checks.checked(slab()).end[0], slab().start[0])
    for r in packed.read(BUNDLED)[0][:40]:
        again = checks.checked(r)
        np.testing.assert_allclose(again.end, r.end - r.start.mean(axis=0), atol=2e-5)
        assert checks.other_hand(again) == ""


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (replaced(**NONE), "no atoms"),
        (record([8], [[0.0, 0, 0]]), "single atom"),
        (water(free=np.zeros(3, bool)), "All atoms of record water are fixed"),
        (replaced(start=WATER * np.nan), "water has a position that is NaN or infinite"),
        (replaced(end=MOVED + np.inf), "NaN or infinite"),
        (replaced(end=MOVED[:2]), r"3 atoms, but its target .* \(2, 3\)"),
        (replaced(start=WATER * TOUCH), "Atoms 0 and 1 of record water .* start"),
        (replaced(end=MOVED * TOUCH[[0, 2, 1]]), "Atoms 0 and 2 .* target"),
        (replaced(frames=path(0, 1) * 0.01), "frame 0"),
        (replaced(start=WATER * 0.13, end=None), "nanometres"),
        (replaced(frames=path(0, 0.5, 3)), "last frame of the path .* at most 0.05"),
        (slab(cell=np.zeros((3, 3))), "cell .* is singular"),
        (slab(cell=EQUAL), "cell .* is singular"),
        (slab([0, 0, 0], [2.5, 0, 0], [0, 0, 0]), "Atoms 0 and 1 .* target"),
    ],
)
def test_errors(made, words):
    with pytest.raises(UserError, match=words):
        checks.checked(made)


def test_unknown_elements_and_what_is_supported():
    with pytest.raises(UserError, match=r"contains O, but supported are H, C, N\."):
        checks.checked(water(), (1, 6, 7))
    with pytest.raises(UserError, match=r"contains 119, but supported are H to Og\."):
        checks.checked(record([119, 1], [[0, 0, 0], [0, 0, 1.0]]))
    assert elements.names([1, 2, 3, 4, 8, 9]) == "H to Be, O, F"
    assert elements.formula(np.array([1, 8, 6, 1, 6])) == "C2H2O"


def test_ends_must_be_the_same_atoms():
    with pytest.raises(
        UserError, match="two ends of water differ: H2O at the start, HO at the target"
    ):
        checks.joined(water(), np.array([8, 1], np.int32), MOVED[:2])
    with pytest.raises(UserError, match="H2O, list their atoms in another order: atom 0 is O"):
        checks.joined(water(), np.array([1, 8, 1], np.int32), MOVED)
    np.testing.assert_array_equal(checks.joined(water(), water().numbers, MOVED).end, MOVED)


def test_a_single_atom_in_a_cell():
    r = record([8], [[0.0, 0, 0]], cell=np.eye(3) * 4, pbc=np.ones(3, bool))
    assert len(checks.checked(r).numbers) == 1


def test_displacements_around_a_cell():
    moved = slab([0, 0, 0], [0, 0, 0], [5.2, 0, 0])
    np.testing.assert_allclose(checks.checked(moved).end[2], [1.4, 0, 1.9])
    far = slab([0, 0, 0], [0, 0, 0], [2.4, 2.4, 0])
    with pytest.raises(UserError, match=r"moves 3.39 angstrom, more than half .* 2.50"):
        checks.checked(far)
    skew = slab(cell=np.array([[5.0, 0, 0], [4, 3, 0], [0, 0, 20]]))
    np.testing.assert_allclose(checks.heights(skew), [3.0, 3.0])
    fixed = slab([0, 0, 0.2], [0, 0, 0], [0, 0, 0])
    with pytest.warns(UserWarning, match="fixed atom of record slab moves 0.2"):
        checks.checked(fixed)


def test_warnings():
    with pytest.warns(UserWarning, match="2 molecules that no bond joins"):
        checks.checked(water()._replace(bonds=water().bonds[:1]))
    with pytest.warns(UserWarning, match="positions in bohr"):
        checks.checked(water()._replace(start=WATER * 1.8897, end=None))
    # Argon stands that far apart.
    checks.checked(record([18, 18, 18], WATER * 3.9))
    with pytest.warns(UserWarning, match="1 frames, of which 1 differ"):
        assert checks.checked(water()._replace(frames=path(1))).frames is None
    with pytest.warns(UserWarning, match="3 frames, of which 1 differ"):
        assert checks.checked(water()._replace(frames=path(1, 1, 1))).frames is None
    with pytest.warns(UserWarning, match="4 frames, of which 3 differ .* repeated"):
        made = checks.checked(water()._replace(frames=path(0, 0, 0.5, 1)))
    assert len(made.frames) == 3


def test_a_set_drops_other_stereoisomers_and_says_what_it_turned():
    good, mirror = chiral(), chiral(order=(1, 0, 2, 3))
    x = good.start
    near = good._replace(id="near", end=x * 1.01)
    wrong = good._replace(id="wrong", end=mirror.start)
    away = good._replace(id="away", end=turned(x * 1.01, 3))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        kept, dropped = checks.checked_set([near, wrong, away])
    said = [str(w.message) for w in heard]
    assert [r.id for r in kept] == ["near", "away"]
    assert dropped == {"wrong": "the target is the mirror image of the start."}
    assert any(s.startswith("1 of 3 targets stood in a frame unrelated") for s in said)
    assert any(
        "1 of 3 records were dropped; wrong: the target is the mirror" in s for s in said
    )
    np.testing.assert_allclose(kept[1].end, kept[0].end, atol=1e-9)
    with pytest.raises(UserError, match="NaN"):
        checks.checked_set([near, near._replace(start=x * np.nan)])


def test_many_warnings_of_a_set_are_counted():
    loose = [water()._replace(id=f"w{k}", bonds=water().bonds[:1]) for k in range(9)]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        checks.checked_set(loose)
    assert len(heard) == 4
    assert "6 more warnings" in str(heard[-1].message)

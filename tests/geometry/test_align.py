"""Frames: rotations against brute force, lines and planes, labels, hands, minimum images."""

from itertools import permutations, product

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import align, packed, symmetry
from tests.geometry.molecules_made import (
    BUNDLED,
    MOVED,
    WATER,
    chiral,
    record,
    tetrahedron,
    turned,
    water,
)


def rotations(steps):
    """A grid of rotations, by Euler angles."""
    angles = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    for a, b, c in product(angles, np.linspace(0, np.pi, steps // 2), angles):
        ca, sa, cb, sb, cc, sc = (
            *(f(v) for v in (a, b) for f in (np.cos, np.sin)),
            *(
                np.cos(c),
                np.sin(c),
            ),
        )
        z1 = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
        y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
        z2 = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
        yield z1 @ y @ z2


def test_no_rotation_of_a_grid_is_better():
    rng = np.random.default_rng(0)
    moving, fixed = rng.standard_normal((2, 5, 3))
    m, f = moving - moving.mean(0), fixed - fixed.mean(0)
    best = min(np.sum((m @ a - f) ** 2) for a in rotations(24))
    found = np.sum((align.kabsch(moving, fixed) - fixed) ** 2)
    assert found <= best + 1e-12
    assert found > 0.9 * best - 1e-12  # The grid is fine enough to notice a poor one.


def test_a_turned_body_comes_back_exactly_and_alignment_is_idempotent():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((9, 3))
    np.testing.assert_allclose(align.kabsch(turned(x, 2), x), x, atol=1e-12)
    y = rng.standard_normal((9, 3))
    once = align.kabsch(y, x)
    np.testing.assert_allclose(align.kabsch(once, x), once, atol=1e-12)


def test_rotations_are_proper_even_onto_a_mirror_image():
    x = tetrahedron()
    a = align.rotation(turned(x, 3, reflect=True), x)
    assert np.linalg.det(a) == pytest.approx(1, abs=1e-12)
    assert align.rmsd(turned(x, 3, reflect=True), x) > 0.5
    assert align.rmsd(turned(x, 3), x) < 1e-7


@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_lines_turn_the_shortest_way_and_planes_need_no_luck(noise):
    line = np.array([[0, 0, -1.2], [0, 0, 0], [0, 0, 1.1]])
    spoilt = line + noise * np.random.default_rng(4).standard_normal(line.shape)
    found = align.rotation(spoilt, turned(line, 5))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-9)
    # The angle of the turn is that between the lines, no more.
    cosine = (np.trace(found) - 1) / 2
    other = turned(line, 5)
    axis = (other[2] - other[0]) / np.linalg.norm(other[2] - other[0])
    assert cosine == pytest.approx(axis[2], abs=1e-9)
    back = align.rotation(line, -line)
    np.testing.assert_allclose(line @ back, -line, atol=1e-12)
    flat = np.concatenate([WATER, [[1.0, 2.0, 0.0]]])
    np.testing.assert_allclose(align.kabsch(turned(flat, 6), flat), flat, atol=1e-9)
    np.testing.assert_array_equal(align.rotation(np.zeros((1, 3)), np.ones((1, 3))), np.eye(3))


def test_many_labellings_at_once_give_the_same_rmsd():
    rng = np.random.default_rng(7)
    fixed, moving = rng.standard_normal((6, 3)), rng.standard_normal((10, 6, 3))
    for m, square in zip(moving, align.squares(moving, fixed), strict=True):
        assert np.sqrt(square) == pytest.approx(float(align.rmsd(m, fixed)), abs=1e-9)
    several = align.kabsch(moving, np.repeat(fixed[None], 10, axis=0))
    np.testing.assert_allclose(several[3], align.kabsch(moving[3], fixed), atol=1e-12)


def graph_automorphisms(numbers, bonds):
    """All permutations that keep elements and bonds."""
    n = len(numbers)
    table = np.zeros((n, n), int)
    for a, b, kind in bonds:
        table[a, b] = table[b, a] = kind
    return {
        p
        for p in permutations(range(n))
        if all(numbers[p[i]] == numbers[i] for i in range(n))
        and np.array_equal(table[np.ix_(p, p)], table)
    }


ETHANE = ([6, 6, *[1] * 6], [(0, 1, 1), *[(k // 3, 2 + k, 1) for k in range(6)]])
GRAPHS = {
    "ethane": ETHANE,
    "square": ([6] * 4, [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 0, 1)]),
    "alternating": ([6] * 4, [(0, 1, 2), (1, 2, 1), (2, 3, 2), (3, 0, 1)]),
    "hydrogen": ([1, 1], [(0, 1, 1)]),
    "two": ([8, 1, 1, 8, 1, 1], [(0, 1, 1), (0, 2, 1), (3, 4, 1), (3, 5, 1)]),
    "prism": ([6] * 6, [(0, 1, 1), (1, 2, 1), (2, 0, 1), (3, 4, 1), (4, 5, 1), (5, 3, 1),
                        (0, 3, 1), (1, 4, 1), (2, 5, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_automorphisms_are_all_of_them(name):
    numbers, bonds = np.array(GRAPHS[name][0]), np.array(GRAPHS[name][1], np.int32)
    found = symmetry.automorphisms(numbers, bonds)
    np.testing.assert_array_equal(found[0], np.arange(len(numbers)))
    assert len(found) == len({tuple(p) for p in found.tolist()})
    assert {tuple(p) for p in found.tolist()} == graph_automorphisms(*GRAPHS[name])


def test_too_many_automorphisms_are_not_listed():
    numbers, bonds = np.array(ETHANE[0]), np.array(ETHANE[1], np.int32)
    assert len(symmetry.automorphisms(numbers, bonds, 72)) == 72
    assert symmetry.automorphisms(numbers, bonds, 71) is None


def methyls(centre, corners, phases):
    """Carbons at 1.5 angstrom from the centre, with three hydrogens each."""
    carbons, hydrogens, bonds = [], [], []
    for k, (corner, phase) in enumerate(zip(corners, phases, strict=True)):
        axis = corner / np.linalg.norm(corner)
        across = np.cross(axis, [0.3, 0.5, 0.8])
        across /= np.linalg.norm(across)
        other = np.cross(axis, across)
        carbons.append(centre + 1.5 * axis)
        for h in range(3):
            angle = phase + 2 * np.pi * h / 3
            side = np.cos(angle) * across + np.sin(angle) * other
            hydrogens.append(carbons[-1] + 0.35 * axis + 1.03 * side)
            bonds.append((1 + k, 1 + len(corners) + 3 * k + h, 1))
    bonds += [(0, 1 + k, 1) for k in range(len(corners))]
    x = np.array([centre, *carbons, *hydrogens])
    return np.array([6] * (1 + len(corners)) + [1] * (3 * len(corners))), x, bonds


@pytest.mark.parametrize("arms", [2, 4])
def test_relabelling_finds_shuffled_atoms(arms):
    """Propane's skeleton has 72 automorphisms; neopentane 31104, above the limit."""
    corners = tetrahedron()[1:][:arms] * [1, 1.1, 0.95]
    numbers, x, bonds = methyls(np.zeros(3), corners, 0.3 * np.arange(arms))
    bonds = np.array(bonds, np.int32)
    shuffle = np.arange(len(x))
    shuffle[[1, 2]] = 2, 1
    shuffle[1 + arms :][:6] = (np.array([4, 3, 5, 1, 0, 2])) + 1 + arms
    known = symmetry.automorphisms(numbers, bonds)
    assert known is None if arms == 4 else len(known) == 72
    p = align.relabelling(numbers, bonds, turned(x, 9)[shuffle], x)
    np.testing.assert_array_equal(shuffle[p], np.arange(len(x)))


def test_relabelling_is_the_best_of_all_permutations():
    rng = np.random.default_rng(10)
    numbers, bonds = np.array(ETHANE[0]), np.array(ETHANE[1], np.int32)
    x, y = rng.standard_normal((2, 8, 3))
    p = align.relabelling(numbers, bonds, x, y)
    best = min(float(align.rmsd(x[list(q)], y)) for q in graph_automorphisms(*ETHANE))
    assert float(align.rmsd(x[p], y)) == pytest.approx(best, abs=1e-9)


def test_relabelling_changes_neither_composition_nor_bonds():
    for r in packed.read(BUNDLED)[0][:60]:
        made = align.relabelled(r)
        p = align.relabelling(r.numbers, r.bonds, r.end, r.start)
        np.testing.assert_array_equal(r.numbers[p], r.numbers)
        pairs = {(*sorted((a, b)), k) for a, b, k in r.bonds.tolist()}
        assert {(*sorted((int(p[a]), int(p[b]))), k) for a, b, k in r.bonds.tolist()} == pairs
        before = np.sum((align.kabsch(r.end, r.start) - r.start) ** 2)
        assert np.sum((made.end - r.start) ** 2) <= before + 1e-9
        again = align.relabelled(made)
        np.testing.assert_allclose(again.end, made.end, atol=1e-9)


def test_a_pair_in_unrelated_frames_is_aligned():
    x = tetrahedron()
    r = chiral()._replace(start=turned(x, 11), end=turned(x * 1.02, 12))
    path = np.stack([turned(x * s, 13 + k) for k, s in enumerate((1, 1.01, 1.02))])
    made = align.aligned(r._replace(frames=path))
    np.testing.assert_allclose(made.start.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(made.frames[0], made.start, atol=1e-9)
    assert np.abs(made.end - made.start).max() < 0.1
    np.testing.assert_allclose(made.frames[-1], made.end, atol=1e-9)
    assert align.aligned(made).end == pytest.approx(made.end, abs=1e-12)


def test_other_labels_leave_a_path_out():
    """It begins at the start, whose labels are the given ones."""
    numbers, x, bonds = methyls(np.zeros(3), tetrahedron()[1:3] * 1.1, [0.0, 0.4])
    r = record(numbers, x, 1.02 * x, bonds, frames=np.stack([x, 1.02 * x]))
    assert align.aligned(r, labels="matched").frames is not None
    swapped = r._replace(end=r.end[[0, 1, 2, 4, 5, 3, 6, 7, 8]])
    made = align.aligned(swapped, labels="matched")
    assert made.frames is None
    np.testing.assert_allclose(made.end, align.aligned(r).end, atol=1e-9)


def test_hands():
    left, right = chiral(), chiral(order=(1, 0, 2, 3))
    x, y = left.start, right.start
    of = lambda start, end: symmetry.stereo(left.numbers, left.bonds, start, end)
    assert of(x, turned(x, 14)) == "same"
    assert of(x, y) == "mirror"
    assert of(x, turned(x, 14, reflect=True)) == "mirror"
    # With two equal neighbours there is no hand, and the mirror image is the molecule itself.
    equal = np.array([6, 9, 9, 35, 1], np.int32)
    assert symmetry.stereo(equal, left.bonds, x, y) == "same"
    assert symmetry.same(equal, left.bonds, x, x, -1)
    assert not symmetry.same(left.numbers, left.bonds, x, x, -1)


def test_sides_of_a_double_bond():
    """1,2-difluoroethene, cis and trans: planar, so each is its own mirror image."""
    numbers = np.array([6, 6, 9, 1, 9, 1], np.int32)
    bonds = np.array([(0, 1, 2), (0, 2, 1), (0, 3, 1), (1, 4, 1), (1, 5, 1)], np.int32)
    trans = np.array(
        [[0, 0, 0], [1.3, 0, 0], [-0.6, 1.1, 0], [-0.6, -1, 0], [1.9, -1.1, 0], [1.9, 1, 0.0]]
    )
    cis = trans.copy()
    cis[4:, 1] *= -1
    assert symmetry.stereo(numbers, bonds, trans, trans) == "same"
    assert symmetry.stereo(numbers, bonds, trans, cis) == "other"
    assert symmetry.same(numbers, bonds, cis, cis, -1)


def test_the_nearer_mirror_image_is_taken_of_achiral_molecules_only():
    """A bent hydrogen peroxide whose target is twisted the other way."""
    angle = 1.9
    x = np.array([[0, 0.7, 0], [0, -0.7, 0], [0.9, 1, 0.0], [0, -1, 0]], float)
    x[3, 0], x[3, 2] = 0.9 * np.cos(angle), 0.9 * np.sin(angle)
    bonds = [(0, 1, 1), (0, 2, 1), (1, 3, 1)]
    r = record([8, 8, 1, 1], x, x * [1, 1, -1], bonds)
    off, closest = align.aligned(r), align.aligned(r, mirror="closest")
    assert np.abs(off.end - off.start).max() > 0.3
    np.testing.assert_allclose(closest.end, closest.start, atol=1e-9)
    hand = chiral()._replace(end=chiral(order=(1, 0, 2, 3)).start)
    kept = align.aligned(hand, mirror="closest")
    np.testing.assert_allclose(kept.end, align.aligned(hand).end, atol=1e-9)


def test_minimum_image_worked_value_and_search():
    cell, pbc = np.diag([10.0, 10, 20]), np.array([True, True, True])
    delta = np.array([9.9, 0.1, 0]) - np.array([0.1, 9.9, 0])
    assert np.linalg.norm(align.mic(delta, cell, pbc)) == pytest.approx(0.282843, abs=5e-7)
    skew = np.array([[8.0, 0, 0], [2, 7, 0], [1, 1, 9]])
    rng = np.random.default_rng(15)
    d = rng.standard_normal((40, 3)) * 2.0
    shifted = d + rng.integers(-3, 4, (40, 3)) @ skew
    inside = np.abs(d @ np.linalg.inv(skew)).max(axis=1) < 0.5
    assert inside.sum() > 20
    np.testing.assert_allclose(align.mic(shifted, skew, pbc)[inside], d[inside], atol=1e-9)
    # Only along directions that repeat; a missing third vector is no obstacle.
    slab, two = np.array([[8.0, 0, 0], [2, 7, 0], [0, 0, 0]]), np.array([True, True, False])
    found = align.mic(np.array([8.1, 0, 30.0]), slab, two)
    np.testing.assert_allclose(found, [0.1, 0, 30], atol=1e-12)
    np.testing.assert_array_equal(align.mic(delta, slab * 0, ~np.ones(3, bool)), delta)


def test_anchored_structures_are_not_turned_but_take_the_short_way():
    r = record(
        [29, 29, 1],
        [[0, 0, 0], [2.5, 0, 0], [4.9, 0, 2]],
        [[0, 0, 0], [2.5, 0, 0], [0.2, 0, 2]],
        cell=np.diag([5.0, 5, 20]),
        pbc=np.array([True, True, False]),
        free=np.array([False, True, True]),
    )
    made = align.aligned(r)
    np.testing.assert_array_equal(made.start, r.start)
    np.testing.assert_allclose(made.end[2], [5.2, 0, 2], atol=1e-12)


def test_unknown_choices():
    for fields in (dict(labels="best"), dict(mirror="on")):
        with pytest.raises(UserError, match=r"but must be"):
            align.aligned(water(), **fields)
    np.testing.assert_allclose(align.aligned(water()).start.mean(axis=0), 0, atol=1e-12)
    assert MOVED.shape == WATER.shape

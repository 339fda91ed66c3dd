"""Distances against closed forms, SciPy's matrix root and brute force."""

import itertools

import chex
import jax
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType

from common.errors import UserError
from diffusion.neighbours import Nearest, manifold, memorisation, nearest
from diffusion.quality import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    merged,
    read,
    save,
    statistics,
    streamed,
)


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (n, d)).astype(np.float32)


def gaussian(mean, covariance, count=100):
    return Statistics(count, np.array(mean, float), np.array(covariance, float) * (count - 1))


def pairwise(a, b):
    """Distances of all pairs, float64."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    return np.sqrt(np.sum((a[:, None] - b[None]) ** 2, axis=2))


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    a = gaussian([1, 2, 3], np.diag([4.0, 1.0, 0.25]))
    b = gaussian([0, 2, 5], np.diag([1.0, 9.0, 0.25]))
    want = 1 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2
    np.testing.assert_allclose(frechet_distance(a, b), want, rtol=1e-12)


def test_frechet_distance_is_that_of_scipy_where_covariances_do_not_commute():
    a, b = normal(60, 12, 0), normal(50, 12, 1) @ normal(12, 12, 2) + 0.3
    x, y = statistics(a), statistics(b)
    s, t = np.cov(a.T.astype(float)), np.cov(b.T.astype(float))
    np.testing.assert_allclose(x.covariance, s, atol=1e-12)
    want = np.sum((a.mean(0, dtype=float) - b.mean(0, dtype=float)) ** 2)
    want += np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    np.testing.assert_allclose(frechet_distance(x, y), want, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(y, x), want, rtol=1e-8)


def test_frechet_distance_of_equal_sets_is_zero_also_where_they_are_flat():
    full, thin = normal(200, 16), normal(10, 40, 1, scale=100.0)
    for x in (full, thin):
        s = statistics(x)
        assert frechet_distance(s, s) <= 1e-12 * np.trace(s.covariance)
        # Another order of the rows: equal up to rounding only.
        assert frechet_distance(s, statistics(x[::-1])) <= 1e-10 * np.trace(s.covariance)
    constant = statistics(np.ones((5, 3), np.float32))
    assert frechet_distance(constant, constant) == 0


def test_frechet_distance_of_flat_sets_in_different_directions():
    a = gaussian([0, 0], np.diag([4.0, 0.0]))
    b = gaussian([0, 0], np.diag([0.0, 9.0]))
    np.testing.assert_allclose(frechet_distance(a, b), 13, rtol=1e-12)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))
    first, second = np.split(q.T, 2)  # Two halves of a space, rounding in both.
    a = gaussian(np.zeros(30), first.T @ first)
    b = gaussian(np.zeros(30), second.T @ second)
    np.testing.assert_allclose(frechet_distance(a, b), 30, rtol=1e-12)


def test_frechet_distance_does_not_see_a_rotation():
    a, b = normal(80, 10, 0), 2 * normal(70, 10, 1) + 1
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(10, 10)))
    turned = frechet_distance(statistics(a @ q), statistics(b @ q))
    straight = frechet_distance(statistics(a.astype(float)), statistics(b.astype(float)))
    np.testing.assert_allclose(turned, straight, rtol=1e-6)


def test_statistics_in_parts_are_those_of_the_whole():
    x = normal(101, 7, shift=50.0)
    whole = statistics(x)
    parts = [x[:1], x[1:40], x[40:41], x[41:]]
    chex.assert_trees_all_close(streamed(iter(parts)), whole, rtol=1e-10)
    chex.assert_trees_all_close(
        merged(statistics(x[60:]), statistics(x[:60])), whole, rtol=1e-10
    )


def test_statistics_go_to_a_file_and_back(tmp_path):
    s = statistics(normal(20, 5))
    save(tmp_path / "a" / "s.npz", s)
    chex.assert_trees_all_close(read(tmp_path / "a" / "s.npz"), s, rtol=1e-12)
    np.savez(tmp_path / "theirs.npz", mu=s.mean, sigma=s.covariance)
    assert frechet_distance(read(tmp_path / "theirs.npz"), s) < 1e-12
    np.savez(tmp_path / "odd.npz", mu=s.mean, sigma=s.covariance[:3])
    np.savez(tmp_path / "other.npz", mu=s.mean)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name in ("odd.npz", "other.npz", "torn.npz", "nowhere.npz"):
        with pytest.raises(UserError, match=r"eval\.reference"):
            read(tmp_path / name)


def test_statistics_of_bad_features_are_refused():
    x = normal(4, 3)
    x[2, 1] = np.nan
    with pytest.raises(UserError, match="1 of 4"):
        statistics(x)
    with pytest.raises(UserError, match="2 at least"):
        streamed(iter([]))
    with pytest.raises(UserError, match="2 at least"):
        frechet_distance(statistics(normal(1, 3)), statistics(normal(5, 3)))
    with pytest.raises(UserError, match="3 and 4"):
        frechet_distance(statistics(normal(5, 3)), statistics(normal(5, 4)))


def test_kernel_distance_of_whole_sets_is_brute_force():
    x, y = normal(9, 4, 0), normal(9, 4, 1, shift=0.5)
    kernel = lambda u, v: (np.dot(u.astype(float), v.astype(float)) / 4 + 1) ** 3
    pairs = list(itertools.permutations(range(9), 2))
    want = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    want -= 2 * np.mean([kernel(u, v) for u in x for v in y])
    got = kernel_distance(x, y, np.random.default_rng(0), subsets=3)
    np.testing.assert_allclose(got, (want, 0), rtol=1e-9, atol=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    x, y = normal(400, 6, 0), normal(400, 6, 1)
    near = kernel_distance(x, y, np.random.default_rng(0), subsets=20, size=100)
    far = kernel_distance(x, y + 1, np.random.default_rng(0), subsets=20, size=100)
    assert abs(near.mean) < 3 * near.std
    assert far.mean > 10 * near.std


def test_inception_score_of_certain_and_of_ignorant_classifiers():
    certain = 1000 * np.eye(5, dtype=np.float32)[np.tile(np.arange(5), 4)]
    np.testing.assert_allclose(inception_score(certain, 2), (5, 0), atol=1e-9)
    np.testing.assert_allclose(inception_score(np.zeros((20, 5)), 4), (1, 0), atol=1e-12)
    logits = normal(30, 4).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = np.exp(np.mean([np.sum(r * np.log(r / p.mean(0))) for r in p]))
    np.testing.assert_allclose(inception_score(logits, 1).mean, want, rtol=1e-10)
    with pytest.raises(UserError, match=r"eval\.samples is 30, .* at least the 31 splits"):
        inception_score(logits, 31)


@pytest.mark.parametrize("devices", [1, 8])
def test_nearest_rows_are_those_of_brute_force(devices):
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows, queries = normal(53, 6, 0), normal(21, 6, 1)
    got = nearest(queries, rows, 3, tile=20, block=8, mesh=mesh)
    want = pairwise(queries, rows)
    order = np.argsort(want, axis=1)[:, :3]
    assert np.array_equal(got.index, order)
    np.testing.assert_allclose(got.distance, np.take_along_axis(want, order, 1), rtol=1e-5)


def test_copies_are_at_distance_zero_even_far_from_the_origin():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
    rows[30] = rows[7]
    got = nearest(rows[[7, 11, 39]], rows, 2, tile=16, block=2)
    assert got.distance[:, 0].tolist() == [0, 0, 0]
    assert got.index[:, 0].tolist() == [7, 11, 39]
    assert (got.distance[0, 1], got.index[0, 1]) == (0, 30)

    far = normal(40, 30) + 1e3 * normal(1, 30, 5)
    close = far[5:6] + np.float32(1e-3)
    got = nearest(close, far, 1, tile=16)
    assert got.index[0, 0] == 5
    np.testing.assert_allclose(got.distance, pairwise(close, far[5:6]), rtol=1e-6)


def test_neighbours_closer_than_rounding_are_told_apart():
    """|a|² is 3e7, its rounding 2; the squared distances are 0.1."""
    far = 1e3 * normal(1, 30, 5) + 0.05 * normal(40, 30)
    queries = far[:8] + 0.05 * normal(8, 30, 1)
    two = np.concatenate([far[:6], -far[6:]])  # The mean is far from all of them.
    for rows in (far, two):
        got = nearest(queries, rows, 2, tile=16)
        want = pairwise(queries, rows)
        assert np.array_equal(got.index, np.argsort(want, axis=1)[:, :2])


def test_a_row_is_not_its_own_neighbour_but_its_twin_is():
    x = normal(30, 5)
    x[9] = x[4]
    got = nearest(x, x, 2, skip_self=True, tile=7, block=4)
    want = pairwise(x, x)
    np.fill_diagonal(want, np.inf)
    order = np.argsort(want, axis=1, kind="stable")[:, :2]
    assert np.array_equal(got.index, order)
    assert (got.index[4, 0], got.index[9, 0], got.distance[4, 0]) == (9, 4, 0)


def test_too_few_rows_are_refused():
    x = normal(3, 2)
    assert nearest(x, x, 2, skip_self=True).index.shape == (3, 2)
    for wrong in (lambda: nearest(x, x, 3, skip_self=True), lambda: nearest(x, x, 4)):
        with pytest.raises(UserError, match=r"eval\.neighbours"):
            wrong()
    with pytest.raises(UserError, match="cannot be compared"):
        nearest(normal(3, 4), x)
    with pytest.raises(UserError, match=r"eval\.tile"):
        nearest(x, x, 1, tile=0)


def test_memorised_samples_are_flagged_and_fresh_ones_are_not():
    rows, held_out = normal(300, 20), normal(100, 20, 1)
    reference = nearest(rows, rows, 2, skip_self=True)
    copies = rows[:60] + 0.01 * normal(60, 20, 2)
    got = memorisation(nearest(copies, rows), reference)
    assert (got.copies, got.close) == (1.0, 1.0)
    assert got.flagged.all()
    fresh = memorisation(nearest(held_out, rows), reference)
    assert fresh.copies == 0
    assert fresh.close < 0.2
    assert fresh.median_ratio > 0.9
    both = memorisation(nearest(np.concatenate([copies, held_out]), rows))
    np.testing.assert_allclose(both.copies, 60 / 160)
    assert np.isnan(both.close)


def test_memorisation_by_hand():
    near = Nearest(
        np.array([[0, 0], [1, 2], [1, 4], [3, 3]], np.float32), np.zeros((4, 2), np.int32)
    )
    got = memorisation(near, Nearest(np.array([[2.0], [4.0]]), np.zeros((2, 1))), quantile=0.5)
    assert got.flagged.tolist() == [True, False, True, False]
    assert (got.copies, got.close, got.threshold, got.median_ratio) == (0.5, 0.75, 3.0, 0.375)
    with pytest.raises(UserError, match=r"eval\.neighbours"):
        memorisation(near._replace(distance=near.distance[:, :1]))
    with pytest.raises(UserError, match=r"eval\.memorisation\.ratio"):
        memorisation(near, ratio=1.0)


def manifold_by_brute_force(real, made, k):
    """The definitions, ball by ball."""

    def radii(x):
        return np.sort(pairwise(x, x), axis=1)[:, k]  # Column 0 is the row itself.

    inside_real = pairwise(made, real) <= radii(real)
    inside_made = pairwise(real, made) <= radii(made)
    return (
        inside_real.any(1).mean(),
        inside_made.any(1).mean(),
        inside_real.sum(1).mean() / k,
        inside_real.any(0).mean(),
    )


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [1, 4])
def test_manifolds_are_those_of_brute_force(devices, k):
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    real, made = normal(47, 3, 0), normal(38, 3, 1, scale=0.7, shift=0.4)
    got = manifold(real, made, neighbours=k, tile=20, block=8, mesh=mesh)
    want = manifold_by_brute_force(real, made, k)
    assert 0 < want[1] < 1
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_manifolds_of_equal_and_of_disjoint_sets():
    x = normal(60, 8)
    equal = manifold(x, x[::-1].copy(), neighbours=3)
    assert (equal.precision, equal.recall, equal.coverage) == (1, 1, 1)
    # Each row is in its own ball and in those of all whose third neighbour is farther.
    assert equal.density > 1
    assert tuple(manifold(x, x + 100, neighbours=3)) == (0, 0, 0, 0)
    with pytest.raises(UserError, match=r"eval\.neighbours"):
        manifold(x[:3], x, neighbours=3)


def test_balls_of_radius_zero_hold_their_own_row():
    x = np.repeat(normal(5, 8, scale=30.0), 4, axis=0)
    got = manifold(x, x, neighbours=3)
    assert (got.precision, got.recall, got.coverage) == (1, 1, 1)

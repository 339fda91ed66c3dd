"""The streaming posterior against brute force in float64: tiles, devices, types, extremes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion.rows
from common import mesh as meshes
from common.errors import UserError
from diffusion import draws
from diffusion.optimal_denoiser import optimal_denoiser
from diffusion.posterior import Queries, accumulate, finish, nothing
from diffusion.rows import Rows, fetch, fold, rows
from tests.diffusion.digits import brute, digits, noise

KEY = jax.random.key(3)
LEVELS = [0.002, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 5.0, 20.0, 80.0]


def small(n=300, d=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_digits_equal_brute_force_at_twelve_levels():
    """Draw by draw, and the mean, in float64: at every level, however small its values."""
    with jax.enable_x64(True):
        part = draws.block(0, 64, 1797, seed=1)
        eps = noise(KEY, part.number, 64)
        found = draws.exact(rows(digits(), tile=500), part, KEY, jnp.asarray(LEVELS))
        for i, s in enumerate(LEVELS):
            want = brute(digits(), part.index, eps, s)
            # Single draws: the reference takes the difference of two sums of its size.
            np.testing.assert_allclose(found.trcov[i], want, rtol=1e-6, atol=1e-13)
            got = np.asarray(found.trcov[i]).mean()
            np.testing.assert_allclose(got, want.mean(), rtol=1e-6)
            for form in ("residual", "paired"):
                want = brute(digits(), part.index, eps, s, form)
                got = getattr(found, form)[i]
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("levels", [[0.7], [0.4, 0.7, 3.0]], ids=["alone", "together"])
@pytest.mark.parametrize("tile", [7, 300, 1000])
def test_tiles_and_shared_products_change_nothing(levels, tile):
    with jax.enable_x64(True):
        y = small()
        part = draws.block(0, 20, len(y), seed=0)
        eps = noise(KEY, part.number, y.shape[1])
        found = draws.exact(rows(y, tile=tile), part, KEY, jnp.asarray(levels))
        for i, s in enumerate(levels):
            want = brute(y, part.index, eps, s)
            np.testing.assert_allclose(found.trcov[i], want, rtol=1e-10, atol=1e-13)
            away = ((y[part.index] + s * eps)[:, None] - y) ** 2
            p = np.exp(-away.sum(-1) / (2 * s**2))
            p /= p.sum(1, keepdims=True)
            np.testing.assert_allclose(found.ess[i], 1 / (p**2).sum(1), rtol=1e-9)
            own = p[np.arange(20), part.index]
            np.testing.assert_allclose(found.p_self[i], own, rtol=1e-9)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("tile", [16, 64])
def test_devices_share_the_rows(devices, tile):
    """300 rows: neither tiles nor devices divide them."""
    y, part = small().astype(np.float32), draws.block(0, 24, 300, seed=0)
    levels = jnp.asarray([0.5, 1.0, 4.0])
    want = draws.exact(rows(y, tile=tile), part, KEY, levels)
    mesh = meshes.make(data=devices)
    with jax.set_mesh(mesh):
        got = draws.exact(rows(y, tile=tile, mesh=mesh), part, KEY, levels)
    for a, b in zip(jax.device_get(got), jax.device_get(want), strict=True):
        # "paired" is a difference of numbers of the largest one's size.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_no_program_is_made_twice():
    y = small(64, 5).astype(np.float32)
    data = rows(y, tile=16)
    before = draws.exact._cache_size()
    for seed, s in ((0, 0.3), (1, 0.9)):
        part = draws.block(seed, 8, 64, seed)
        draws.exact(data, part, jax.random.key(seed), jnp.asarray([s]))
    assert draws.exact._cache_size() == before + 1
    few = draws.by_subset._cache_size()
    for c in (2.0, 3.0):
        part = draws.block(0, 8, 64, 0, subset=16)
        draws.by_subset(data, part, KEY, jnp.asarray([0.5]), "constant", c)
    assert draws.by_subset._cache_size() == few + 1


def test_stored_types_mean_the_same_numbers():
    y = np.random.default_rng(0).integers(0, 256, (90, 10)).astype(np.uint8)
    part = draws.block(0, 16, 90, 0)
    levels = jnp.asarray([0.3, 1.0])
    as_float = rows(y / 127.5 - 1, tile=32)
    as_bytes = rows(y, tile=32, scale=1 / 127.5, offset=-1.0)
    assert as_bytes.tiles.dtype == jnp.uint8
    a, b = (draws.exact(d, part, KEY, levels) for d in (as_float, as_bytes))
    np.testing.assert_allclose(a.trcov, b.trcov, rtol=1e-4, atol=1e-6)
    index = jnp.asarray(part.index)
    np.testing.assert_allclose(fetch(as_float, index), fetch(as_bytes, index), atol=1e-6)


def test_bfloat16_means_the_numbers_it_holds():
    """Stored as bits."""
    y = small(90, 10).astype(jnp.bfloat16)
    part, levels = draws.block(0, 16, 90, 0), jnp.asarray([0.3, 1.0])
    short, wide = rows(y, tile=32), rows(y.astype(np.float32), tile=32)
    a, b = (draws.exact(d, part, KEY, levels) for d in (wide, short))
    np.testing.assert_allclose(a.trcov, b.trcov, rtol=1e-4, atol=1e-6)
    index = jnp.arange(90)
    want = y.astype(np.float32) - np.asarray(short.mean)
    np.testing.assert_allclose(fetch(short, index), want, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 8, 16])
def test_a_fold_sees_every_row_once(size, monkeypatch):
    """Neither pieces nor tiles divide the rows."""
    y = np.float32(small(45, 3))
    data = rows(y, tile=16, labels=np.arange(45) % 4)
    monkeypatch.setattr(diffusion.rows, "_piece", lambda tile, dim: size)

    def add(carry, part, square, index, label):
        assert len(part) <= size
        np.testing.assert_allclose(square, jnp.sum(part**2, -1), rtol=1e-5)
        seen, total = carry
        at = jnp.where(index >= 0, index, 45)
        counted = jnp.where(index[:, None] >= 0, part, 0) * (label[:, None] + 1)
        return seen.at[at].add(1, mode="drop"), total + counted.sum(0)

    with jax.disable_jit():
        seen, total = fold(add, (jnp.zeros(45, int), jnp.zeros(3)), data)
    np.testing.assert_array_equal(seen, 1)
    want = ((y - y.mean(0)) * (np.arange(45) % 4 + 1)[:, None]).sum(0)
    np.testing.assert_allclose(total, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stored", "levels"), [("float32", 1), ("uint8", 3), ("uint16", 1)])
def test_a_pass_needs_little_memory_whatever_the_number_of_rows(stored, levels):
    """At most 3 (block x tile + block x D) floats beside the sums of several levels."""
    block, tile, dim = 256, 4096, 3072
    array = jax.ShapeDtypeStruct
    one, whole = array((), jnp.float32), lambda shape: array(shape, jnp.int32)
    part = jax.eval_shape(lambda: draws.block(0, block, 4, seed=0))
    found = []
    for k in (3, 12):
        data = Rows(
            tiles=array((k, tile, dim), stored),
            square=array((k, tile), jnp.float32),
            index=whole((k, tile)),
            label=whole((k, tile)),
            mean=array((dim,), jnp.float32),
            scale=one,
            offset=one,
            count=whole(()),
        )
        some = array((levels,), jnp.float32)
        program = draws.exact.lower(data, part, KEY, some).compile()
        found.append(program.memory_analysis().temp_size_in_bytes)
    sums = 4 * levels * block * dim if levels > 1 else 0
    assert found[1] == found[0]
    assert found[0] - sums <= 3 * 4 * block * (tile + dim)


def large(dim, batch, levels):
    """A block of `batch` draws of images of `dim` numbers, as shapes: rows, levels, draws."""
    array, word = jax.ShapeDtypeStruct, jnp.int32
    one = array((), jnp.float32)
    data = Rows(
        tiles=array((2, 1024, dim), jnp.float32),
        square=array((2, 1024), jnp.float32),
        index=array((2, 1024), word),
        label=array((2, 1024), word),
        mean=array((dim,), jnp.float32),
        scale=one,
        offset=one,
        count=array((), word),
    )
    part = jax.eval_shape(lambda: draws.block(0, batch, 512, seed=0, subset=256))
    return data, array((levels,), jnp.float32), part


@pytest.mark.parametrize(
    ("rule", "most"), [("exact", 2.5), ("tapered", 2.5), ("snis", 2.5), ("knn", 6.5)]
)
def test_many_levels_of_large_images_are_not_held_at_once(rule, most):
    """256 x 256 x 3 at the defaults: sums of all levels are 12.9 GB."""
    data, levels, part = large(256 * 256 * 3, 256, 64)
    if rule == "exact":
        lowered = draws.exact.lower(data, part, KEY, levels)
    else:
        near = jax.ShapeDtypeStruct((2048, 16), jnp.int32) if rule == "knn" else None
        lowered = draws.by_subset.lower(data, part, KEY, levels, rule, 1.0, near)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < most * 2**30


def test_levels_of_small_images_go_together():
    """CIFAR at the paper's block of 1,024, and what is smaller: not one loop more."""
    for dim, batch in ((64, 256), (3072, 500), (3072, 1024)):
        assert draws.group_size(64, batch, dim, "float32") == 64
        data, levels, part = large(dim, batch, 64)
        found = jax.make_jaxpr(draws.exact)(data, part, KEY, levels)
        assert f"f32[64,{batch},{dim}]" in str(found)


@pytest.mark.parametrize("fits", [1, 2, 3, 6, 7, 8, 100])
def test_groups_are_even_and_hold_all_levels(fits, monkeypatch):
    monkeypatch.setattr(draws, "HELD", fits * 10 * 5 * 4)
    size = draws.group_size(7, 10, 5, "float32")
    assert size <= fits
    assert -(-7 // size) == -(-7 // fits)
    levels = np.arange(1.0, 8.0, dtype=np.float32)
    found = np.asarray(draws.groups(jnp.asarray(levels), size))
    assert found.shape == (-(-7 // size), size)
    np.testing.assert_array_equal(found.ravel()[:7], levels)
    np.testing.assert_array_equal(found.ravel()[7:], 7)
    assert draws.group_size(7, 10, 6000, "float32") == 1


@pytest.fixture
def in_groups(monkeypatch):
    """Makes programs that hold a few bytes."""

    def limit(size):
        monkeypatch.setattr(draws, "HELD", size)
        draws.exact.clear_cache()
        draws.by_subset.clear_cache()

    yield limit
    limit(2**30)


@pytest.mark.parametrize("fits", [1, 5])
def test_levels_in_groups_are_those_of_brute_force(fits, in_groups):
    """Twelve levels, one by one and in groups of four, in float64."""
    in_groups(fits * 24 * 12 * 8)
    with jax.enable_x64(True):
        y, part = small(), draws.block(0, 24, 300, seed=1)
        eps = noise(KEY, part.number, 12)
        found = draws.exact(rows(y, tile=64), part, KEY, jnp.asarray(LEVELS))
        for i, s in enumerate(LEVELS):
            for form in ("trcov", "residual"):
                want = brute(y, part.index, eps, s, form)
                got = getattr(found, form)[i]
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rule", ["exact", "tapered", "knn"])
def test_levels_in_groups_are_all_levels(rule, devices, in_groups):
    """Seven, in groups of three: the last is filled up."""
    y, part = np.float32(small()), draws.block(0, 24, 300, seed=0, subset=60)
    levels = jnp.asarray([0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 40.0])
    mesh = meshes.make(data=devices)
    with jax.set_mesh(mesh):
        data = rows(y, tile=16, mesh=mesh if devices > 1 else None)
        near = jnp.argsort(jnp.sum((y[:, None] - y[None]) ** 2, -1), 1)[:, 1:9]
        near = near.astype(jnp.int32)

        def found():
            if rule == "exact":
                return draws.exact(data, part, KEY, levels)
            given = near if rule == "knn" else None
            return draws.by_subset(data, part, KEY, levels, rule, 1.0, given)

        want = jax.device_get(found())
        # Of subsets each device has a share of the draws.
        in_groups(3 * 24 * 12 * 4 // (1 if rule == "exact" else devices))
        got = jax.device_get(found())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == (7, 24)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_copies_of_a_row_share_its_weight():
    y = small(40, 6)
    y[7] = y[3]
    data = rows(np.float32(y), tile=8)
    part = draws.block(0, 40, 40, 0)
    found = draws.exact(data, part, KEY, jnp.asarray([1e-3, 1e-2]))
    own = np.asarray(found.p_self)
    twice = np.isin(part.index, (3, 7))
    np.testing.assert_allclose(own[:, twice], 0.5)
    np.testing.assert_array_equal(own[:, ~twice], 1)
    # A copy is at no distance: nothing is lost.
    np.testing.assert_array_equal(found.trcov, 0)


def by_differences(y, index, eps, s):
    """trcov of each draw, in float64, from differences of rows alone."""
    found = []
    for i, e in zip(index, eps, strict=True):
        apart = np.float64(y) - np.float64(y[i])
        distance = (apart**2).sum(1)
        logit = -distance / (2 * s**2) + apart @ e / s
        p = np.exp(logit - logit.max())
        p /= p.sum()
        found.append(p @ distance - ((p @ apart) ** 2).sum())
    return np.array(found)


def clusters(rng):
    """Two tight ones, far apart."""
    side = np.repeat([5.0, -5.0], 20)[:, None]
    return np.float32(side + 0.005 * rng.normal(size=(40, 12)))


def nearly_equal(rng):
    """Images; every second differs from the one before in 8 pixels by one level of grey."""
    y = rng.integers(0, 255, (40, 3072))
    y[1::2] = y[::2]
    for row in y[1::2]:
        row[rng.choice(3072, 8, replace=False)] += 1
    return np.float32(y / 127.5 - 1)


def pairs(rng):
    y = np.float32(rng.uniform(-1, 1, (40, 3072)))
    y[1::2] = y[::2]
    return y


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    ("made", "s"),
    [(clusters, 0.02), (nearly_equal, 0.011), (pairs, 0.002), (pairs, 0.02)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_rows_that_nearly_coincide_are_told_apart_in_float32(made, s, levels):
    """One level or several; uncentred rows are much larger than their distances."""
    y = made(np.random.default_rng(0))
    part = draws.block(0, 40, 40, 0)
    eps = noise(KEY, part.number, y.shape[1])
    found = draws.exact(rows(y, tile=16), part, KEY, jnp.asarray([s, 2 * s][:levels]))
    want = by_differences(y, part.index, eps, s)
    np.testing.assert_allclose(found.trcov[0], want, rtol=2e-3, atol=1e-9)
    if made is pairs:
        np.testing.assert_array_equal(want, 0)
        np.testing.assert_allclose(found.p_self, 0.5, rtol=1e-6)


@pytest.mark.parametrize("s", [1e-300, 1e-30, 1e-22, 1e-19, 1e-15, 1e15, 1e19, 1e38])
def test_noise_of_any_size_has_its_limit(s):
    """Nothing is lost, or the variance; no level is NaN."""
    y = small(12, 5)
    y[7] = y[3]
    data, part = rows(np.float32(y)), draws.block(0, 12, 12, 0)
    limit = 0 if s < 1 else float(np.sum(data.square)) / 12
    for levels in ([s], [s, 2 * s]):
        found = draws.exact(data, part, KEY, jnp.asarray(levels, jnp.float32))
        assert all(np.isfinite(v).all() for v in found)
        np.testing.assert_allclose(found.trcov.mean(-1), limit, rtol=1e-5)
    denoised = optimal_denoiser(data)(jnp.float32(y), s)
    mean = y.mean(0) if s > 1 else y
    np.testing.assert_allclose(denoised, mean + 0 * y, atol=1e-5)


def test_rows_whose_squares_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="too large"):
        rows(np.full((2, 3), 1e19, np.float32) * np.array([[1], [-1]], np.float32))


def test_a_class_without_rows_has_no_denoiser():
    data = rows(np.float32(small(6, 3)), labels=np.array([0, 0, 1, 1, 3, 3]))
    optimal_denoiser(data, jnp.array([0, 3, -1]))
    with pytest.raises(UserError, match="class 2"):
        optimal_denoiser(data, jnp.array([0, 2]))


def test_subsets_and_orders_have_streams_of_their_own():
    """A subset of all rows in the order of its stream would be the order of an epoch."""
    order = draws.common_data.indices(1, 50, 50, seed=3)
    first = np.random.default_rng((3, 0, draws.SUBSETS)).permutation(50)
    assert (order != first).any()
    chosen = [draws.block(i, 4, 50, 3, subset=25).subset for i in range(2)]
    assert len(np.setdiff1d(*chosen)) > 0
    assert len(np.setdiff1d(chosen[0], order[:25])) > 0


def test_one_row_and_equal_rows_lose_nothing():
    for n in (1, 5):
        y = np.ones((n, 4), np.float32)
        found = draws.exact(rows(y), draws.block(0, 4, n, 0), KEY, jnp.asarray([0.1, 10.0]))
        np.testing.assert_allclose(found.trcov, 0, atol=1e-7)
        np.testing.assert_allclose(found.residual, 0, atol=1e-7)


def test_sums_of_parts_merge_to_the_sums_of_the_whole():
    from diffusion.posterior import merged

    with jax.enable_x64(True):
        y = small()
        whole = rows(y, tile=50)
        x0 = fetch(whole, jnp.arange(5))
        eps = jnp.asarray(noise(KEY, range(5), 12))
        queries = Queries(x0, eps, jnp.arange(5), jnp.full(5, -1))
        s = jnp.asarray([0.3, 2.0])
        want = accumulate(nothing(2, queries), whole, queries, s)
        cut = [
            rows(y[a:b], tile=50, mean=np.asarray(whole.mean), start=a)
            for a, b in ((0, 90), (90, 300))
        ]
        parts = [accumulate(nothing(2, queries), c, queries, s) for c in cut]
        together = merged(jax.tree.map(lambda *a: jnp.stack(a), *parts))
        one_after_the_other = accumulate(parts[0], cut[1], queries, s)
        for sums in (together, one_after_the_other):
            got = finish(sums, queries, whole.mean)
            ref = finish(want, queries, whole.mean)
            for a, b in zip(got, ref, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_two_points_have_the_denoiser_tanh():
    """a tanh(a x / s^2), check 1 of section 11."""
    data = rows(np.array([[0.7], [-0.7]], np.float32))
    x = jnp.linspace(-3, 3, 41)[:, None]
    for s in (0.2, 0.5, 1.0, 3.0):
        got = optimal_denoiser(data)(x, s)
        np.testing.assert_allclose(got, 0.7 * np.tanh(0.7 * x / s**2), atol=1e-6)


def test_the_denoiser_takes_images_levels_and_classes():
    with jax.enable_x64(True):
        y = small(60, 8).reshape(60, 2, 2, 2)
        labels = np.arange(60) % 3
        x = jnp.asarray(small(6, 8, seed=1).reshape(6, 2, 2, 2))
        s = np.array([0.3, 0.5, 1.0, 2.0, 0.7, 0.4])
        wanted = np.array([0, 1, 2, -1, 0, -1], np.int32)
        got = optimal_denoiser(rows(y, labels=labels, tile=17), jnp.asarray(wanted))(x, s)
        for i in range(6):
            chosen = y[(labels == wanted[i]) | (wanted[i] < 0)]
            logit = -((x[i] - chosen) ** 2).sum((1, 2, 3)) / (2 * s[i] ** 2)
            p = np.exp(logit - logit.max())
            want = np.einsum("n,nhwc->hwc", p / p.sum(), chosen)
            np.testing.assert_allclose(got[i], want, rtol=1e-9, atol=1e-12)


def test_antithetic_draws_come_in_pairs():
    part = draws.block(3, 8, 50, 0, antithetic=True)
    np.testing.assert_array_equal(part.index[::2], part.index[1::2])
    np.testing.assert_array_equal(part.number[::2], part.number[1::2])
    np.testing.assert_array_equal(part.sign, [1, -1] * 4)
    with pytest.raises(UserError, match="block"):
        draws.block(0, 7, 50, 0, antithetic=True)


def test_blocks_go_through_whole_permutations():
    seen = np.concatenate([draws.block(i, 25, 50, 4).index for i in range(4)])
    np.testing.assert_array_equal(np.bincount(seen), 2)
    numbers = np.concatenate([draws.block(i, 25, 50, 4).number for i in range(4)])
    np.testing.assert_array_equal(numbers, np.arange(100))


@pytest.mark.parametrize(
    ("data", "given", "named"),
    [
        (np.zeros((0, 3)), {}, "without zeros"),
        (np.zeros(4), {}, "without zeros"),
        (np.zeros((4, 0)), {}, "without zeros"),
        (np.zeros((4, 3), np.uint8), {}, "data.scale"),
        (np.array([[0.0], [np.nan], [np.inf]]), {}, "2 rows .* row 1 first"),
        (np.zeros((4, 3), complex), {}, "real numbers"),
        (np.array([["a"]]), {}, "real numbers"),
        (np.zeros((4, 3)), dict(labels=np.array([0, 1])), "data.labels"),
        (np.zeros((2, 3)), dict(labels=np.array([0, -1])), "1 of 2 rows"),
    ],
)
def test_data_that_cannot_be_are_named(data, given, named):
    with pytest.raises(UserError, match=named):
        rows(data, **given)


def test_float16_is_promoted():
    with pytest.warns(UserWarning, match="float16"):
        data = rows(np.ones((3, 2), np.float16))
    assert data.tiles.dtype == data.square.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.skipif("TENFOLD_DATA" not in os.environ, reason="needs the folder of images/")
def test_cifar_keeps_four_digits_in_float32():
    """Check 8 on the first 4,000 images: s = 2 to 80, identical draws."""
    from diffusion.images import load, scaled

    path = f"{os.environ['TENFOLD_DATA']}/images/cifar10_train_first4000.npz"
    y = np.asarray(scaled(load(path, scaling="x/127.5-1").rows)).reshape(4000, -1)
    levels = [2.0, 3.5, 6.0, 20.0, 80.0]
    parts = [draws.block(i, 512, 4000, 0) for i in range(2)]
    means = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            data = rows(y.astype(np.float64) if x64 else y)
            s = jnp.asarray(levels, data.square.dtype)
            # The same noise: float32 numbers in either precision.
            found = []
            for part in parts:
                with jax.enable_x64(False):
                    x0 = fetch(rows(y), jnp.asarray(part.index))
                    eps = np.asarray(draws.queries(part, KEY, x0).eps)
                x0 = fetch(data, jnp.asarray(part.index))
                some = Queries(
                    x0, jnp.asarray(eps, x0.dtype), jnp.asarray(part.index), jnp.full(512, -1)
                )
                sums = accumulate(nothing(len(levels), some), data, some, s)
                found.append(np.float64(finish(sums, some, data.mean).trcov))
            means.append(np.concatenate(found, 1).mean(1))
    np.testing.assert_allclose(means[0], means[1], rtol=1e-4)
    assert means[0][-1] == pytest.approx(means[1][-1], rel=1e-5)
    np.testing.assert_allclose(means[1][1] / 3072, 0.0054, rtol=0.5)
    np.testing.assert_allclose(means[1][3] / 3072, 0.2124, rtol=0.05)

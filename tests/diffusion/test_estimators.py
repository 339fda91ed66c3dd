"""Estimators of J*: the numeric checks of section 11 of the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from diffusion import block_means, draws, plans
from diffusion.estimators import estimate_optimal_loss
from diffusion.plans import FORMS
from diffusion.rows import rows, within_classes
from diffusion.stratification import nearest_neighbours
from tests.diffusion.digits import brute, digits, noise

KEY = jax.random.key(11)
TABLE = {
    0.3: (0.0078, 0.0007),
    0.4: (0.083, 0.002),
    0.5: (0.320, 0.006),
    0.6: (0.803, 0.008),
    0.8: (2.51, 0.02),
    1.0: (4.80, 0.02),
    1.5: (9.90, 0.03),
    2.0: (13.08, 0.03),
    3.0: (16.01, 0.02),
    5.0: (17.737, 0.009),
    10.0: (18.512, 0.004),
    20.0: (18.709, 0.002),
    80.0: (18.7696, 0.0004),
}


DRAWS = 4 * 1797


@pytest.fixture(scope="module")
def curve():
    """Digits, exact, at all levels that the tests compare others with."""
    return estimate("exact", sorted([0.05, 0.1, 2.5, *TABLE]))


def estimate(estimator, levels, draws=DRAWS, **given):
    return estimate_optimal_loss(
        digits(), levels, KEY, num_draws=draws, estimator=estimator, **given
    )


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "given",
    [
        dict(estimator="exact"),
        dict(estimator="corrected", neighbours=8, subset_size=64, exact_draws=256),
    ],
    ids=lambda given: given["estimator"],
)
def test_levels_in_groups_make_the_same_curve(given, devices, monkeypatch):
    """13 levels in groups of five; blocks of the corrected one have 16 draws, shared where
    they are the cheap ones."""
    mesh = meshes.make(data=devices) if devices > 1 else None
    made = lambda: estimate_optimal_loss(
        digits(), sorted(TABLE), KEY, num_draws=512, block=64, mesh=mesh, **given
    )
    size = 64 if given["estimator"] == "exact" else 16 // devices
    programs = (draws.exact, draws.by_subset, plans._measured)
    with jax.enable_x64(True):
        want = made()
        monkeypatch.setattr(draws, "HELD", 5 * size * 64 * 8)
        [program.clear_cache() for program in programs]
        got = made()
        [program.clear_cache() for program in programs]
    for name in ("value", "stderr", "lower", "upper", "ess"):
        a, b = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def at(curve, levels):
    """Value and standard error there."""
    where = [int(np.flatnonzero(curve.sigmas == s)[0]) for s in levels]
    return curve.value[where], curve.stderr[where]


def test_two_points_have_the_published_loss():
    """Check 1: a^2 E sech^2(a (a + s Z) / s^2)."""
    want = [3.5228e-4, 0.11612605, 0.32093727, 0.46465865]
    got = estimate_optimal_loss(
        np.array([[0.7], [-0.7]]), [0.2, 0.5, 1, 3], KEY, num_draws=200_000, block=50_000
    )
    assert (np.abs(got.value - want) <= 3 * got.stderr).all()
    assert (got.stderr < 0.1 * np.array(want)).all()


def test_digits_have_the_published_curve(curve):
    """Check 2, and parts of 3."""
    want, error = np.array(list(TABLE.values())).T
    value, stderr = at(curve, TABLE)
    assert (np.abs(value - want) <= 3 * np.hypot(error, stderr)).all()
    assert curve.value[0] < 1e-15
    assert curve.value[1] < 1e-5
    assert (np.diff(curve.value) > -2 * curve.stderr[1:]).all()
    assert float(curve.variance) == pytest.approx(18.773105, rel=1e-6)
    rest = (float(curve.variance) - curve.value[-2]) * 400
    assert rest == pytest.approx(25, abs=5)


def test_forms_have_one_mean_and_trcov_the_least_spread():
    """Check 5."""
    levels = [0.3, 0.5, 1.0, 2.0, 8.0]
    found = {
        form: estimate_optimal_loss(digits(), levels, KEY, num_draws=2 * 1797, form=form)
        for form in FORMS
    }
    base = found["trcov"]
    for form in FORMS:
        other = found[form]
        bar = 3 * np.hypot(base.stderr, other.stderr)
        assert (np.abs(base.value - other.value) <= bar).all(), form
        assert (base.stderr <= other.stderr).all(), form
    assert found["unpaired"].stderr[1] >= 4 * base.stderr[1]


@pytest.mark.parametrize("s", [0.1, 1.0, 2.0, 4.0])
def test_a_gaussian_sample_is_near_its_population(s):
    """Check 6: below it at small noise, where the rows are known apart."""
    lam = np.array([4, 1, 0.25])
    y = np.random.default_rng(0).normal(size=(20_000, 3)) * np.sqrt(lam)
    got = estimate_optimal_loss(np.float32(y), [s], KEY, num_draws=4000, block=1000)
    want = np.sum(lam * s**2 / (lam + s**2))
    if s == 0.1:
        assert got.value[0] < want
    else:
        assert got.value[0] == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    ("x64", "rules"),
    [(False, ["constant", "knn"]), (True, ["ht", "tapered", "snis", "knn"])],
)
def test_a_subset_of_all_rows_is_exact(x64, rules):
    """Check 7, first part: L = N, C = 1."""
    with jax.enable_x64(x64):
        y = digits()[:500]
        data = rows(y, tile=128)
        part = draws.block(0, 16, len(y), 0, subset=len(y))
        s = jnp.asarray([0.3, 0.6, 2.0], data.square.dtype)
        want = draws.exact(data, part, KEY, s)
        near = nearest_neighbours(data, 20)
        for rule in rules:
            got = draws.by_subset(data, part, KEY, s, rule, 1.0, near)
            for found in got:
                bar = 1e-10 if x64 else 1e-5
                for name in ("trcov", "residual"):
                    a, b = getattr(found, name), getattr(want, name)
                    np.testing.assert_allclose(a, b, rtol=bar, atol=bar * np.abs(b).max())


def test_subsets_bracket_the_optimum(curve):
    """Check 7: E DOL_16 < DOL_64 < DOL_256 < J* < SNIS residual."""
    levels = [0.6, 1.0]
    exact, _ = at(curve, levels)
    low = [estimate("dol", levels, subset_size=size) for size in (16, 64, 256)]
    high = estimate("snis", levels, subset_size=256, form="residual")
    ladder = np.stack([*(c.value for c in low), exact, high.value])
    assert (np.diff(ladder, axis=0) > 0).all()
    ratio = low[-1].value / exact
    assert 0.25 < ratio[0] < 0.36
    assert high.value[0] / exact[0] > 6
    np.testing.assert_allclose(low[-1].lower, low[-1].value, rtol=0.05)
    np.testing.assert_allclose(high.upper, high.value)
    assert (low[-1].upper > exact).all()


def test_the_papers_rule_has_the_measured_bias(curve):
    """Check 7: cDOL, 4 N / L, paired, L = 256."""
    levels = [0.6, 1.0, 1.5, 2.5]
    exact, _ = at(curve, levels)
    got = estimate("cdol", levels, form="paired", c_rule="paper", subset_size=256)
    low, high = np.array([(0.70, 0.88), (0.93, 1.03), (0.94, 1.0), (0.94, 1.0)]).T
    ratio = got.value / exact
    assert ((ratio >= low) & (ratio <= high)).all(), ratio


def test_neighbours_mend_the_small_noise(curve):
    """Check 7: K = 128, L = 256, s = 0.4."""
    exact, _ = at(curve, [0.4])
    got = estimate("knn", [0.4], subset_size=256, neighbours=128)
    assert got.value[0] / exact[0] > 0.85
    plain = estimate("cdol", [0.4, 1.0], subset_size=256)  # A program that there is.
    assert plain.value[0] < 0.8 * got.value[0]


@pytest.mark.parametrize("neighbours", [0, 32])
def test_the_corrected_estimator_is_right_where_its_parts_are_not(curve, neighbours):
    levels = [0.6, 1.0, 1.5, 2.5]
    exact, error = at(curve, levels)
    got = estimate(
        "corrected", levels, subset_size=256, neighbours=neighbours, exact_draws=1797
    )
    assert (np.abs(got.value - exact) <= 3 * np.hypot(error, got.stderr)).all()
    # The many cheap draws are worth something: a quarter of the exact ones would err by twice
    # the error of all.
    assert (got.stderr[1:] < 2 * error[1:]).all()


def test_float32_keeps_four_digits():
    """Check 8, the digits: identical draws against brute force in float64."""
    data = rows(np.float32(digits()))
    part = draws.block(0, 128, 1797, 0)
    eps = noise(KEY, part.number, 64)
    for levels in ([0.3, 0.5, 1.0, 5.0, 80.0], [0.3], [1.0], [80.0]):
        found = draws.exact(data, part, KEY, jnp.asarray(levels))
        assert (np.asarray(found.trcov) >= 0).all()
        for i, s in enumerate(levels):
            want = brute(digits(), part.index, eps, s).mean()
            bar = 1e-5 if s == 80 else 1e-4
            assert np.mean(np.float64(found.trcov[i])) == pytest.approx(want, rel=bar), s


@pytest.mark.parametrize("estimator", ["cdol", "knn", "corrected"])
def test_eight_devices_equal_one(estimator):
    """Check 9: 1797 rows on 8 devices. Exact sums below."""
    given = dict(subset_size=64, neighbours=0 if estimator == "cdol" else 8, block=32)
    given |= dict(num_draws=256, exact_draws=256, estimator=estimator, tile=128)
    levels = [0.5, 1.0, 3.0]
    one = estimate_optimal_loss(digits(), levels, KEY, **given)
    eight = estimate_optimal_loss(digits(), levels, KEY, mesh=meshes.make(), **given)
    np.testing.assert_allclose(eight.value, one.value, rtol=1e-5)
    np.testing.assert_allclose(eight.stderr, one.stderr, rtol=1e-3)
    np.testing.assert_allclose(eight.upper, one.upper, rtol=1e-5)


TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(64, 64)))[0]


def turned(y):
    return y @ TURN


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("change", "factor", "bar"),
    [
        (lambda y: y + 100, 1.0, 1e-3),
        (turned, 1.0, 1e-5),
        (lambda y: 3 * y, 3.0, 1e-5),
        (lambda y: 0.25 * y, 0.25, 1e-5),
    ],
    ids=["shift", "turn", "scale", "alpha and sigma"],
)
def test_what_changes_nothing(x64, change, factor, bar, monkeypatch):
    """Check 10: J*(c Y, c s) = c^2 J*(Y, s). A turn turns the noise of the draws, too."""
    with jax.enable_x64(x64):
        s = np.array([0.5, 1.2, 4.0])
        given = dict(num_draws=512)
        want = estimate_optimal_loss(digits(), s, KEY, **given)
        if change is turned:
            drawn = draws.queries

            def and_noise(part, key, x0):
                found = drawn(part, key, x0)
                return found._replace(eps=found.eps @ jnp.asarray(TURN, x0.dtype))

            monkeypatch.setattr(draws, "queries", and_noise)
            jax.clear_caches()
        got = estimate_optimal_loss(change(digits()), factor * s, KEY, **given)
        if change is turned:
            jax.clear_caches()
        bar = 1e-9 if x64 else bar
        np.testing.assert_allclose(got.value, factor**2 * want.value, rtol=bar)


def test_classes_lower_the_optimum(curve):
    """Fact 7, and a mean over classes by hand."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    levels = [0.8, 1.5]
    got = estimate("exact", levels, labels=labels, tile=64)
    assert (got.value < at(curve, levels)[0]).all()
    by_hand = 0.0
    for c in range(10):
        part = digits()[labels == c]
        # Tiles of 64: three in every class, for which there is one program.
        one = estimate_optimal_loss(part, levels, KEY, num_draws=4 * len(part), tile=64)
        by_hand = by_hand + one.value * len(part) / 1797
    np.testing.assert_allclose(got.value, by_hand, rtol=0.02)


def test_more_rows_repeat_the_identity_of_frequencies():
    """Fact 9: a set written twice is the same set."""
    levels = [0.4, 1.0]
    twice = np.concatenate([digits()[:200], digits()[:200]])
    a = estimate_optimal_loss(digits()[:200], levels, KEY, num_draws=8000)
    b = estimate_optimal_loss(twice, levels, KEY, num_draws=8000)
    assert (np.abs(a.value - b.value) <= 3 * np.hypot(a.stderr, b.stderr)).all()


def test_devices_and_rows_that_stay_on_the_host_have_the_same_curve():
    given = dict(num_draws=512, tile=128)
    levels = [0.5, 1.0, 3.0]
    want = estimate_optimal_loss(digits(), levels, KEY, **given)
    for change in (dict(mesh=meshes.make()), dict(chunk=700)):
        got = estimate_optimal_loss(digits(), levels, KEY, **given, **change)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)
    both = estimate_optimal_loss(digits(), levels, KEY, chunk=700, mesh=meshes.make(), **given)
    np.testing.assert_allclose(both.value, want.value, rtol=2e-5)
    np.testing.assert_allclose(both.stderr, want.stderr, rtol=1e-3)


@pytest.mark.parametrize("neighbours", [0, 16])
def test_error_bars_of_corrected_hold_the_value(neighbours):
    """Default draws and blocks, 40 times: two standard errors hold 95 % of a normal law.

    Below 0.4 a few draws in a thousand are all of J*, and no error bar knows what it missed.
    """
    y, levels = np.float32(digits()[:300]), [0.4, 0.6, 1.0, 3.0, 80.0]
    truth = estimate_optimal_loss(y, levels, jax.random.key(999), num_draws=60_000, block=1500)
    found = [
        estimate_optimal_loss(
            y,
            levels,
            jax.random.key(i),
            estimator="corrected",
            num_draws=1024,
            subset_size=64,
            neighbours=neighbours,
        )
        for i in range(40)
    ]
    value, error = (np.stack([getattr(f, n) for f in found]) for n in ("value", "stderr"))
    held = np.abs(value - truth.value) <= 2 * np.hypot(error, truth.stderr)
    assert held.mean() > 0.9
    assert (held.mean(0) >= 0.85).all()
    # Nor are they wide for nothing.
    wide = np.median(error, 0)[1:] / value.std(0)[1:]
    assert (wide < 2).all()


def test_few_exact_blocks_are_not_mended():
    """As early in a run: the exact ones stand alone, with Student's factor."""
    rng = np.random.default_rng(0)
    truth, base, many = (rng.normal(size=(n, 3)) for n in (3, 3, 40))
    value, error = block_means._controlled(truth, base, many)
    np.testing.assert_allclose(value, truth.mean(0))
    assert block_means.wider(2) == pytest.approx(4.5265 / 2, rel=1e-3)
    want = block_means.wider(2) * truth.std(0, ddof=1) / 3**0.5
    np.testing.assert_allclose(error, want)


def test_the_variance_of_classes_is_within_them():
    labels = np.array([0] * 40 + [1] * 59 + [2])
    y = digits()[:100] + labels[:, None]
    with pytest.warns(UserWarning, match="1 classes have one row"):
        got = estimate_optimal_loss(y, [1.0, 1e4], KEY, num_draws=400, labels=labels)
    want = sum(((y[labels == c] - y[labels == c].mean(0)) ** 2).sum() for c in range(3)) / 100
    assert float(got.variance) == pytest.approx(want, rel=1e-5)
    assert got.value[1] == pytest.approx(want, rel=1e-4)
    assert within_classes(y, labels, 1.0) == pytest.approx(want)
    assert within_classes(np.uint8(8 * y), labels, 0.125) == pytest.approx(
        within_classes(np.floor(8 * y) / 8 % 32, labels, 1.0)
    )


@pytest.mark.parametrize("estimator", ["exact", "cdol", "knn", "corrected"])
def test_classes_share_a_program(estimator):
    """However many rows they have."""
    labels = np.repeat(np.arange(4), [60, 70, 80, 90])
    plans._measured.clear_cache()
    got = estimate_optimal_loss(
        digits()[:300],
        [1.0],
        KEY,
        num_draws=640,
        labels=labels,
        estimator=estimator,
        subset_size=0 if estimator == "exact" else 16,
    )
    assert np.isfinite(got.value).all()
    assert plans._measured._cache_size() == (2 if estimator == "corrected" else 1)


def test_one_draw_has_no_error():
    with pytest.warns(UserWarning, match="no standard error"):
        got = estimate("exact", [1.0], 1)
    assert np.isnan(got.stderr).all()
    assert np.isfinite(got.value).all()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(sigmas=[0.0]), "sigmas"),
        (dict(sigmas=[np.nan]), "sigmas"),
        (dict(sigmas=[np.inf]), "sigmas"),
        (dict(sigmas=[]), "at least one"),
        (dict(sigmas=["a"]), "sigmas"),
        (dict(num_draws=0), "num_draws"),
        (dict(tile=0), "estimator.tile"),
        (dict(precision="single"), "estimator.precision"),
        (dict(estimator="dolo"), "estimator.name"),
        (dict(form="AB"), "estimator.form"),
        (dict(estimator="dol", subset_size=1), "subset_size"),
        (dict(estimator="dol", subset_size=1798), "subset_size"),
        (dict(estimator="knn", subset_size=16, neighbours=15), "neighbours"),
        (dict(estimator="cdol", c_rule="papers"), "c_rule"),
        (dict(estimator="cdol", c_rule=0.0), "c_rule"),
        (dict(estimator="cdol", c_rule=np.nan), "c_rule"),
        (dict(block=0), "block"),
        (dict(chunk=8, estimator="dol"), "estimator.chunk"),
        (dict(chunk=8, labels=np.zeros(1797, int)), "estimator.chunk"),
        (dict(chunk=-1), "estimator.chunk"),
        (dict(estimator="corrected", num_draws=99, exact_draws=15), "at least 16 of each"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(given, named):
    given = dict(sigmas=[1.0], num_draws=8) | given
    with pytest.raises(UserError, match=named):
        estimate_optimal_loss(digits(), key=KEY, **given)


def test_draws_are_whole_numbers():
    assert plans.whole("num_draws", np.int32(3)) == 3
    for value in (256.5, "9", None, 0):
        with pytest.raises(UserError, match="num_draws"):
            plans.whole("num_draws", value)

"""Error bars against autoregressive series, whose errors are known in closed form."""

import re

import numpy as np
import pytest

from nqs import statistics as stats


def ar1(a, t, chains, seed=0):
    """x_{k+1} = a x_k + noise, stationary, with variance 1; [t, chains]."""
    rng = np.random.default_rng(seed)
    x = np.empty((t, chains))
    x[0] = rng.normal(size=chains)
    noise = np.sqrt(1 - a**2) * rng.normal(size=(t, chains))
    for k in range(1, t):
        x[k] = a * x[k - 1] + noise[k]
    return x


def variance_of_mean(a, n):
    """Of n successive members of `ar1`."""
    k = np.arange(1, n)
    return (1 + 2 * np.sum((1 - k / n) * a**k)) / n


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, -0.5])
def test_each_level_is_the_error_that_its_blocks_would_have(a):
    t, chains = 2**10, 800
    levels = np.array([stats.blocked_error(x)[1] for x in ar1(a, t, chains).T])
    assert levels.shape == (chains, 10)  # Blocks of 1, 2, ..., 512.
    squared, spread = (levels**2).mean(axis=0), (levels**2).std(axis=0) / np.sqrt(chains)
    for level in range(10):
        size = 2**level
        blocks = t // size
        # Blocks scatter about the mean of the series itself, which takes its part.
        scatter = variance_of_mean(a, size) - variance_of_mean(a, t)
        want = scatter * blocks / (blocks - 1) / blocks
        assert abs(squared[level] - want) < 4 * spread[level]


@pytest.mark.parametrize("a", [0.0, 0.5, 0.8])
def test_the_blocked_error_is_that_of_correlated_samples_or_a_little_more(a):
    t, chains = 2**13, 100
    x = ar1(a, t, chains, seed=1)
    errors = np.array([stats.blocked_error(series)[0] for series in x.T])
    naive = x.std(axis=0, ddof=1) / np.sqrt(t)
    want = np.sqrt((1 + a) / (1 - a) / t)
    assert (errors >= naive * (1 - 1e-12)).all()
    assert want <= np.mean(errors) < 1.5 * want
    # An error bar holds: two of them contain the truth, 0, at least as often as promised.
    assert np.mean(np.abs(x.mean(axis=0)) < 2 * errors) >= 0.95


def test_blocked_error_takes_the_largest_level_of_at_least_sixteen_blocks():
    x = ar1(0.9, 300, 1)[:, 0]
    error, levels = stats.blocked_error(x)
    by_hand, blocks = [], x
    while len(blocks) >= 2:
        by_hand.append(blocks.std(ddof=1) / np.sqrt(len(blocks)))
        pairs = range(0, len(blocks) - 1, 2)
        blocks = np.array([(blocks[i] + blocks[i + 1]) / 2 for i in pairs])
    np.testing.assert_allclose(levels, by_hand, rtol=1e-12)
    assert error == max(by_hand[:5])  # 300, 150, 75, 37, 18 blocks.
    error, levels = stats.blocked_error(x[:10])
    assert error == levels[0]


@pytest.mark.parametrize("a", [0.0, 0.5, 0.8])
def test_errors_of_short_correlated_chains_are_true_ones(a):
    """128 measurements of 512 walkers: too few to block, as an evaluation is."""
    true = np.sqrt(variance_of_mean(a, 128) / 512)
    pooled, means, blocked = [], [], []
    for seed in range(50):
        x = ar1(a, 128, 512, seed)
        tau = stats.autocorrelation_time(stats.autocorrelation(x))
        pooled.append(stats.chains_error(x)[0])
        means.append(stats.correlated_error(x.mean(axis=1), tau))
        blocked.append(stats.blocked_error(x.mean(axis=1))[0])
        assert pooled[-1] >= blocked[-1]
        assert means[-1] >= blocked[-1]
    assert 0.9 < np.mean(pooled) / true < 1.2
    assert 0.9 < np.mean(means) / true < 1.2
    if a == 0.8:
        assert np.mean(blocked) / true < 0.8  # Which is why blocking is not enough.


def test_the_error_of_few_measurements_is_that_between_walkers():
    x = ar1(0.95, 8, 400)
    error, levels = stats.chains_error(x)
    assert error == pytest.approx(x.mean(axis=0).std(ddof=1) / 20)
    np.testing.assert_array_equal(levels, stats.blocked_error(x.mean(axis=1))[1])
    together = x + np.linspace(0, 50, 8)[:, None]  # All walkers drift: only time tells.
    assert stats.chains_error(together)[0] == stats.blocked_error(together.mean(axis=1))[0]


def test_the_errors_of_single_series_use_the_larger_time():
    x = ar1(0.0, 1000, 1)[:, 0]
    naive = x.std(ddof=1) / np.sqrt(1000)
    assert stats.correlated_error(x, 50.0) == pytest.approx(naive * 10 * np.sqrt(999 / 900))
    slow = ar1(0.9, 4000, 40, seed=3)
    own = np.mean([stats.correlated_error(c) for c in slow.T])
    assert own == pytest.approx(np.sqrt(19 / 4000), rel=0.15)
    assert stats.correlated_error(np.ones(64), 3.0) == 0


def test_missing_samples_are_left_out_of_everything():
    x = 3 + ar1(0.6, 128, 200)
    holes = np.where(np.random.default_rng(1).random(x.shape) < 0.05, np.nan, x)
    holes[5] = np.inf  # A whole measurement,
    holes[:, 7] = np.nan  # and a whole walker.
    assert stats.chains_error(holes)[0] == pytest.approx(stats.chains_error(x)[0], rel=0.1)
    rho = stats.autocorrelation(holes)
    np.testing.assert_allclose(rho[:8], stats.autocorrelation(x)[:8], atol=0.02)
    assert stats.split_r_hat(holes) == pytest.approx(stats.split_r_hat(x), abs=0.01)
    small = np.array([[1.0, 2.0], [np.nan, 5.0], [4.0, 0.0]])
    y = np.nan_to_num(small - 2.4)
    want = np.array([np.sum(y**2) / 5, (y[0, 1] * y[1, 1] + y[1, 1] * y[2, 1]) / 2])
    np.testing.assert_allclose(stats.autocorrelation(small)[:2], want / want[0])


def test_a_constant_series_has_no_error_and_a_single_value_none_that_is_known():
    assert stats.blocked_error(np.full(100, 3.0))[0] == 0
    error, levels = stats.blocked_error(np.array([1.0]))
    assert np.isnan(error)
    assert levels.size == 0


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, -0.3])
def test_the_autocorrelation_of_an_autoregressive_series_is_geometric(a):
    x = 5 + 3 * ar1(a, 4096, 128)
    rho = stats.autocorrelation(x)
    assert rho.shape == (4096,)
    assert rho[0] == 1
    lags = np.arange(20)
    # Bartlett: the error of rho is at most sqrt((1 + a²)/(1 - a²) / samples).
    error = np.sqrt((1 + a**2) / (1 - a**2) / (4096 * 128))
    np.testing.assert_allclose(rho[:20], a**lags, rtol=0, atol=5 * error)
    tau = stats.autocorrelation_time(rho)
    assert tau == pytest.approx(max((1 + a) / (1 - a) / 2, 0.5), rel=0.03)


def test_autocorrelation_averages_products_about_one_mean():
    x = np.random.default_rng(0).normal([0.0, 1.0, 5.0], size=(9, 3))
    y = x - x.mean()
    c = [np.mean([y[k] @ y[k + lag] / 3 for k in range(9 - lag)]) for lag in range(9)]
    np.testing.assert_allclose(stats.autocorrelation(x), np.array(c) / c[0], rtol=1e-10)
    np.testing.assert_array_equal(stats.autocorrelation(np.ones((4, 2))), [1, 0, 0, 0])


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.95])
def test_the_window_ends_five_times_beyond_the_time_itself(a):
    rho = a ** np.arange(2000)
    partial = 0.5 + np.concatenate([[0.0], np.cumsum(rho[1:])])
    end = next(w for w, tau in enumerate(partial) if w >= 5 * tau)
    tau = stats.autocorrelation_time(rho)
    assert tau == pytest.approx(partial[end], rel=1e-12)
    assert tau == pytest.approx((1 + a) / (1 - a) / 2, rel=0.01)


def test_anticorrelated_series_do_not_count_as_less_than_independent():
    assert stats.autocorrelation_time((-0.5) ** np.arange(100)) == 0.5


def r_hat(x):
    """Gelman and Rubin's, written out."""
    half = len(x) // 2
    chains = [c for pair in (x[:half], x[half : 2 * half]) for c in pair.T]
    within = np.mean([np.var(c, ddof=1) for c in chains])
    means = [np.mean(c) for c in chains]
    between = half * np.var(means, ddof=1)
    return np.sqrt(((half - 1) / half * within + between / half) / within)


def test_r_hat_is_one_for_equal_chains_and_more_for_displaced_ones():
    x = ar1(0.3, 2001, 8)
    assert stats.split_r_hat(x) == pytest.approx(r_hat(x), rel=1e-12)
    assert abs(stats.split_r_hat(x) - 1) < 0.01
    displaced = x + np.where(np.arange(8) == 3, 2.0, 0.0)
    assert stats.split_r_hat(displaced) == pytest.approx(r_hat(displaced), rel=1e-12)
    assert stats.split_r_hat(displaced) > 1.1
    drifting = x + np.linspace(0, 3, 2001)[:, None]  # The same drift in all chains.
    assert stats.split_r_hat(drifting) > 1.1


def test_r_hat_of_degenerate_chains():
    assert stats.split_r_hat(np.full((10, 3), 2.0)) == 1
    assert stats.split_r_hat(np.tile([1.0, 2.0], (10, 1))) == np.inf
    assert np.isnan(stats.split_r_hat(np.ones((3, 2))))


def test_v_score_is_that_of_its_definition():
    # Twelve electrons, variance 0.5, energy -8 against 4 at infinite temperature.
    assert stats.v_score(-8.0, 0.5, 12, 4.0) == pytest.approx(12 * 0.5 / 144)
    # It does not change with the unit of energy.
    assert stats.v_score(-16.0, 2.0, 12, 8.0) == pytest.approx(12 * 0.5 / 144)


def test_the_v_score_of_an_eigenstate_is_zero_wherever_its_energy_lies():
    assert stats.v_score(48.0, 0.0, 12, 48.0) == 0
    assert stats.v_score(48.0, 1e-26, 12, 48.0 + 1e-13) == 0  # To rounding.
    assert stats.v_score(0.0, 0.0, 12, 0.0) == 0
    assert stats.v_score(48.0, 0.1, 12, 48.0) == np.inf
    assert stats.v_score_error(48.0, 0.1, 0.0, 0.0, 12, 48.0) == 0
    assert stats.v_score_error(48.0, 0.1, 0.1, 0.0, 12, 48.0) == np.inf


def test_the_error_of_the_v_score_is_propagated():
    rng = np.random.default_rng(0)
    energies, variances = rng.normal(-8, 0.05, 20_000), rng.normal(0.5, 0.02, 20_000)
    draws = [stats.v_score(e, v, 12, 4.0) for e, v in zip(energies, variances, strict=True)]
    got = stats.v_score_error(-8.0, 0.05, 0.5, 0.02, 12, 4.0)
    assert got == pytest.approx(np.std(draws), rel=0.03)


def test_combine_takes_the_larger_of_scatter_and_own_errors():
    values = np.array([1.0, 2.0, 6.0])
    mean, error = stats.combine(values, np.full(3, 1e-3))
    assert mean == 3.0
    assert error == pytest.approx(np.sqrt((4 + 1 + 9) / 2 / 3))
    assert stats.combine(values, np.array([9.0, 12.0, 0.0]))[1] == pytest.approx(15 / 3)
    assert stats.combine([4.0], [0.25]) == (4.0, 0.25)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-0.741802, 0.00012, "-0.74180(12)"),
        (-0.741802, 0.0000117, "-0.741802(12)"),
        (3.14159, 0.25, "3.14(25)"),
        (-5.0, 1.2, "-5.0(12)"),
        (123.4, 15.0, "123(15)"),
        (1.5, 0.0, "1.500000"),
        (1.5, float("nan"), "1.500000"),
        (1.5, float("inf"), "1.500000"),
        (1.5, None, "1.500000"),
        (None, None, "–"),
        (float("nan"), 0.1, "–"),
    ],
)
def test_digits_by_example(value, error, text):
    assert stats.digits(value, error) == text


def test_digits_tell_value_and_error_to_half_a_unit_of_the_last_digit():
    rng = np.random.default_rng(0)
    for _ in range(500):
        value, error = rng.normal() * 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(-6, 0.9)
        text = stats.digits(value, error)
        number, digits, units = re.fullmatch(r"(-?\d+\.?(\d*))\((\d+)\)", text).groups()
        unit = 10.0 ** -len(digits)
        assert abs(float(number) - value) <= unit / 2 + 1e-12
        assert abs(int(units) * unit - error) <= unit / 2 + 1e-12
        assert 10 <= int(units) <= 100

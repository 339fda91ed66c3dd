"""Exponents against closed forms, brute force and the limits of random matrices."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

from common.errors import UserError
from optim.exponents import clauset_alpha, hill_alpha, marchenko_pastur_alpha, tail_start
from optim.spectra import esd

CLOSED = {
    64: (1.027262, 0.995308),
    128: (1.013426, 0.997629),
    256: (1.006663, 0.998808),
    512: (1.003319, 0.999402),
    1024: (1.001657, 0.999701),
}


def pareto(r, a):
    """Plotting positions of a Pareto law with density exponent a, ascending."""
    return np.sort(((np.arange(1, r + 1) - 0.5) / r) ** (-1 / (a - 1)))


def constant(r, reference):
    """c of section 2.4: alpha - 1 = c (a - 1) on `pareto`."""
    k = r / 2
    shift = -0.5 if reference == "mle" else 0.5
    return k / (k * np.log(k + shift) - gammaln(k + 0.5) + gammaln(0.5))


@pytest.mark.parametrize("reference", ["mle", "hill"])
@pytest.mark.parametrize("r", CLOSED)
@pytest.mark.parametrize("a", [1.5, 2, 3, 5])
def test_pareto_spectra_have_a_closed_form(r, a, reference):
    want = constant(r, reference)
    assert want == pytest.approx(CLOSED[r][reference == "hill"], abs=1e-6)
    got = hill_alpha(jnp.asarray(pareto(r, a), jnp.float32), reference=reference)
    assert float(got) - 1 == pytest.approx(want * (a - 1), rel=1e-4)


@pytest.mark.parametrize("a", [2.0, 3.0])
def test_draws_scatter_as_they_should(a):
    rng = np.random.default_rng(0)
    r, k = 512, 256
    draws = np.sort((1 - rng.uniform(size=(400, r))) ** (-1 / (a - 1)), axis=-1)
    got = np.asarray(hill_alpha(jnp.asarray(draws, jnp.float32)))
    assert got.mean() == pytest.approx(a, rel=0.02)
    assert got.std() == pytest.approx((a - 1) / np.sqrt(k), rel=0.15)


@pytest.mark.parametrize("tail", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("reference", ["mle", "hill"])
def test_the_definition_term_by_term(tail, reference):
    values = np.sort(np.random.default_rng(1).uniform(1, 9, size=101))
    i = tail_start(101, tail)
    assert i == int(np.floor(101 * (1 - tail)))
    below = values[i] if reference == "mle" else values[i - 1]
    want = 1 + (101 - i) / sum(np.log(v / below) for v in values[i:])
    got = hill_alpha(jnp.asarray(values, jnp.float32), tail, reference)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_powers_of_a_spectrum_scale_the_exponent():
    values = jnp.sort(jax.random.uniform(jax.random.key(0), (128,), minval=1, maxval=5))
    assert float(hill_alpha(values**3) - 1) == pytest.approx(float(hill_alpha(values) - 1) / 3)
    small = float(hill_alpha(1e-7 * values))
    assert small == pytest.approx(float(hill_alpha(values)), rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [jnp.zeros(64), jnp.ones(64), jnp.full(64, 3.0).at[:40].set(1.0).at[40:].set(3.0)],
    ids=["zeros", "ones", "a constant tail over another start"],
)
def test_a_tail_without_spread_has_no_exponent(values):
    first = tail_start(64, 0.3)
    assert np.isnan(hill_alpha(values, 0.3))
    assert first > 40
    assert np.isnan(clauset_alpha(jnp.ones(64)))


def brute_clauset(values, fit, slip=False):
    """Candidate by candidate, from section 2.3."""
    r = len(values)
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[counts.argmax()]
    low = np.log10(0.95 * peak) if slip else 0.95 * peak
    best = (np.inf, np.nan)
    for i in range(r - 1):
        if fit == "fix_finger" and not low <= values[i] <= 1.5 * peak:
            continue
        total = np.log(values[i:] / values[i]).sum()
        if total <= 0:
            continue
        alpha = 1 + (r - i) / total
        model = 1 - (values[i:] / values[i]) ** (1 - alpha)
        gap = np.abs(model - np.arange(r - i) / (r - i)).max()
        best = min(best, (gap, alpha))
    return best[1]


@pytest.mark.parametrize("fit", ["goodness_of_fit", "fix_finger"])
@pytest.mark.parametrize("slip", [False, True])
def test_the_start_with_the_least_distance(fit, slip):
    rng = np.random.default_rng(2)
    spectra = [
        pareto(80, 2.5),
        np.sort(rng.chisquare(3, 80)),
        np.sort(rng.pareto(2, 80) + 0.01),
    ]
    for values in spectra:
        with jax.enable_x64(True):
            got = float(clauset_alpha(jnp.asarray(values), fit, slip))
        assert got == pytest.approx(brute_clauset(values, fit, slip), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        ((512, 512), 2.1217),
        ((512, 1376), 2.9992),
        ((768, 2048), 2.9910),
        ((2736, 1024), 2.9930),
        ((192, 576), 3.1176),
        ((192, 768), 3.4546),
    ],
)
def test_random_matrices_have_the_exponent_of_their_shape(shape, limit):
    assert marchenko_pastur_alpha(*shape) == pytest.approx(limit, abs=1e-4)


def test_the_least_distance_is_that_of_weightwatcher():
    watcher = pytest.importorskip("weightwatcher")
    torch = pytest.importorskip("torch")
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    rng = np.random.default_rng(3)
    each = [rng.normal(size=(128, 300)), rng.standard_t(3, size=(100, 100))]
    turn = np.linalg.qr(rng.normal(size=(150, 150)))[0]
    each.append(np.sqrt(pareto(150, 3.0))[:, None] * turn)
    layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in each]
    for layer, w in zip(layers, each, strict=True):
        layer.weight.data = torch.from_numpy(w.astype(np.float32))
    model = torch.nn.Sequential(*layers)
    want = watcher.WeightWatcher(model=model).analyze()["alpha"].to_numpy()
    got = [float(clauset_alpha(esd(jnp.asarray(w, jnp.float32), "svd"))) for w in each]
    np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda v: hill_alpha(v, reference="foo"),
            "reference is 'foo', but must be one of mle",
        ),
        (lambda v: hill_alpha(v, 0.0), "tail is 0.0, but must be between 0 and 1"),
        (lambda v: hill_alpha(v, 1.0), "tail is 1.0, but must be between 0 and 1"),
        (lambda v: hill_alpha(v, float("nan")), "tail is nan, but must be between 0 and 1"),
        (lambda v: hill_alpha(v, 0.99, "hill"), "tail is 0.99, but must be at most 0.9844"),
        (lambda v: clauset_alpha(v, "foo"), "fit is 'foo', but must be one of goodness_of_fit"),
        (lambda v: clauset_alpha(v, "median"), "fit is 'median', but must be one of goodness"),
        (lambda v: marchenko_pastur_alpha(9, 9, 2.0), "tail is 2.0, but must be between 0"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(UserError, match=f"config.optim.alphadecay.{said}"):
        call(jnp.arange(1.0, 65.0))


def test_a_tail_has_a_value_at_least():
    assert tail_start(64, 1e-12) == 63

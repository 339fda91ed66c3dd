from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.languages import build, hmm, information
from lm.languages.hmm import HMM, NGram
from lm.masked import curve
from tests.lm.languages import brute

RNG = np.random.default_rng


def conditional(q, vocab, length, i, seen):
    """H(x_i | x_seen) by sums over all texts."""
    box = q.reshape((vocab,) * length)
    rest = lambda kept: box.sum(axis=tuple(j for j in range(length) if j not in kept))
    return brute.entropy(rest({i, *seen}).reshape(-1)) - brute.entropy(
        np.atleast_1d(rest(set(seen))).reshape(-1)
    )


def by_count(q, vocab, length):
    """h_n by sums over all sets of n visible positions, for n = 0 ... L - 1."""
    found = np.zeros(length)
    for n in range(length):
        each = [
            conditional(q, vocab, length, i, seen)
            for i in range(length)
            for seen in combinations([j for j in range(length) if j != i], n)
        ]
        found[n] = np.mean(each)
    return found


@pytest.mark.parametrize("start", ["stationary", "skewed"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_exact_curve_is_that_of_all_sets(start, length):
    language = build.random_ngram(RNG(0), 3, 2, support_k=2)
    if start == "skewed":
        language = language._replace(start=np.array([0.9, 0.1, 0.0]))
    wanted = by_count(brute.of_ngram(*language, length), 3, length)
    np.testing.assert_allclose(information.exact_counts(language, length), wanted, atol=1e-13)
    # h(a) is the mean of h_n over Binomial(L - 1, a).
    a = np.array([0.0, 0.2, 0.7, 1.0])
    n = np.arange(length)
    ways = [len(list(combinations(range(length - 1), k))) for k in n]
    chance = ways * a[:, None] ** n * (1 - a[:, None]) ** (length - 1 - n)
    found = information.exact_curve(language, length, a)
    np.testing.assert_allclose(found, chance @ wanted, atol=1e-13)


def test_an_hmm_with_a_token_for_each_state_is_of_first_order():
    pi, a = np.array([0.2, 0.5, 0.3]), RNG(0).dirichlet(np.ones(3), 3)
    language = HMM(pi, a, np.eye(3)[[2, 0, 1]])
    assert information.first_order(language)
    wanted = by_count(brute.of_hmm(*language, 4), 3, 4)
    np.testing.assert_allclose(information.exact_counts(language, 4), wanted, atol=1e-13)
    assert not information.first_order(build.pairs(3))
    assert not information.first_order(build.random_ngram(RNG(0), 3, 3))
    with pytest.raises(UserError, match="first order"):
        information.exact_curve(build.pairs(3), 4, np.zeros(1))


def test_the_area_under_the_curve_is_the_entropy():
    language = build.random_ngram(RNG(1), 8, 2)
    for length in (3, 64):
        per_token = information.entropy(language, length).value / length
        assert information.exact_counts(language, length).mean() == pytest.approx(per_token)
        nodes, weights = np.polynomial.legendre.leggauss(200)
        h = information.exact_curve(language, length, (nodes + 1) / 2)
        assert h @ weights / 2 == pytest.approx(per_token, rel=1e-9)


def test_the_curve_of_a_stationary_chain_falls_from_the_marginal_entropy():
    language = build.random_ngram(RNG(1), 8, 2)
    h = information.exact_curve(language, 64, np.linspace(0, 1, 50))
    assert (np.diff(h) < 0).all()
    assert h[0] == pytest.approx(brute.entropy(language.start))


@pytest.mark.parametrize("name", ["first", "third", "pairs", "dense", "hidden"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_entropies_are_those_of_all_texts(name, length):
    if name == "hidden":
        tables = brute.sparse_hmm(seed=2, states=3)
        language, q = HMM(*tables), brute.of_hmm(*tables, length)
    elif name == "pairs":
        language = build.pairs(3)
        q = brute.of_hmm(*language, length)
    else:
        tables = brute.sparse_ngram(2 if name == "first" else 4)
        language, q = NGram(*tables), brute.of_ngram(*tables, length)
        language = hmm.dense(language) if name == "dense" else language
    found = information.entropy(language, length)
    assert found.value == pytest.approx(brute.entropy(q), abs=1e-12)
    assert found.error == 0


def test_the_entropy_rate_of_ngrams_is_closed():
    language = build.random_ngram(RNG(0), 4, 3)
    rows = -(language.table * np.log(language.table)).sum(axis=-1)
    wanted = brute.entropy(language.start.reshape(-1)) + 98 * np.sum(language.start * rows)
    assert information.entropy(language, 100).value == pytest.approx(wanted)


def test_entropies_of_worst_cases():
    log = np.log(8)
    assert information.entropy(build.pairs(8), 64).value == pytest.approx(32 * log)
    assert information.entropy(build.parity(4), 64).value == pytest.approx(48 * np.log(2))
    assert information.entropy(build.running_sum(5), 64).value == pytest.approx(32 * np.log(5))


def test_too_many_beliefs_are_sampled(monkeypatch):
    language = HMM(*brute.sparse_hmm(seed=1, states=3))
    exact = information.entropy(language, 12).value
    monkeypatch.setattr(information, "BELIEFS", 2)
    found = information.entropy(language, 12, texts=2000)
    assert found.error > 0
    assert abs(found.value - exact) < 4 * found.error


def test_sampled_curves_are_the_exact_one():
    language, a = build.random_ngram(RNG(0), 4, 2), np.array([0.0, 0.3, 0.8])
    device, length = hmm.on_device(language), 16
    exact = information.exact_curve(language, length, a)
    per_token = information.entropy(language, length).value / length
    for above in (False, True):
        h, error = information.sampled(jax.random.key(1), device, length, a, 1024, above)
        assert (error > 0).all()
        assert (np.abs(h + above * per_token - exact) < 4 * error).all()
    _, plain = information.sampled(jax.random.key(1), device, length, a, 1024)
    assert error[2] < 0.7 * plain[2]


def test_sampled_curves_of_a_hidden_chain():
    tables = brute.sparse_hmm(seed=2, states=3)
    wanted = by_count(brute.of_hmm(*tables, 4), 3, 4)
    a = np.array([0.0, 0.5, 1.0])
    chance = np.array([[1, 0, 0, 0], [1 / 8, 3 / 8, 3 / 8, 1 / 8], [0, 0, 0, 1]])
    device = hmm.on_device(HMM(*tables))
    h, error = information.sampled(jax.random.key(0), device, 4, a, 2048)
    assert (np.abs(h - chance @ wanted) < 4 * error).all()


def test_gaps_hold_the_bars_of_e1():
    language = build.random_ngram(RNG(0), 8, 2)
    gaps = {}
    for length in (64, 256):
        h0, h1 = information.exact_curve(language, length, np.array([0.0, 1.0]))
        for steps in (1, 2, 4, 8, 16, 64):
            gap = information.gap(language, length, np.full(steps, 1 / steps))
            gaps[length, steps] = gap
            assert 0 < gap <= (h0 - h1) / steps + 1e-12
            if steps >= 8:
                assert gap * steps == pytest.approx((h0 - h1) / 2, rel=0.02)
    for steps in (1, 2, 4, 8, 16, 64):
        assert gaps[64, steps] == pytest.approx(gaps[256, steps], rel=0.03)


def test_left_sums_agree_with_those_over_counts():
    language, w = build.random_ngram(RNG(0), 4, 2), np.array([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(information.shares(w), [0, 0.1, 0.5, 0.7])
    h = information.exact_curve(language, 12, information.shares(w))
    counts = information.exact_counts(language, 12)
    assert information.nelbo(h, w) == pytest.approx(curve.ancestral(12, w) @ counts)
    assert jnp.ndim(h) == 1

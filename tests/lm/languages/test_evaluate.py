from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.languages import build, evaluate, hmm
from lm.languages.hmm import HMM, NGram
from tests.lm.languages import brute


@pytest.fixture(scope="module")
def tiny():
    """Languages with zeros, with q of all texts of 4 tokens."""
    hidden, three = brute.sparse_hmm(), brute.sparse_ngram(3)
    return [
        (HMM(*hidden), brute.of_hmm(*hidden, 4)),
        (NGram(*three), brute.of_ngram(*three, 4)),
    ]


def test_log_prob_is_that_of_all_paths(tiny):
    x = jnp.asarray(brute.texts(3, 4))
    for language, q in tiny:
        with jax.enable_x64(True):
            found = evaluate.log_prob(hmm.on_device(language, jnp.float64), x)
        np.testing.assert_allclose(np.exp(found), q, atol=1e-15)
        found = evaluate.log_prob(hmm.on_device(language), x)
        np.testing.assert_array_equal(found == -np.inf, q == 0)
        np.testing.assert_allclose(np.exp(found), q, atol=1e-6)
        np.testing.assert_array_equal(evaluate.supported(hmm.on_device(language), x), q > 0)
        assert 0 < (q == 0).sum() < len(q)


def test_masked_tokens_may_be_any(tiny):
    x = np.array([[3, 1, 3, 0], [3, 3, 3, 3]], np.int32)
    every = brute.texts(3, 4)
    for language, q in tiny:
        wanted = [q[((every == row) | (row == 3)).all(axis=1)].sum() for row in x]
        found = evaluate.log_prob(hmm.on_device(language), jnp.asarray(x))
        np.testing.assert_allclose(np.exp(found), wanted, atol=1e-6)


def test_float32_is_within_a_hundred_thousandth_of_a_nat_per_token():
    language = build.random_hmm(np.random.default_rng(0))
    x = evaluate.draw(jax.random.key(0), hmm.on_device(language), 16, 512)
    found = np.asarray(evaluate.log_prob(hmm.on_device(language), x), np.float64)
    # The same sum in float64, token by token.
    for row, log_q in zip(np.asarray(x), found, strict=True):
        c, total = language.pi, 0.0
        for token in row:
            seen = c * language.B[:, token]
            total += np.log(seen.sum())
            c = seen / seen.sum() @ language.A
        assert abs(total - log_q) / 512 < 1e-5


def test_support_does_not_underflow():
    # q(x) = 1e-25^30 is 0 in any float, and so are products of counts of bfloat16.
    rare = 1e-25
    language = hmm.on_device(HMM([1.0, 0.0], [[1 - rare, rare], [rare, 1 - rare]], np.eye(2)))
    x = jnp.array([[0, 1] * 15, [0, 0] * 15, [1, 0] * 15])
    assert evaluate.supported(language, x).tolist() == [True, True, False]
    wide = hmm.on_device(HMM(np.ones(64) / 64, np.ones((64, 64)) / 64, np.ones((64, 1))))
    assert evaluate.supported(wide, jnp.zeros((1, 300), jnp.int32)).all()


def test_draws_follow_the_law(tiny):
    for language, q in tiny:
        device = hmm.on_device(language)
        x = np.asarray(evaluate.draw(jax.random.key(0), device, 20_000, 4))
        assert x.dtype == np.int32
        counts = np.bincount(x @ 3 ** np.arange(4)[::-1], minlength=81)
        assert not counts[q == 0].any()
        error = np.sqrt(20_000 * q * (1 - q))
        assert (np.abs(counts - 20_000 * q) <= 4.5 * error + 1e-9).all()
        some = q * 20_000 > 5
        chi = np.sum((counts - 20_000 * q)[some] ** 2 / (20_000 * q)[some])
        assert chi < some.sum() + 5 * np.sqrt(2 * some.sum())


def test_a_text_is_that_of_its_number(tiny):
    language = hmm.on_device(tiny[0][0])
    key = jax.random.key(3)
    many = evaluate.draw(key, language, 64, 6)
    np.testing.assert_array_equal(evaluate.draw(key, language, 8, 6), many[:8])
    np.testing.assert_array_equal(evaluate.draw(key, language, 8, 6, first=16), many[16:24])
    # Shorter texts are the beginnings of longer ones, and no two are of the same noise.
    np.testing.assert_array_equal(evaluate.draw(key, language, 8, 3), many[:8, :3])
    assert len(np.unique(many, axis=0)) > 40


def test_generative_error_averages_no_infinity():
    found = evaluate.generative(np.array([-4.0, -np.inf, -8.0, -6.0]), 2)
    assert found.mean == pytest.approx(3)
    assert found.error == pytest.approx(1 / np.sqrt(3))
    assert found.unsupported == pytest.approx(0.25)
    none = evaluate.generative(np.full(3, -np.inf), 2)
    assert np.isnan(none.mean)
    assert np.isnan(none.error)
    assert none.unsupported == 1


def test_diversity_is_counted():
    rng = np.random.default_rng(0)
    for vocab in (4, 50_000):
        x = rng.integers(0, vocab, (7, 9)).astype(np.int32)
        x[3] = x[4]
        found = evaluate.diversity(x, vocab)
        for n in (1, 2, 3):
            grams = Counter(tuple(row[i : i + n]) for row in x.tolist() for i in range(10 - n))
            p = np.array(list(grams.values())) / sum(grams.values())
            assert found[f"entropy_{n}"] == pytest.approx(-np.sum(p * np.log(p)))
            if n > 1:
                assert found[f"distinct_{n}"] == pytest.approx(len(p) / sum(grams.values()))
    assert evaluate.diversity(np.zeros((3, 1), np.int32), 4) == {"entropy_1": 0}
    assert evaluate.bits(np.log(8)) == pytest.approx(3)

"""The exact denoiser and the evaluators against sums over all texts (bar 1 of section 8.1)."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from lm.languages import build, evaluate, hmm
from lm.languages.oracle import oracle, posterior
from lm.masked.denoiser import denoise
from tests.lm.languages.small import LANGUAGES, LENGTH, conditional, law, texts

NAMES = sorted(LANGUAGES)


@pytest.fixture(scope="module")
def laws():
    return {name: law(language) for name, language in LANGUAGES.items()}


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float64, 1e-12), (jnp.float32, 2e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_posteriors_of_all_patterns(laws, name, dtype, error):
    language, q = LANGUAGES[name], laws[name]
    v = hmm.vocab(language)
    patterns = texts(v + 1)
    with jax.enable_x64(dtype == jnp.float64):
        found, bad = jax.jit(posterior)(hmm.on_device(language, dtype), jnp.asarray(patterns))
        found, bad = np.exp(np.asarray(found, np.float64)), np.asarray(bad)
    assert np.isfinite(found).all()
    for i, pattern in enumerate(patterns):
        want = conditional(q, v, pattern)
        assert bad[i] == (want is None)
        if want is not None:
            assert np.abs(found[i] - want).max() <= error
            assert np.all((found[i] == 0) == (want == 0))


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_and_support_of_all_texts(laws, name):
    language, q = LANGUAGES[name], laws[name]
    every = jnp.asarray(texts(hmm.vocab(language)))
    np.testing.assert_allclose(q.sum(), 1, atol=1e-12)
    device = hmm.on_device(language)
    found = np.asarray(evaluate.log_prob(device, every), np.float64)
    assert np.all(np.isneginf(found) == (q == 0))
    some = q > 0
    np.testing.assert_allclose(found[some], np.log(q[some]), atol=1e-5)
    np.testing.assert_array_equal(evaluate.supported(device, every), some)


def test_long_texts_keep_five_digits_per_token():
    language = build.random_hmm(np.random.default_rng(5), 32, 8, 2, 2)
    x = evaluate.draw(jax.random.key(0), hmm.on_device(language), 16, 512)
    found = evaluate.log_prob(hmm.on_device(language), x)
    with jax.enable_x64(True):
        want = evaluate.log_prob(hmm.on_device(language, jnp.float64), x)
        assert np.abs(np.asarray(found) - np.asarray(want)).max() / 512 < 1e-5
    assert np.isfinite(found).all()
    assert evaluate.supported(hmm.on_device(language), x).all()
    broken = x.at[:, 200].set((x[:, 200] + 1) % 8)
    np.testing.assert_array_equal(
        evaluate.supported(hmm.on_device(language), broken),
        np.isfinite(evaluate.log_prob(hmm.on_device(language), broken)),
    )


@pytest.mark.parametrize("name", NAMES)
def test_texts_come_as_often_as_they_should(laws, name):
    language, q = LANGUAGES[name], laws[name]
    v, number = hmm.vocab(language), 20_000
    x = np.asarray(evaluate.draw(jax.random.key(1), hmm.on_device(language), number, LENGTH))
    found = np.bincount(x @ v ** np.arange(LENGTH)[::-1], minlength=len(q))
    assert found[q == 0].sum() == 0
    z = (found - number * q) / np.sqrt(np.maximum(number * q * (1 - q), 1e-9))
    some = number * q > 5
    assert np.abs(z[some]).max() < 5


def test_a_text_depends_on_its_number_only():
    language = hmm.on_device(LANGUAGES["hmm"])
    few = evaluate.draw(jax.random.key(3), language, 3, 9)
    many = evaluate.draw(jax.random.key(3), language, 11, 9)
    np.testing.assert_array_equal(few, many[:3])


def test_structured_transitions_are_the_dense_ones():
    language = LANGUAGES["3gram"]
    x = jax.random.randint(jax.random.key(0), (6, 10), 0, 4)
    with jax.enable_x64(True):
        found, _ = posterior(hmm.on_device(language, jnp.float64), x)
        dense = hmm.on_device(hmm.dense(language), jnp.float64)
        np.testing.assert_allclose(found, posterior(dense, x)[0], atol=1e-12)
        whole = jnp.minimum(x, 2)
        structured = hmm.on_device(language, jnp.float64)
        np.testing.assert_allclose(
            evaluate.log_prob(structured, whole), evaluate.log_prob(dense, whole), atol=1e-12
        )


def test_another_table_of_the_same_shape_is_no_other_program():
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(lambda p, x: denoise(oracle(4), p, x), n=1))
    x = jnp.full((2, 5), 4)
    one = function(hmm.on_device(LANGUAGES["2gram"]), x)
    two = function(hmm.on_device(LANGUAGES["sparse"]), x)
    assert oracle(4) is oracle(4)
    assert np.abs(np.asarray(one - two)).max() > 0.01


def test_shards_say_what_one_device_says():
    language = hmm.on_device(LANGUAGES["hmm"])
    x = jax.random.randint(jax.random.key(0), (16, 12), 0, 4)
    want = posterior(language, x)
    mesh = meshes.make(devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        found = jax.jit(posterior)(language, meshes.to_devices(np.asarray(x), mesh))
    chex.assert_trees_all_close(found, want, atol=1e-6)


def test_an_impossible_prompt_is_flagged_and_is_no_nan():
    language = hmm.on_device(LANGUAGES["pairs"])
    x = jnp.array([[0, 1, 3, 3, 3, 2], [0, 0, 3, 3, 3, 2]])
    found, bad = posterior(language, x)
    assert bad.tolist() == [True, False]
    assert not np.isnan(found).any()
    np.testing.assert_allclose(np.exp(found[:, 4]), [[0, 0, 1], [0, 0, 1]], atol=1e-6)


def test_scores_of_many_texts():
    found = evaluate.generative(np.array([-4.0, -8.0, -np.inf, -6.0]), 2)
    np.testing.assert_allclose(found, [3.0, 1 / np.sqrt(3), 0.25], rtol=1e-12)
    assert np.isnan(evaluate.generative(np.array([-np.inf]), 2).mean)
    tokens = np.array([[0, 1, 0, 1], [0, 1, 0, 1]])
    spread = evaluate.diversity(tokens, 2)
    np.testing.assert_allclose(spread["entropy_1"], np.log(2))
    p = np.array([2, 1]) / 3  # 01 twice as often as 10
    np.testing.assert_allclose(spread["entropy_2"], -(p * np.log(p)).sum())
    np.testing.assert_allclose(spread["distinct_2"], 2 / 6)
    np.testing.assert_allclose(spread["distinct_3"], 2 / 4)
    assert "entropy_3" not in evaluate.diversity(tokens[:, :2], 2)
    assert evaluate.bits(np.log(8)) == pytest.approx(3)


@pytest.mark.slow
def test_the_oracle_bar():
    """512 texts, L = 256, S = 64, T = 64 calls in less than 60 s on two cores."""
    language = hmm.on_device(build.random_hmm(np.random.default_rng(0), 64, 8, 2, 2))
    x = jnp.full((512, 256), 8)
    call = jax.jit(posterior)
    jax.block_until_ready(call(language, x))
    start = time.perf_counter()
    for _ in range(4):
        jax.block_until_ready(call(language, x))
    assert (time.perf_counter() - start) / 4 * 64 < 60

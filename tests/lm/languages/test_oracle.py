from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from lm.languages import build, evaluate, hmm
from lm.languages.hmm import HMM, NGram
from lm.languages.oracle import oracle, posterior
from lm.masked.denoiser import denoise
from tests.lm.languages import brute

LENGTH = 5


@cache
def law(name):
    """A language with zeros, float64, and q of all its texts, at most 3^5."""
    if name == "hmm":
        tables = brute.sparse_hmm()
        return HMM(*tables), brute.of_hmm(*tables, LENGTH)
    tables = brute.sparse_ngram(int(name))
    return NGram(*tables), brute.of_ngram(*tables, LENGTH)


def masked(q, texts=40, seed=0):
    """Possible texts with some positions masked, and q(x_i | visible) of all positions."""
    rng = np.random.default_rng(seed)
    x = brute.texts(3, LENGTH)[rng.choice(len(q), texts, p=q)]
    x[rng.random(x.shape) < rng.random((texts, 1))] = 3
    x[0] = 3
    return x.astype(np.int32), np.array([brute.marginals(q, 3, row) for row in x])


@pytest.mark.parametrize("name", ["hmm", "2", "3"])
@pytest.mark.parametrize(("dtype", "bar"), [("float64", 1e-12), ("float32", 2e-6)])
def test_brute_force_says_the_same(name, dtype, bar):
    language, q = law(name)
    x, wanted = masked(q)
    with jax.enable_x64(dtype == "float64"):
        device = hmm.on_device(language, dtype)
        found = np.asarray(denoise(oracle(3), device, jnp.asarray(x)))
        assert found.dtype == dtype
        assert np.abs(np.exp(found.astype(np.float64)) - wanted).max() <= bar
        # Zeros are zeros, and nothing else is.
        np.testing.assert_array_equal(found == -np.inf, wanted == 0)
        certain, impossible = posterior(device, jnp.asarray(x))
    assert not impossible.any()
    here = np.where((x < 3)[..., None], np.arange(3) == x[..., None], wanted)
    assert np.abs(np.exp(np.asarray(certain, np.float64)) - here).max() <= bar


def test_structured_and_dense_agree():
    for n in (2, 3):
        language, q = law(str(n))
        x = jnp.asarray(masked(q, seed=1)[0])
        with jax.enable_x64(True):
            ours, _ = posterior(hmm.on_device(language, jnp.float64), x)
            plain, _ = posterior(hmm.on_device(hmm.dense(language), jnp.float64), x)
        np.testing.assert_allclose(np.exp(ours), np.exp(plain), atol=1e-14)


def test_impossible_tokens_are_flagged_without_nan():
    pairs = hmm.on_device(build.pairs(3))
    m = 3
    x = [[0, 1, m, m, 2, m], [m, 0, 0, 1, m, m], [0, m, 1, 1, m, 2], [0, 0, 1, 1, 2, 2]]
    x = jnp.array(x)
    log_f, impossible = posterior(pairs, x)
    assert impossible.tolist() == [True, True, False, False]
    p = np.exp(log_f)
    assert not np.isnan(log_f).any()
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-6)
    # After a slip any state may be next: the last token is a second half, or a new pair.
    np.testing.assert_allclose(p[0, 5], [1 / 6, 1 / 6, 2 / 3], atol=1e-6)
    np.testing.assert_allclose(p[3], np.eye(3)[[0, 0, 1, 1, 2, 2]])
    # A message from the left and one from the right that cannot both be.
    sums = hmm.on_device(build.running_sum(3))
    log_f, impossible = posterior(sums, jnp.array([[1, 0, m, m], [m, m, 1, m], [1, 1, m, 0]]))
    assert impossible.tolist() == [True, False, False]
    assert not np.isnan(log_f).any()
    assert log_f[2, 2].tolist() == [-np.inf, -np.inf, 0]


def test_the_flag_is_exact():
    language, q = law("hmm")
    every = np.indices((4,) * LENGTH).reshape(LENGTH, -1).T.astype(np.int32)
    texts = brute.texts(3, LENGTH)
    possible = [q[((texts == x) | (x == 3)).all(axis=1)].sum() > 0 for x in every]
    _, impossible = posterior(hmm.on_device(language), jnp.asarray(every))
    np.testing.assert_array_equal(~np.asarray(impossible), possible)
    assert 0 < impossible.sum() < len(every)


def test_one_object_and_one_program_for_all_tables():
    assert oracle(3) is oracle(3)
    assert hash(oracle(3)) != hash(oracle(4))
    call = jax.jit(lambda language, x: denoise(oracle(3), language, x))
    x = jnp.full((2, 4), 3)
    found = [
        call(hmm.on_device(build.random_ngram(np.random.default_rng(seed), 3, 2)), x)
        for seed in range(3)
    ]
    assert call._cache_size() == 1
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_eight_devices_say_what_one_does():
    language = hmm.on_device(build.random_hmm(np.random.default_rng(0), 16, 5))
    x = evaluate.draw(jax.random.key(0), language, 16, 12)
    x = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x, 5)
    call = jax.jit(lambda language, x: denoise(oracle(5), language, x))
    alone = call(language, x)
    mesh = meshes.make(data=8)
    with jax.set_mesh(mesh):
        spread = meshes.to_devices(np.asarray(x), mesh)
        found = call(meshes.everywhere(language, mesh), spread)
        program = call.lower(language, spread).compile()
    assert found.sharding.spec[0] == "data"
    # Texts have nothing to tell each other.
    assert "all-" not in program.as_text()
    np.testing.assert_allclose(np.exp(found), np.exp(alone), atol=1e-6)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(alone))

"""The autoregressive baseline against loops without jit, and its law."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from common.errors import UserError
from lm.masked.autoregressive import ar, ar_nocache, log_prob, token_losses
from lm.masked.categorical import draw, each
from lm.masked.settings import settings
from lm.transformer import transformer

V, L = 5, 6
FIELDS = dict(vocab=V + 1, dim=16, mlp=24, heads=2, depth=2, init_std=0.5)
MODEL = transformer(**FIELDS)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
APPLY = jax.jit(MODEL.apply)
PLAIN = settings()
KEY = jax.random.key(7)


def conditionals(x):
    """log p(. | what is before) [B, L, V], float64, each position from a row of its own."""
    x = np.asarray(x)
    found = []
    for i in range(x.shape[1]):
        row = np.zeros((len(x), L), np.int32)
        row[:, 0], row[:, 1 : i + 1] = V, x[:, :i]
        found.append(np.asarray(APPLY(PARAMS, row))[:, i, :V])
    return log_softmax(np.stack(found, axis=1).astype(np.float64), axis=-1)


def every_text(length):
    grid = np.meshgrid(*[np.arange(V)] * length, indexing="ij")
    return np.stack([a.ravel() for a in grid], axis=1).astype(np.int32)


def test_the_likelihood_is_the_product_of_conditionals():
    x = np.random.default_rng(0).integers(V, size=(4, L)).astype(np.int32)
    wanted = np.take_along_axis(conditionals(x), x[..., None], axis=-1)[..., 0]
    losses = jax.jit(token_losses, static_argnums=(0, 3))(MODEL, PARAMS, x, V)
    np.testing.assert_allclose(losses, -wanted, atol=1e-5)
    found = jax.jit(log_prob, static_argnums=(0, 3))(MODEL, PARAMS, x, V)
    np.testing.assert_allclose(found, wanted.sum(axis=1), atol=1e-5)


def test_probabilities_of_all_texts_sum_to_one():
    found = jax.jit(log_prob, static_argnums=(0, 3))(MODEL, PARAMS, every_text(4), V)
    np.testing.assert_allclose(np.exp(np.asarray(found, np.float64)).sum(), 1, atol=1e-5)


@pytest.mark.parametrize("write", [ar, ar_nocache])
def test_tokens_are_drawn_one_after_the_other(write):
    """By the keys of `draw`, whatever the cache does."""
    found = write(KEY, MODEL, PARAMS, 4, L, PLAIN, V)
    x, keys = np.zeros((4, L), np.int32), each(KEY, 4)
    for i in range(L):
        logits = jnp.asarray(conditionals(x)[:, i : i + 1], jnp.float32)
        x[:, i] = draw(keys, PLAIN, logits, jnp.full((4, 1), i))[:, 0]
    np.testing.assert_array_equal(found.tokens, x)
    np.testing.assert_array_equal(found.when, np.tile(np.arange(L), (4, 1)))
    assert found.tokens.dtype == found.when.dtype == found.calls.dtype == jnp.int32
    assert (found.calls == L).all()
    assert found.rounds == L


def test_with_and_without_a_cache_texts_are_the_same():
    made = settings(temperature=0.6, top_k=4, top_p=0.9)
    found, plain = (f(KEY, MODEL, PARAMS, 3, L, made, V) for f in (ar, ar_nocache))
    np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_without_temperature_the_most_probable_tokens_follow_a_prompt():
    prompt = np.array([[1, 2], [0, 4], [3, 3]], np.int32)
    for write in (ar, ar_nocache):
        found = write(KEY, MODEL, PARAMS, 3, L, settings(temperature=0.0), V, prompt=prompt)
        x = np.asarray(found.tokens)
        np.testing.assert_array_equal(x[:, :2], prompt)
        np.testing.assert_array_equal(conditionals(x)[:, 2:].argmax(-1), x[:, 2:])
        np.testing.assert_array_equal(found.when[:, :2], -1)
        assert (found.calls == L - 2).all()


def test_frequencies_are_the_models_probabilities():
    n = 20000
    x = np.asarray(ar(KEY, MODEL, PARAMS, n, 2, PLAIN, V).tokens)
    counts = np.bincount(x[:, 0] * V + x[:, 1], minlength=V**2)
    p = np.exp(np.asarray(log_prob(MODEL, PARAMS, jnp.asarray(every_text(2)), V), np.float64))
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_a_text_does_not_depend_on_its_batch():
    wanted = ar(KEY, MODEL, PARAMS, 4, L, PLAIN, V).tokens
    np.testing.assert_array_equal(ar(KEY, MODEL, PARAMS, 2, L, PLAIN, V).tokens, wanted[:2])
    later = ar(KEY, MODEL, PARAMS, 2, L, PLAIN, V, first=2)
    np.testing.assert_array_equal(later.tokens, wanted[2:])
    other = ar(jax.random.key(8), MODEL, PARAMS, 4, L, PLAIN, V)
    assert (other.tokens != wanted).any()


@pytest.mark.parametrize("write", [ar, ar_nocache])
def test_after_the_stop_a_text_repeats_it_without_calls(write):
    free = np.asarray(ar(KEY, MODEL, PARAMS, 4, L, PLAIN, V).tokens)
    for stop in range(V):
        found = write(KEY, MODEL, PARAMS, 4, L, PLAIN, V, stop=stop)
        ends = []
        for i in range(4):
            hits = np.flatnonzero(free[i] == stop)
            end = hits[0] + 1 if len(hits) else L
            np.testing.assert_array_equal(found.tokens[i, :end], free[i, :end])
            np.testing.assert_array_equal(found.tokens[i, end:], stop)
            np.testing.assert_array_equal(found.when[i, end:], -1)
            ends.append(end)
        np.testing.assert_array_equal(found.calls, ends)
        assert found.rounds == max(ends)


def test_a_prompt_that_is_the_whole_text_needs_no_call():
    prompt = np.ones((2, L), np.int32)
    found = ar(KEY, MODEL, PARAMS, 2, L, PLAIN, V, prompt=prompt)
    np.testing.assert_array_equal(found.tokens, prompt)
    assert found.rounds == 0
    assert not found.calls.any()


def test_tokens_from_vocab_on_are_never_drawn():
    found = ar(KEY, MODEL, PARAMS, 200, 3, PLAIN, V, vocab=3)
    assert set(np.unique(found.tokens)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(batch=0), r"config\.batch is 0"),
        (dict(length=0), r"config\.length is 0"),
        (dict(start=V + 1), r"config\.model\.vocab is 6, but must be at least 7"),
        (dict(settings=settings(top_k=V + 1)), r"config\.sampler\.top_k is 6, but must be"),
        (dict(prompt=np.zeros((2, L + 1), np.int32)), "at most 6 tokens in each of 2 rows"),
        (dict(prompt=np.zeros((3, 1), np.int32)), "in each of 2 rows"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes, sentence):
    given = dict(batch=2, length=L, settings=PLAIN, start=V) | changes
    with pytest.raises(UserError, match=sentence):
        ar(KEY, MODEL, PARAMS, **given)


@pytest.mark.parametrize("token", [-1, V, 77])
def test_a_prompt_of_no_tokens_is_refused(token):
    prompt = np.array([[1, token]], np.int32)
    with pytest.raises(UserError, match=rf"has the token {token} in row 0 at 1"):
        ar(KEY, MODEL, PARAMS, 1, L, PLAIN, V, prompt=prompt)


def test_logits_of_parts_are_those_of_all(monkeypatch):
    """Values and gradients, whatever the size of a part is."""
    x = jnp.asarray(np.random.default_rng(0).integers(V, size=(4, L)), jnp.int32)

    def found():
        loss = lambda params: jnp.sum(token_losses(MODEL, params, x, V))
        return jax.jit(jax.value_and_grad(loss))(PARAMS)

    whole = found()
    monkeypatch.setattr("lm.masked.denoiser.LOGITS", 4 * V * 2)
    text = str(jax.make_jaxpr(lambda params: token_losses(MODEL, params, x, V))(PARAMS))
    assert f"f32[4,{L},{V + 1}]" not in text
    chex.assert_trees_all_close(found(), whole, rtol=1e-5, atol=1e-6)

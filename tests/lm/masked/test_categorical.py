"""Draws: the noise that is used, keys of positions, and what temperature 0 does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.masked import categorical
from lm.masked.settings import settings

KEYS = categorical.each(jax.random.key(0), 64)
AT = jnp.broadcast_to(jnp.arange(16), (64, 16))
LOG_F = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (64, 16, 7)))
draw = jax.jit(categorical.draw, static_argnames=("settings", "greedy"))


def test_a_token_is_the_argmax_with_noise_of_a_long_tail_of_its_own_key():
    # Low noise would give other tokens at once: it is of other bits.
    found = draw(KEYS, settings(temperature=0.7), LOG_F, AT)

    def one(text, place):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), text), place)
        noise = jax.random.gumbel(key, (7,), jnp.float32, mode="high")
        return jnp.argmax(LOG_F[text, place] / 0.7 + noise)

    wanted = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    np.testing.assert_array_equal(found, wanted(jnp.arange(64), jnp.arange(16)))
    assert found.dtype == jnp.int32


def test_a_token_knows_neither_batch_nor_chunk():
    whole = np.asarray(draw(KEYS, settings(), LOG_F, AT))
    part = draw(KEYS[3:5], settings(), LOG_F[3:5, 4:9], AT[3:5, 4:9])
    np.testing.assert_array_equal(part, whole[3:5, 4:9])
    later = categorical.each(jax.random.key(0), 2, 3)
    np.testing.assert_array_equal(
        draw(later, settings(), LOG_F[3:5, 4:9], AT[3:5, 4:9]), whole[3:5, 4:9]
    )
    reversed_ = draw(KEYS, settings(), LOG_F[:, ::-1], AT[:, ::-1])
    np.testing.assert_array_equal(reversed_[:, ::-1], whole)


def test_temperature_zero_is_argmax_without_noise():
    cold = settings(temperature=0.0)
    best = np.asarray(LOG_F).argmax(axis=-1)
    np.testing.assert_array_equal(draw(KEYS, cold, LOG_F, AT), best)
    np.testing.assert_array_equal(draw(KEYS, settings(), LOG_F, AT, True), best)
    for made, noisy in ((cold, False), (settings(), True)):
        program = jax.make_jaxpr(lambda k, f, at: categorical.draw(k, made, f, at))  # noqa: B023
        assert ("random" in str(program(KEYS, LOG_F, AT))) == noisy


def test_greedy_rows_are_the_most_probable_and_the_others_as_ever():
    greedy = (AT % 3) == 0
    found = categorical.draw(KEYS, settings(), LOG_F, AT, greedy)
    best, drawn = np.asarray(LOG_F).argmax(axis=-1), draw(KEYS, settings(), LOG_F, AT)
    np.testing.assert_array_equal(found, np.where(greedy, best, drawn))
    assert (best != drawn).any()


def test_bfloat16_is_made_float32_and_float64_stays():
    half = LOG_F.astype(jnp.bfloat16)
    assert categorical.logits(settings(), half).dtype == jnp.float32
    np.testing.assert_array_equal(
        draw(KEYS, settings(), half, AT), draw(KEYS, settings(), half.astype(jnp.float32), AT)
    )
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(LOG_F), jnp.float64)
        assert categorical.logits(settings(), wide).dtype == jnp.float64


@pytest.mark.parametrize("fields", [dict(top_k=2), dict(top_p=0.3), dict(top_k=3, top_p=0.8)])
def test_only_what_is_allowed_is_drawn_and_in_proportion(fields):
    log_p = np.log([0.4, 0.3, 0.2, 0.1])
    rows = jnp.broadcast_to(jnp.asarray(log_p, jnp.float32), (64, 128, 4))
    at = jnp.broadcast_to(jnp.arange(128), (64, 128))
    made = settings(temperature=0.5, **fields)
    found = np.bincount(np.asarray(draw(KEYS, made, rows, at)).reshape(-1), minlength=4)
    p = np.exp(log_p / 0.5)
    p[fields.get("top_k", 4) :] = 0
    p /= p.sum()
    p[1:][np.cumsum(p)[:-1] >= fields.get("top_p", 1.0)] = 0
    p /= p.sum()
    n = found.sum()
    assert (found[p == 0] == 0).all()
    assert (np.abs(found - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_keys_with_a_number_folded_in():
    same = categorical.fold(KEYS, 3)
    each = categorical.fold(KEYS, jnp.full(64, 3))
    other = categorical.fold(KEYS, jnp.arange(64))
    data = [np.asarray(jax.random.key_data(k)) for k in (same, each, other)]
    np.testing.assert_array_equal(data[0], data[1])
    assert (data[0][3] == data[2][3]).all()
    assert len(np.unique(np.concatenate(data[1:]), axis=0)) == 127

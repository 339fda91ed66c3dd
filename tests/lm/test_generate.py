"""Generated tokens against loops that know no cache, and what may be drawn, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.generate import generate, restrict, sliding
from lm.transformer import transformer

MODEL = transformer(vocab=11, dim=16, mlp=24, heads=2, depth=2, init_std=0.5)
PARAMS = jax.jit(MODEL.init)(jax.random.key(1))
PROMPT = jnp.array([[1, 2, 3], [10, 0, 7]], jnp.int32)


APPLY = jax.jit(MODEL.apply)


def logits_after(rows):
    """Of the token after each row, without a cache; later columns do not matter."""
    rows = np.asarray(rows)
    padded = np.zeros((len(rows), 12), np.int32)
    padded[:, : rows.shape[1]] = rows
    return np.asarray(APPLY(PARAMS, jnp.asarray(padded)))[:, rows.shape[1] - 1]


def greedy(steps):
    row = np.asarray(PROMPT)
    for _ in range(steps):
        row = np.concatenate([row, logits_after(row).argmax(axis=1)[:, None]], axis=1)
    return row


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_greedy_is_a_loop_of_argmax(steps):
    found = generate(MODEL, PARAMS, jax.random.key(0), PROMPT, steps, temperature=0.0)
    assert found.dtype == PROMPT.dtype
    np.testing.assert_array_equal(found, greedy(steps))


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=1e-9)])
def test_one_choice_is_greedy(settings):
    found = generate(MODEL, PARAMS, jax.random.key(0), PROMPT, 5, **settings)
    np.testing.assert_array_equal(found, greedy(5))


def test_after_the_stop_a_row_repeats_it():
    free = greedy(8)
    stop = int(free[0, 5])  # The third new token of the first row.
    found = np.asarray(
        generate(MODEL, PARAMS, jax.random.key(0), PROMPT, 8, temperature=0.0, stop=stop)
    )
    for row, there in zip(found, free, strict=True):
        hits = np.flatnonzero(there[3:] == stop)
        end = 3 + (hits[0] if len(hits) else 8)
        np.testing.assert_array_equal(row[:end], there[:end])
        np.testing.assert_array_equal(row[end:], stop)
    assert (found[0, 5:] == stop).all()
    # One in the prompt means nothing.
    untouched = generate(MODEL, PARAMS, jax.random.key(0), PROMPT, 1, temperature=0.0, stop=1)
    np.testing.assert_array_equal(untouched, greedy(1))


def test_draws_follow_the_models_probabilities():
    many = jnp.tile(PROMPT[:1], (4000, 1))
    draw = lambda seed: generate(
        MODEL, PARAMS, jax.random.key(seed), many, 2, temperature=0.7, top_k=4
    )
    found = np.asarray(draw(0))
    np.testing.assert_array_equal(found, draw(0))
    assert (found != draw(1)).any()
    # Every token given what was drawn before it, by the model's own probabilities.
    prompt = np.asarray(PROMPT)[:1]
    given = [(found[:, 3], prompt)]
    for first in np.unique(found[:, 3]):
        row = np.concatenate([prompt, [[first]]], axis=1)
        given.append((found[found[:, 3] == first, 4], row))
    for drawn, row in given:
        logits = logits_after(row)[0].astype(np.float64)
        best = np.argsort(-logits)[:4]
        p = np.zeros(11)
        p[best] = np.exp((logits - logits.max())[best] / 0.7)
        p /= p.sum()
        n, counts = len(drawn), np.bincount(drawn, minlength=11)
        assert (counts[p == 0] == 0).all()
        assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def support(logits, top_k, top_p):
    """Which tokens may be drawn, one after the other."""
    p = np.exp(np.asarray(logits, np.float64))
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or len(p)]
    total, allowed, reached = sum(p[i] for i in order), set(), 0.0
    for i in order:
        allowed.add(i)
        reached += p[i] / total
        if reached >= top_p:
            break
    return allowed


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.55, 0.9, 1.0])
def test_the_support_is_restricted_exactly(top_k, top_p):
    logits = 2 * np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float32)
    logits[0] = logits[0].round()  # With equals among them.
    found = np.asarray(jax.jit(restrict, static_argnums=(1, 2))(logits, top_k, top_p))
    kept = np.isfinite(found)
    np.testing.assert_array_equal(found[kept], logits[kept])
    assert (found[~kept] == -np.inf).all()
    for there, row in zip(kept.reshape(-1, 8), logits.reshape(-1, 8), strict=True):
        assert set(np.flatnonzero(there)) == support(row, top_k, top_p)


def test_equals_do_not_enlarge_the_support():
    flat = jnp.zeros(10)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(restrict(flat, 3, 1.0))), range(3))
    half = restrict(flat, 4, 0.5)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(half)), range(2))


def test_tokens_beyond_the_vocabulary_are_never_drawn():
    many = jnp.tile(PROMPT[:1], (500, 1))
    draw = lambda **s: np.asarray(generate(MODEL, PARAMS, jax.random.key(0), many, 4, **s))[
        :, 3:
    ]
    assert draw().max() == 10
    assert set(np.unique(draw(vocab=5))) == set(range(5))
    assert draw(vocab=3, top_k=4, top_p=0.99).max() == 2
    np.testing.assert_array_equal(draw(vocab=11), draw())
    rows, best = np.asarray(PROMPT), logits_after(PROMPT)[:, :4].argmax(axis=1)
    found = generate(MODEL, PARAMS, jax.random.key(0), PROMPT, 1, temperature=0.0, vocab=4)
    np.testing.assert_array_equal(found, np.column_stack([rows, best]))


@pytest.mark.parametrize(("context", "steps"), [(1, 3), (2, 5), (5, 0), (5, 9), (20, 9)])
def test_a_sliding_window_is_generated_window_by_window(context, steps):
    row, seen, key = np.asarray(PROMPT), [], jax.random.key(3)

    def extend(params, cache, tokens, positions):
        jax.debug.callback(lambda p: seen.append(int(p.max())), positions)
        return MODEL.extend(params, cache, tokens, positions)

    spied = MODEL._replace(extend=extend)
    found = sliding(spied, PARAMS, key, row, steps, context, temperature=0.9)
    jax.effects_barrier()
    key = jax.random.key(3)
    assert max(seen, default=0) < context
    window = row[:, -context:]
    while row.shape[1] < 3 + steps:
        key, this = jax.random.split(key)
        new = min(steps, context + 1 - window.shape[1])
        made = generate(MODEL, PARAMS, this, jnp.asarray(window), new, 0.9)
        row = np.concatenate([row, np.asarray(made)[:, window.shape[1] :]], axis=1)
        window = row[:, -max(1, context // 2) :]
    np.testing.assert_array_equal(found, row[:, : 3 + steps])


def test_windows_after_the_first_are_of_one_shape():
    shapes = set()

    def start(batch, length):
        shapes.add((batch, length))
        return MODEL.start(batch, length)

    made = sliding(
        MODEL._replace(start=start), PARAMS, jax.random.key(0), np.asarray(PROMPT), 40, 6
    )
    assert made.shape == (2, 43)
    assert shapes == {(2, 6)}


def test_a_row_that_has_stopped_stays_so_in_later_windows():
    rows = np.tile(np.asarray(PROMPT), (3, 1))
    whole = sliding(MODEL, PARAMS, jax.random.key(0), rows, 30, 6)
    for stop in (int(whole[0, 5]), int(whole[1, 20])):
        found = sliding(MODEL, PARAMS, jax.random.key(0), rows, 30, 6, stop=stop)
        assert found.shape == whole.shape
        for there, row in zip(found, whole, strict=True):
            hits = np.flatnonzero(row[3:] == stop)
            end = 3 + (hits[0] if len(hits) else 30)
            np.testing.assert_array_equal(there[:end], row[:end])
            np.testing.assert_array_equal(there[end:], stop)


def test_a_setting_out_of_range_is_refused_in_any_window():
    with pytest.raises(UserError, match=r"config\.sample\.steps is -1"):
        sliding(MODEL, PARAMS, jax.random.key(0), np.asarray(PROMPT), -1, 6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(steps=-1), "config.sample.steps is -1"),
        (dict(temperature=-0.5), "config.sample.temperature is -0.5"),
        (dict(temperature=float("nan")), "config.sample.temperature is nan"),
        (dict(top_k=-1), "config.sample.top_k is -1"),
        (dict(top_p=0.0), "config.sample.top_p is 0.0, but must be above 0 and at most 1"),
        (dict(top_p=1.5), "config.sample.top_p is 1.5"),
        (dict(prompt=PROMPT[:, :0]), "The prompt has 0 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(settings, sentence):
    settings = dict(prompt=PROMPT, steps=1) | settings
    with pytest.raises(UserError, match=sentence):
        generate(MODEL, PARAMS, jax.random.key(0), **settings)

"""Adaptive samplers against their rules in NumPy, text by text, and against exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.masked import adaptive, plans
from lm.masked.categorical import each
from lm.masked.sample import sample
from lm.masked.settings import ADAPTIVE, settings
from tests.lm.masked import tables

commit = jax.jit(adaptive.commit, static_argnames="settings")
KEYS = each(jax.random.key(0), 40)
LOG_F = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(1), (40, 9, 5)))
FREE = jax.random.bernoulli(jax.random.key(2), 0.7, (40, 9)).at[0].set(False)
QUOTA = jax.random.randint(jax.random.key(3), (40,), 0, 9)
Q = tables.random(2, 4)
DENOISER, PARAMS = tables.exact(Q)


def entropies(f):
    return -np.sum(np.where(f > 0, f * np.log(np.where(f > 0, f, 1)), 0), axis=-1)


def rule(kind, f, token, free, quota, tau, gamma):
    """What one text commits: positions, by the words of section 7."""
    places = np.flatnonzero(free)
    p = {i: f[i, token[i]] for i in places}
    top = np.sort(f, axis=-1)
    score = {
        "confidence": p,
        "threshold": p,
        "margin": {i: top[i, -1] - top[i, -2] for i in places},
    }.get(kind, {i: -entropies(f)[i] for i in places})
    best = sorted(places, key=lambda i: -score[i])
    if kind == "threshold":
        return {i for i in places if p[i] >= tau} | set(best[:1])
    if kind == "entropy_bound":
        n = 1
        h = [-score[i] for i in best]
        while n < len(best) and sum(h[: n + 1]) - max(h[: n + 1]) <= gamma:
            n += 1
        return set(best[:n])
    return set(best[:quota])


@pytest.mark.parametrize(
    ("kind", "candidate"), [*((kind, "sample") for kind in ADAPTIVE), ("threshold", "argmax")]
)
def test_a_call_commits_by_the_rule(kind, candidate):
    made = settings(kind=kind, candidate=candidate, tau=0.6, gamma=1.5)
    tokens, take = map(np.asarray, commit(made, KEYS, LOG_F, FREE, QUOTA))
    f = np.exp(np.asarray(LOG_F, np.float64))
    for b in range(40):
        free = np.asarray(FREE)[b]
        wanted = rule(kind, f[b], tokens[b], free, int(QUOTA[b]), 0.6, 1.5)
        assert set(np.flatnonzero(take[b])) == wanted, b
    assert not take[0].any()
    best = f.argmax(axis=-1)
    assert (tokens == best).all() == (candidate == "argmax")
    if kind in ("threshold", "entropy_bound"):
        assert take[1:].any(axis=1).all()


@pytest.mark.parametrize("rounding", [0, 1e-7])
@pytest.mark.parametrize("kind", ["confidence", "entropy", "count"])
def test_ties_are_broken_at_random_and_not_by_position(kind, rounding):
    # Equal, or equal but for the last bit, and then the first ones larger.
    log_f = jnp.log(jnp.full((3000, 8, 2), 0.5)) * (1 + rounding * jnp.arange(8)[:, None])
    free = jnp.ones((3000, 8), bool).at[:, 5].set(False)
    made = settings(kind=kind, gamma=0.1)
    take = commit(made, each(jax.random.key(4), 3000), log_f, free, jnp.full(3000, 1))[1]
    count = np.asarray(take).sum(axis=0)
    assert count[5] == 0
    assert count.sum() == 3000
    assert (np.abs(np.delete(count, 5) - 3000 / 7) < (120 if not rounding else 200)).all()


def test_noise_does_not_reorder_what_differs():
    log_f = jnp.log(jnp.array([[0.5, 0.5], [0.5001, 0.4999], [0.4999, 0.5001]]))[None]
    log_f = jnp.broadcast_to(log_f.at[0, 2, 1].set(jnp.log(0.5002)), (500, 3, 2))
    made = settings(kind="confidence", candidate="argmax")
    ones = jnp.ones((500, 3), bool)
    take = commit(made, each(jax.random.key(5), 500), log_f, ones, jnp.full(500, 1))[1]
    assert (np.asarray(take) == [False, False, True]).all()


def peaked(seed, length=4):
    """A law whose marginals of one text are all at least 0.8, as (n + 1) e <= 1 asks for."""
    rng = np.random.default_rng(seed)
    rest = rng.dirichlet(np.full(2**length, 0.3)).reshape((2,) * length)
    text = tuple(rng.integers(0, 2, length))
    q = 0.19 * rest
    q[text] += 0.81
    return q, text


def test_threshold_is_greedy_one_by_one_where_it_must_be():
    for seed in range(20):
        q, text = peaked(seed)
        _, params = tables.exact(q)
        key = jax.random.key(seed)
        made = settings(kind="threshold", tau=0.8, candidate="argmax")
        found = sample(key, DENOISER, params, 30, 4, made)
        greedy = settings(kind="first_hitting", temperature=0.0)
        one_by_one = sample(key, DENOISER, params, 30, 4, greedy)
        np.testing.assert_array_equal(found.tokens, one_by_one.tokens)
        np.testing.assert_array_equal(found.tokens, [text] * 30)
        assert found.rounds == 1
        assert one_by_one.rounds == 4


def test_a_threshold_that_nothing_reaches_is_one_by_one():
    made = settings(kind="threshold", tau=1.0)
    q = (Q + 0.01) / (Q + 0.01).sum()
    found = sample(jax.random.key(0), DENOISER, tables.exact(q)[1], 30, 4, made)
    assert (np.asarray(found.calls) == 4).all()
    found = sample(jax.random.key(0), DENOISER, PARAMS, 30, 4, made._replace(tau=0.0))
    assert (np.asarray(found.calls) == 1).all()


def test_the_entropy_bound_spends_calls_where_something_is_open():
    q = (Q + 0.01) / (Q + 0.01).sum()
    key, made = jax.random.key(0), settings(kind="entropy_bound", gamma=0.0)
    found = sample(key, DENOISER, tables.exact(q)[1], 30, 4, made)
    assert (np.asarray(found.calls) == 4).all()
    # A pair's second token has no entropy: it comes with the next open one.
    pairs = tables.pairs(2, 4)
    found = sample(key, DENOISER, tables.exact(pairs)[1], 30, 4, made)
    assert set(np.asarray(found.calls)) <= {2, 3}
    assert (pairs[tuple(np.asarray(found.tokens).T)] > 0).all()
    free = sample(key, DENOISER, PARAMS, 30, 4, made._replace(gamma=100.0))
    assert (np.asarray(free.calls) == 1).all()


@pytest.mark.parametrize("kind", ["confidence", "margin", "entropy", "threshold"])
def test_blocks_of_one_token_have_the_law_of_the_language(kind):
    made = settings(kind=kind, steps=4, block=1, tau=0.3)
    found = sample(jax.random.key(6), DENOISER, PARAMS, 20000, 4, made)
    tables.assert_law(found.tokens, 2, Q)
    np.testing.assert_array_equal(found.when, np.broadcast_to(np.arange(4), (20000, 4)))


@pytest.mark.parametrize("kind", ["confidence", "margin", "entropy"])
def test_one_at_a_time_stays_in_the_support(kind):
    made = settings(kind=kind, steps=4)
    for q in (tables.pairs(2, 4), tables.parity(4), Q):
        found = sample(jax.random.key(7), DENOISER, tables.exact(q)[1], 20000, 4, made)
        assert (q[tuple(np.asarray(found.tokens).T)] > 0).all()


def test_the_first_to_be_written_is_the_surest():
    # Position 2 is certain, 0 is nearly so, 1 is open.
    rows = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3]]))
    params = jnp.broadcast_to(rows, (81, 4, 2))
    for kind in ("confidence", "margin", "entropy"):
        made = settings(kind=kind, steps=4, candidate="argmax")
        found = sample(jax.random.key(8), DENOISER, params, 30, 4, made)
        np.testing.assert_array_equal(found.when, np.tile([1, 3, 0, 2], (30, 1)))
        made = made._replace(block=2)
        found = sample(jax.random.key(8), DENOISER, params, 30, 4, made)
        np.testing.assert_array_equal(found.when, np.tile([0, 1, 2, 3], (30, 1)))


def test_quotas_are_of_each_texts_own_positions():
    prompt = np.full((3, 4), 2, np.int32)
    prompt[1, :2], prompt[2, :3] = 1, 0
    made = settings(kind="entropy", steps=3)
    found = sample(jax.random.key(9), DENOISER, PARAMS, 3, 4, made, prompt)
    for row, n in zip(np.asarray(found.when), (4, 2, 1), strict=True):
        sizes = plans.sizes(n, 3)
        np.testing.assert_array_equal(np.bincount(row[row >= 0]), sizes[sizes > 0])
    np.testing.assert_array_equal(found.calls, [3, 2, 1])
    assert found.rounds == 3
    assert (np.asarray(found.tokens)[prompt != 2] == prompt[prompt != 2]).all()


def test_rows_change_nothing_but_the_cost():
    made = settings(kind="confidence", steps=2)
    wanted = sample(jax.random.key(8), DENOISER, PARAMS, 30, 4, made)
    found = sample(jax.random.key(8), DENOISER, PARAMS, 30, 4, made._replace(rows=1))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.when, wanted.when)


def test_the_last_step_may_be_greedy():
    q = np.array([[0.6, 0.1], [0.1, 0.2]])
    denoiser, params = tables.exact(q)
    made = settings(kind="confidence", steps=2, final="greedy")
    found = sample(jax.random.key(0), denoiser, params, 400, 2, made)
    last, tokens = np.asarray(found.when) == 1, np.asarray(found.tokens)
    np.testing.assert_array_equal(tokens[last], tokens[~last])
    assert 0 < np.mean(tokens) < 1


def test_data_compiles_nothing_new():
    traced = []
    counted = DENOISER._replace(hidden=lambda p, x: traced.append(0) or DENOISER.hidden(p, x))
    for n, fields in enumerate([dict(), dict(tau=0.3, block=2), dict(tau=1.0, steps=7)]):
        made = settings(kind="threshold", **fields)
        sample(jax.random.key(0), counted, PARAMS, 8, 4, made)
        if n == 0:
            once = len(traced)
    assert len(traced) == once

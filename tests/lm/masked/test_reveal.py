"""Planned samplers against exact laws of tiny texts, and what a call costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.masked import enumeration, plans, reveal, schedules
from lm.masked.categorical import each
from lm.masked.denoiser import Denoiser
from lm.masked.sample import sample
from lm.masked.settings import settings
from tests.lm.masked import tables

Q = tables.random(2, 4)
DENOISER, PARAMS = tables.exact(Q)
B = 20000


def weights(made):
    return schedules.weights(schedules.schedule(made.schedule), made.grid, made.steps)


@pytest.mark.parametrize(
    "fields",
    [dict(steps=2), dict(steps=3, schedule="cosine"), dict(steps=50)],
)
def test_ancestral_sampling_has_the_exact_law(fields):
    made = settings(**fields)
    p = enumeration.law(DENOISER, PARAMS, 4, weights(made))
    found = sample(jax.random.key(0), DENOISER, PARAMS, B, 4, made)
    tables.assert_law(found.tokens, 2, p)
    k = plans.plan(jax.random.key(9), made, jnp.ones((B, 4), bool))
    assert np.mean(found.calls) == pytest.approx(float(np.mean(plans.calls(k))), rel=0.02)
    assert found.rounds == np.max(found.calls)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_count_has_the_exact_law(steps):
    p = enumeration.count_law(DENOISER, PARAMS, 4, plans.sizes(4, steps))
    made = settings(kind="count", steps=steps)
    found = sample(jax.random.key(1), DENOISER, PARAMS, B, 4, made)
    tables.assert_law(found.tokens, 2, p)
    assert (np.asarray(found.calls) == steps).all()
    if steps == 4:
        tables.assert_law(found.tokens, 2, Q)


@pytest.mark.parametrize(("per_call", "sizes"), [(1, [1] * 4), (3, [3, 1])])
def test_first_hitting_has_the_exact_law(per_call, sizes):
    p = enumeration.count_law(DENOISER, PARAMS, 4, np.array(sizes))
    made = settings(kind="first_hitting", per_call=per_call)
    found = sample(jax.random.key(2), DENOISER, PARAMS, B, 4, made)
    tables.assert_law(found.tokens, 2, p)
    assert (np.asarray(found.calls) == len(sizes)).all()


@pytest.mark.parametrize("fields", [dict(steps=3), dict(steps=4, grid="cosine")])
def test_the_literal_process_has_the_same_law(fields):
    made = settings(**fields)
    p = enumeration.law(DENOISER, PARAMS, 4, weights(made))
    x = jnp.full((B, 4), 2, jnp.int32)
    found = reveal.literal(jax.random.key(3), DENOISER, PARAMS, x, made)
    tables.assert_law(found, 2, p)


@pytest.mark.parametrize(
    ("q", "kind", "steps", "ser"),
    [
        (tables.pairs(2, 4), "ancestral", 2, 0.4375),
        (tables.parity(4), "ancestral", 2, 0.375),
        (tables.parity(4), "ancestral", 4, 0.21875),
        (tables.parity(4), "count", 2, 0.5),
        (tables.pairs(2, 4), "count", 4, 0),
        (tables.parity(4), "count", 4, 0),
        (tables.parity(4), "first_hitting", 4, 0),
    ],
)
def test_sequence_errors_are_the_closed_forms(q, kind, steps, ser):
    _, params = tables.exact(q)
    made = settings(kind=kind, steps=steps)
    found = sample(jax.random.key(4), DENOISER, params, B, 4, made).tokens
    wrong = np.mean(q[tuple(np.asarray(found).T)] == 0)
    assert abs(wrong - ser) <= 5 * np.sqrt(ser * (1 - ser) / B)


def test_blocks_of_one_token_are_autoregressive_and_exact():
    made = settings(kind="count", steps=4, block=1)
    found = sample(jax.random.key(5), DENOISER, PARAMS, B, 4, made)
    tables.assert_law(found.tokens, 2, Q)
    np.testing.assert_array_equal(found.when, np.broadcast_to(np.arange(4), (B, 4)))


def test_rare_tokens_are_as_frequent_at_many_steps():
    # One draw of "token or stay masked" makes 0.037 as many of p = 1e-4 at 1/4096 (section 7).
    p = np.array([1 - 1e-3 - 1e-4, 1e-3, 1e-4])
    log_p, length = jnp.log(jnp.asarray(p, jnp.float32)), 64
    flat = Denoiser(
        3,
        3,
        lambda params, x: jnp.zeros((*x.shape, 1)),
        lambda params, h: jnp.broadcast_to(params, (*h.shape[:2], 3)),
    )
    made = settings(steps=4096)
    found = sample(jax.random.key(6), flat, log_p, 4096, length, made).tokens
    count, n = np.bincount(np.asarray(found).reshape(-1), minlength=3), 4096 * length
    assert (np.abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
    assert abs(0.037 * p[2] - p[2]) * n > 4.5 * np.sqrt(n * p[2])  # The biased way is seen.


def test_the_head_sees_only_what_is_filled_in():
    seen = []

    def head(table, features):
        jax.debug.callback(lambda n: seen.append(int(n)), features.shape[1])
        return features

    spied = DENOISER._replace(head=head)
    x = jnp.full((3, 4), 2, jnp.int32)
    when = jnp.array([[0, 0, 0, 1], [1, 0, 2, 0], [-1, -1, -1, 0]], jnp.int32)
    x = x.at[2, :3].set(1)
    found = jax.jit(reveal.reveal, static_argnames=("denoiser", "settings"))(
        each(jax.random.key(7), 3), spied, PARAMS, x, when, settings(rows=2)
    )
    jax.effects_barrier()
    # Call 0 has three positions of a text at most, in two parts; calls 1 and 2 have one each.
    assert seen == [2, 2, 2, 2]
    assert (np.asarray(found)[2, :3] == 1).all()
    assert (np.asarray(found) < 2).all()


def test_rows_change_nothing_but_the_cost():
    made = settings(steps=2)
    wanted = sample(jax.random.key(8), DENOISER, PARAMS, 8, 4, made).tokens
    for rows in (1, 3, 100):
        found = sample(jax.random.key(8), DENOISER, PARAMS, 8, 4, made._replace(rows=rows))
        np.testing.assert_array_equal(found.tokens, wanted)


def test_the_last_step_may_be_greedy():
    q = np.array([[0.6, 0.1], [0.1, 0.2]])
    denoiser, params = tables.exact(q)
    for kind in ("ancestral", "count"):
        made = settings(kind=kind, steps=1, final="greedy")
        found = np.asarray(sample(jax.random.key(0), denoiser, params, 500, 2, made).tokens)
        assert (found == 0).all()  # Marginals 0.7, 0.3.
    made = settings(kind="count", steps=2, final="greedy")
    found = sample(jax.random.key(0), denoiser, params, 500, 2, made)
    last = np.asarray(found.when) == 1
    tokens = np.asarray(found.tokens)
    # Given 0 the other is 0, given 1 it is 1, always.
    np.testing.assert_array_equal(tokens[last], tokens[~last])
    assert 0.2 < np.mean(tokens) < 0.4
    x = jnp.full((500, 2), 2, jnp.int32)
    one = settings(steps=1, final="greedy")
    assert (np.asarray(reveal.literal(jax.random.key(0), denoiser, params, x, one)) == 0).all()


def test_steps_and_tables_compile_nothing_new():
    traced = []
    counted = DENOISER._replace(hidden=lambda p, x: traced.append(0) or DENOISER.hidden(p, x))
    other = tables.exact(tables.parity(4))[1]
    for steps, params, schedule in (
        (2, PARAMS, "linear"),
        (77, other, "cosine"),
        (4096, PARAMS, "poly3"),
    ):
        made = settings(steps=steps, schedule=schedule)
        sample(jax.random.key(steps), counted, params, 8, 4, made)
        x = jnp.full((8, 4), 2, jnp.int32)
        if steps == 2:
            once = len(traced)
    assert len(traced) == once
    for steps in (2, 77):
        reveal.literal(jax.random.key(0), counted, PARAMS, x + 0, settings(steps=steps))
        if steps == 2:
            once = len(traced)
    assert len(traced) == once

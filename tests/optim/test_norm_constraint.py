"""Lengths of updates, their schedule, and the values that may not be given."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from optim.norm_constraint import decayed_norm, scale_by_norm_constraint

UPDATES = {"a": jnp.array([[3.0, 0.0]]), "b": jnp.array(-4.0)}  # of length 5


def constrain(updates, *args):
    tx = scale_by_norm_constraint(*args)
    return jax.jit(tx.update)(updates, tx.init(updates))[0]


@pytest.mark.parametrize(
    ("limit", "mode", "factor"),
    [(1.0, "cap", 0.2), (10.0, "cap", 1.0), (1.0, "fixed", 0.2), (10.0, "fixed", 2.0)],
)
def test_length(limit, mode, factor):
    got = constrain(UPDATES, limit, mode)
    chex.assert_trees_all_close(got, jax.tree.map(lambda u: factor * u, UPDATES), rtol=1e-6)


def test_short_updates_pass_unchanged():
    updates = {"a": jax.random.normal(jax.random.key(0), (50,)) * 1e-3}
    chex.assert_trees_all_equal(constrain(updates, 1.0), updates)


@pytest.mark.parametrize("mode", ["cap", "fixed"])
def test_zero_stays_zero(mode):
    zero = jax.tree.map(jnp.zeros_like, UPDATES)
    chex.assert_trees_all_equal(constrain(zero, 1.0, mode), zero)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_underflow_nor_overflow(size):
    updates = jax.tree.map(lambda u: size * u, UPDATES)
    want = jax.tree.map(lambda u: u / 5, UPDATES)
    chex.assert_trees_all_close(constrain(updates, 1.0, "fixed"), want, rtol=1e-6)


def test_schedule_is_followed_and_dtypes_are_kept():
    updates = {"a": jnp.full(9, 2.0, jnp.bfloat16), "b": jnp.ones(2)}
    schedule = decayed_norm(0.5, decay_start=4, decay_scale=2, warmup=2)
    tx = optax.chain(scale_by_norm_constraint(schedule, "fixed"))
    state = tx.init(updates)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    lengths = []
    for _ in range(9):
        got, state = update(updates, state, updates, scores=jnp.ones(3))
        chex.assert_trees_all_equal_shapes_and_dtypes(got, updates)
        lengths.append(optax.tree.norm(jax.tree.map(lambda u: u.astype(float), got)))
    want = [0.25, 0.5, 0.5, 0.5, 0.5, 0.5 / 1.5, 0.5 / 2, 0.5 / 2.5, 0.5 / 3]
    np.testing.assert_allclose(lengths, want, rtol=5e-3)


def test_schedule_of_the_paper():
    schedule = decayed_norm(0.1, decay_start=8000, decay_scale=8000)
    got = [schedule(k) for k in (0, 8000, 16000, 32000)]
    np.testing.assert_allclose(got, [0.1, 0.1, 0.05, 0.025], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: scale_by_norm_constraint(0.0), "max_norm"),
        (lambda: scale_by_norm_constraint(float("nan")), "max_norm"),
        (lambda: scale_by_norm_constraint(1.0, "clip"), "norm_mode"),
        (lambda: decayed_norm(-1.0, 1, 1), "max_norm"),
        (lambda: decayed_norm(1.0, 1, 0), "decay_scale"),
        (lambda: decayed_norm(1.0, -1, 1), "decay_start"),
        (lambda: decayed_norm(1.0, 1, 1, warmup=-5), "warmup"),
    ],
)
def test_bad_values_are_named(make, field):
    with pytest.raises(UserError, match=rf"config\.optim\.{field} is"):
        make()


@pytest.mark.parametrize("late", [3_000_000_000, 10**12])
def test_a_decay_that_never_starts(late):
    schedule = decayed_norm(0.5, decay_start=late, decay_scale=2)
    assert float(schedule(jnp.int32(5))) == pytest.approx(0.5)

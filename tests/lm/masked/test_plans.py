"""Plans against their laws and the numbers of calls that theory has for them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.masked import plans, schedules
from lm.masked.plans import NEVER
from lm.masked.settings import settings

plan = plans.plan
when, calls = jax.jit(plans.when), jax.jit(plans.calls)


@jax.jit
def groups(rank, n, steps):
    return plans.group(rank, n, steps), plans.group_size(rank, n, steps)


def full(batch, length):
    return jnp.ones((batch, length), bool)


@pytest.mark.parametrize(
    ("schedule", "grid", "steps"),
    [("linear", "uniform", 5), ("cosine", "uniform", 4), ("poly2", "cosine", 3)],
)
def test_ancestral_steps_are_drawn_by_the_weights_each_by_itself(schedule, grid, steps):
    made = settings(schedule=schedule, grid=grid, steps=steps)
    k = np.asarray(plan(jax.random.key(0), made, full(8000, 2)))
    w = schedules.weights(schedules.schedule(schedule), grid, steps)
    p = np.outer(w, w).reshape(-1)
    found = np.bincount(k[:, 0] * steps + k[:, 1], minlength=steps**2)
    assert (np.abs(found - 8000 * p) <= 5 * np.sqrt(8000 * p * (1 - p))).all()
    assert k.dtype == np.int32


def test_the_table_of_weights_is_exact_to_2_to_the_minus_32():
    made = settings(schedule="cosine", steps=5000)
    table = plans.table(made, 8).astype(np.float64) / 2**32
    w = schedules.weights(schedules.schedule("cosine"), "uniform", 5000)
    assert len(table) == 8192
    np.testing.assert_allclose(table[:4999], np.cumsum(w)[:-1], rtol=0, atol=1.2e-10)
    assert len(plans.table(made._replace(steps=1), 8)) == plans.LEAST_TABLE
    # Where all bits are ones, the last step: padding is no step.
    one = np.asarray(plan(jax.random.key(0), settings(steps=1), full(1000, 8)))
    assert (one == 0).all()


@pytest.mark.parametrize(("length", "steps"), [(8, 3), (8, 8), (8, 1), (8, 5)])
def test_count_has_groups_of_its_sizes_in_a_random_order(length, steps):
    k = np.asarray(
        plan(jax.random.key(1), settings(kind="count", steps=steps), full(1000, length))
    )
    sizes = plans.sizes(length, steps)
    assert sizes.sum() == length
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()
    for row in k:
        np.testing.assert_array_equal(np.bincount(row, minlength=steps), sizes)
    share = (k[:, :, None] == np.arange(steps)).mean(axis=0)
    error = np.sqrt(sizes / length * (1 - sizes / length) / 1000)
    assert (np.abs(share - sizes / length) <= 5 * error + 1e-9).all()


def test_every_order_is_as_frequent_as_another():
    k = np.asarray(plan(jax.random.key(2), settings(kind="first_hitting"), full(6000, 4)))
    found = np.unique(k @ 4 ** np.arange(4), return_counts=True)[1]
    assert len(found) == len(list(itertools.permutations(range(4))))
    assert (np.abs(found - 250) <= 5 * np.sqrt(250)).all()


def test_groups_of_a_prompt_are_of_its_own_free_positions():
    free = np.zeros((3, 6), bool)
    free[0, 1:6], free[1, 3:5] = True, True
    k = np.asarray(plan(jax.random.key(3), settings(kind="count", steps=3), jnp.asarray(free)))
    assert (k[~free] == NEVER).all()
    np.testing.assert_array_equal(np.bincount(k[0][free[0]]), [2, 2, 1])
    np.testing.assert_array_equal(np.bincount(k[1][free[1]]), [1, 1])  # No empty step.
    np.testing.assert_array_equal(calls(k), [3, 2, 0])
    found = np.asarray(plan(jax.random.key(3), settings(), jnp.asarray(free)))
    assert (found[~free] == NEVER).all()
    assert (found[free] < 32).all()
    np.testing.assert_array_equal(calls(found)[2], 0)


@pytest.mark.parametrize("per_call", [1, 5])
def test_first_hitting_takes_so_many_a_call(per_call):
    made = settings(kind="first_hitting", per_call=per_call)
    k = np.asarray(plan(jax.random.key(4), made, full(50, 12)))
    wanted = [min(per_call, 12 - first) for first in range(0, 12, per_call)]
    for row in k:
        np.testing.assert_array_equal(np.bincount(row), wanted)
    assert (np.asarray(calls(k)) == -(-12 // per_call)).all()


@pytest.mark.parametrize("kind", ["ancestral", "count", "first_hitting"])
def test_blocks_come_one_after_the_other(kind):
    made = settings(kind=kind, block=4, steps=6)
    k = np.asarray(plan(jax.random.key(5), made, full(50, 12))).reshape(50, 3, 4)
    assert (k.max(axis=2)[:, :-1] < k.min(axis=2)[:, 1:]).all()
    if kind != "first_hitting":
        np.testing.assert_array_equal(k // 2, np.broadcast_to(np.arange(3)[:, None], k.shape))
    if kind == "count":
        assert ((k % 2 == 0).sum(axis=2) == 2).all()
    # b = 1 is from left to right, b = L no blocks at all.
    one = plan(jax.random.key(5), made._replace(block=1, steps=12), full(50, 12))
    np.testing.assert_array_equal(when(one), np.broadcast_to(np.arange(12), (50, 12)))
    whole = plan(jax.random.key(5), made._replace(block=12), full(50, 12))
    none = plan(jax.random.key(5), made._replace(block=0), full(50, 12))
    np.testing.assert_array_equal(whole, none)


def test_calls_are_the_distinct_steps_in_their_order():
    k = jnp.array([[5, 2, 9, 2], [0, 0, 0, 0], [NEVER, 7, NEVER, 1], [NEVER] * 4], jnp.int32)
    wanted = [[1, 0, 2, 0], [0, 0, 0, 0], [-1, 1, -1, 0], [-1] * 4]
    np.testing.assert_array_equal(when(k), wanted)
    np.testing.assert_array_equal(calls(k), [3, 1, 2, 0])


@pytest.mark.parametrize(("length", "steps"), [(64, 64), (64, 16), (64, 300), (1024, 5000)])
def test_calls_follow_the_formula(length, steps):
    """Equation (8): T (1 - (1 - 1/T)^L) for one text, and with B L for one clock for all."""
    batch = 16
    k = np.asarray(plan(jax.random.key(6), settings(steps=steps), full(batch, length)))
    wanted = steps * (1 - (1 - 1 / steps) ** length)
    assert np.mean(calls(k)) == pytest.approx(wanted, rel=0.02)
    together = steps * (1 - (1 - 1 / steps) ** (batch * length))
    assert len(np.unique(k)) == pytest.approx(together, rel=0.02)
    if (length, steps) == (1024, 5000):
        assert (round(wanted), round(together)) == (926, 4811)


def test_a_plan_knows_not_its_batch():
    for kind in ("ancestral", "count", "first_hitting"):
        made = settings(kind=kind, steps=6)
        large = plan(jax.random.key(7), made, full(1000, 8))
        np.testing.assert_array_equal(plan(jax.random.key(7), made, full(2, 8)), large[:2])


def test_a_group_is_that_of_its_rank():
    for n, steps in itertools.product(range(1, 9), range(1, 11)):
        sizes = plans.sizes(n, steps)
        wanted = np.repeat(np.arange(steps), sizes)
        group, size = groups(jnp.arange(8), jnp.full(8, n), steps)
        np.testing.assert_array_equal(group[:n], wanted)
        starts = np.concatenate([[0], np.cumsum(sizes)])[: np.sum(sizes > 0)]
        np.testing.assert_array_equal(size[starts], sizes[sizes > 0])

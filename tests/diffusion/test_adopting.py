"""Runs that start from another run's network, and those whose gradients stay broken."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import runner
from common.errors import UserError
from optim.denoising import PATIENCE, denoising
from tests.diffusion.test_training import config, started, trained


@pytest.fixture(scope="module")
def donor():
    return trained(3)[1]


@pytest.mark.parametrize("kind", ["half_life", "power", "plain"])
def test_a_run_starts_from_the_average_and_goes_on_from_there(donor, kind):
    many = dict(ema=dict(kind=kind))
    _, fresh, _ = started(config(**many))
    made = runner.make(config(**many))
    state = made.adopt(fresh, donor)
    want = donor.averages.trees[0]
    chex.assert_trees_all_equal(state.params["net"], want)
    for tree in state.averages.trees:
        chex.assert_trees_all_equal(tree, want)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), donor.params["net"], want)
    assert any(jax.tree.leaves(moved))


def test_a_run_trains_on_from_another(donor):
    _, after, values, _ = trained(2, donor=donor, ema=dict(kind="power"))
    assert np.isfinite(values["loss"])
    assert int(after.averages.step) == 2


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=dict(mlp=dict(width=24))),
        dict(model=dict(mlp=dict(layers=2))),
        dict(model=dict(name="dit")),
    ],
    ids=str,
)
def test_another_network_is_refused(donor, changes):
    made = runner.make(config(**changes))
    fresh = jax.eval_shape(made.init, jax.random.key(0))
    with pytest.raises(UserError, match=r"config\.init_from.*same network"):
        made.adopt(fresh, donor)


def test_the_learned_loss_starts_anew_where_the_donor_has_none(donor):
    made = runner.make(config(schedule=dict(kind="edm2")))
    fresh = jax.jit(made.init)(jax.random.key(0))
    state = made.adopt(fresh, donor)
    chex.assert_trees_all_equal(state.params["net"], donor.averages.trees[0])
    chex.assert_trees_all_equal(state.params["log_loss"], fresh.params["log_loss"])


def test_no_number_of_broken_steps_moves_anything():
    given = dict(name="adam", steps=100, learning_rate=0.1, rate="constant", warmup=0)
    given |= dict(decay_from=1, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=0.0)
    tx = denoising(**given)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2 * PATIENCE):
        updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, {"w": jnp.ones(2)})
    assert int(state.notfinite_count) == 2 * PATIENCE


def test_too_many_broken_steps_are_shown_until_somebody_looks():
    c = config()
    made, state, step = started(c)
    good = made.batch(0)
    bad = good | {"x": np.full_like(good["x"], np.nan)}
    shown = []
    for i in range(PATIENCE + 2):
        given = bad if i < PATIENCE else good
        state, values = step(state, given, jax.random.key(1), jnp.uint32(i))
        shown.append(float(values["loss"]))
    assert np.isfinite(shown[: PATIENCE - 1]).all()
    assert not np.isfinite(shown[PATIENCE - 1 :]).any()
    chex.assert_tree_all_finite(state.params)

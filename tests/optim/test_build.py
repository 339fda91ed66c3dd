"""Chains of a config: what a refused batch does to each of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import config as configs
from optim.build import variational


@pytest.mark.parametrize("name", ["march", "spring", "minsr", "adam", "sgd"])
def test_a_refused_batch_moves_and_ages_nothing(name):
    fields = configs.load("configs/nqs.py").optim.to_dict() | dict(name=name)
    tx = variational(**fields, clip=5.0, linalg="float32")
    params = {"w": jnp.arange(4.0)}
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    energy = jnp.asarray(rng.normal(size=8), jnp.float32)
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, state = update(params, state, params, scores=scores, local_energy=energy)
    assert float(optax.tree.norm(first)) > 0
    bad = energy.at[:4].set(jnp.nan)
    refused, after = update(params, state, params, scores=scores, local_energy=bad)
    chex.assert_trees_all_equal(refused, jax.tree.map(jnp.zeros_like, params))
    heart = lambda s: s[0] if name in ("march", "spring", "minsr") else s
    chex.assert_trees_all_equal(heart(after), heart(state))

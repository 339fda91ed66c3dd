"""The chains of pre-training: every rule under every optimizer, and the schedule."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import config as configs
from common.errors import UserError
from lm.modules import modules
from lm.transformer import transformer
from optim.pretraining import OPTIMIZERS, RULES, pretraining, schedule

PARTS = dict(vocab=11, dim=16, mlp=24, heads=2, depth=2)
COUPLED = ("cautious", "adamc", "scheduled", "norm_control")


def settings(**changes):
    fields = configs.load("configs/alphadecay.py:test").optim.to_dict()
    return fields | dict(steps=8, modules=modules) | changes


def run(steps=3, **changes):
    params = transformer(**PARTS).init(jax.random.key(0))
    tx = pretraining(**settings(**changes))
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(7 * p + i), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@cache
def plain(name):
    """Without decay, once for all rules."""
    return run(name=name, rule="none")


FEW = ("none", "uniform", "alphadecay", "static_by_type", "cautious")
CHAINS = [(n, r) for n in OPTIMIZERS for r in (RULES if n in ("adam", "adamw") else FEW)]


@pytest.mark.parametrize(("name", "rule"), CHAINS)
def test_every_rule_takes_finite_steps_and_decays(name, rule):
    if name == "adam" and rule in COUPLED:
        with pytest.raises(UserError, match="rule that couples"):
            run(name=name, rule=rule)
        return
    changes = dict(name=name, rule=rule, weight_decay=0.5)
    got = run(**changes)
    chex.assert_tree_all_finite(got)
    if rule == "none":
        chex.assert_trees_all_equal(got, plain(name))
    elif rule != "norm_control":  # It may pull outwards.
        size = lambda tree: float(optax.tree.norm(tree["blocks"]["up"]))
        assert size(got) < size(plain(name))


def test_rules_differ_where_they_should():
    """The controls decay what is no module as uniform decay does."""
    ratios = dict(q=2.0, k=1, v=1, o=1, gate=1, up=1, down=1)
    shared = dict(weight_decay=0.5, ratios=ratios, clip=0.0)
    uniform = run(rule="uniform", **shared)
    names = ("uniform_matched", "static_by_type", "alphadecay", "shuffled")
    others = {name: run(rule=name, **shared) for name in names}
    for name, tree in others.items():
        chex.assert_trees_all_close(tree["embed"], uniform["embed"], rtol=1e-6)
        q, base = tree["blocks"]["q"]["kernel"], uniform["blocks"]["q"]["kernel"]
        assert not np.allclose(q, base, rtol=1e-5), name
    up, base = (t["blocks"]["up"]["kernel"] for t in (others["static_by_type"], uniform))
    np.testing.assert_allclose(up, base, rtol=1e-6)


def test_uniform_matched_is_one_ratio_for_all_modules():
    params = transformer(**PARTS).init(jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    changes = dict(weight_decay=0.3, matched=2.5, ratios=dict(q=0.0), warmup=0.0)
    found = {}
    for rule in ("uniform_matched", "none"):
        tx = pretraining(**settings(rule=rule, **changes))
        found[rule], _ = tx.update(grads, tx.init(params), params)
    rate = settings()["learning_rate"]
    ratio = {name: 1.0 if "norm" in name else 2.5 for name in params["blocks"]}
    for name, value in ratio.items():
        (got, plain, w) = (
            jax.tree.leaves(tree["blocks"][name])[0]
            for tree in (found["uniform_matched"], found["none"], params)
        )
        np.testing.assert_allclose(got, plain - rate * 0.3 * value * w, rtol=1e-5, atol=1e-9)


def test_awd_goes_by_the_gradient_before_clipping():
    """bar_0 = 0.9 factor eta |g| / |w| of section 8, for all parameters alike."""
    params = transformer(**PARTS).init(jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    norm = lambda tree: np.sqrt(sum(float(np.sum(np.square(a))) for a in jax.tree.leaves(tree)))
    changes = dict(weight_decay=0.01, awd_factor=50.0, clip=0.5, warmup=0.0, b1=0.0)
    found = {}
    for rule in ("awd", "none"):
        tx = pretraining(**settings(rule=rule, **changes))
        found[rule], _ = tx.update(grads, tx.init(params), params)
    rate = settings()["learning_rate"]
    decay = 0.9 * 50 * 0.01 * norm(grads) / (norm(params) + 1e-8)
    want = jax.tree.map(lambda u, p: u - rate * decay * p, found["none"], params)
    chex.assert_trees_all_close(found["awd"], want, rtol=1e-5, atol=1e-9)


def test_the_schedule():
    rate = schedule(1e-3, 100, 0.1, 0.1)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(5e-4)
    assert float(rate(10)) == pytest.approx(1e-3)
    assert float(rate(55)) == pytest.approx(1e-3 * (0.1 + 0.9 / 2))
    assert float(rate(100)) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(name="adamz"), r"optim\.name is 'adamz', but must be one of adamw"),
        (dict(rule="uniforn"), r"optim\.rule is 'uniforn'"),
        (dict(clip=-1.0), r"optim\.clip is -1\.0"),
        (dict(warmup=2.0), r"optim\.warmup is 2\.0"),
        (dict(learning_rate=0.0), r"optim\.learning_rate is 0\.0"),
        (dict(b2=1.0), r"optim\.b2 is 1\.0"),
        (dict(weight_decay=float("nan")), r"optim\.weight_decay is nan"),
        (dict(rule="static_by_type", ratios=dict(query=1.0)), r"optim\.ratios is 'query'"),
        (dict(rule="static_by_type", ratios=dict(q=0.0)), r"must be the mean of an AlphaDecay"),
        (dict(rule="uniform_matched", matched=0.0), r"optim\.matched is 0\.0, but must be the"),
        (dict(rule="uniform_matched", matched=-1.0), r"optim\.matched is -1\.0"),
        (dict(decay_rest="all"), r"optim\.decay_rest is 'all', but must be base or none"),
    ],
)
def test_what_cannot_be_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        run(**changes)

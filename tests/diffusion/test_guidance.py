"""Guidance by its formula and its limits; dropped conditions by counting."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion.guidance import absent, classifier_free, drop, guided

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 3, 3, 2)), jnp.float32)
LEVELS = jnp.asarray([0.1, 0.5, 2.0, 7.0])
CONDITION = {
    "label": jnp.asarray([0, 2, 1, -1], jnp.int32),
    "vector": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32),
    "channels": jnp.asarray(RNG.normal(size=(4, 3, 3, 1)), jnp.float32),
    "augment": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
}


def of_condition(condition):
    """Every part of the condition shows in what this denoiser says."""

    def denoiser(x, sigma):
        shift = condition["label"] + condition["vector"].sum(axis=-1)
        shift = shift + 0.1 * condition["augment"].sum(axis=-1) + jnp.log(sigma)
        return jnp.tanh(x) * shift[:, None, None, None] + condition["channels"]

    return denoiser


MAIN, FREE = of_condition(CONDITION), of_condition(absent(CONDITION))


def formula(weight):
    main, free = (np.asarray(f(IMAGES, LEVELS), np.float64) for f in (MAIN, FREE))
    return main, free, free + weight * (main - free)


@pytest.mark.parametrize("stacked", [True, False])
def test_one_is_the_condition_zero_is_none_and_more_goes_beyond(stacked):
    for weight in (0.0, 1.0, 2.8):
        found = classifier_free(of_condition, CONDITION, weight, stacked=stacked)
        chex.assert_trees_all_close(
            found(IMAGES, LEVELS), np.float32(formula(weight)[2]), rtol=1e-5, atol=1e-5
        )
    assert np.abs(formula(1.0)[0] - formula(0.0)[1]).max() > 0.1


@pytest.mark.parametrize("stacked", [True, False])
def test_beyond_the_interval_the_condition_alone_counts(stacked):
    main, _, led = formula(3.0)
    found = classifier_free(of_condition, CONDITION, 3.0, interval=(0.5, 2.0), stacked=stacked)(
        IMAGES, LEVELS
    )
    inside = np.array([False, True, True, False])[:, None, None, None]
    chex.assert_trees_all_close(
        found, np.float32(np.where(inside, led, main)), rtol=1e-5, atol=1e-5
    )


def test_the_guide_is_not_run_where_no_sample_is_inside():
    runs = []

    def guide(x, sigma):
        jax.debug.callback(lambda: runs.append(1))
        return x

    denoiser = jax.jit(guided(MAIN, guide, 2.0, interval=(0.5, 2.0)))
    for level, total in ((0.1, 0), (1.0, 1), (3.0, 1)):
        jax.block_until_ready(denoiser(IMAGES, jnp.full(4, level)))
        jax.effects_barrier()
        assert len(runs) == total


def test_a_weaker_model_can_be_the_guide_and_samples_may_differ_in_weight():
    weak = lambda x, sigma: 0.5 * MAIN(x, sigma) + 0.1
    weight = jnp.asarray([0.0, 1.0, 2.0, 4.0])
    main = np.asarray(MAIN(IMAGES, LEVELS))
    want = 0.5 * main + 0.1 + np.asarray(weight)[:, None, None, None] * (0.5 * main - 0.1)
    found = guided(MAIN, weak, weight)(IMAGES, LEVELS)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_level_for_all_samples_is_taken_as_one_for_each():
    found = guided(MAIN, FREE, 2.0, interval=(0.1, 1.0))
    chex.assert_trees_all_close(found(IMAGES, 0.5), found(IMAGES, jnp.full(4, 0.5)))


@pytest.mark.parametrize("stacked", [True, False])
def test_rescaling_brings_the_spread_of_each_sample_back(stacked):
    main, _, led = formula(4.0)
    axes = (1, 2, 3)
    go = partial(classifier_free, of_condition, CONDITION, 4.0, stacked=stacked)
    full = np.asarray(go(rescale=1.0)(IMAGES, LEVELS))
    np.testing.assert_allclose(full.std(axis=axes), main.std(axis=axes), rtol=1e-4)
    half = np.asarray(go(rescale=0.5)(IMAGES, LEVELS))
    np.testing.assert_allclose(half, (full + led) / 2, rtol=1e-4, atol=1e-5)


def test_rescaling_leaves_a_sample_without_spread_as_it_is():
    flat = lambda x, sigma: jnp.ones_like(x)
    found = guided(flat, flat, 2.0, rescale=0.7)(IMAGES, LEVELS)
    np.testing.assert_array_equal(found, np.ones_like(IMAGES))


def test_an_absent_condition_has_nothing_in_it_but_the_augmentation():
    none = absent(CONDITION)
    np.testing.assert_array_equal(none["label"], [-1] * 4)
    assert not np.asarray(none["vector"]).any()
    assert not np.asarray(none["channels"]).any()
    np.testing.assert_array_equal(none["augment"], CONDITION["augment"])
    chex.assert_trees_all_equal_shapes_and_dtypes(none, CONDITION)


def gone(condition):
    """[names, B] of which conditions are absent; the originals never are."""
    return np.stack(
        [
            np.asarray(condition["label"]) == -1,
            ~np.asarray(condition["vector"]).any(axis=-1),
            ~np.asarray(condition["channels"]).any(axis=(1, 2, 3)),
        ]
    )


def many(n):
    return {
        "label": jnp.zeros(n, jnp.int32),
        "vector": jnp.ones((n, 2)),
        "channels": jnp.ones((n, 1, 1, 1)),
        "augment": jnp.ones((n, 1)),
    }


def near(share, p, n):
    return abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_each_condition_is_dropped_by_itself():
    n = 20_000
    found = drop(jax.random.key(0), many(n), 0.2)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, many(n))
    np.testing.assert_array_equal(found["augment"], np.ones((n, 1)))
    dropped = gone(found)
    for share in dropped.mean(axis=1):
        assert near(share, 0.2, n)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert near((dropped[i] & dropped[j]).mean(), 0.04, n)


def test_all_of_a_sample_are_dropped_together():
    n = 20_000
    dropped = gone(drop(jax.random.key(1), many(n), 0.0, together=0.3))
    np.testing.assert_array_equal(dropped, dropped[:1].repeat(3, axis=0))
    assert near(dropped[0].mean(), 0.3, n)
    both = gone(drop(jax.random.key(2), many(n), 0.1, together=0.3))
    assert near(both.all(axis=0).mean(), 0.3 + 0.7 * 0.001, n)
    assert near(both[0].mean(), 0.37, n)


def test_a_whole_batch_is_dropped_at_once():
    keys = jax.random.split(jax.random.key(3), 400)
    found = jax.vmap(lambda key: drop(key, many(3), 0.0, batch=0.25))(keys)
    flat = np.stack([gone(jax.tree.map(lambda a, i=i: a[i], found)) for i in range(400)])
    flat = flat.reshape(400, -1)
    np.testing.assert_array_equal(flat.all(axis=1), flat.any(axis=1))
    assert near(flat[:, 0].mean(), 0.25, 400)


def test_rates_by_name_leave_the_others_alone():
    dropped = gone(drop(jax.random.key(4), many(50), {"vector": 1.0}))
    np.testing.assert_array_equal(dropped.mean(axis=1), [0, 1, 0])
    same = drop(jax.random.key(5), CONDITION, 0.0)
    chex.assert_trees_all_equal(same, CONDITION)
    every = drop(jax.random.key(5), CONDITION, 1.0)
    chex.assert_trees_all_equal(every, absent(CONDITION))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: guided(MAIN, FREE, -0.5), "sampler.guidance"),
        (lambda: guided(MAIN, FREE, float("nan")), "sampler.guidance"),
        (lambda: guided(MAIN, FREE, 2.0, interval=(2.0, 1.0)), "sampler.interval"),
        (lambda: guided(MAIN, FREE, 2.0, rescale=1.5), "sampler.rescale"),
        (lambda: classifier_free(of_condition, CONDITION, -1.0), "sampler.guidance"),
        (lambda: drop(jax.random.key(0), CONDITION, 1.5), "train.drop.rate.channels"),
        (lambda: drop(jax.random.key(0), CONDITION, together=-0.1), "train.drop.together"),
        (lambda: drop(jax.random.key(0), CONDITION, batch=float("nan")), "train.drop.batch"),
        (lambda: drop(jax.random.key(0), CONDITION, {"text": 0.1}), "train.drop.rate.text"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(call, field):
    with pytest.raises(UserError, match=rf"config\.{field} is"):
        call()

"""The same samples in any batch and on any number of devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from common import mesh as meshes
from common.errors import UserError
from diffusion import grids
from diffusion.guidance import classifier_free
from diffusion.samplers import sample
from diffusion.sampling import generate

SHAPE = (4, 4, 1)
SIGMAS = grids.edm(5, sigma_max=10.0)
INDICES = np.array([3, 0, 7, 100_000, 12, 5, 6, 1, 2, 9, 40])
LABELS = {"label": np.arange(11, dtype=np.int32) % 3}


def elementwise(scale, condition):
    """A denoiser in which nothing is summed up: no batch can change its rounding."""

    def denoiser(x, sigma):
        s = sigma[:, None, None, None]
        mean = condition["label"][:, None, None, None] * scale
        return mean + (x - mean) / (1 + s**2)

    return denoiser


MAKE = Partial(elementwise, jnp.float32(0.3))


def run(devices=None, batch_size=8, indices=INDICES, condition=LABELS, key=0, **options):
    settings = dict(shape=SHAPE, sigmas=SIGMAS, batch_size=batch_size, condition=condition)
    go = lambda: generate(MAKE, indices, jax.random.key(key), **settings, **options)
    if devices is None:
        return go()
    with jax.set_mesh(meshes.make(devices=jax.devices()[:devices])):
        return go()


STOCHASTIC = dict(method="edm", s_churn=3.0)


def test_samples_are_the_same_in_any_batch_on_any_devices():
    want = run(batch_size=11, **STOCHASTIC)
    assert want.shape == (11, *SHAPE)
    assert want.dtype == np.float32
    for devices, batch_size in ((1, 8), (2, 8), (8, 8), (8, 16), (None, 3)):
        found = run(devices, batch_size, **STOCHASTIC)
        np.testing.assert_array_equal(found, want)


def test_without_noise_on_the_way_too():
    want = run(batch_size=11)
    np.testing.assert_array_equal(run(8, 8), want)
    assert np.abs(run(**STOCHASTIC) - want).max() > 0.01


def test_a_network_that_sums_agrees_up_to_rounding():
    kernel = jax.random.normal(jax.random.key(1), (16, 16)) / 4

    def make(kernel, condition):
        del condition

        def denoiser(x, sigma):
            flat = x.reshape(len(x), -1) / (1 + sigma[:, None])
            return jnp.tanh(flat @ kernel).reshape(x.shape)

        return denoiser

    results = []
    for devices in (1, 8):
        with jax.set_mesh(meshes.make(devices=jax.devices()[:devices])):
            results.append(
                generate(
                    Partial(make, kernel),
                    INDICES,
                    jax.random.key(0),
                    shape=SHAPE,
                    sigmas=SIGMAS,
                    batch_size=8,
                )
            )
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)


def test_a_sample_is_that_of_its_number_in_any_order():
    want = run(**STOCHASTIC)
    order = np.array([4, 9, 1])
    some = {"label": LABELS["label"][order]}
    found = run(batch_size=2, indices=INDICES[order], condition=some, **STOCHASTIC)
    np.testing.assert_array_equal(found, want[order])


def test_a_sample_takes_its_noise_from_key_and_number():
    rows = [2, 4]
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), INDICES[i])) for i in rows]
    noise = jnp.stack([jax.random.normal(key[0], SHAPE) for key in keys])
    steps = jnp.stack([key[1] for key in keys])
    denoiser = MAKE({"label": jnp.asarray(LABELS["label"][rows])})
    want = sample(denoiser, noise, SIGMAS, steps, **STOCHASTIC)
    np.testing.assert_allclose(run(**STOCHASTIC)[rows], want, rtol=1e-5, atol=1e-5)


def test_numbers_keys_and_conditions_make_a_difference():
    want = run()
    assert len({row.tobytes() for row in want}) == 11
    assert np.abs(run(key=1) - want).min() > 0
    changed = run(condition={"label": (LABELS["label"] + 1) % 3})
    assert np.abs(changed - want).max() > 0.1


def test_the_work_is_split_over_the_devices():
    seen = []

    def make(condition):
        del condition

        def denoiser(x, sigma):
            jax.debug.inspect_array_sharding(x, callback=seen.append)
            return x / (1 + sigma[:, None, None, None])

        return denoiser

    with jax.set_mesh(meshes.make(devices=jax.devices()[:8])):
        settings = dict(shape=SHAPE, sigmas=SIGMAS, batch_size=16)
        generate(make, INDICES, jax.random.key(0), **settings)
    assert seen
    assert all(sharding.shard_shape((16, *SHAPE)) == (2, *SHAPE) for sharding in seen)


def test_other_keys_grids_and_parameters_are_no_compilation():
    traces = []

    def make(scale, condition):
        traces.append(1)
        return elementwise(scale, condition)

    def go(scale, key, sigmas, n):
        generate(
            Partial(make, jnp.float32(scale)),
            INDICES[:n],
            jax.random.key(key),
            shape=SHAPE,
            sigmas=sigmas,
            batch_size=4,
            condition={"label": LABELS["label"][:n]},
        )

    go(0.3, 0, SIGMAS, 11)
    go(0.3, 1, SIGMAS, 5)
    go(0.5, 2, 2 * SIGMAS, 1)
    assert len(traces) == 1


def test_guidance_is_a_denoiser_of_a_condition_too():
    def make(scale, condition):
        return classifier_free(Partial(elementwise, scale), condition, 1.0)

    settings = dict(shape=SHAPE, sigmas=SIGMAS, batch_size=4, condition=LABELS)
    bound = Partial(make, jnp.float32(0.3))
    found = generate(bound, INDICES, jax.random.key(0), **settings)
    np.testing.assert_allclose(found, run(), atol=1e-5)


def test_no_samples_are_an_empty_array():
    assert run(indices=INDICES[:0], condition=None).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("batch_size", dict(batch_size=0)),
        ("batch_size", dict(batch_size=12, devices=8)),
        ("indices", dict(indices=np.array([1, -1]), condition=None)),
        ("indices", dict(indices=np.array([2**31]), condition=None)),
        ("condition.label", dict(condition={"label": np.zeros(4, np.int32)})),
        ("method", dict(method="plms")),
        ("eta", dict(eta=0.5)),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(field, settings):
    with pytest.raises(UserError, match=rf"config\.sampler\.{field} is"):
        run(**settings)

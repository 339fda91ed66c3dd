"""Samples: classes as often as in the data, guidance, grids, and options that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion import drawing, grids
from diffusion.dataset import dataset
from diffusion.images import scaled
from diffusion.parts import parts_of
from diffusion.processes import ddpm_levels, process
from tests.diffusion.test_training import config


def test_classes_come_as_often_as_in_the_data():
    labels = np.repeat([0, 1, 2], [500, 300, 200])  # Sorted, as folders are.
    found = drawing.classes(labels, 100, -1)
    np.testing.assert_array_equal(np.bincount(found), [50, 30, 20])
    assert (np.diff(found) < 0).any()
    np.testing.assert_array_equal(drawing.classes(labels, 4, 2), 2)


def ready(**changes):
    c = config(**changes)
    data = dataset(**c.data, seed=c.data_seed)
    parts = parts_of(c, data)
    return c, data, parts


def told(params, condition):
    """A denoiser whose samples show their class."""
    level = 0.0 if condition is None else condition["label"].astype(jnp.float32) / 10
    return lambda x, s: params + 0 * x + jnp.reshape(level, (-1, 1, 1, 1))


def test_samples_are_told_their_classes_and_guidance_acts():
    given = dict(data=dict(class_cond=True), label_drop=0.1)
    c, data, parts = ready(**given)
    parts = parts._replace(of_condition=told)
    zero = jnp.float32(0.0)
    made = drawing.samples(c, data, parts, zero, jax.random.key(0), 50)
    shown = np.round(10 * made.mean((1, 2, 3))).astype(int)
    np.testing.assert_array_equal(np.sort(shown), np.sort(drawing.classes(data.labels, 50, -1)))
    c.sampler.guidance = 3.0
    drawing.check(c, data, parts)
    led = drawing.samples(c, data, parts, zero, jax.random.key(0), 50)
    # D_u + 3 (D_c - D_u), and the class that is absent is -1.
    np.testing.assert_allclose(led, -0.1 + 3 * (made + 0.1), atol=1e-5)
    c.sampler.guide_low, c.sampler.guide_high = 100.0, 200.0
    apart = drawing.samples(c, data, parts, zero, jax.random.key(0), 50)
    np.testing.assert_allclose(apart, made, atol=1e-6)


def test_the_grids():
    c = config().sampler
    c.n, c.grid = 9, "edm"
    np.testing.assert_array_equal(drawing.grid(c, process("edm")), grids.edm(9))
    c.grid = "log_uniform"
    found = drawing.grid(c, process("edm"))
    np.testing.assert_allclose(found[:-1], np.geomspace(80, 0.002, 9))
    c.grid = "times"
    vp = drawing.grid(c, process("vp"))
    assert vp[0] == pytest.approx(np.sqrt(np.exp(10.05) - 1), rel=1e-3)
    assert vp[-1] == 0
    levels = ddpm_levels(500, 1e-4, 0.028)
    ddpm = drawing.grid(c, process("ddpm", steps=500, beta_last=0.028))
    assert len(ddpm) == 10
    assert (np.diff(ddpm) < 0).all()
    np.testing.assert_allclose(ddpm[[0, -2, -1]], [levels[-1], levels[0], 0], rtol=1e-5)
    c.n = 500
    every = drawing.grid(c, process("ddpm", steps=500, beta_last=0.028))
    np.testing.assert_allclose(every, [*levels[::-1], 0], rtol=1e-5)
    c.n = 1
    with pytest.raises(UserError, match=r"sampler\.n is 1, but must be .* from 2 up"):
        drawing.grid(c, process("iddpm"))
    c.n = 9
    c.grid, c.shift = "flow", 2.0
    assert drawing.grid(c, process("fm_linear"))[-1] == 0


@pytest.mark.parametrize("name", ["ddpm", "iddpm", "vp", "ve"])
@pytest.mark.parametrize("method", ["ddim", "dpm_3s"])
def test_equal_steps_of_time_leave_no_noise_in_samples(name, method):
    """With the exact denoiser every sample becomes a row."""
    start = "ve" if name == "ve" else "vp"
    chosen = dict(grid="times", method=method, n=50, batch_size=32, start=start)
    c, data, parts = ready(process=dict(name=name), sampler=chosen)
    rows = np.reshape(scaled(data.rows), (len(data.rows), -1))

    def exact(params, condition):
        del params, condition

        def denoiser(x, s):
            flat = x.reshape(len(x), 1, -1)
            logit = -0.5 * jnp.sum((flat - rows) ** 2, -1) / s[:, None] ** 2
            return (jax.nn.softmax(logit) @ rows).reshape(x.shape)

        return denoiser

    parts = parts._replace(of_condition=exact)
    made = drawing.samples(c, data, parts, (), jax.random.key(0), 32)
    away = np.linalg.norm(made.reshape(32, 1, -1) - rows, axis=-1)
    assert np.mean(away.min(1)) < 1e-3


def test_guided_samples_compile_once_for_all_parameters():
    c, data, parts = ready(
        data=dict(class_cond=True), label_drop=0.1, sampler=dict(guidance=2.0, rescale=0.3)
    )
    traces = []

    def counted(params, condition):
        traces.append(1)
        return told(params, condition)

    parts = parts._replace(of_condition=counted)
    for value in range(3):
        drawing.samples(c, data, parts, jnp.float32(value), jax.random.key(value), 32)
    assert len(traces) == 1
    c.sampler.guidance = 2.5
    drawing.samples(c, data, parts, jnp.float32(0), jax.random.key(0), 32)
    assert len(traces) == 2


def test_every_method_takes_its_options():
    for method in drawing.samplers.METHODS:
        c, data, parts = ready(sampler=dict(method=method, n=6))
        drawing.check(c, data, parts)
        grid = drawing.grid(c.sampler, parts.process)
        assert len(drawing.samplers.planned(grid, method, **drawing.options(c.sampler)).sigma)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(method="foo"), "sampler.method"),
        (dict(grid="foo"), "sampler.grid"),
        (dict(n=1), "sampler.n"),
        (dict(rho=0.0), "sampler.rho"),
        (dict(sigma_min=-1.0), "sampler.sigma_min"),
        (dict(eta=1.0), "sampler.eta is 1.0, but must be 0.0 with method 'heun'"),
        (dict(s_churn=40.0), "sampler.s_churn"),
        (dict(method="edm", s_churn=-1.0), "sampler.s_churn"),
        (dict(guidance=-3.0), "sampler.guidance"),
        (dict(guidance=3.0), "label_drop"),
        (dict(guide_low=5.0), "sampler.guide_low is 5.0, .* 0.0 with sampler.guidance 1"),
        (dict(guide_high=5.0), "sampler.guide_high is 5.0, .* with sampler.guidance 1"),
        (dict(rescale=0.5), "sampler.rescale is 0.5, .* with sampler.guidance 1"),
        (dict(guidance=2.0, guide_low=5.0, guide_high=1.0), "sampler.guide_low"),
        (dict(guidance=2.0, guide_low=5.0), "sampler.guide_high"),
        (dict(guidance=2.0, rescale=2.0), "sampler.rescale"),
        (dict(label=3), "sampler.label"),
        (dict(batch_size=0), "sampler.batch_size"),
        (dict(count=0), "sampler.count"),
        (dict(start="foo"), "sampler.start"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named_before_training(changes, said):
    c, data, parts = ready()
    for name, value in changes.items():
        c.sampler[name] = value
    with pytest.raises(UserError, match=said):
        drawing.check(c, data, parts)

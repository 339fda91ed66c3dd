"""Samples: classes as often as in the data, guidance, grids, and options that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion import drawing, grids, judging
from diffusion.dataset import dataset
from diffusion.parts import parts_of
from diffusion.processes import process
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
    ddpm = drawing.grid(c, process("ddpm", steps=500, beta_last=0.028))
    assert len(ddpm) == 10
    assert (np.diff(ddpm) < 0).all()
    c.grid, c.shift = "flow", 2.0
    assert drawing.grid(c, process("fm_linear"))[-1] == 0


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
        (dict(guide_low=5.0, guide_high=1.0), "sampler.guide_low"),
        (dict(guide_low=5.0), "sampler.guide_high"),
        (dict(label=3), "sampler.label"),
        (dict(rescale=2.0), "sampler.rescale"),
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


def test_copies_of_rows_are_judged_as_such():
    """Random rows of a set that is sorted by class: precise, complete, and remembered."""
    c, data, _ = ready(eval=dict(samples=600))
    order = np.argsort(data.labels, kind="stable")
    data = data._replace(rows=data.rows[order], labels=data.labels[order])
    rng = np.random.default_rng(0)
    made = np.float32(data.rows[rng.permutation(1797)[:900]])
    found = judging.judged(c, data, made)
    assert found["precision"] == 1
    assert found["recall"] > 0.9
    assert found["copies"] > 0.9
    assert found["close"] == 1
    assert found["nearest"] < 1e-5
    noise = judging.judged(c, data, rng.normal(size=made.shape).astype(np.float32))
    assert noise["frechet"] > 20 * found["frechet"]
    assert noise["copies"] < 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(features="fid"), "eval.features"),
        (dict(neighbours=0), "eval.neighbours"),
        (dict(samples=2), "eval.samples"),
        (dict(features="dinov2", weights="/nowhere.npz"), "eval.weights"),
        (dict(local=dict(steps=0)), "eval.local.steps"),
    ],
    ids=str,
)
def test_evaluations_that_cannot_be_are_named(changes, said):
    c, data, _ = ready(eval=dict(samples=64))
    c.eval.update(changes)
    with pytest.raises(UserError, match=said):
        judging.check(c, data)


def test_images_are_rounded_to_pixels_as_the_real_ones_are(monkeypatch):
    c, data, _ = ready(eval=dict(samples=64))
    data = data._replace(scaling="x/127.5-1")
    shown, real = [], judging.features.extract

    def extract(known, x, **more):
        shown.append(x.dtype)
        return real(known, x, **more)

    monkeypatch.setattr(judging.features, "extract", extract)
    judging.judged(c, data, np.zeros((64, 8, 8, 1), np.float32))
    assert shown[-1] == np.uint8

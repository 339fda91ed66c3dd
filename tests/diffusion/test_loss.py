"""The loss by hand, and what a network is told while it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from diffusion import loss as objective
from diffusion import optimal_loss
from diffusion.images import scaled
from diffusion.networks import Network, network
from diffusion.preconditioning import preconditioning
from diffusion.processes import process
from tests.diffusion.test_training import config, started, trained

KEY = jax.random.key(0)
WRAP = preconditioning(process("edm"), "F")


def batch(n=8, **cond):
    keys = jax.random.split(jax.random.key(1), 3)
    x0, eps = (jax.random.normal(k, (n, 4, 4, 1)) for k in keys[:2])
    s = jnp.exp(jax.random.normal(keys[2], (n,)))
    return objective.Given(x0, eps, s, 1 + s, cond)


def fixed(apply):
    """A network without parameters."""
    return Network(lambda key: {}, apply, lambda params: params, None, lambda fsdp: ())


def test_the_loss_is_a_weighted_mean():
    net = fixed(lambda params, x, noise, cond, key: 0 * x)
    given = batch()
    value, error = objective.loss(net, WRAP, {"net": {}}, given)
    s = np.float64(given.s).reshape(-1, 1, 1, 1)
    x0, eps = np.float64(given.x0), np.float64(given.eps)
    want = ((0.25 / (s**2 + 0.25) * (x0 + s * eps) - x0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(error, want, rtol=1e-5)
    assert float(value) == pytest.approx(np.mean(np.float64(given.weight) * want), rel=1e-5)


def test_a_learned_log_loss_is_least_at_the_log_of_the_loss():
    net = fixed(lambda params, x, noise, cond, key: 0 * x)
    given = batch()
    params = {"net": {}, "log_loss": jnp.zeros(objective.KNOTS)}
    of = lambda u: objective.loss(net, WRAP, params | {"log_loss": u}, given, None, True)[0]
    _, error = objective.loss(net, WRAP, params, given)
    for shift in (-0.5, 0.0, 0.7):
        u = params["log_loss"] + shift
        want = np.mean(np.float64(given.weight) * np.float64(error)) * np.exp(-shift) + shift
        assert float(of(u)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_have_the_gradient_of_the_whole_and_masks_of_their_own(slices):
    net = network("mlp", shape=(4, 4, 1), width=8)
    params = objective.init(net, KEY, False)
    loss = lambda params, given, key: objective.loss(net, WRAP, params, given, key)
    given = batch()
    (whole, errors), grads = objective.gradient(loss, params, given, None, 1)
    (parts, again), sliced = objective.gradient(loss, params, given, None, slices)
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(again, errors, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, sliced)

    masks = lambda params, given, key: (
        jnp.sum(params["w"]),
        jax.random.uniform(key, given.s.shape),
    )
    key = jax.random.key(2)
    (_, drawn), _ = objective.gradient(masks, {"w": jnp.ones(2)}, given, key, slices)
    assert len(np.unique(drawn)) == len(drawn)


def told(monkeypatch, **changes):
    """What the network was given in one step, and the batch it came from."""
    seen = []
    real = objective.loss

    def recorded(net, wrap, params, given, key=None, learned=False):
        jax.debug.callback(lambda *a: seen.append(a), given.cond, given.x0, key is not None)
        return real(net, wrap, params, given, key, learned)

    monkeypatch.setattr(optimal_loss.objective, "loss", recorded)
    c = config(**changes)
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        rows = made.batch(0)
        state, _ = step(state, meshes.to_devices(rows, mesh), jax.random.key(3), jnp.uint32(0))
        jax.effects_barrier()
    cond, x0, dropout = seen[-1]
    return jax.device_get(cond), np.asarray(x0), bool(dropout), rows


def test_labels_are_dropped_at_the_rate(monkeypatch):
    given = dict(batch_size=400, data=dict(class_cond=True), label_drop=0.25)
    cond, _, _, rows = told(monkeypatch, **given)
    away = cond["label"] == -1
    assert away.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 400))
    np.testing.assert_array_equal(cond["label"][~away], rows["label"][~away])


def test_the_network_is_told_its_augmentation(monkeypatch):
    unet = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    given = dict(augment=0.5, model=dict(name="unet", unet=unet, dropout=0.1))
    cond, x0, dropout, rows = told(monkeypatch, **given)
    assert dropout
    assert cond["augment"].shape == (16, 9)
    changed = np.abs(x0 - np.asarray(scaled(rows["x"]))).max((1, 2, 3)) > 1e-6
    # What was done is said, and nothing else is.
    np.testing.assert_array_equal(changed, np.any(cond["augment"] != 0, -1))
    assert changed.any()


def test_without_dropout_there_is_no_key(monkeypatch):
    *_, dropout, _ = told(monkeypatch)
    assert not dropout


def test_one_bad_batch_moves_nothing_and_leaves_the_schedule_whole():
    floor = trained(6, experiment="diffusion.estimate", steps=6)[1]
    c = config(
        init_from="floor-seed0",
        schedule=dict(kind="optimal_loss", optimal=dict(warm=16, every=16)),
    )
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        state = made.adopt(state, floor)
        shown = []
        for i in range(4):
            rows = made.batch(i)
            if i == 1:
                rows = rows | {"x": np.full_like(rows["x"], np.inf)}
            before = jax.device_get(state.params)
            rows = meshes.to_devices(rows, mesh)
            state, values = step(state, rows, jax.random.key(1), jnp.uint32(i))
            shown.append(jax.device_get(values))
            if i == 1:
                jax.tree.map(
                    np.testing.assert_array_equal, jax.device_get(state.params), before
                )
    assert [float(v["skipped"]) for v in shown] == [0, 1, 1, 1]
    assert shown[1]["loss"] == shown[0]["loss"]
    assert shown[2]["loss"] != shown[1]["loss"]
    assert np.isfinite(state.schedule.probability).all()
    assert np.isfinite(state.schedule.total).all()


def test_the_schedule_learns_of_samples_like_those_of_the_floor():
    cond = {"label": jnp.array([1, 2, 3]), "augment": jnp.zeros((3, 9)).at[2, 0].set(1.0)}
    dropped = cond | {"label": jnp.array([1, -1, 3])}
    use = optimal_loss._like_the_floor(cond, dropped)
    np.testing.assert_array_equal(use, [True, False, False])

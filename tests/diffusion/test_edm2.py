"""EDM2: the network in NumPy and float64, unit weights, preserved magnitudes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion import edm2
from tests.diffusion import reference as ref

SMALL = dict(
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(2,),
    channels_per_head=8,
    label_dim=3,
    vector_dim=5,
    cond_channels=1,
    label_balance=0.4,
    concat_balance=0.6,
    res_balance=0.3,
    attn_balance=0.2,
)
SHAPE = (4, 4, 2)


def numpy_edm2(p, x, noise, cond):
    """The network of SMALL: levels of 4 x 4 and 2 x 2, heads of 8 channels."""
    silu = lambda x: ref.silu(x) / 0.596
    unit = lambda x: x / np.sqrt((x**2).mean(axis=-1, keepdims=True))

    def weights(p, gain=1.0):
        kernel = p["kernel"].reshape(-1, p["kernel"].shape[-1])
        kernel = gain * kernel / np.linalg.norm(kernel, axis=0)
        return {"kernel": kernel.reshape(p["kernel"].shape)}

    def total(a, b, t):
        return ((1 - t) * a + t * b) / np.hypot(1 - t, t)

    def block(name, x, e, kind, heads=0, way=""):
        q = p[name]
        x = ref.resample(x, (1, 1), way) if way else x
        shortcut = lambda x: ref.conv(x, weights(q["shortcut"])) if "shortcut" in q else x
        if kind == "enc":
            x = unit(shortcut(x))
        y = ref.conv(silu(x), weights(q["conv0"]))
        y = y * (1 + ref.dense(e, weights(q["embed"], q["gain"])))[:, None, None]
        y = ref.conv(silu(y), weights(q["conv1"]))
        x = total(shortcut(x) if kind == "dec" else x, y, 0.3)
        assert ("qkv" in q) == (heads > 0)
        if heads:
            y = ref.attend(ref.conv(x, weights(q["qkv"])), heads, unit)
            x = total(x, ref.conv(y, weights(q["proj"])), 0.2)
        return x

    def join(a, b):
        parts = [0.4 * a / np.sqrt(a.shape[-1]), 0.6 * b / np.sqrt(b.shape[-1])]
        size = np.sqrt((a.shape[-1] + b.shape[-1]) / (0.4**2 + 0.6**2))
        return size * np.concatenate(parts, axis=-1)

    rng = np.random.default_rng(0)
    f, phase = 2 * np.pi * rng.standard_normal(8), 2 * np.pi * rng.random(8)
    e = np.sqrt(2) * np.cos(np.asarray(noise, np.float64)[:, None] * f + phase)
    e = ref.dense(e, weights(p["noise"]))
    hot = np.eye(4)[cond["label"]][:, :3] * np.sqrt(3)
    e = total(e, ref.dense(hot, weights(p["label"])), 0.4)
    e = silu(total(e, ref.dense(cond["vector"], weights(p["vector"])), 0.4))

    x = np.concatenate([x, cond["channels"], np.ones_like(x[..., :1])], axis=-1)
    a = ref.conv(x, weights(p["enc4_conv"]))
    b = block("enc4_block0", a, e, "enc")
    c = block("enc2_down", b, e, "enc", way="down")
    d = block("enc2_block0", c, e, "enc", heads=2)
    y = block("dec2_in1", block("dec2_in0", d, e, "dec", heads=2), e, "dec")
    y = block("dec2_block0", join(y, d), e, "dec", heads=2)
    y = block("dec2_block1", join(y, c), e, "dec", heads=2)
    y = block("dec4_up", y, e, "dec", way="up")
    y = block("dec4_block0", join(y, b), e, "dec")
    y = block("dec4_block1", join(y, a), e, "dec")
    return ref.conv(y, weights(p["out_conv"], p["gain"]))


def pieces():
    init, apply = edm2.edm2(SHAPE, **SMALL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(jnp.asarray, ref.filled(shapes)) | {"gain": jnp.float32(0.8)}
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal((3, *shape)).astype(np.float32)
    cond = {"label": np.array([2, -1, 0], np.int32), "vector": draw(5)}
    cond["channels"] = draw(4, 4, 1)
    noise = np.array([-0.9, 0.1, 0.7], np.float32)
    return jax.jit(apply), params, (draw(*SHAPE), noise, cond)


def test_the_network_is_that_of_the_formulas_whatever_the_size_of_the_weights():
    apply, params, (x, noise, cond) = pieces()
    wanted = numpy_edm2(ref.wide(params), x, noise, cond)
    found = apply(params, x, noise, cond)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)

    rng = np.random.default_rng(2)
    longer = {
        path: leaf * float(np.exp(rng.uniform(-2, 2))) if path[-1] == "kernel" else leaf
        for path, leaf in flatten_dict(params).items()
    }
    for same in (unflatten_dict(longer), edm2.normalized(params)):
        np.testing.assert_allclose(apply(same, x, noise, cond), found, atol=1e-4, rtol=1e-4)


def lengths(params):
    """Of the weights of each output in the forward pass: stored / sqrt(fan-in)."""
    for path, leaf in flatten_dict(params).items():
        if path[-1] == "kernel":
            rows = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
            yield np.linalg.norm(rows, axis=0) / np.sqrt(len(rows))


def test_weights_have_unit_norm_after_every_step_and_a_fresh_network_gives_zero():
    init, apply = edm2.edm2(SHAPE, **SMALL | dict(channel_mult=(1,), attn_resolutions=(4,)))
    params = jax.jit(init)(jax.random.key(0))
    for length in lengths(params):
        np.testing.assert_allclose(length, 1, atol=1e-5)
    tx = optax.adam(0.1)
    x, noise = jnp.ones((2, *SHAPE)), jnp.array([0.3, -0.4])

    def loss(params):
        u, out = edm2.uncertainty(params, noise), apply(params, x, noise)
        error = jnp.mean((out - 1) ** 2, axis=(1, 2, 3))
        return jnp.mean(jnp.exp(-u) * error + u), out

    @jax.jit
    def step(params, opt):
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        raw = optax.apply_updates(params, updates)
        return raw, edm2.normalized(raw), opt, value, out

    opt, values = tx.init(params), []
    for i in range(3):
        raw, params, opt, value, out = step(params, opt)
        assert (float(jnp.abs(out).max()) == 0) == (i == 0)
        values.append(float(value))
        for length in lengths(params):
            np.testing.assert_allclose(length, 1, atol=1e-5)
    # Not by itself: Adam's steps made some of the weights longer.
    assert max(np.abs(length - 1).max() for length in lengths(raw)) > 1e-3
    assert values[2] < values[0]
    untouched = {p: a for p, a in flatten_dict(raw).items() if p[-1] != "kernel"}
    kept = {p: a for p, a in flatten_dict(params).items() if p[-1] != "kernel"}
    chex.assert_trees_all_equal(untouched, kept)
    chex.assert_trees_all_close(edm2.normalized(params), params, atol=1e-6)


def test_activations_keep_their_magnitude_at_the_start():
    options = dict(model_channels=32, channel_mult=(1, 2), num_blocks=1, label_dim=10)
    options |= dict(attn_resolutions=(4,), channels_per_head=16)
    init, _ = edm2.edm2((8, 8, 3), **options)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(jnp.asarray, ref.filled(shapes))
    # The gains start at zero, which takes the embedding out of the blocks.
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.zeros_like(a) if path[-1].key == "gain" else a, params
    )
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32)
    label = jnp.arange(4, dtype=jnp.int32)

    @jax.jit
    def sizes(params):
        module = edm2.UNet(_settings(options))
        noise = jnp.linspace(-1.0, 1.0, 4)
        _, found = module.apply(
            {"params": params},
            x,
            noise,
            {"label": label},
            capture_intermediates=lambda m, _: isinstance(m, edm2.Block | edm2.Weights),
        )
        return jax.tree.map(lambda a: jnp.sqrt(jnp.mean(a**2)), found["intermediates"])

    found = {
        path: float(size)
        for path, (size,) in flatten_dict(sizes(params)).items()
        if path[-2] != "embed" and path != ("out_conv", "__call__")
    }
    # What is lost is lost at the zeros around the image and to attention, which averages.
    assert len(found) > 30
    for path, size in found.items():
        assert 0.5 < size < 1.2, (path, size)
    blocks = [size for path, size in found.items() if len(path) == 2 and "block" in path[0]]
    assert 0.75 < np.mean(blocks) < 1.1


def _settings(options):
    return edm2._Settings(
        out_channels=3,
        attn_block=1024,
        dropout=0.0,
        vector_dim=0,
        cond_channels=0,
        label_balance=0.5,
        concat_balance=0.5,
        res_balance=0.3,
        attn_balance=0.3,
        resample_filter=(1, 1),
        remat=False,
        dtype="float32",
        **options,
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations_of_unit_magnitude_have_it_too(t):
    a, b = np.random.default_rng(0).standard_normal((2, 4000, 6))
    total = edm2.mp_sum(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), t)
    np.testing.assert_allclose(total, ((1 - t) * a + t * b) / np.hypot(1 - t, t), atol=1e-5)
    assert abs(float(jnp.mean(total**2)) - 1) < 0.05
    joined = edm2.mp_concat(jnp.asarray(a, jnp.float32), jnp.asarray(b[:, :2], jnp.float32), t)
    square = np.asarray(joined) ** 2
    assert abs(square.mean() - 1) < 0.1
    # Of the total, the second part has t^2 / ((1 - t)^2 + t^2), however many channels.
    share = square[:, 6:].sum() / square.sum()
    assert abs(share - t**2 / ((1 - t) ** 2 + t**2)) < 0.05


def test_silu_of_a_normal_has_mean_square_one():
    x, w = np.polynomial.hermite_e.hermegauss(80)
    square = np.asarray(edm2.mp_silu(jnp.asarray(x, jnp.float32)), np.float64) ** 2
    assert abs(square @ w / w.sum() - 1) < 2e-3


def test_uncertainty_is_the_head_on_waves_of_the_noise_and_nothing_else():
    init, _ = edm2.edm2(SHAPE, **SMALL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert shapes["uncertainty"]["kernel"].shape == (128, 1)
    params = jax.tree.map(jnp.asarray, ref.filled(shapes))
    noise = np.array([-1.0, 0.2, 0.9], np.float32)
    rng = np.random.default_rng(1)
    f, phase = 2 * np.pi * rng.standard_normal(128), 2 * np.pi * rng.random(128)
    w = np.asarray(params["uncertainty"]["kernel"], np.float64)[:, 0]
    wanted = np.sqrt(2) * np.cos(noise[:, None] * f + phase) @ (w / np.linalg.norm(w))
    found = edm2.uncertainty(params, jnp.asarray(noise))
    np.testing.assert_allclose(found, wanted, atol=1e-4)

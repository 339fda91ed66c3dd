"""The U-Nets of EDM against the same network in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import SIZES
from diffusion.unet import unet
from tests.diffusion import reference as ref
from tests.diffusion.test_blocks import sizes

SMALL = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4, 2))
CASES = {
    "ddpmpp-32": dict(label_dim=3, augment_dim=2),
    "ncsnpp-32": dict(vector_dim=5, augment_dim=2, cond_channels=1),
    "adm-64": dict(label_dim=3, augment_dim=2, channels_per_head=8),
}
SHAPE = (4, 4, 2)


def numpy_unet(p, x, noise, cond, o):
    """o: the options of a network with two levels, 4 x 4 and 2 x 2, and one block each."""
    adm, eps, taps = o.get("style") == "adm", o.get("norm_eps", 1e-6), o.get("taps", (1, 1))

    def block(name, x, e, heads=0, way=""):
        q = p[name]
        y = ref.silu(ref.group_norm(x, q["norm0"], eps))
        y = ref.conv(ref.resample(y, taps, way) if way else y, q["conv0"])
        affine = ref.dense(e, q["affine"])[:, None, None]
        if adm:
            scale, shift = np.split(affine, 2, axis=-1)
            y = ref.group_norm(y, q["norm1"], eps) * (1 + scale) + shift
        else:
            y = ref.group_norm(y + affine, q["norm1"], eps)
        y = ref.conv(ref.silu(y), q["conv1"])
        x = ref.resample(x, taps, way) if way else x
        assert ("shortcut" in q) == (x.shape[-1] != y.shape[-1] or (way != "" and not adm))
        x = ref.conv(x, q["shortcut"]) if "shortcut" in q else x
        gain = 1 if adm else np.sqrt(0.5)
        x = gain * (x + y)
        assert ("qkv" in q) == (heads > 0)
        if heads:
            y = ref.conv(ref.group_norm(x, q["norm2"], eps), q["qkv"])
            x = gain * (x + ref.conv(ref.attend(y, heads), q["proj"]))
        return x

    if o.get("embedding") == "fourier":
        half = 8  # Waves of twice the model's channels.
        waves = ref.waves(noise, 32 * np.pi * np.random.default_rng(0).standard_normal(half))
    else:
        waves = ref.waves(noise, 1e4 ** -(np.arange(4) / (4 if adm else 3)))
    e, hot = waves, np.eye(4)[cond["label"]][:, :3] if "label" in cond else None
    if hot is not None and not adm:
        e = e + ref.dense(hot * np.sqrt(3), p["label"])
    e = e + ref.dense(cond["augment"], p["augment"])
    e = ref.dense(ref.silu(ref.dense(e, p["embed0"])), p["embed1"])
    if hot is not None and adm:
        e = e + ref.dense(hot, p["label"])
    if "vector" in cond:
        e = e + ref.dense(cond["vector"], p["vector"])
    e = ref.silu(e)

    one, two = (1, 2) if adm else (1, 1)  # Heads at 8 and 16 channels.
    if "channels" in cond:
        x = np.concatenate([x, cond["channels"]], axis=-1)
    a = ref.conv(x, p["enc4_conv"])
    b = block("enc4_block0", a, e, one)
    c = block("enc2_down", b, e, way="down")
    if o.get("encoder") == "residual":
        c = np.sqrt(0.5) * (c + ref.resample(ref.conv(x, p["enc2_residual"]), taps, "down"))
    d = block("enc2_block0", c, e, two)
    y = block("dec2_in1", block("dec2_in0", d, e, two), e)
    join = lambda *parts: np.concatenate(parts, axis=-1)
    y = block("dec2_block0", join(y, d), e, two if adm else 0)
    y = block("dec2_block1", join(y, c), e, two)
    y = block("dec4_up", y, e, way="up")
    y = block("dec4_block0", join(y, b), e, one if adm else 0)
    y = block("dec4_block1", join(y, a), e, one)
    return ref.conv(ref.silu(ref.group_norm(y, p["out_norm"], eps)), p["out_conv"])


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_that_of_the_formulas(name):
    options = SIZES[name][1] | SMALL | CASES[name]
    init, apply = unet(SHAPE, **options)
    params = ref.filled(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal((3, *shape)).astype(np.float32)
    given = {"label": np.array([2, -1, 0], np.int32), "augment": draw(2), "vector": draw(5)}
    given["channels"] = draw(4, 4, 1)
    cond = {n: given[n] for n in given if options.get(WIDTH[n])}
    x, noise = draw(*SHAPE), np.array([-0.3, 0.1, 0.4], np.float32)
    found = jax.jit(apply)(params, jnp.asarray(x), jnp.asarray(noise), cond)
    o = options | {"taps": options.get("resample_filter", (1, 1))}
    np.testing.assert_allclose(
        found, numpy_unet(ref.wide(params), x, noise, cond, o), atol=1e-4, rtol=1e-4
    )


WIDTH = dict(label="label_dim", augment="augment_dim", vector="vector_dim")
WIDTH["channels"] = "cond_channels"


@pytest.mark.parametrize("name", ["ddpmpp-32", "adm-64"])
def test_the_start_is_that_of_edm(name):
    options = SIZES[name][1] | dict(model_channels=64, channel_mult=(1,), num_blocks=1)
    options |= dict(attn_resolutions=(4,), label_dim=3, augment_dim=2)
    init, _ = unet((4, 4, 2), **options)
    params = jax.jit(init)(jax.random.key(0))
    adm, block = name == "adm-64", params["enc4_block0"]
    # Uniform within these bounds: Xavier's, or 1 / sqrt(fan-in).
    fans = {"conv0": (576, 576), "qkv": (64, 192), "affine": (256, 128 if adm else 64)}
    for layer, (into, out) in fans.items():
        kernel = np.asarray(block[layer]["kernel"])
        factor = np.sqrt(0.2) if layer == "qkv" else 1
        bound = into**-0.5 if adm else factor * np.sqrt(6 / (into + out))
        assert 0.95 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6), layer
        assert abs(np.std(kernel) / bound * np.sqrt(3) - 1) < 0.05, layer
    for kernel in (block["conv1"]["kernel"], block["proj"]["kernel"]):
        size = float(jnp.abs(kernel).max())
        assert size == 0 if adm else 0 < size < 1e-5 * np.sqrt(6 / 128)
    assert float(jnp.abs(params["out_conv"]["kernel"]).max()) < 1e-5
    if adm:
        assert abs(float(params["label"]["kernel"].std()) - 1) < 6 / np.sqrt(2 * 3 * 256)
        np.testing.assert_array_equal(params["augment"]["kernel"], 0)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("last", {"enc4_block0", "enc4_block1", "dec2_in0", "dec4_block2"}),
        ("none", {"enc4_block0", "enc4_block1", "dec2_in0"}),
        (
            "all",
            {"enc4_block0", "enc4_block1", "dec2_in0"} | {f"dec4_block{i}" for i in range(3)},
        ),
    ],
)
def test_where_the_network_attends(where, wanted):
    options = dict(model_channels=8, channel_mult=(1, 1), num_blocks=2, decoder_attention=where)
    init, _ = unet(SHAPE, attn_resolutions=(4,), **options)
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert {name for name, p in shapes.items() if "qkv" in p} == wanted


def test_attention_at_full_size_holds_no_full_map():
    """As the breast ultrasound generator needs: 64 x 64 tokens in tiles of 256."""
    options = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(64,))
    init, apply = unet((64, 64, 3), decoder_attention="none", attn_block=256, **options)
    x, noise = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 64, 64, 3), (1,)))
    loss = lambda *a: jnp.sum(apply(*a))
    program = jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(init, jax.random.key(0)), x, noise)
    # Far below 4096^2: what is kept is a hundred channels of the image at most.
    assert max(sizes(program.jaxpr)) <= 100 * 64**2


def test_the_result_may_have_other_channels_and_sides_may_differ():
    init, apply = unet((8, 4, 2), out_channels=5, **SMALL | dict(attn_resolutions=(8,)))
    x, noise = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 8, 4, 2), (3,)))
    out = jax.eval_shape(apply, jax.eval_shape(init, jax.random.key(0)), x, noise)
    assert out.shape == (3, 8, 4, 5)

"""What holds for every network: counts of parameters, conditions, dtypes, gradients."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from diffusion.networks import KINDS, SIZES, network, parameters
from tests.diffusion import reference

# Name, shape, options, parameters of the reference definitions.
TABLE = [
    ("ddpmpp-32", (32, 32, 3), dict(label_dim=10), 55_735_299),
    ("ddpmpp-32", (32, 32, 3), {}, 55_733_891),
    ("ddpmpp-32", (32, 32, 3), dict(augment_dim=0), 55_732_739),
    ("ncsnpp-32", (32, 32, 3), dict(label_dim=10), 56_400_643),
    ("ncsnpp-32", (32, 32, 3), {}, 56_397_827),
    ("ddpmpp-64", (64, 64, 3), {}, 61_805_571),
    ("ncsnpp-64", (64, 64, 3), {}, 62_761_091),
    ("adm-64", (64, 64, 3), {}, 295_899_267),
    ("edm2-xxs", (64, 64, 3), {}, 31_307_877),
    ("edm2-xs", (64, 64, 3), {}, 124_710_949),
    ("edm2-s", (64, 64, 3), {}, 280_209_381),
    ("edm2-m", (64, 64, 3), {}, 497_803_173),
    ("edm2-l", (64, 64, 3), {}, 777_492_325),
    ("edm2-xl", (64, 64, 3), {}, 1_119_276_837),
    ("edm2-xxl", (64, 64, 3), {}, 1_523_156_709),
    ("edm2-xs", (64, 64, 4), {}, 124_713_253),
    ("edm2-s", (64, 64, 4), {}, 280_212_837),
    ("edm2-m", (64, 64, 4), {}, 497_807_781),
    ("edm2-l", (64, 64, 4), {}, 777_498_085),
    ("edm2-xl", (64, 64, 4), {}, 1_119_283_749),
    ("edm2-xxl", (64, 64, 4), {}, 1_523_164_773),
    ("dit-s/2", (32, 32, 4), {}, 32_865_056),
    ("dit-b/2", (32, 32, 4), {}, 130_315_808),
    ("dit-l/2", (32, 32, 4), {}, 457_840_672),
    ("dit-xl/2", (32, 32, 4), {}, 674_834_720),
    ("sit-s/2", (32, 32, 4), {}, 32_858_896),
    ("sit-b/2", (32, 32, 4), {}, 130_303_504),
    ("sit-l/2", (32, 32, 4), {}, 457_824_272),
    ("sit-xl/2", (32, 32, 4), {}, 674_816_272),
    ("dit-s/4", (32, 32, 4), {}, 32_920_448),
    ("dit-b/4", (32, 32, 4), {}, 130_426_496),
    ("dit-l/4", (32, 32, 4), {}, 457_988_224),
    ("dit-xl/4", (32, 32, 4), {}, 675_000_704),
    ("lightningdit-xl/1", (16, 16, 32), {}, 674_961_824),
    ("mlp", (8, 8, 1), {}, 168_768),
]
# One network of each kind with every condition it can take, tiny.
SHAPE = (8, 8, 2)
_CONDITIONS = dict(label_dim=3, vector_dim=5, cond_channels=1)
_UNET = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
_UNET |= _CONDITIONS
TINY = {
    "ncsnpp": ("ncsnpp-32", _UNET | dict(augment_dim=2)),
    "adm": ("adm-64", _UNET | dict(augment_dim=2, channels_per_head=8)),
    "edm2": ("edm2", _UNET | dict(channels_per_head=8)),
    "dit": ("dit", _CONDITIONS | dict(dim=16, depth=2, heads=2, learn_variance=True)),
    "lightning": ("lightningdit-xl/1", _CONDITIONS | dict(dim=16, depth=2, heads=2, patch=4)),
    "mlp": ("mlp", _CONDITIONS | dict(width=16)),
}
ROWS = 4


def tiny(name, **options):
    size, settings = TINY[name]
    return network(size, shape=SHAPE, **settings | options)


@cache
def start(name):
    """Parameters of the sizes that training gives them, without the zeros of the start."""
    shapes = jax.eval_shape(tiny(name).init, jax.random.key(0))
    return jax.tree.map(jnp.asarray, reference.filled(shapes, stacked=("blocks",)))


@cache
def batch(name):
    """The same rows six times over: as they are, with no condition, with one condition less
    in turn, and once more as they are where there are but three conditions."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal((ROWS, *shape)).astype(np.float32)
    cond = {
        "label": np.arange(ROWS, dtype=np.int32) - 1,
        "vector": draw(5),
        "channels": draw(8, 8, 1),
    }
    if "augment_dim" in TINY[name][1]:
        cond["augment"] = draw(2)
    absent = {n: np.zeros_like(c) - (n == "label") for n, c in cond.items()}
    variants = [cond, absent, *(cond | {n: absent[n]} for n in sorted(cond))]
    variants += [cond] * (6 - len(variants))
    x = np.concatenate([draw(*SHAPE)] * 6)
    noise = np.tile(np.linspace(-1, 1, ROWS, dtype=np.float32), 6)
    cond = {n: np.concatenate([v[n] for v in variants]) for n in cond}
    return jax.tree.map(jnp.asarray, (x, noise, cond))


@cache
def output(name):
    return jax.jit(tiny(name).apply)(start(name), *batch(name))


def output_and_gradient(name, remat=False):
    net, (x, noise, cond) = tiny(name, **dict(remat=True) if remat else {}), batch(name)

    def loss(params):
        out = net.apply(params, x, noise, cond)
        weights = np.random.default_rng(5).standard_normal(out.shape)
        value = jnp.sum(weights * out)
        if net.uncertainty:
            value += jnp.sum(
                jnp.sin(jnp.arange(1, len(x) + 1)) * net.uncertainty(params, noise)
            )
        return value, out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(start(name))
    return out, grads


@pytest.mark.parametrize(("name", "shape", "options", "count"), TABLE)
def test_published_sizes_have_the_published_counts(name, shape, options, count):
    net = network(name, shape=shape, **options)
    params = jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in params) == count
    assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}


LARGEST = ["adm-64", "edm2-xxl", "dit-xl/2", "sit-xl/4", "lightningdit-xl/1"]


@pytest.mark.parametrize("name", LARGEST)
def test_networks_of_paper_scale_can_be_traced(name):
    shape = next((shape for size, shape, _, _ in TABLE if size == name), (32, 32, 4))
    net = network(name, shape=shape, dtype="bfloat16", remat=True)
    params = jax.eval_shape(net.init, jax.random.key(0))
    x, noise = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, *shape), (2,)))
    out = jax.eval_shape(net.apply, params, x, noise)
    channels = shape[-1] * (2 if name.startswith("dit") else 1)
    assert (out.shape, out.dtype) == ((2, *shape[:2], channels), jnp.float32)


def test_every_size_can_be_built_and_is_of_a_kind():
    assert {kind for kind, _ in SIZES.values()} <= set(KINDS)
    for name in SIZES:
        network(name, shape=(64, 64, 4))


def test_parameters_counts_what_init_makes():
    params = network("tiny_unet", shape=(8, 8, 1)).init
    leaves = jax.tree.leaves(jax.eval_shape(params, jax.random.key(0)))
    assert parameters("tiny_unet", shape=(8, 8, 1)) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (32, 16, 4)])
def test_tiny_networks_are_below_a_million(shape):
    assert parameters("tiny_unet", shape=shape, label_dim=10, cond_channels=1) < 1_000_000


@pytest.mark.parametrize("name", TINY)
def test_every_condition_counts_and_every_parameter_has_a_gradient(name):
    out, grads = output_and_gradient(name)
    assert (out.shape, out.dtype) == ((24, 8, 8, 4 if name == "dit" else 2), jnp.float32)
    full, absent, *less = np.asarray(out).reshape(6, ROWS, *out.shape[1:])
    scale = np.abs(full).max()
    for entry, output in zip(sorted(batch(name)[2]), less, strict=False):
        moved = np.abs(output - full).max(axis=(1, 2, 3)) > 1e-4 * scale
        # The first row's label is -1 to begin with.
        assert moved.tolist() == [entry != "label", True, True, True], entry
    assert np.abs(absent - full).max(axis=(1, 2, 3)).min() > 1e-4 * scale

    grads = jax.tree.map(np.asarray, grads)
    leaves = jax.tree.leaves(grads)
    largest = max(np.abs(g).max() for g in leaves)
    for path, g in zip(meshes.paths(grads), leaves, strict=True):
        assert np.isfinite(g).all(), path
        for layer in g if path.startswith("blocks/") else [g]:
            # Above rounding, which is what a parameter without effect would show.
            assert np.abs(layer).max() > 1e-5 * largest, path


@pytest.mark.parametrize("name", ["edm2", "dit", "mlp"])
def test_no_conditions_are_all_conditions_absent(name):
    x, noise, _ = (jax.tree.map(lambda a: a[:ROWS], part) for part in batch(name))
    found = jax.jit(tiny(name).apply)(start(name), x, noise)
    wanted = output(name)[ROWS : 2 * ROWS]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("name", ["ncsnpp", "edm2", "lightning", "mlp"])
def test_bfloat16_is_near_and_leaves_parameters_and_result_float32(name):
    net = tiny(name, dtype="bfloat16")
    found = jax.jit(net.apply)(start(name), *batch(name))
    wanted = output(name)
    assert found.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((found - wanted) ** 2) / jnp.mean(wanted**2)))
    assert 1e-5 < error < 0.1
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, start(name))


def test_checkpoints_in_the_network_change_no_value_and_no_gradient():
    (out, grads), (again, grads_again) = (
        output_and_gradient("lightning", remat) for remat in (False, True)
    )
    np.testing.assert_allclose(again, out, atol=1e-5 * float(jnp.abs(out).max()))
    scale = max(np.abs(np.asarray(g)).max() for g in jax.tree.leaves(grads))
    chex.assert_trees_all_close(grads, grads_again, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["ncsnpp", "edm2", "dit"])
def test_checkpoints_are_there_where_asked_for(name):
    for remat in (False, True):
        net = tiny(name, **dict(remat=remat))
        program = str(jax.make_jaxpr(net.apply)(start(name), *batch(name)))
        assert ("remat" in program) == remat


@pytest.mark.parametrize("name", ["adm", "edm2"])
def test_dropout_is_on_with_a_key_and_only_then(name):
    # The batch goes in as arguments: the order of closed-over constants in a jaxpr may vary.
    program = lambda net, key: str(
        jax.make_jaxpr(lambda *inputs: net.apply(*inputs, key))(start(name), *batch(name))
    )
    drops, keeps = tiny(name, dropout=0.5), tiny(name)
    assert program(drops, None) == program(keeps, None) == program(keeps, jax.random.key(1))
    run = jax.jit(lambda key: drops.apply(start(name), *batch(name), key))
    one, other, same = (run(jax.random.key(k)) for k in (1, 2, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-2 * float(jnp.abs(one).max())


@pytest.mark.parametrize("name", ["adm", "edm2"])
def test_eight_devices_do_what_one_does(name):
    net, mesh = tiny(name), meshes.make(data=8)
    wanted = output(name)
    with jax.set_mesh(mesh):
        placed = meshes.place(start(name), net.rules(True), mesh)
        params = jax.tree.map(lambda a, p: jax.device_put(a, p.sharding), start(name), placed)
        split = [p for p in jax.tree.leaves(params) if not p.is_fully_replicated]
        assert len(split) > 5
        found = jax.jit(net.apply)(params, *meshes.to_devices(batch(name), mesh))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "unet++",
            {},
            "config.model.name is 'unet.*', but must be one of unet, edm2, dit, mlp",
        ),
        ("mlp", dict(depth=3), "config.model.depth is 3, but must be left out: mlp takes"),
        ("tiny_unet", dict(heads=3), "config.model.heads is 3.*tiny_unet takes.*dropout"),
        ("mlp", dict(waves=3), "config.model.waves is 3, but must be even"),
        ("mlp", dict(width=0), "config.model.width is 0"),
        ("mlp", dict(frequencies=(2.0, 1.0)), "config.model.frequencies"),
        ("tiny_unet", dict(dtype="float16"), "config.model.dtype is 'float16'"),
        ("unet", {}, r"config.model.attn_resolutions is \(16,\).*of 8, 4, 2"),
        ("unet", dict(channel_mult=(1,) * 5), r"config.model.channel_mult is .*8 x 8"),
        ("unet", dict(channel_mult=(1, 0)), r"config.model.channel_mult is \(1, 0\)"),
        ("tiny_unet", dict(dropout=1.0), "config.model.dropout is 1.0"),
        ("tiny_unet", dict(resample_filter=(1, 2, 1)), "config.model.resample_filter"),
        ("tiny_unet", dict(channels_per_head=24), "config.model.channels_per_head is 24"),
        ("tiny_unet", dict(model_channels=3), "config.model.model_channels is 3.*even"),
        ("tiny_unet", dict(style="edm"), "config.model.style is 'edm'.*song, adm"),
        ("tiny_unet", dict(encoder="skip"), "config.model.encoder is 'skip'"),
        ("edm2", dict(attn_resolutions=()), "config.model.channels_per_head is 64"),
        ("dit", dict(patch=3), "config.model.patch is 3.*8 x 8"),
        ("dit", dict(dim=18), "config.model.dim is 18, but must be a multiple of 4"),
        ("dit", dict(dim=36, heads=6, rope=True), "config.model.heads is 6.*multiple of 4"),
        ("dit", dict(norm="batch"), "config.model.norm is 'batch'"),
        ("dit", dict(depth=0), "config.model.depth is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(name, options, sentence):
    more = dict(model_channels=96) if name == "edm2" else {}
    with pytest.raises(UserError, match=sentence):
        network(name, shape=(8, 8, 1), **more | options)


def test_a_shape_has_three_positive_parts():
    for shape in ((8, 8), (8, 0, 1)):
        with pytest.raises(UserError, match=r"config.data.shape is \(8"):
            network("mlp", shape=shape)

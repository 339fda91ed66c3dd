"""Low-rank adapters against the sum they stand for, on every kind of kernel."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from common.errors import UserError
from diffusion import lora
from diffusion.networks import network

# A layer, stacked layers, 1x1 and 3x3 convolutions, and what is no kernel.
SHAPES = {
    "front": {"kernel": (6, 4), "bias": (4,)},
    "blocks": {"qkv": {"kernel": (3, 4, 12), "bias": (3, 12)}, "norm": {"scale": (3, 4)}},
    "mix": {"proj": {"kernel": (1, 1, 8, 5)}, "conv": {"kernel": (3, 3, 8, 8)}},
    "label": {"embedding": (11, 4)},
}
FITTING = {("front", "kernel"), ("blocks", "qkv", "kernel"), ("mix", "proj", "kernel")}


def params(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def trained(adapter, seed=1):
    rng = np.random.default_rng(seed)
    noise = lambda a: a + rng.standard_normal(a.shape).astype(np.float32)
    return jax.tree.map(noise, adapter)


def test_a_fresh_adapter_changes_nothing():
    adapter = lora.init(jax.random.key(0), params(), 2)
    chex.assert_trees_all_equal(lora.merge(params(), adapter, 4.0), params())
    assert {path[:-1] for path in flatten_dict(adapter)} == FITTING
    assert float(jnp.abs(adapter["front"]["kernel"]["a"]).max()) > 0


def test_merging_adds_the_product_for_every_kind_of_kernel():
    old, adapter = params(), trained(lora.init(jax.random.key(0), params(), 2))
    new = jax.jit(lora.merge)(old, adapter, 0.5)
    chex.assert_trees_all_equal(old, params())
    wanted = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(old).items()}
    half = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(adapter).items()}
    wanted["front", "kernel"] += (
        0.5 * half["front", "kernel", "a"] @ half["front", "kernel", "b"]
    )
    for layer in range(3):
        a, b = (half["blocks", "qkv", "kernel", n][layer] for n in "ab")
        wanted["blocks", "qkv", "kernel"][layer] += 0.5 * a @ b
    a, b = (half["mix", "proj", "kernel", n][0, 0] for n in "ab")
    wanted["mix", "proj", "kernel"][0, 0] += 0.5 * a @ b
    for path, leaf in flatten_dict(new).items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-5, err_msg=str(path))
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("rank", [1, 3])
def test_the_change_has_the_rank(rank):
    old = params()
    adapter = trained(lora.init(jax.random.key(0), old, rank, "blocks"))
    change = lora.merge(old, adapter, 1.0)["blocks"]["qkv"]["kernel"]
    singular = np.linalg.svd(change - old["blocks"]["qkv"]["kernel"], compute_uv=False)
    assert (singular > 1e-4).sum(axis=1).tolist() == [rank] * 3


def test_a_pattern_chooses_among_the_kernels():
    adapter = lora.init(jax.random.key(0), params(), 2, r"mix|front")
    paths = {path[:-1] for path in flatten_dict(adapter)}
    assert paths == {("front", "kernel"), ("mix", "proj", "kernel")}


def test_a_is_drawn_at_its_scale_and_for_each_kernel_and_layer_anew():
    many = {"blocks": {"qkv": {"kernel": jnp.zeros((2, 400, 64))}}}
    many["front"] = {"kernel": jnp.zeros((400, 64))}
    adapter = lora.init(jax.random.key(0), many, 32)
    halves = [*adapter["blocks"]["qkv"]["kernel"]["a"], adapter["front"]["kernel"]["a"]]
    for a in halves:
        assert abs(float(a.std()) * 32 - 1) < 6 / np.sqrt(2 * a.size)
    assert len({float(a[0, 0]) for a in halves}) == 3


def test_at_the_start_the_gradient_is_of_b_alone():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 6)), jnp.float32)
    adapter = lora.init(jax.random.key(0), params(), 2, "front")

    def loss(adapter):
        return jnp.sum((x @ lora.merge(params(), adapter, 2.0)["front"]["kernel"]) ** 2)

    grads = jax.grad(loss)(adapter)["front"]["kernel"]
    np.testing.assert_array_equal(grads["a"], 0)
    a, w = adapter["front"]["kernel"]["a"], params()["front"]["kernel"]
    np.testing.assert_allclose(grads["b"], 4 * (x @ a).T @ (x @ w), rtol=1e-4, atol=1e-4)


NETWORKS = [
    ("ddpmpp-32", (32, 32, 3), "qkv", 4, 1),
    ("adm-64", (64, 64, 3), "qkv|proj", 8, 2),
    ("edm2-xs", (64, 64, 3), "qkv", 8, 1),
    ("dit-s/2", (32, 32, 4), "blocks/qkv", 8, 1),
    ("mlp", (8, 8, 1), "hidden", 8, 3),
]


@pytest.mark.parametrize(("name", "shape", "pattern", "rank", "least"), NETWORKS)
def test_adapters_fit_the_networks(name, shape, pattern, rank, least):
    shapes = jax.eval_shape(network(name, shape=shape).init, jax.random.key(0))
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, rank, pattern))
    assert len(jax.tree.leaves(adapter)) >= 2 * least
    merged = jax.eval_shape(lora.merge, shapes, adapter, 1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, shapes)


@pytest.mark.parametrize(
    ("rank", "pattern", "sentence"),
    [
        (0, "", "config.lora.rank is 0, but must be a whole number from 1 to 4"),
        (5, "", "config.lora.rank is 5, but must be a whole number from 1 to 4"),
        (6, "mix", "config.lora.rank is 6.*from 1 to 5"),
        (2, "conv", "config.lora.pattern is 'conv'.*kernel"),
        (2, "attention", "config.lora.pattern is 'attention'"),
        (2, "(", r"config.lora.pattern is '\('.*regular expression"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(rank, pattern, sentence):
    with pytest.raises(UserError, match=sentence):
        lora.init(jax.random.key(0), params(), rank, pattern)


def test_an_adapter_of_other_parameters_is_refused():
    adapter = lora.init(jax.random.key(0), params(), 2, "front")
    for other in (
        {"back": {"kernel": jnp.zeros((6, 4))}},
        {"front": {"kernel": jnp.zeros((4, 6))}},
    ):
        with pytest.raises(UserError, match=r"config.lora.adapter is 'front/kernel'.*\(6, 4\)"):
            lora.merge(other, adapter, 1.0)

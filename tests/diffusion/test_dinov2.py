"""DINOv2: shapes and counts, a block against NumPy, the whole against Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from common.errors import UserError
from diffusion.dinov2 import apply, block, convert, dinov2, encode

NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def tensors(dim, depth, grid, seed=None):
    """A file of such a network; zeros without a seed."""
    shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.mask_token": (1, dim),
        "embeddings.position_embeddings": (1, 1 + grid * grid, dim),
        "embeddings.patch_embeddings.projection.weight": (dim, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }
    for layer in range(depth):
        p = f"encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            shapes[f"{p}attention.attention.{part}.weight"] = (dim, dim)
            shapes[f"{p}attention.attention.{part}.bias"] = (dim,)
        shapes |= {
            f"{p}attention.output.dense.weight": (dim, dim),
            f"{p}attention.output.dense.bias": (dim,),
            f"{p}mlp.fc1.weight": (4 * dim, dim),
            f"{p}mlp.fc1.bias": (4 * dim,),
            f"{p}mlp.fc2.weight": (dim, 4 * dim),
            f"{p}mlp.fc2.bias": (dim,),
        }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[p + name] = (dim,)
        shapes |= {p + f"layer_scale{i}.lambda1": (dim,) for i in (1, 2)}
    if seed is None:
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.5 / np.sqrt(dim), shape).astype(np.float32)
        + ("norm" in name and "weight" in name)
        for name, shape in shapes.items()
    }


def test_the_small_network_has_its_published_size():
    params = convert(tensors(384, 12, 37))
    found = sum(leaf.size for leaf in jax.tree.leaves(params))
    # No mask token, the class token has its position added, 16 x 16 places of 37 x 37.
    assert found == 22_056_576 - 384 - 384 - (37**2 - 16**2) * 384
    for shape in ((32, 32, 3), (8, 8, 1), (300, 240, 3)):
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        assert jax.eval_shape(apply, params, images).shape == (2, 384)


def normed(x, weight, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * weight + bias


def reference_block(h, t, p="encoder.layer.0."):
    """Tokens [T, D], head by head, in float64."""
    t = {name: array.astype(np.float64) for name, array in t.items()}
    linear = lambda x, name: x @ t[f"{p}{name}.weight"].T + t[f"{p}{name}.bias"]
    x = normed(h, t[p + "norm1.weight"], t[p + "norm1.bias"])
    q, k, v = (linear(x, f"attention.attention.{n}") for n in ("query", "key", "value"))
    heads = []
    for s in range(0, h.shape[1], 64):
        scores = q[:, s : s + 64] @ k[:, s : s + 64].T / 8
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, s : s + 64])
    mixed = linear(np.concatenate(heads, 1), "attention.output.dense")
    h = h + t[p + "layer_scale1.lambda1"] * mixed
    x = linear(normed(h, t[p + "norm2.weight"], t[p + "norm2.bias"]), "mlp.fc1")
    x = x * (1 + erf(x / np.sqrt(2))) / 2
    return h + t[p + "layer_scale2.lambda1"] * linear(x, "mlp.fc2")


def test_a_block_is_the_one_written_out_in_numpy():
    stored = tensors(128, 1, 2, seed=0)
    for i in (1, 2):  # Not small, so that the branches count.
        stored[f"encoder.layer.0.layer_scale{i}.lambda1"] += 1
    h = np.random.default_rng(1).normal(size=(5, 128))
    params = convert(stored)
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    with jax.default_matmul_precision("highest"):
        got = block(layer, jnp.asarray(h[None], jnp.float32))[0]
    np.testing.assert_allclose(got, reference_block(h, stored), atol=1e-5)


def test_the_token_is_read_after_patches_and_positions():
    """With all blocks switched off what remains is the class token and its position."""
    stored = tensors(64, 2, 16, seed=0)
    for layer, i in ((0, 1), (0, 2), (1, 1), (1, 2)):
        stored[f"encoder.layer.{layer}.layer_scale{i}.lambda1"][:] = 0
    params = convert(stored)
    x = jax.random.uniform(jax.random.key(0), (1, 224, 224, 3))
    token = (
        stored["embeddings.cls_token"][0, 0] + stored["embeddings.position_embeddings"][0, 0]
    )
    want = normed(token, stored["layernorm.weight"], stored["layernorm.bias"])
    np.testing.assert_allclose(encode(params, x)[0], want, atol=1e-4)


def test_newer_names_and_a_prefix_are_the_same_file(tmp_path):
    old = tensors(64, 2, 16, seed=0)
    new = {}
    for name, array in old.items():
        for part, newer in NAMES.items():
            name = name.replace(f"attention.attention.{part}.", f"attention.{newer}.")
        name = name.replace("attention.output.dense.", "attention.o_proj.")
        new[f"dinov2.{name}"] = array
    np.savez(tmp_path / "new.npz", **new)
    features = dinov2(str(tmp_path / "new.npz"))
    assert (features.name, features.dim, features.logits) == ("dinov2", 64, None)
    for got, want in zip(
        jax.tree.leaves(features.params), jax.tree.leaves(convert(old)), strict=True
    ):
        assert np.array_equal(got, want)


def test_wrong_files_are_one_sentence():
    good = tensors(64, 2, 4)
    for change, match in [
        ({"embeddings.cls_token": None}, r"lacks the tensor embeddings\.cls_token\."),
        (
            {"encoder.layer.1.mlp.fc1.bias": None},
            r"lacks .*encoder\.layer\.1\.mlp\.fc1\.bias\.",
        ),
        ({"layernorm.weight": np.zeros(3)}, r"layernorm\.weight .*\(3,\)"),
        ({"embeddings.cls_token": np.zeros((1, 1, 60))}, "width 60"),
        ({"embeddings.position_embeddings": np.zeros((1, 16, 64))}, r"\(1, 16, 64\)"),
    ]:
        wrong = {k: v for k, v in (good | change).items() if v is not None}
        with pytest.raises(UserError, match=match):
            convert(wrong)
    nothing = {k: v for k, v in good.items() if "layer." not in k}
    with pytest.raises(UserError, match="0 layers"):
        convert(nothing)


def test_images_are_resized_as_pillow_does():
    from PIL import Image

    for size in (32, 300):
        # Far from black and white, where Pillow clips between its two passes.
        x = np.random.default_rng(0).integers(80, 170, (size, size, 3)).astype(np.uint8)
        want = np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC))
        got = jax.image.resize(jnp.asarray(x, jnp.float32), (224, 224, 3), "cubic")
        assert np.abs(got - want).max() < 1.6  # It also rounds after each.


@pytest.mark.parametrize("image_size", [224, 518])
def test_the_network_is_the_one_of_hugging_face(image_size, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=image_size
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    features = dinov2(str(tmp_path / "model.safetensors"))
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        y = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        want = model(pixel_values=y).pooler_output.numpy()
    got = np.asarray(encode(features.params, jnp.asarray(x)))
    difference = np.abs(got - want).max() / np.abs(want).max()
    print(f"dinov2 {image_size}: {difference:.2e} of {np.abs(want).max():.3g}")
    assert difference < 2e-5

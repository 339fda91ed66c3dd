"""MDLM's network against NumPy, by the names of its files, with a time that is told as 0."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from lm.masked import ddit, networks
from lm.masked.denoiser import denoise

FIELDS = dict(vocab=9, dim=16, heads=2, depth=2)
COND = 6


def stored(seed=0):
    """Tensors as MDLM writes them: [out, in], nothing zero."""
    rng = np.random.default_rng(seed)
    d, c = 16, COND
    shapes = {"vocab_embed.embedding": (9, d), "rotary_emb.inv_freq": (4,)}
    shapes |= {"sigma_map.mlp.0.weight": (c, 256), "sigma_map.mlp.0.bias": (c,)}
    shapes |= {"sigma_map.mlp.2.weight": (c, c), "sigma_map.mlp.2.bias": (c,)}
    for n in range(2):
        block = {
            "norm1.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d),
            "norm2.weight": (d,), "mlp.0.weight": (4 * d, d), "mlp.0.bias": (4 * d,),
            "mlp.2.weight": (d, 4 * d), "mlp.2.bias": (d,),
            "adaLN_modulation.weight": (6 * d, c), "adaLN_modulation.bias": (6 * d,),
        }  # fmt: skip
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    out = {
        "norm_final.weight": (d,), "linear.weight": (9, d), "linear.bias": (9,),
        "adaLN_modulation.weight": (2 * d, c), "adaLN_modulation.bias": (2 * d,),
    }  # fmt: skip
    shapes |= {f"output_layer.{name}": shape for name, shape in out.items()}
    draw = lambda shape: (0.4 * rng.normal(size=shape)).astype(np.float32)
    return {f"backbone.{name}": draw(shape) for name, shape in shapes.items()}


def written(folder, **changes):
    config = dict(model_type="mdlm", vocab_size=9, hidden_dim=16, cond_dim=COND, n_blocks=2)
    config |= dict(n_heads=2, model_length=32, dropout=0.1, time_conditioning=False)
    save_file(stored(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def theirs(tensors, row, sigma=0.0):
    """Logits of one row; the time is embedded, not folded."""
    w = {k.removeprefix("backbone."): v.astype(float) for k, v in tensors.items()}
    silu = lambda x: x / (1 + np.exp(-x))
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    wave = np.concatenate([np.cos(sigma * frequencies), np.sin(sigma * frequencies)])
    c = silu(w["sigma_map.mlp.0.weight"] @ wave + w["sigma_map.mlp.0.bias"])
    c = silu(w["sigma_map.mlp.2.weight"] @ c + w["sigma_map.mlp.2.bias"])

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def adaptive(name, parts):
        made = w[f"{name}.adaLN_modulation.weight"] @ c + w[f"{name}.adaLN_modulation.bias"]
        return made.reshape(parts, 16)

    angle = np.outer(np.arange(len(row)), 1e4 ** (-np.arange(4) / 4))

    def rotate(x):
        a, b = x[:, :4], x[:, 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)

    x = w["vocab_embed.embedding"][row]
    for n in range(2):
        get = lambda name, n=n: w[f"blocks.{n}.{name}"]
        shift1, scale1, gate1, shift2, scale2, gate2 = adaptive(f"blocks.{n}", 6)
        y = norm(x, get("norm1.weight")) * (1 + scale1) + shift1
        qkv = (y @ get("attn_qkv.weight").T).reshape(len(row), 3, 2, 8)
        heads = []
        for h in range(2):
            q, k, v = rotate(qkv[:, 0, h]), rotate(qkv[:, 1, h]), qkv[:, 2, h]
            p = np.exp(q @ k.T / np.sqrt(8))
            heads.append(p / p.sum(1, keepdims=True) @ v)
        x = x + gate1 * (np.concatenate(heads, axis=1) @ get("attn_out.weight").T)
        y = norm(x, get("norm2.weight")) * (1 + scale2) + shift2
        y = y @ get("mlp.0.weight").T + get("mlp.0.bias")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + gate2 * (y @ get("mlp.2.weight").T + get("mlp.2.bias"))
    shift, scale = adaptive("output_layer", 2)
    x = norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def test_the_function_is_theirs(tmp_path):
    params, fields = ddit.load(written(tmp_path))
    assert fields == FIELDS
    model = ddit.ddit(**fields)
    x = np.random.default_rng(1).integers(9, size=(2, 7))
    wanted = np.stack([theirs(stored(), row) for row in x])
    found = jax.jit(model.apply)(params, x)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    with jax.enable_x64(True):
        exact = jax.jit(ddit.ddit(**fields, dtype="float64").apply)(params, x)
        np.testing.assert_allclose(exact, wanted, atol=2e-6)  # The modulation is float32.
    narrow = jax.jit(ddit.ddit(**fields, dtype="bfloat16").apply)(params, x)
    assert narrow.dtype == jnp.float32
    assert 0 < np.linalg.norm(narrow - wanted) / np.linalg.norm(wanted) < 0.05
    # Another time would give something else.
    assert np.abs(theirs(stored(), x[0], 1.0) - wanted[0]).max() > 1e-3


def test_out_and_in_changes_no_bit(tmp_path):
    params, fields = ddit.load(written(tmp_path))
    ddit.export(params, fields, tmp_path / "ours", length=32)
    found, again = ddit.load(tmp_path / "ours")
    chex.assert_trees_all_equal(found, params)
    assert again == fields
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert names == stored().keys() - {"backbone.rotary_emb.inv_freq"}
    x = np.arange(7)
    kept = load_file(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_allclose(theirs(kept, x), theirs(stored(), x), atol=1e-4)


def test_as_a_denoiser(tmp_path):
    """Padding changes nothing, and the mask is no class."""
    params, fields = ddit.load(written(tmp_path))
    model = ddit.ddit(**fields)
    plain, padded = networks.denoiser(model, 7, 7), networks.denoiser(model, 7, 7, 8)
    x = np.array([[1, 7, 7, 3]])
    call = jax.jit(denoise, static_argnums=0)
    wanted = call(plain, params, x)
    found = call(padded, params, np.pad(x, ((0, 0), (2, 1)), constant_values=8))
    np.testing.assert_allclose(found[:, 2:6], wanted, atol=1e-5)
    assert wanted.shape == (1, 4, 7)


def test_the_start_is_theirs():
    model = ddit.ddit(**FIELDS)
    params = jax.jit(model.init)(jax.random.key(0))
    logits = jax.jit(model.apply)(params, np.arange(5)[None])
    np.testing.assert_array_equal(logits, 0)
    up = np.asarray(params["blocks"]["up"]["kernel"])
    assert 0.24 < np.abs(up).max() <= 0.25


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(time_conditioning=True), "time_conditioning is True, but must be False"),
        (dict(model_type="bert"), "model_type is 'bert'"),
        (dict(n_heads=3), r"model\.heads is 3"),
        (dict(cond_dim=7), r"mlp.0.weight has the shape \(6, 256\), but must have \(7, 256\)"),
        (dict(n_blocks=3), r"lacks the tensor backbone\.blocks\.2\.norm1"),
        (dict(hidden_dim=None), "hidden_dim is None, but must be a whole number"),
    ],
)
def test_another_model_is_refused_in_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        ddit.load(written(tmp_path, **changes))


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="keeps no cache"):
        ddit.ddit(**FIELDS).start(1, 4)
    with pytest.raises(UserError, match=r"config\.model\.dtype is 'float16'"):
        ddit.ddit(**FIELDS, dtype="float16")
    with pytest.raises(UserError, match=r"config\.model\.depth is -1"):
        ddit.ddit(**FIELDS | dict(depth=-1))
    with pytest.raises(UserError, match=r"config\.model\.mlp is 5"):
        ddit.export({}, FIELDS | dict(mlp=5), tmp_path)

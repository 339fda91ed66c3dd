"""LLaDA's files: names, shards, and the function against NumPy, with its own names only."""

import json
from functools import cache

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from lm import llada
from lm.masked import networks
from lm.masked.denoiser import denoise
from lm.transformer import transformer

FIELDS = dict(
    vocab=16, dim=16, mlp=24, heads=4, kv_heads=2, depth=2, rope_base=500.0, norm_eps=1e-5,
    init_std=0.4, tie=False, causal=False,
)  # fmt: skip
MASK, CLASSES = 12, 14


@cache
def made(**changes):
    """Parameters as after training: norms away from one."""
    params = jax.jit(transformer(**FIELDS | changes).init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    noise = lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32)
    return jax.tree.map(noise, params)


def exported(folder, **changes):
    llada.export(made(**changes), FIELDS | changes, folder, mask=MASK, vocab=CLASSES, length=32)
    return folder


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def theirs(folder, row):
    """Logits of one row from the tensors by the names that LLaDA gives them."""
    stored = load_file(folder / "model.safetensors")
    w = {k.removeprefix("model.transformer."): v.astype(float) for k, v in stored.items()}
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    t, c = len(row), 4
    frequency = 1.0 / 500.0 ** (np.arange(0, c, 2) / c)
    angle = np.concatenate([np.outer(np.arange(t), frequency)] * 2, axis=1)

    def rope(x):  # [t, c]
        half = np.concatenate([-x[:, c // 2 :], x[:, : c // 2]], axis=1)
        return x * np.cos(angle) + half * np.sin(angle)

    x = w["wte.weight"][row]
    for n in range(2):
        get = lambda name, n=n: w[f"blocks.{n}.{name}.weight"]
        y = norm(x, get("attn_norm"))
        q, k, v = (y @ get(f"{name}_proj").T for name in "qkv")
        heads = []
        for h in range(4):
            g = slice(h // 2 * c, h // 2 * c + c)
            scores = rope(q[:, h * c : h * c + c]) @ rope(k[:, g]).T / np.sqrt(c)
            p = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(p / p.sum(1, keepdims=True) @ v[:, g])
        x = x + np.concatenate(heads, axis=1) @ get("attn_out").T
        y = norm(x, get("ff_norm"))
        gate = y @ get("ff_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ get("up_proj").T)) @ get("ff_out").T
    head = w.get("ff_out.weight", w["wte.weight"])
    return norm(x, w["ln_f.weight"]) @ head.T


@pytest.mark.parametrize("changes", [{}, dict(tie=True)], ids=["untied", "tied"])
def test_the_function_is_theirs_and_the_way_out_and_in_changes_no_bit(tmp_path, changes):
    found = llada.load(exported(tmp_path, **changes))
    chex.assert_trees_all_equal(found.params, made(**changes))
    assert found.fields == FIELDS | changes
    assert (found.vocab, found.mask) == (CLASSES, MASK)
    x = np.random.default_rng(0).integers(16, size=(2, 7))
    logits = jax.jit(transformer(**found.fields).apply)(found.params, x)
    wanted = np.stack([theirs(tmp_path, row) for row in x])
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


def test_as_a_denoiser_the_mask_is_never_written(tmp_path):
    found = llada.load(exported(tmp_path))
    made = networks.denoiser(transformer(**found.fields), found.vocab, found.mask)
    log_f = jax.jit(denoise, static_argnums=0)(made, found.params, np.array([[3, MASK, 1]]))
    assert log_f.shape == (1, 3, CLASSES)
    assert (log_f[..., MASK] == -np.inf).all()
    np.testing.assert_allclose(jnp.exp(log_f).sum(-1), 1, atol=1e-6)


def test_shards_and_bfloat16(tmp_path):
    folder = exported(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + i % 3}-of-3.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: a for n, a in tensors.items() if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    narrow, wide = llada.load(folder, "bfloat16"), llada.load(index)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), made())
    chex.assert_trees_all_equal(narrow.params, rounded)
    chex.assert_trees_all_equal_dtypes(narrow.params, rounded)
    chex.assert_trees_all_equal(
        wide.params, jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
    )
    apply, x = jax.jit(transformer(**wide.fields | dict(dtype="bfloat16")).apply), [[1, 2, 3]]
    found, wanted = (apply(one.params, np.array(x)) for one in (narrow, wide))
    np.testing.assert_array_equal(found, wanted)


def test_the_config_of_the_published_model_is_understood(tmp_path):
    """Sizes of LLaDA-8B, as its config.json has them."""
    exported(tmp_path)
    published = dict(
        activation_type="silu", alibi=False, alibi_bias_max=8.0, attention_dropout=0.0,
        attention_layer_norm=False, attention_layer_norm_with_affine=True,
        bias_for_layer_norm=False, block_group_size=1, block_type="llama", d_model=4096,
        embedding_dropout=0.0, embedding_size=126464, eos_token_id=126081,
        flash_attention=False, include_bias=False, include_qkv_bias=False, init_std=0.02,
        input_emb_norm=False, layer_norm_type="rms", layer_norm_with_affine=True,
        mask_token_id=126336, max_sequence_length=4096, mlp_hidden_size=12288, mlp_ratio=4,
        model_type="llada", multi_query_attention=None, n_heads=32, n_kv_heads=32,
        n_layers=32, pad_token_id=126081, residual_dropout=0.0, rms_norm_eps=1e-05, rope=True,
        rope_full_precision=True, rope_theta=500000.0, scale_logits=False, vocab_size=126464,
        weight_tying=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(UserError, match=r"lacks the tensor .*blocks\.2\.attn_norm\.weight"):
        llada.load(tmp_path)
    fields = llada.LAYOUT.ours(llada.weights.config_of(tmp_path))
    shapes = jax.eval_shape(transformer(**fields).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 8_015_581_184
    assert fields["rope_base"] == 5e5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(model_type="llama"), "model_type is 'llama', but must be 'llada'"),
        (dict(block_type="sequential"), "block_type is 'sequential', but must be 'llama'"),
        (dict(activation_type="gelu"), "activation_type is 'gelu'"),
        (dict(alibi=True), "alibi is True"),
        (dict(d_model="16"), "d_model is '16', but must be a whole number"),
        (dict(n_heads=5), r"model\.heads is 5"),
        (dict(embedding_size=13), "embedding_size is 13, but must be at least 14, or null"),
        (dict(mask_token_id=16), "mask_token_id is 16, but must be from 0 to 15"),
        (dict(mask_token_id=None), "mask_token_id is None, but must be a whole number"),
        (dict(mlp_hidden_size=None, mlp_ratio=4), r"ff_proj.weight has the shape \(24, 16\)"),
    ],
)
def test_another_model_is_refused_in_a_sentence(tmp_path, changes, sentence):
    configure(exported(tmp_path), **changes)
    with pytest.raises(UserError, match=sentence):
        llada.load(tmp_path)


def test_a_causal_model_is_no_llada(tmp_path):
    with pytest.raises(UserError, match="LLaDA sees both sides"):
        llada.export({}, FIELDS | dict(causal=True), tmp_path, mask=MASK)

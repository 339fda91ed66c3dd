"""Files that come back bit for bit, that Transformers reads, and that say what is wrong."""

import json
import os
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from lm import weights
from lm.transformer import transformer

FIELDS = dict(
    vocab=13, dim=16, mlp=24, heads=4, kv_heads=2, depth=2, rope_base=500.0, norm_eps=1e-5
)
FIELDS |= dict(init_std=0.2, tie=False)
NAME = "model.layers.1.mlp.down_proj.weight"


def made(**changes):
    """Parameters as after training: norms away from one."""
    params = transformer(**(FIELDS | changes)).init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noisy = lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape, a.dtype)
    return jax.tree.map(noisy, params)


def exported(folder, **changes):
    weights.export(made(**changes), FIELDS | changes, folder, length=64)
    return folder


def edit(folder, change, name="model.safetensors"):
    """Writes the tensors again as `change` leaves them."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sharded(folder):
    """The same in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


@pytest.mark.parametrize(
    "changes",
    [{}, dict(tie=True, kv_heads=0), dict(depth=0)],
    ids=["untied", "tied", "no blocks"],
)
def test_out_and_in_changes_no_bit(tmp_path, changes):
    folder = exported(tmp_path / "new" / "model", **changes)
    found, fields = weights.load(folder)
    chex.assert_trees_all_equal(found, made(**changes))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, made(**changes))
    wanted = FIELDS | changes
    assert fields == wanted | {"kv_heads": wanted["kv_heads"] or wanted["heads"]}
    assert sorted(os.listdir(tmp_path / "new" / "model")) == [
        "config.json",
        "model.safetensors",
    ]


def test_matrices_are_theirs_out_by_in(tmp_path):
    stored, params = load_file(exported(tmp_path) / "model.safetensors"), made()
    assert len(stored) == 3 + 9 * 2
    np.testing.assert_array_equal(stored[NAME], params["blocks"]["down"]["kernel"][1].T)
    assert stored["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
    assert (
        stored["lm_head.weight"].shape == stored["model.embed_tokens.weight"].shape == (13, 16)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        vocab_size=13,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        torch_dtype="float32",
    )
    assert wanted.items() <= config.items()


def test_a_file_an_index_and_shards_do_as_well(tmp_path):
    folder, wanted = exported(tmp_path), made()
    chex.assert_trees_all_equal(weights.load(folder / "model.safetensors")[0], wanted)
    where = sharded(folder)
    chex.assert_trees_all_equal(weights.load(folder)[0], wanted)
    found, _ = weights.load(str(folder / "model.safetensors.index.json"))
    chex.assert_trees_all_equal(found, wanted)
    # A shard without what the index says of it, then none.
    edit(folder, lambda t: t.pop(NAME), where[NAME])
    with pytest.raises(UserError, match=rf"{where[NAME]} lacks the tensor {NAME}"):
        weights.load(folder)
    (folder / where[NAME]).unlink()
    with pytest.raises(UserError, match=rf"There is no file .*{where[NAME]}"):
        weights.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(UserError, match="has no weight_map"):
        weights.load(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_fits_in_exactly(tmp_path, dtype):
    folder = exported(tmp_path)
    edit(folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    wanted = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), made())
    chex.assert_trees_all_equal(weights.load(folder)[0], wanted)


def test_what_is_loaded_computes_the_same(tmp_path):
    x = jnp.arange(10).reshape(2, 5)
    params, fields = weights.load(exported(tmp_path))
    found = jax.jit(transformer(**fields).apply)(params, x)
    np.testing.assert_array_equal(found, jax.jit(transformer(**FIELDS).apply)(made(), x))


def test_old_names_that_mean_nothing_are_passed_over(tmp_path):
    folder = exported(tmp_path, tie=True)
    head = np.zeros((13, 16), np.float32)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    edit(folder, lambda t: t.update(frequencies, **{"lm_head.weight": head}))
    chex.assert_trees_all_equal(weights.load(folder)[0], made(tie=True))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("hidden_size", "16", "a whole number"),
        ("hidden_size", 16.0, "a whole number"),
        ("vocab_size", None, "a whole number"),
        ("num_hidden_layers", 2.0, "a whole number"),
        ("num_attention_heads", True, "a whole number"),
        ("intermediate_size", 10**30, "a whole number"),
        ("num_key_value_heads", [2], "a whole number, or null"),
        ("head_dim", "4", "a whole number, or null"),
        ("head_dim", 0, "4"),
        ("rope_theta", "abc", "a finite number"),
        ("rope_theta", None, "a finite number"),
        ("rope_theta", 10**400, "a finite number"),
        ("rms_norm_eps", float("nan"), "a finite number"),
        ("initializer_range", [], "a finite number"),
        ("tie_word_embeddings", "no", "true or false"),
        ("rope_parameters", [1], "an object, or null"),
        ("rope_scaling", "default", "None, or of the rope_type 'default'"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, name, value, allowed):
    configure(exported(tmp_path), **{name: value})
    said = f"{tmp_path / 'config.json'}: {name} is {value!r}, but must be {allowed}."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "harmless",
    [
        dict(rope_scaling={"rope_type": "default"}),
        dict(rope_scaling={"type": "default"}),
        dict(rope_scaling={}),
        dict(rope_parameters=None),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 500}, rope_theta=None),
        dict(head_dim=None),
        dict(head_dim=4),
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(tmp_path, harmless):
    wanted = weights.load(exported(tmp_path))[1]
    configure(tmp_path, **harmless)
    assert weights.load(tmp_path)[1] == wanted


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda f: edit(f, lambda t: t.pop(NAME)),
            rf"model.safetensors lacks the tensor {NAME}",
        ),
        (
            lambda f: edit(f, lambda t: t.update({NAME: t[NAME].T.copy()})),
            rf"model.safetensors: {NAME} has the shape \(24, 16\), but must have \(16, 24\)",
        ),
        (
            lambda f: edit(f, lambda t: t.update({NAME: t[NAME].astype(np.int8)})),
            rf"{NAME} is of type I8, but must be one of F32, BF16, F16",
        ),
        (
            lambda f: edit(f, lambda t: t.update({"lm_head.bias": np.ones(13)})),
            "has the tensor lm_head.bias, for which we have no place",
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 1000),
            "model.safetensors is damaged or no safetensors file",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda f: (f / "config.json").unlink(), "There is no file .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged or no JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json lacks vocab_size"),
        (lambda f: configure(f, num_attention_heads=5), "config.json: .*model.heads is 5"),
        (lambda f: configure(f, hidden_act="gelu"), "hidden_act is 'gelu', but must be 'silu'"),
        (lambda f: configure(f, model_type="gpt2"), "model_type is 'gpt2'"),
        (lambda f: configure(f, attention_bias=True), "attention_bias is True"),
        (lambda f: configure(f, rope_scaling={"factor": 2.0}), "rope_scaling is {'factor'"),
        (lambda f: configure(f, rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
        (lambda f: configure(f, head_dim=8), "head_dim is 8, but must be 4"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path, harm, sentence):
    harm(exported(tmp_path))
    with pytest.raises(UserError, match=sentence):
        weights.load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*nowhere"):
        weights.load(tmp_path / "nowhere")


def test_parameters_of_another_model_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"params\['blocks'\]\['down'\].*\(2, 24, 16\)"):
        weights.export(made(), FIELDS | dict(mlp=32), tmp_path / "out")
    with pytest.raises(UserError, match=r"params has \['head'\]\['kernel'\]"):
        weights.export(made(), FIELDS | dict(tie=True), tmp_path / "out")
    with pytest.raises(UserError, match=r"params lacks \['head'\]\['kernel'\]"):
        weights.export(made(tie=True), FIELDS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        exported(tmp_path / "file")


@pytest.mark.parametrize("stopped", ["writing", "first name", "second name"])
def test_an_export_that_is_stopped_leaves_a_whole_model_or_none(tmp_path, monkeypatch, stopped):
    folder = exported(tmp_path)
    (folder / "tokenizer.json").write_text("theirs")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, calls = os.replace, []

    def stop(*args, **kwargs):
        calls.append(args)
        if stopped == "second name" and len(calls) == 1:
            return replace(*args)
        raise KeyboardInterrupt

    owner, name = (weights, "save_file") if stopped == "writing" else (os, "replace")
    monkeypatch.setattr(owner, name, stop)
    other = jax.tree.map(lambda a: 2 * a, made())
    with pytest.raises(KeyboardInterrupt):
        weights.export(other, FIELDS, folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    if stopped == "writing":
        assert after == before
    else:  # Old weights or new ones, but none that anybody would take for a model.
        assert sorted(after) == ["model.safetensors", "tokenizer.json"]
        with pytest.raises(UserError, match=r"There is no file .*config\.json"):
            weights.load(folder)
    monkeypatch.undo()
    weights.export(other, FIELDS, folder)
    chex.assert_trees_all_equal(weights.load(folder)[0], other)
    assert (folder / "tokenizer.json").read_text() == "theirs"


@pytest.mark.parametrize("changes", [{}, dict(tie=True, kv_heads=0)], ids=["untied", "tied"])
def test_transformers_opens_it_and_gives_the_same_logits(tmp_path, changes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = exported(tmp_path / "ours", **changes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not any(info.values()), info  # Nothing missing, nothing left over.
    x = np.random.default_rng(0).integers(FIELDS["vocab"], size=(3, 40))
    with torch.no_grad():
        wanted = theirs.eval()(torch.from_numpy(x)).logits.numpy()
    found = jax.jit(transformer(**(FIELDS | changes)).apply)(made(**changes), jnp.asarray(x))
    difference = np.abs(found - wanted).max()
    print(f"largest logit {np.abs(wanted).max():.3f}, largest difference {difference:.2e}")
    assert difference < 1e-4
    # And the other way: what Transformers writes, in one file or in shards, is read.
    for size in ("1GB", "2KB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        params, fields = weights.load(tmp_path / size)
        chex.assert_trees_all_equal(params, made(**changes))
        assert fields == weights.load(folder)[1]
    assert (tmp_path / "2KB" / "model.safetensors.index.json").exists()

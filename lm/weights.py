"""Parameters in the files of Hugging Face's LlamaForCausalLM, out and in.

    export(params, fields, "folder")        AutoModelForCausalLM.from_pretrained("folder")
    params, fields = load("folder")         transformer(**fields).apply(params, tokens)

A folder holds `config.json` and `model.safetensors`, or shards of it listed in
`model.safetensors.index.json`. Their matrices are [out, in], one per layer; ours are
[L, in, out]. Nothing else differs: no permutation of heads, since `lm.transformer` rotates
the same pairs. Files of other models are read and written by their own `Layout`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import UserError
from lm.layouts import (
    Config,
    Layout,
    Tensor,
    checked,
    field,
    flag,
    maybe_whole,
    number,
    require,
    tensors,
    whole,
    wrong,
)
from lm.model import Params
from lm.transformer import transformer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = ("F32", "BF16", "F16")

# Ours -> theirs.
BLOCKS = {
    "attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
REST = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

# Settings of theirs that change the function, and the only values that are ours.
REQUIRED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def _theirs(fields: dict) -> dict:
    get = lambda name: field(fields, name)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("vocab"),
        "hidden_size": get("dim"),
        "intermediate_size": get("mlp"),
        "num_hidden_layers": get("depth"),
        "num_attention_heads": get("heads"),
        "num_key_value_heads": get("kv_heads") or get("heads"),
        "head_dim": get("dim") // get("heads"),
        "hidden_act": "silu",
        "rms_norm_eps": get("norm_eps"),
        "rope_theta": get("rope_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": get("init_std"),
        "tie_word_embeddings": get("tie"),
        "torch_dtype": "float32",
    }


def _ours(config: Config) -> dict:
    """The fields of a config.json; Transformers 5 puts what is about rotations together."""
    require(config, REQUIRED)
    values = config.values
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise wrong(config, "rope_parameters", rope, "an object, or null")
    if rope.get("rope_type", "default") != "default":
        raise wrong(config, "rope_type", rope["rope_type"], "'default'")
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else ""
    if scaling and kind != "default":
        allowed = "None, or of the rope_type 'default'"
        raise wrong(config, "rope_scaling", scaling, allowed)
    turning = config._replace(values=rope) if "rope_theta" in rope else config
    fields = {
        "vocab": whole(config, "vocab_size"),
        "dim": whole(config, "hidden_size"),
        "mlp": whole(config, "intermediate_size"),
        "heads": whole(config, "num_attention_heads"),
        "depth": whole(config, "num_hidden_layers"),
        "kv_heads": maybe_whole(config, "num_key_value_heads") or 0,
        "rope_base": number(turning, "rope_theta", 1e4),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "init_std": number(config, "initializer_range", 0.02),
        "tie": flag(config, "tie_word_embeddings", False),
    }
    fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
    checked(config, transformer, fields)
    width, allowed = maybe_whole(config, "head_dim"), fields["dim"] // fields["heads"]
    if width not in (None, allowed):
        raise wrong(config, "head_dim", width, str(allowed))
    return fields


def _harmless(name: str, fields: dict) -> bool:
    """Old files keep the frequencies, and some a head that is the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and fields["tie"])


LLAMA = Layout(REST, BLOCKS, transformer, _ours, _theirs, _harmless)


def export(
    params: Params,
    config_fields: dict,
    folder: str | os.PathLike,
    *,
    length: int = 2048,
    begin: int | None = None,
    end: int | None = None,
    pad: int | None = None,
) -> None:
    """Writes a LLaMA's `model.safetensors` (float32) and `config.json`; both, or neither.

    Args:
      params: of `transformer`, with all of every array on this process's devices or host.
      config_fields: the arguments of that `transformer`.
      folder: made where it is missing.
      length: of the rows in training, `max_position_embeddings`.
      begin, end, pad: the tokenizer's tokens, `bos_token_id` ...; None: it has none.

    Raises:
      UserError: the parameters are not of these fields, or the folder cannot be written.
    """
    more = {
        "max_position_embeddings": length,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    save(params, config_fields, folder, LLAMA, more)


def save(
    params: Params, fields: dict, folder: str | os.PathLike, layout: Layout, more: dict
) -> None:
    """Writes `model.safetensors` (float32) and `config.json` of a layout.

    Both are finished under other names before the first one gets its own, and while old
    weights are exchanged for new ones no config stands beside them: whenever this is
    stopped, a folder with a config is a whole model. Other files of the folder stay.

    Args:
      params: of the layout's model, with all of every array on this process's devices or
        host.
      fields: the arguments of that model.
      folder: made where it is missing.
      more: settings for the config that are none of the model's.

    Raises:
      UserError: the parameters are not of these fields, or the folder cannot be written.
    """
    _require_shapes(params, _shapes(layout, fields))
    out = {}
    for tensor in tensors(layout, fields):
        leaf = params
        for name in tensor.leaf:
            leaf = leaf[name]
        array = leaf if tensor.layer is None else leaf[tensor.layer]
        array = np.asarray(array, np.float32)
        out[tensor.name] = np.ascontiguousarray(array.T if tensor.transposed else array)
    config = layout.theirs(fields) | more
    # Transformers looks at `format` and refuses files without it.
    writers = {
        WEIGHTS: lambda path: save_file(out, path, metadata={"format": "pt"}),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n"),
    }
    try:
        _write(Path(folder), writers)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error


def load(
    folder_or_file: str | os.PathLike, layout: Layout = LLAMA, dtype: str = "float32"
) -> tuple[Params, dict]:
    """Reads such a folder, or a `.safetensors` or index file with a config beside it.

    Args:
      dtype: of the arrays; bfloat16 and float16 fit into float32 exactly.

    Returns:
      params, NumPy arrays, and the fields with which the layout's model, `transformer`, is
      theirs.

    Raises:
      UserError: naming file and key, if a file is missing or damaged, a tensor is missing,
        has another shape or type, or the model has what ours has not.
    """
    path = _found(folder_or_file)
    fields = layout.ours(config_of(path))
    where = _index(path) if path.name.endswith(".index.json") else _names(path)
    wanted = list(tensors(layout, fields))
    _require_names(path, where, wanted, lambda name: layout.harmless(name, fields))
    made = lambda a: np.empty(a.shape, jnp.dtype(dtype))
    params = jax.tree.map(made, _shapes(layout, fields))
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in wanted:
        by_file.setdefault(where[tensor.name], []).append(tensor)
    for file, inside in by_file.items():
        with _opened(file) as stored:
            for tensor in inside:
                leaf = params
                for name in tensor.leaf:
                    leaf = leaf[name]
                goal = leaf if tensor.layer is None else leaf[tensor.layer]
                goal = goal.T if tensor.transposed else goal
                goal[...] = _read(file, stored, tensor.name, goal.shape)
    return params, fields


def config_of(folder_or_file: str | os.PathLike) -> Config:
    """The config.json of such a folder or file."""
    file = _found(folder_or_file).parent / CONFIG
    return Config(file, _json(file))


def _found(folder_or_file: str | os.PathLike) -> Path:
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / (WEIGHTS if (path / WEIGHTS).exists() else INDEX)
        if not path.exists():
            raise UserError(f"{path.parent} holds neither {WEIGHTS} nor {INDEX}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    return path


def _read(file: Path, stored: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        piece = stored.get_slice(name)
        found, dtype = tuple(piece.get_shape()), piece.get_dtype()
    except SafetensorError as error:  # An index may promise what the shard has not.
        raise UserError(f"{file} lacks the tensor {name}.") from error
    if found != shape:
        raise UserError(f"{file}: {name} has the shape {found}, but must have {shape}.")
    if dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise UserError(f"{file}: {name} is of type {dtype}, but must be one of {allowed}.")
    return stored.get_tensor(name)


def _require_shapes(params: Params, shapes: Params) -> None:
    found = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(params)}
    wanted = jax.tree.leaves_with_path(shapes)
    wanted = {jax.tree_util.keystr(k): v for k, v in wanted}
    for name in sorted(found.keys() ^ wanted.keys()):
        here, there = ("has", "have not") if name in found else ("lacks", "have")
        raise UserError(f"params {here} {name}, which models of these fields {there}.")
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape:
            raise UserError(
                f"params{name} has the shape {found[name].shape}, but must have {leaf.shape}."
            )


def _require_names(
    path: Path, where: dict, wanted: list[Tensor], harmless: Callable[[str], bool]
) -> None:
    names = {tensor.name for tensor in wanted}
    for tensor in wanted:
        if tensor.name not in where:
            raise UserError(f"{path} lacks the tensor {tensor.name}.")
    for name in sorted(where.keys() - names):
        if not harmless(name):
            raise UserError(f"{path} has the tensor {name}, for which we have no place.")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file: {error}.") from error


def _names(file: Path) -> dict[str, Path]:
    with _opened(file) as stored:
        return dict.fromkeys(stored.keys(), file)


def _index(file: Path) -> dict[str, Path]:
    listed = _json(file).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise UserError(f"{file} has no weight_map from tensors to files.")
    return {name: file.parent / shard for name, shard in listed.items()}


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object.")
    return found


def _shapes(layout: Layout, fields: dict) -> Any:
    return jax.eval_shape(layout.model(**fields).init, jax.random.key(0))


def _write(folder: Path, writers: dict[str, Callable[[Path], Any]]) -> None:
    """Files by their names; see `export` for the order. The last one makes it valid."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        (folder / CONFIG).unlink(missing_ok=True)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)

"""Parameters in the files of Hugging Face's LlamaForCausalLM, out and in.

    export(params, fields, "folder")        AutoModelForCausalLM.from_pretrained("folder")
    params, fields = load("folder")         transformer(**fields).apply(params, tokens)

A folder holds `config.json` and `model.safetensors`, or shards of it listed in
`model.safetensors.index.json`. Their matrices are [out, in], one per layer; ours are
[L, in, out]. Nothing else differs: no permutation of heads, since `lm.transformer` rotates
the same pairs.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import UserError
from lm.transformer import transformer

Params = Any
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = ("F32", "BF16", "F16")

# Path of ours below `blocks` -> name of theirs below `model.layers.N`.
BLOCKS = {
    "attention_norm/scale": "input_layernorm",
    "q/kernel": "self_attn.q_proj",
    "k/kernel": "self_attn.k_proj",
    "v/kernel": "self_attn.v_proj",
    "o/kernel": "self_attn.o_proj",
    "mlp_norm/scale": "post_attention_layernorm",
    "gate/kernel": "mlp.gate_proj",
    "up/kernel": "mlp.up_proj",
    "down/kernel": "mlp.down_proj",
}
REST = {
    "embed/embedding": "model.embed_tokens",
    "norm/scale": "model.norm",
    "head/kernel": "lm_head",
}

# Settings of theirs that change the function, and the only values that are ours.
REQUIRED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


class Tensor(NamedTuple):
    """One tensor of theirs: its name, our leaf, the layer in it, whether transposed."""

    name: str
    leaf: tuple[str, ...]
    layer: int | None
    transposed: bool


def tensors(fields: dict) -> Iterator[Tensor]:
    """All tensors of a model of these fields, in their order."""
    for path, name in REST.items():
        if path != "head/kernel" or not _field(fields, "tie"):
            leaf = tuple(path.split("/"))
            yield Tensor(f"{name}.weight", leaf, None, leaf[-1] == "kernel")
    for layer in range(fields["depth"]):
        for path, name in BLOCKS.items():
            leaf = ("blocks", *path.split("/"))
            full = f"model.layers.{layer}.{name}.weight"
            yield Tensor(full, leaf, layer, leaf[-1] == "kernel")


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
    """Writes `model.safetensors` (float32) and `config.json`; both, or neither.

    Both are finished under other names before the first one gets its own, and while old
    weights are exchanged for new ones no config stands beside them: whenever this is
    stopped, a folder with a config is a whole model. Other files of the folder stay.

    Args:
      params: of `transformer`, with all of every array on this process's devices or host.
      config_fields: the arguments of that `transformer`.
      folder: made where it is missing.
      length: of the rows in training, `max_position_embeddings`.
      begin, end, pad: the tokenizer's tokens, `bos_token_id` ...; None: it has none.

    Raises:
      UserError: the parameters are not of these fields, or the folder cannot be written.
    """
    _require_shapes(params, config_fields)
    out = {}
    for tensor in tensors(config_fields):
        leaf = params
        for name in tensor.leaf:
            leaf = leaf[name]
        array = leaf if tensor.layer is None else leaf[tensor.layer]
        array = np.asarray(array, np.float32)
        out[tensor.name] = np.ascontiguousarray(array.T if tensor.transposed else array)
    config = _to_theirs(config_fields) | {
        "max_position_embeddings": length,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    # Transformers looks at `format` and refuses files without it.
    writers = {
        WEIGHTS: lambda path: save_file(out, path, metadata={"format": "pt"}),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n"),
    }
    try:
        _write(Path(folder), writers)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error


def load(folder_or_file: str | os.PathLike) -> tuple[Params, dict]:
    """Reads such a folder, or a `.safetensors` or index file with a config beside it.

    Returns:
      params, float32 NumPy arrays (bfloat16 and float16 fit in exactly), and the fields
      with which `transformer(**fields)` is their model.

    Raises:
      UserError: naming file and key, if a file is missing or damaged, a tensor is missing,
        has another shape or type, or the model has what ours has not.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / (WEIGHTS if (path / WEIGHTS).exists() else INDEX)
        if not path.exists():
            raise UserError(f"{path.parent} holds neither {WEIGHTS} nor {INDEX}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    fields = _to_ours(path.parent / CONFIG)
    where = _index(path) if path.name.endswith(".index.json") else _names(path)
    wanted = list(tensors(fields))
    _require_names(path, where, wanted, fields)
    params = jax.tree.map(lambda a: np.empty(a.shape, np.float32), _shapes(fields))
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
    return stored.get_tensor(name).astype(np.float32)


def _require_shapes(params: Params, fields: dict) -> None:
    found = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(params)}
    wanted = jax.tree.leaves_with_path(_shapes(fields))
    wanted = {jax.tree_util.keystr(k): v for k, v in wanted}
    for name in sorted(found.keys() ^ wanted.keys()):
        here, there = ("has", "have not") if name in found else ("lacks", "have")
        raise UserError(f"params {here} {name}, which models of these fields {there}.")
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape:
            raise UserError(
                f"params{name} has the shape {found[name].shape}, but must have {leaf.shape}."
            )


def _require_names(path: Path, where: dict, wanted: list[Tensor], fields: dict) -> None:
    names = {tensor.name for tensor in wanted}
    for tensor in wanted:
        if tensor.name not in where:
            raise UserError(f"{path} lacks the tensor {tensor.name}.")
    for name in sorted(where.keys() - names):
        # Old files keep the frequencies, and some a head that is the embedding.
        harmless = name.endswith("rotary_emb.inv_freq")
        harmless |= name == "lm_head.weight" and fields["tie"]
        if not harmless:
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


def _field(fields: dict, name: str) -> Any:
    """A field, or what `transformer` takes where it is not given."""
    return fields.get(name, inspect.signature(transformer).parameters[name].default)


def _to_theirs(fields: dict) -> dict:
    get = lambda name: _field(fields, name)
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


def _to_ours(file: Path) -> dict:
    """The fields of a config.json; Transformers 5 puts what is about rotations together."""
    config = _json(file)

    def wrong(name, value, allowed):
        return UserError(f"{file}: {name} is {value!r}, but must be {allowed}.")

    for name, allowed in REQUIRED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise wrong(name, config[name], repr(allowed[0]))
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise wrong("rope_parameters", rope, "an object, or null")
    if rope.get("rope_type", "default") != "default":
        raise wrong("rope_type", rope["rope_type"], "'default'")
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else ""
    if scaling and kind != "default":
        raise wrong("rope_scaling", scaling, "None, or of the rope_type 'default'")

    def get(name, allowed, right, *default, among=config):
        if name not in among and not default:
            raise UserError(f"{file} lacks {name}.")
        value = among.get(name, *default)
        if not right(value):
            raise wrong(name, value, allowed)
        return value

    whole = lambda name, *default: get(name, "a whole number", _whole, *default)
    maybe = lambda name: get(
        name, "a whole number, or null", lambda v: v is None or _whole(v), None
    )
    number = lambda name, default, among=config: float(
        get(name, "a finite number", _number, default, among=among)
    )
    base = number("rope_theta", 1e4, rope if "rope_theta" in rope else config)
    fields = {
        "vocab": whole("vocab_size"),
        "dim": whole("hidden_size"),
        "mlp": whole("intermediate_size"),
        "heads": whole("num_attention_heads"),
        "depth": whole("num_hidden_layers"),
        "kv_heads": maybe("num_key_value_heads") or whole("num_attention_heads"),
        "rope_base": base,
        "norm_eps": number("rms_norm_eps", 1e-6),
        "init_std": number("initializer_range", 0.02),
        "tie": get("tie_word_embeddings", "true or false", _is_bool, False),
    }
    try:
        transformer(**fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    width, allowed = maybe("head_dim"), fields["dim"] // fields["heads"]
    if width not in (None, allowed):
        raise wrong("head_dim", width, allowed)
    return fields


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(value: Any) -> bool:
    """An integer that the axis of an array may have; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max  # JSON's integers have no end.


def _shapes(fields: dict) -> Any:
    return jax.eval_shape(transformer(**fields).init, jax.random.key(0))


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

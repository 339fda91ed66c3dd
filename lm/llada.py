"""LLaDA in its own files: a LLaMA that sees both sides (Nie et al., arXiv:2502.09992).

    found = load("folder")                       of GSAI-ML/LLaDA-8B-Base, -Instruct, -1.5
    model = transformer(**found.fields)
    denoiser = networks.denoiser(model, found.vocab, found.mask)

The blocks are those of `lm.transformer`, rotations pair the same halves; tensors have the names
of OLMo, from which its code comes. The mask is a token of the vocabulary (126336 of 126464).
A missing file, tensor or setting is refused by name, as in `lm.weights`.
"""

import os
from functools import partial
from typing import Any, NamedTuple

from common.errors import UserError
from lm import weights
from lm.layouts import (
    Config,
    Layout,
    checked,
    field,
    flag,
    maybe_whole,
    number,
    require,
    whole,
    wrong,
)
from lm.model import Params
from lm.transformer import transformer

# Ours -> theirs.
BLOCKS = {
    "attention_norm/scale": "model.transformer.blocks.{}.attn_norm.weight",
    "q/kernel": "model.transformer.blocks.{}.q_proj.weight",
    "k/kernel": "model.transformer.blocks.{}.k_proj.weight",
    "v/kernel": "model.transformer.blocks.{}.v_proj.weight",
    "o/kernel": "model.transformer.blocks.{}.attn_out.weight",
    "mlp_norm/scale": "model.transformer.blocks.{}.ff_norm.weight",
    "gate/kernel": "model.transformer.blocks.{}.ff_proj.weight",
    "up/kernel": "model.transformer.blocks.{}.up_proj.weight",
    "down/kernel": "model.transformer.blocks.{}.ff_out.weight",
}
REST = {
    "embed/embedding": "model.transformer.wte.weight",
    "norm/scale": "model.transformer.ln_f.weight",
    "head/kernel": "model.transformer.ff_out.weight",
}

# Settings of theirs that change the function, and the only values that are ours.
REQUIRED = {
    "model_type": ("llada",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "scale_logits": (False,),
}
NUMBERS = {
    "vocab_size": "vocab",
    "d_model": "dim",
    "n_heads": "heads",
    "n_layers": "depth",
}


class Loaded(NamedTuple):
    """A model from its files.

    Attributes:
      params: of `transformer(**fields)`, NumPy arrays.
      fields: its arguments; `vocab` counts the rows of the embedding.
      vocab: V, tokens that may be written, and the mask.
      mask: the token that hides another.
    """

    params: Params
    fields: dict
    vocab: int
    mask: int


def load(folder_or_file: str | os.PathLike, dtype: str = "float32") -> Loaded:
    """Reads a folder, or a `.safetensors` or index file with a config beside it.

    Args:
      dtype: of the arrays; bfloat16 is that of the published files, and half the memory.

    Raises:
      UserError: as `weights.load`.
    """
    params, fields = weights.load(folder_or_file, LAYOUT, dtype)
    config = weights.config_of(folder_or_file)
    vocab, mask = whole(config, "vocab_size"), whole(config, "mask_token_id")
    if not 0 <= mask < fields["vocab"]:
        raise wrong(config, "mask_token_id", mask, f"from 0 to {fields['vocab'] - 1}")
    return Loaded(params, fields, vocab, mask)


def export(
    params: Params,
    fields: dict,
    folder: str | os.PathLike,
    *,
    mask: int,
    vocab: int | None = None,
    length: int = 4096,
    end: int | None = None,
    pad: int | None = None,
) -> None:
    """Writes `model.safetensors` (float32) and `config.json`; both, or neither.

    Args:
      params: of `transformer(**fields)`, on this process's devices or host.
      mask: the token that hides another.
      vocab: tokens that may be written; None: all rows of the embedding.
      length: of the rows in training.
      end, pad: the tokenizer's tokens; None: it has none.

    Raises:
      UserError: the parameters are not of these fields, the model is causal, or the folder
        cannot be written.
    """
    if field(fields, "causal") or field(fields, "block"):
        raise UserError("LLaDA sees both sides: causal must be False and block 0.")
    more = {
        "vocab_size": fields["vocab"] if vocab is None else vocab,
        "mask_token_id": mask,
        "max_sequence_length": length,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    weights.save(params, fields, folder, LAYOUT, more)


def _ours(config: Config) -> dict:
    require(config, REQUIRED)
    fields: dict[str, Any] = {ours: whole(config, name) for name, ours in NUMBERS.items()}
    rows = maybe_whole(config, "embedding_size")
    if rows is not None and rows < fields["vocab"]:
        raise wrong(config, "embedding_size", rows, f"at least {fields['vocab']}, or null")
    mlp = maybe_whole(config, "mlp_hidden_size")
    fields |= {
        "vocab": rows or fields["vocab"],
        "mlp": whole(config, "mlp_ratio") * fields["dim"] if mlp is None else mlp,
        "kv_heads": maybe_whole(config, "n_kv_heads") or fields["heads"],
        "rope_base": number(config, "rope_theta", 1e4),
        "norm_eps": number(config, "rms_norm_eps", 1e-5),
        "init_std": number(config, "init_std", 0.02),
        "tie": flag(config, "weight_tying"),
        "causal": False,
    }
    return checked(config, transformer, fields)


def _theirs(fields: dict) -> dict:
    get = partial(field, fields)
    fixed = {name: allowed[0] for name, allowed in REQUIRED.items()}
    return fixed | {
        "architectures": ["LLaDAModelLM"],
        "d_model": get("dim"),
        "n_heads": get("heads"),
        "n_kv_heads": get("kv_heads") or get("heads"),
        "n_layers": get("depth"),
        "mlp_hidden_size": get("mlp"),
        "embedding_size": get("vocab"),
        "rope_theta": get("rope_base"),
        "rms_norm_eps": get("norm_eps"),
        "init_std": get("init_std"),
        "weight_tying": get("tie"),
        "torch_dtype": "float32",
    }


def _harmless(name: str, fields: dict) -> bool:
    return name == REST["head/kernel"] and fields["tie"]


LAYOUT = Layout(REST, BLOCKS, transformer, _ours, _theirs, _harmless)

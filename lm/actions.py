"""What can be done with a trained language model: `--do=evaluate`, sample, export, analyze."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import metrics, plots
from common.errors import UserError
from common.experiment import Run
from lm import tokenizers, weights
from lm.generate import generate
from lm.modules import TYPES, modules
from optim import spectra
from optim.assignment import assign_decay
from optim.exponents import hill_alpha, tail_start
from optim.modules import select


def spectra_of(params: Any) -> dict:
    """Per type of module, one number per layer: exponents, stable ranks and a flag.

    Returns:
      alpha_layers_TYPE (0: there is no exponent), stable_rank_layers_TYPE, and
      deficient_layers_TYPE: 1 where half the spectrum holds zeros, up to rounding. Such a
      module still has an exponent, a small one.
    """
    leaves = select(params, modules)
    every = jax.tree.leaves(params)
    found = _spectra(tuple(leaves), [every[leaf.index] for leaf in leaves])
    return jax.device_get(found)


@partial(jax.jit, static_argnums=0)
def _spectra(leaves, ws):
    found = {}
    for leaf, values in zip(leaves, spectra.eigenvalues(list(leaves), ws), strict=True):
        found[f"alpha_layers_{leaf.kind}"] = jnp.nan_to_num(hill_alpha(values))
        largest = jnp.maximum(values[..., -1], jnp.finfo(values.dtype).tiny)
        found[f"stable_rank_layers_{leaf.kind}"] = values.sum(axis=-1) / largest
        # Singular values below r eps of the largest, as NumPy counts a matrix's rank.
        nothing = (leaf.rank * jnp.finfo(values.dtype).eps) ** 2 * largest
        middle = values[..., tail_start(leaf.rank)]
        found[f"deficient_layers_{leaf.kind}"] = (middle <= nothing).astype(jnp.int32)
    return found


def evaluate(config, parts, run: Run, folder: Path) -> str:
    """Validation loss anew, with today's `config.eval`."""
    del folder
    values = parts.evaluate(run.state(), jax.random.key(config.seed))
    row = metrics.to_row(0, "eval", values)
    names = ("val_loss", "val_ppl", "val_ppl_released", "val_tokens")
    lines = ["| | |", "|---|---|", *(f"| {n} | {row[n]:.6g} |" for n in names)]
    return "\n".join(lines)


def sample(config, parts, run: Run, folder: Path) -> str:
    """Continues the text of the file --input, or the start of the validation text."""
    reader = tokenizers.tokenizer(parts.train.tokenizer or "bytes")
    start = _read(run.input) if run.input else None
    prompt = reader.encode(start) if start else np.asarray(parts.valid.tokens[:64])
    if not len(prompt):
        raise UserError(f"The file --input={run.input} holds no text to continue.")
    prompt = prompt[-config.data.length :].astype(np.int32)
    s = config.sample
    key = jax.random.key(config.seed)
    rows = jnp.tile(prompt, (s.count, 1))
    tokens = generate(
        parts.model, run.state().params, key, rows, s.steps, s.temperature, s.top_k, s.top_p
    )
    texts = [reader.decode(row) for row in np.asarray(tokens)]
    if jax.process_index() == 0:
        metrics.write(folder / "samples.txt", "\n\f\n".join(texts))
    return "\n\n".join(f"```\n{text}\n```" for text in texts)


def export(config, parts, run: Run, folder: Path) -> str:
    """Writes the weights as a LLaMA that `transformers` opens."""
    fields = dict(config.model)
    eos, pad = parts.train.eos, parts.train.pad
    weights.export(
        jax.device_get(run.state().params),
        fields,
        folder,
        length=config.data.length,
        end=eos if eos >= 0 else None,
        pad=pad if pad >= 0 else None,
    )
    return f"{folder}: model.safetensors and config.json, LlamaForCausalLM."


def analyze(config, parts, run: Run, folder: Path) -> str:
    """Exponents, stable ranks and the decays they would be assigned, module by module.

    Of this run, or of a folder or file of safetensors given as --input. Exponents over the
    training of this run are drawn, too.
    """
    del parts
    params = weights.load(run.input)[0] if run.input else run.state().params
    found = spectra_of(jax.tree.map(jnp.asarray, params))
    alpha = np.stack([found[f"alpha_layers_{kind}"] for kind in TYPES])
    rank = np.stack([found[f"stable_rank_layers_{kind}"] for kind in TYPES])
    flags = np.stack([found[f"deficient_layers_{kind}"] for kind in TYPES])
    s = config.optim.alphadecay
    known = jnp.where(alpha.ravel() > 0, alpha.ravel(), jnp.nan)
    ratio = np.asarray(assign_decay(known, "linear", s.s1, s.s2)).reshape(alpha.shape)
    decay = config.optim.weight_decay * ratio
    rows = [
        [
            kind,
            layer,
            *(f"{a[i, layer]:.4f}" for a in (alpha, rank, ratio)),
            f"{decay[i, layer]:.3e}",
            note(float(alpha[i, layer]), int(flags[i, layer])),
        ]
        for i, kind in enumerate(TYPES)
        for layer in range(alpha.shape[1])
    ]
    head = ["type", "layer", "alpha", "stable rank", "ratio", "decay", "note"]
    if jax.process_index() == 0:
        with (folder / "modules.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        heat_map(folder / "modules.png", {"alpha": alpha, "decay ratio": ratio})
        if not run.input:
            over_training(folder / "over_training.png", {run.name: run.rows})
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(table)


def heat_map(path: Path, maps: dict[str, np.ndarray]) -> None:
    """One panel per quantity: types of modules against layers."""
    with plots.panels(path, len(maps)) as axes:
        for axis, (title, values) in zip(axes, maps.items(), strict=True):
            shown = axis.imshow(np.asarray(values), aspect="auto", cmap="viridis")
            axis.set(title=title, xlabel="layer")
            axis.set_yticks(range(len(TYPES)), TYPES)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(False)
            axis.figure.colorbar(shown, ax=axis, shrink=0.8)


def over_training(path: Path, runs: dict[str, list[dict]]) -> None:
    """Exponents of every module at every evaluation, one panel per run."""
    with plots.panels(path, len(runs)) as axes:
        for axis, (title, rows) in zip(axes, runs.items(), strict=True):
            rows = [row for row in rows if row["split"] == "eval"]
            each = np.array([[row[f"alpha_layers_{kind}"] for kind in TYPES] for row in rows])
            layers = each.shape[2]
            values = each.reshape(len(rows), -1).T
            shown = axis.imshow(np.where(values > 0, values, np.nan), aspect="auto")
            axis.set(title=title, xlabel="step")
            axis.set_xticks(range(len(rows)), [str(row["step"]) for row in rows], rotation=45)
            middle = (layers - 1) / 2 + layers * np.arange(len(TYPES))
            axis.set_yticks(middle, TYPES)
            axis.grid(False)
            axis.figure.colorbar(shown, ax=axis, shrink=0.8, label="alpha")


def note(alpha: float, deficient: int) -> str:
    """What is wrong with a module's spectrum; nothing, as a rule."""
    return "no exponent" if alpha <= 0 else "rank-deficient" if deficient else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"Cannot read --input={path}: {reason}.") from error


ALL = {"evaluate": evaluate, "sample": sample, "export": export, "analyze": analyze}

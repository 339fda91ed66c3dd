"""What can be done with a trained language model: `--do=evaluate`, sample, export, analyze."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import mesh as meshes
from common import metrics, plots
from common.errors import UserError, reject
from common.experiment import Run
from common.pod import first
from lm import tokenizers, weights
from lm.generate import sliding
from lm.modules import TYPES, modules
from optim import spectra
from optim.alphadecay import alphadecay, refresher
from optim.exponents import hill_alpha, tail_start
from optim.modules import select
from optim.weight_decay import independent


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
    return meshes.replicate(found)


def evaluate(config, parts, run: Run, folder: Path) -> str:
    """Validation loss anew, with today's `config.eval`."""
    del folder
    _no_input(run)
    values = parts.evaluate(run.state(), jax.random.key(config.seed))
    row = metrics.to_row(0, "eval", values)
    names = ("val_loss", "val_ppl", "val_ppl_released", "val_tokens")
    lines = ["| | |", "|---|---|", *(f"| {n} | {row[n]:.6g} |" for n in names)]
    return "\n".join(lines)


def sample(config, parts, run: Run, folder: Path) -> str:
    """Continues the text of the file --input, or the start of the validation text.

    No position is beyond those of training; a row ends where the end of the text is drawn.
    """
    s = config.sample
    if s.count < 1:
        raise reject("sample.count", s.count, "a whole number from 1 up")
    reader = tokenizers.tokenizer(parts.train.tokenizer or "bytes")
    if run.input:
        prompt = reader.encode(_read(run.input))
        if not len(prompt):
            raise UserError(f"The file --input={run.input} holds no text to continue.")
    else:
        prompt = np.asarray(parts.valid.tokens[:64])
    # Documents as rows are one token shorter on the way in.
    context = config.data.length - (not config.data.pack)
    prompt = prompt[-context:].astype(np.int32)
    if prompt.max() >= config.model.vocab:
        allowed = f"at least {prompt.max() + 1} for the tokens of the text to continue"
        raise reject("model.vocab", config.model.vocab, allowed)
    stop = parts.train.eos if parts.train.eos >= 0 else None
    rows = sliding(
        parts.model,
        run.state().params,
        jax.random.key(config.seed),
        np.tile(prompt, (s.count, 1)),
        s.steps,
        context,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        stop=stop,
        vocab=reader.vocab_size,
    )
    texts = [reader.decode(_ended(row, len(prompt), stop)) for row in rows]
    if jax.process_index() == 0:
        metrics.write(folder / "samples.txt", "\n\f\n".join(texts))
    return "\n\n".join(f"```\n{text}\n```" for text in texts)


def _ended(row: np.ndarray, start: int, stop: int | None) -> np.ndarray:
    """The row up to the first `stop` from `start` on."""
    found = np.flatnonzero(row[start:] == stop) if stop is not None else ()
    return row[: start + found[0]] if len(found) else row


def export(config, parts, run: Run, folder: Path) -> str:
    """Writes the weights, and the tokenizer, as a LLaMA that `transformers` opens."""
    _no_input(run)
    eos, pad = parts.train.eos, parts.train.pad
    gathered = jax.jit(meshes.replicate)
    # Leaf by leaf: all of the parameters at once may not fit on one device.
    params = jax.tree.map(lambda a: jax.device_get(gathered(a)), run.state().params)

    def write():
        weights.export(
            params,
            dict(config.model),
            folder,
            length=config.data.length,
            end=eos if eos >= 0 else None,
            pad=pad if pad >= 0 else None,
        )
        files.extend(_tokenizer(parts.train, folder))

    files = [weights.WEIGHTS, weights.CONFIG]
    first(write)
    return f"{folder}: {', '.join(files)}; LlamaForCausalLM."


def _tokenizer(text, folder: Path) -> list[str]:
    """Copies the file of a text's tokenizer, if it has one, and says what is written."""
    if text.tokenizer in ("", "bytes"):
        return []
    path = tokenizers.find(text.tokenizer)
    files = {f"tokenizer{path.suffix}": path.read_bytes()}
    if path.suffix == ".json":
        # Or else `transformers` takes LLaMA's own tokenizer, which cuts text otherwise.
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}
        about |= tokenizers.control(path, text.pad, text.eos)
        files["tokenizer_config.json"] = json.dumps(about, indent=2).encode()
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    return list(files)


def analyze(config, parts, run: Run, folder: Path) -> str:
    """Spectra and the decays that AlphaDecay would assign by them, module by module.

    Of this run, or of a folder or file of safetensors given as --input. Exponents over the
    training of this run are drawn, too.
    """
    del parts
    params = weights.load(run.input)[0] if run.input else run.state().params
    found = spectra_of(params)
    each = lambda name: np.stack([found[f"{name}_layers_{kind}"] for kind in TYPES])
    score, ratio, notes = assigned(config.optim, params)
    s = config.optim.alphadecay
    eta = config.optim.weight_decay
    if config.optim.independent:
        eta = independent(eta, config.optim.learning_rate)
    alpha, flags = each("alpha"), each("deficient")
    rows = [
        [
            kind,
            layer,
            *(f"{a[i, layer]:.4f}" for a in (score, each("stable_rank"), ratio)),
            f"{eta * ratio[i, layer]:.3e}",
            notes.get((kind, layer), note(float(alpha[i, layer]), int(flags[i, layer]))),
        ]
        for i, kind in enumerate(TYPES)
        for layer in range(ratio.shape[1])
    ]
    corrected = "" if s.shape_correction == "none" else f" ({s.shape_correction})"
    head = ["type", "layer", s.score + corrected, "stable rank", "ratio", "decay", "note"]
    if jax.process_index() == 0:
        with (folder / "modules.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        heat_map(folder / "modules.png", {head[2]: score, "decay ratio": ratio})
        if not run.input:
            over_training(folder / "over_training.png", {run.name: run.rows})
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    said = (
        f"The decays that AlphaDecay would assign with config.optim.alphadecay (assignment "
        f"{s.assignment}, fit {s.fit}, s1 = {s.s1:g}, s2 = {s.s2:g}) at a decay of {eta:g}, "
        "whatever rule trained these weights."
    )
    return "\n".join([said, "", *table])


def assigned(optim, params: Any) -> tuple[np.ndarray, np.ndarray, dict]:
    """What the first refresh of AlphaDecay would make of parameters.

    Args:
      optim: the config's; its `alphadecay` counts, and no other rule.
      params: of `lm.transformer`.

    Returns:
      Scores (NaN: none) and ratios, [types, layers], and (type, layer) -> why a module that
      has a score keeps ratio 1.

    Raises:
      UserError: a setting is out of range, or the score needs gradients.
    """
    settings = dict(optim.alphadecay)
    refresh = refresher(modules=modules, **settings)
    rule = alphadecay(0.0, modules=modules, **settings)
    leaves = select(params, modules)
    small = {leaf.kind for leaf in leaves if leaf.rank < optim.alphadecay.min_eigs}
    depth = leaves[0].modules[0]
    score = {kind: np.full(depth, np.nan) for kind in TYPES}
    ratio = {kind: np.ones(depth) for kind in TYPES}
    if len(small) < len(TYPES):  # Or else the rule would refuse the model.
        state = jax.jit(lambda p: meshes.replicate(refresh(rule.init(p), p)))(params)
        for leaf in leaves:
            if leaf.kind not in small:
                score[leaf.kind] = jax.device_get(state.alpha[leaf.name])
                ratio[leaf.kind] = jax.device_get(state.ratio[leaf.name])
    notes = {(kind, i): "below min_eigs" for kind in small for i in range(depth)}
    for leaf in leaves:
        left_out = [i for i, n in enumerate(leaf.names()) if n in optim.alphadecay.exclude]
        notes |= {(leaf.kind, i): "excluded" for i in left_out}
    stacked = lambda found: np.stack([found[kind] for kind in TYPES])
    return stacked(score), stacked(ratio), notes


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
    """Exponents of every module at every evaluation, one panel per run that has any."""
    kept = {n: [row for row in rows if row["split"] == "eval"] for n, rows in runs.items()}
    kept = {name: rows for name, rows in kept.items() if rows}
    if not kept:
        return
    with plots.panels(path, len(kept)) as axes:
        for axis, (title, rows) in zip(axes, kept.items(), strict=True):
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


def _no_input(run: Run) -> None:
    if run.input:
        raise UserError(f"--input={run.input} is for sample and analyze.")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"Cannot read --input={path}: {reason}.") from error


ALL = {"evaluate": evaluate, "sample": sample, "export": export, "analyze": analyze}

"""What can be done with a trained run: `--do=evaluate`, sample, speed, export."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import mesh as meshes
from common import metrics
from common.errors import UserError, reject
from common.experiment import Run
from common.pod import first
from lm import llada, weights
from lm.masked import animation, figures, guidance, sample, settings, speed, sweep
from lm.masked.parts import Parts, judged_params, reader

GAP = "_"  # Of a text with gaps, in --input: a run of these is that many masked tokens.


def evaluate(config, parts: Parts, run: Run, folder: Path) -> str:
    """Likelihood of held-out texts and what the samplers write, with today's settings."""
    del folder
    _no_input(run)
    found = metrics.to_row(0, "eval", parts.evaluate(run.state()))
    lines = [
        f"| {name} | {value:.6g} |"
        for name, value in found.items()
        if isinstance(value, (int, float)) and name != "step"
    ]
    arrays = [
        f"| {name} | {', '.join(f'{v:.4g}' for v in value)} |"
        for name, value in found.items()
        if isinstance(value, list) and value and not isinstance(value[0], list)
    ]
    return "\n".join(["| | |", "|---|---|", *lines, *arrays])


def sampled(config, parts: Parts, run: Run, folder: Path) -> str:
    """Writes texts by `config.sampler`, around the text of the file --input if there is one.

    In that text a run of three or more underscores is a gap: "The ____ cat" asks for four
    tokens. Tokens that are missing at its end are gaps, too.
    """
    params, count = judged_params(run.state()), config.sample.count
    if count < 1:
        raise reject("sample.count", count, "a whole number from 1 up")
    prompt, denoiser = None, parts.denoiser
    if run.input:
        prompt = np.tile(_prompt(config, parts, run.input), (count, 1))
    if config.kind == "ar":
        if config.guidance:
            raise reject("guidance", config.guidance, "0 with kind ar, which has none")
        if run.input:
            prompt = _prefix(prompt, parts.mask)
        found = sweep.drawn(config, parts, params, None, count, prompt)
    elif config.guidance:
        if prompt is None:
            raise reject("guidance", config.guidance, "0 without a text to lean on, --input")
        made = settings.settings(**config.sampler)
        given = guidance.Guided(params, prompt != parts.mask, config.guidance)
        key = jax.random.key(config.seed)
        found = sample.sample(
            key, guidance.guided(denoiser), given, count, config.length, made, prompt
        )
    else:
        made = settings.fit(
            settings.settings(**config.sampler), config.length, parts.source.vocab
        )
        found = sweep.drawn(config, parts, params, made, count, prompt)
    if jax.process_index() > 0:
        return ""
    return _show(config, parts, jax.device_get(found), folder)


def _show(config, parts, found: sample.Result, folder: Path) -> str:
    tokens = np.asarray(found.tokens)
    decode = reader(parts.source.train).decode if parts.source.train else None
    texts = [decode(row) if decode else " ".join(map(str, row)) for row in tokens]
    metrics.write(folder / "samples.txt", "\n\f\n".join(texts))
    np.save(folder / "samples.npy", tokens)
    said = [f"Network calls of a text: {np.mean(found.calls):.1f}."]
    if config.sample.animate:
        one = found._replace(tokens=tokens[:1], when=np.asarray(found.when)[:1], history=None)
        one = one._replace(rounds=int(one.when.max()) + 1)
        said += [
            f"![{c}]({folder / f}) " for c, f in animation.draw(config, parts, one, folder)
        ]
    return "\n\n".join([*said, *(f"```\n{text}\n```" for text in texts)])


def _prompt(config, parts: Parts, path: str) -> np.ndarray:
    """The tokens of a file, the mask where it has gaps: int32 [L]."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"Cannot read --input={path}: {reason}.") from error
    tokens: list[int] = []
    for piece in _pieces(text.rstrip("\n")):
        if piece.startswith(GAP * 3):
            tokens += [parts.mask] * len(piece)
        elif parts.source.train is None:
            tokens += _numbers(piece, parts.source.vocab, path)
        else:
            tokens += reader(parts.source.train).encode(piece).tolist()
    if len(tokens) > config.length:
        raise UserError(
            f"The text of --input={path} has {len(tokens)} tokens, but config.length is "
            f"{config.length}."
        )
    tokens += [parts.mask] * (config.length - len(tokens))
    return np.array(tokens, np.int32)


def _pieces(text: str) -> list[str]:
    """The text cut at its gaps, which are kept."""
    pieces, at = [""], 0
    while at < len(text):
        run = len(text[at:]) - len(text[at:].lstrip(GAP))
        if run >= 3:
            pieces += [GAP * run, ""]
            at += run
        else:
            pieces[-1] += text[at]
            at += 1
    return [piece for piece in pieces if piece]


def _numbers(piece: str, vocab: int, path: str) -> list[int]:
    try:
        found = [int(word) for word in piece.split()]
    except ValueError:
        found = [-1]
    if any(not 0 <= token < vocab for token in found):
        raise UserError(
            f"The text of --input={path} must be numbers from 0 to {vocab - 1} and gaps, as a "
            "formal language has no letters."
        )
    return found


def _prefix(prompt: np.ndarray, mask: int) -> np.ndarray:
    """What stands before the first gap: an autoregressive model cannot see further."""
    gaps = np.flatnonzero(prompt[0] == mask)
    end = int(gaps[0]) if len(gaps) else prompt.shape[1]
    if (prompt[:, end:] != mask).any():
        raise UserError(
            "An autoregressive model continues texts: the gap of --input must be at its end."
        )
    return prompt[:, :end]


def timed(config, parts: Parts, run: Run, folder: Path) -> str:
    """Tokens a second of every sampler, and of an autoregressive model of the same size."""
    _no_input(run)
    if config.kind != "mdm":
        raise reject("kind", config.kind, "mdm: it is compared with its own blocks, causal")
    if not config.speed.batches:
        raise reject("speed.batches", tuple(config.speed.batches), "one batch size at least")
    found = speed.measured(config, parts, judged_params(run.state()), speed.KINDS)
    figures.efficiency(found, folder / "efficiency.png")
    return speed.table(found)


def export(config, parts: Parts, run: Run, folder: Path) -> str:
    """Writes the weights as safetensors: LLaDA's names, or LLaMA's of an autoregressive run."""
    _no_input(run)
    if config.model.absolute:
        raise reject("model.absolute", True, "False: neither LLaDA nor LLaMA has such a table")
    gathered = jax.jit(meshes.replicate)
    params = jax.tree.map(lambda a: jax.device_get(gathered(a)), judged_params(run.state()))
    params, fields = _cut(params, parts.fields, parts.mask + 1)
    length = config.length
    if config.kind == "ar":
        first(lambda: weights.export(params, fields, folder, length=length))
        return (
            f"{folder}: LlamaForCausalLM, start symbol {parts.mask}; it must never be written, "
            f"so let your generator suppress token {parts.mask}."
        )
    first(lambda: llada.export(params, fields, folder, mask=parts.mask, length=length))
    return f"{folder}: LLaDA's names, mask {parts.mask}."


def _cut(params: Any, fields: dict, rows: int) -> tuple[Any, dict]:
    """The model of its first rows: those beyond the mask stand for no token."""
    embed = params["embed"] | {"embedding": params["embed"]["embedding"][:rows]}
    params = params | {"embed": embed}
    if "head" in params:
        params = params | {"head": {"kernel": params["head"]["kernel"][:, :rows]}}
    return params, fields | {"vocab": rows}


def _no_input(run: Run) -> None:
    if run.input:
        raise UserError(f"--input={run.input} is for sample.")


ALL: dict[str, Any] = {
    "evaluate": evaluate,
    "sample": sampled,
    "speed": timed,
    "export": export,
}

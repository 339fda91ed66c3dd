"""Training of a masked diffusion language model, or of the autoregressive one beside it.

Feng et al., "Theoretical Benefit and Limitation of Diffusion Language Model",
arXiv:2502.09622. Both are the same blocks (`lm.transformer`) on the same texts: a formal
language, whose entropy and support are known exactly, or a corpus. Where to find what:

    process, schedules, weights of steps, section 2    masked/schedules.py
    NELBO, its finite and count forms, section 3       masked/objective.py, masked/curve.py
    languages and their exact denoiser, section 6      languages/
    samplers, section 7                                masked/sample.py, reveal.py, adaptive.py,
                                                       remask.py, blocks.py, autoregressive.py
    the exact denoiser against steps, E1 and E2        masked_theory.py
    sampling at many steps, judged, E3 to E6           masked/sweep.py
    tables and figures                                 masked/report.py, masked/figures.py

Actions: evaluate, sample (texts and how they were written; --input is a text with gaps),
speed (tokens a second of every sampler), export and law.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from common import mesh as meshes
from common.errors import reject
from common.experiment import Experiment
from lm import transformer
from lm.masked import actions, autoregressive, curve, objective, report, settings, sweep
from lm.masked.parts import judged_params, parts_of
from lm.modules import modules
from optim import ema
from optim.pretraining import pretraining, schedule

KINDS = ("mdm", "ar")


class State(NamedTuple):
    """All of a run.

    Attributes:
      average: exponential averages of the parameters; None without `config.ema`.
      done: steps so far.
    """

    params: Any
    opt: optax.OptState
    average: ema.Averages | None
    done: Int[Array, ""]


def make(config) -> Experiment:
    """The experiment of `configs/masked_diffusion.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    _check(config)
    parts = parts_of(config)
    source = parts.source
    _check_evaluation(config, source)
    tx = pretraining(**config.optim, steps=config.steps, modules=modules)
    rate = schedule(
        config.optim.learning_rate, config.steps, config.optim.warmup, config.optim.final
    )
    decays = (ema.plain(config.ema),) if config.ema else ()
    loss_of = _mdm_loss(config, parts) if config.kind == "mdm" else _ar_loss(config, parts)

    def init(key):
        params = parts.model.init(key)
        average = ema.init(params, decays) if decays else None
        return State(params, tx.init(params), average, jnp.zeros((), jnp.int32))

    def step(state, batch, key):
        x, free = source.texts(batch)
        function = lambda params: loss_of(params, x, free, key)
        loss, grads = jax.value_and_grad(function)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.average, params, decays) if decays else None
        values = {
            "loss": loss,
            "learning_rate": rate(state.done),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        return State(params, opt, average, state.done + 1), values

    evaluate = partial(_evaluate, config, parts)
    parts = parts._replace(evaluate=partial(evaluate, key=None))
    return Experiment(
        init=init,
        step=step,
        batch=source.batch,
        evaluate=evaluate,
        report=report.report,
        adopt=lambda fresh, donor: fresh._replace(params=donor.params),
        rules=transformer.rules(config.fsdp),
        actions={name: partial(run, config, parts) for name, run in actions.ALL.items()},
        headline=lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}",
        cost=lambda: {"step": _flops(config, parts)},
    )


def _mdm_loss(config, parts):
    """Nats per predicted token, one draw of the objective."""
    denoiser, length = parts.denoiser, config.length
    wanted = objective.objective(
        **{
            k: v
            for k, v in config.objective.items()
            if k not in ("prompt", "cut", "per", "pad_loss")
        }
    )
    cut = config.objective.cut

    def loss(params, x, free, key):
        if cut:
            whether, where = jax.random.split(jax.random.fold_in(key, 1))
            short = jax.random.randint(where, (), 1, length + 1)
            end = jnp.where(jax.random.bernoulli(whether, cut), short, length)
            inside = jnp.arange(length) < end
            x, free = jnp.where(inside, x, parts.pad), free & inside
        key = jax.random.fold_in(key, 0)
        nats, _, _ = objective.nelbo(key, wanted, denoiser, params, x, free)
        return _mean(nats, jnp.sum(free, axis=1), config.objective.per)

    return loss


def _ar_loss(config, parts):
    def loss(params, x, free, key):
        del key  # Nothing is drawn.
        each = autoregressive.token_losses(parts.model, params, x, parts.mask)
        nats = jnp.sum(jnp.where(free, each, 0.0), axis=1)
        return _mean(nats, jnp.sum(free, axis=1), config.objective.per)

    return loss


def _flops(config, parts) -> float:
    per_token = transformer.flops_per_token(length=config.length, **parts.fields)
    return float(config.batch_size * config.length * per_token)


def _mean(nats: Float[Array, " b"], tokens: Int[Array, " b"], per: str) -> Float[Array, ""]:
    if per == "token":
        return jnp.sum(nats) / jnp.maximum(jnp.sum(tokens), 1)
    return jnp.mean(nats / jnp.maximum(tokens, 1))


def _evaluate(config, parts, state: State, key) -> dict:
    """Held-out likelihood; at the last step also what the samplers write.

    Returns:
      nats: NELBO per predicted token (of "ar" the exact likelihood), and its error.
      gap, gap_error: above the entropy; of languages only. Of "mdm" also entropy.
      h, h_error: of "mdm", the information curve h_n; of a language less -log q(x) / L, and
        with it exact, that of the exact denoiser, and excess, the difference.
      sampling: see `sweep.measured`.
    """
    del key  # The same texts and masks at every evaluation, to be compared.
    params = judged_params(state)
    masked = _count if parts.source.ragged else _curve
    found = {"mdm": masked, "ar": _likelihood}[config.kind](config, parts, params)
    if int(state.done) >= config.steps:
        found |= sweep.measured(config, parts, params)
    return found


def _held_out(config, parts, passes: int):
    """(pass, texts before this batch, batch). Of a language every pass has its own texts."""
    mesh = jax.sharding.get_abstract_mesh()
    placed = None if mesh.empty else meshes.make(**config.mesh)
    size, count = config.eval.batch_size, config.eval.texts
    endless = parts.source.language is not None
    found = list(parts.source.held_out(count * passes if endless else count, size))
    turns = 1 if endless else passes
    for number in tqdm(range(turns * len(found)), desc="evaluating", leave=False, disable=None):
        turn, place = divmod(number, len(found))
        batch = found[place]
        batch = meshes.to_devices(batch, placed) if placed is not None else batch
        yield turn, place * size, batch


def _curve(config, parts, params) -> dict:
    length = config.length - config.objective.prompt
    total: dict[str, curve.Curve] = {}
    losses: dict[int, list] = {}
    # In every pass each text has another number of visible tokens.
    shift = max(1, length // config.eval.draws)
    for turn, first, batch in _held_out(config, parts, config.eval.draws):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), turn), first)
        found, each = parts.curve(params, batch, key, first + turn * shift)
        total = {k: curve.added(total[k], v) if total else v for k, v in found.items()}
        losses.setdefault(turn, []).append(np.asarray(each, float))
    whole = curve.whole(length)
    texts = np.array([np.concatenate(pieces) for pieces in losses.values()]).mean(axis=0)
    texts = texts[np.isfinite(texts)]
    found = {
        "nats": curve.combined(total["loss"], whole).value,
        "nats_error": texts.std(ddof=1) / np.sqrt(len(texts)),
    }
    name = "loss" if parts.source.language is None else "above"
    found["h"], found["h_error"] = curve.information(total[name])
    found["h_by_ratio"] = curve.by_ratio(curve.information(total["loss"])[0])
    if parts.source.language is not None:
        # Less the exact denoiser's loss on the same masks, whose mean is the entropy.
        found["gap"], found["gap_error"] = curve.combined(total["excess"], whole)
        found["entropy"] = found["nats"] - curve.combined(total["above"], whole).value
        found["exact"], found["exact_error"] = curve.information(total["exact"])
    return found


def _count(config, parts, params) -> dict:
    rows: dict[int, list] = {}
    for turn, first, batch in _held_out(config, parts, config.eval.draws):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), turn), first)
        start = jnp.uint32(turn * config.eval.texts + first)
        rows.setdefault(turn, []).append(
            np.array(parts.count(params, batch, key, start), float)
        )
    nats, tokens = np.mean([np.concatenate(part, axis=1) for part in rows.values()], axis=0)
    mean = nats.sum() / tokens.sum()
    # Of a ratio of sums over texts, each with all of its draws.
    spread = np.sqrt(np.sum((nats - mean * tokens) ** 2)) / tokens.sum()
    return {"nats": mean, "nats_error": spread}


def _likelihood(config, parts, params) -> dict:
    rows = [
        np.array(parts.likelihood(params, batch), float)
        for _, _, batch in _held_out(config, parts, 1)
    ]
    loss, entropy, tokens = np.concatenate(rows, axis=1)
    some = tokens > 0
    loss, entropy, tokens = loss[some], entropy[some], tokens[some]
    mean = loss.sum() / tokens.sum()
    error = lambda a: (a / tokens).std(ddof=1) / np.sqrt(len(a))
    found = {"nats": mean, "nats_error": error(loss)}
    if parts.source.language is not None:
        gap = (loss - entropy).sum() / tokens.sum()
        found |= {"gap": gap, "gap_error": error(loss - entropy)}
    return found


def _check(config) -> None:
    devices = meshes.make(**config.mesh).shape["data"]
    if config.kind not in KINDS:
        raise reject("kind", config.kind, f"one of {', '.join(KINDS)}")
    for name, rows in (
        ("batch_size", config.batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if rows < 1 or rows % devices:
            raise reject(name, rows, f"a multiple of the {devices} devices of mesh.data")
    if config.length < 1:
        raise reject("length", config.length, "a whole number from 1 up")
    o = config.objective
    if not 0 <= o.prompt < config.length:
        raise reject(
            "objective.prompt", o.prompt, f"from 0 to length - 1 = {config.length - 1}"
        )
    if not 0 <= o.cut <= 1:
        raise reject("objective.cut", o.cut, "a share from 0 to 1")
    if o.per not in ("token", "text"):
        raise reject("objective.per", o.per, "token or text")
    if not 0 <= config.ema < 1:
        raise reject("ema", config.ema, "0 (none), or a decay below 1")
    for name in ("texts", "draws", "samples"):
        if config.eval[name] < 1:
            raise reject(f"eval.{name}", config.eval[name], "a whole number from 1 up")
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise reject("model.dtype", "float64", "another one, or config.x64 True")


def _check_evaluation(config, source) -> None:
    """What would only be found out when the training is over."""
    if config.kind == "ar":
        return
    for kind in config.eval.samplers:
        sweep.variants(config, kind, source.vocab)
    settings.fit(settings.settings(**config.sampler), config.length, source.vocab)
    least = 2 * (config.length - config.objective.prompt)
    e = config.eval
    standing_in = config.vocab and not config.data.path
    if source.valid is not None and not (source.ragged or standing_in):
        windows = (len(source.valid.tokens) - 1) // config.length
        if windows * e.draws < least:
            allowed = (
                f"at most what leaves {-(-least // e.draws)} held-out windows, two for every "
                f"number of visible tokens in eval.draws = {e.draws}: there are {windows}"
            )
            raise reject("length", config.length, allowed)
    if not source.ragged and e.texts * e.draws < least:
        allowed = (
            f"at least {-(-least // e.draws)}: two texts for every number of visible tokens"
        )
        raise reject("eval.texts", e.texts, allowed)

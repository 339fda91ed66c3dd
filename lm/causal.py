"""Pre-training of a causal language model, and what weight decay does to it.

The model is `lm.transformer`, the text `lm.corpus`, the optimizers `optim.pretraining`:
AlphaDecay (He et al., arXiv:2506.14562), its controls and its baselines. Variants of
`config.runs` are compared over seeds in one command. Where to find what:

    exponents of spectra, sections 2 and 4     optim/exponents.py, optim/spectra.py
    decay ratios, section 3                    optim/assignment.py, optim/alphadecay.py
    baselines and controls                     optim/weight_decay.py, optim/decay_controls.py
    validation, true and release-comparable    `evaluate` below
    tables, paired tests, figures              report.py, figures.py

Actions: evaluate, sample (continues --input or the start of the text), export (a folder
that `transformers` opens), analyze (spectra of the modules of this or any checkpoint).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from common import mesh as meshes
from common.errors import reject
from common.experiment import Experiment
from lm import actions, batches, corpus, report
from lm.modules import modules
from lm.transformer import rules, transformer
from optim.alphadecay import AlphaDecayState, diagnostics
from optim.decay_controls import permuted
from optim.modules import select
from optim.pretraining import pretraining, schedule


class State(NamedTuple):
    params: Any
    opt: optax.OptState


class Parts(NamedTuple):
    """What training and the actions share."""

    model: Any
    train: corpus.Corpus
    valid: corpus.Corpus
    evaluate: Any


def make(config) -> Experiment:
    """The experiment of `configs/alphadecay.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    train, valid = corpus.pair(**config.data)
    _check(config, train, valid)
    model = transformer(**config.model)
    tx = pretraining(**config.optim, steps=config.steps, modules=modules)
    o = config.optim
    rate = schedule(o.learning_rate, config.steps, o.warmup, o.final)

    def init(key):
        params = model.init(key)
        if config.pure_bf16:
            params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return State(params, tx.init(params))

    def step(state, batch, key):
        del key  # No dropout.
        loss, grads = _gradient(partial(summed_loss, model), state.params, batch, config)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        values = {
            "loss": loss,
            "perplexity": jnp.exp(loss),
            "learning_rate": rate(_updates_done(state.opt)),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        return State(params, opt), values | _decay_figures(opt, params, config.optim)

    # Jitted here, once: every evaluation of a run uses the same program.
    one = partial(evaluate, config, jax.jit(partial(summed_loss, model)), valid)
    parts = Parts(model, train, valid, one)
    return Experiment(
        init=init,
        step=step,
        batch=_batches(config, train),
        evaluate=one,
        report=report.report,
        adopt=lambda fresh, donor: fresh._replace(params=donor.params),
        rules=rules(config.fsdp),
        actions={name: partial(run, config, parts) for name, run in actions.ALL.items()},
        headline=lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}",
        cost=lambda: report.flops(config),
    )


def _updates_done(opt) -> jax.Array:
    """The count of the learning rate's schedule, the last transformation of every chain."""
    is_ours = lambda x: isinstance(x, optax.ScaleByScheduleState)
    found = [s for s in jax.tree.leaves(opt, is_leaf=is_ours) if is_ours(s)]
    return found[-1].count


def summed_loss(model, params, batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over the targets that count, and their number."""
    logits = model.apply(params, batch["tokens"][:, :-1])
    xent = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    mask = batch["mask"]
    return jnp.sum(jnp.where(mask, xent, 0)), jnp.sum(mask)


def _gradient(loss, params, batch, config):
    """Mean loss of the batch and its gradient, `accumulate` slices one after the other."""
    total = jnp.maximum(jnp.sum(batch["mask"]), 1)
    mean = lambda params, part: loss(params, part)[0] / total
    parts = config.accumulate
    if parts == 1:
        return jax.value_and_grad(mean)(params, batch)
    # Rows of a slice stay where they are: the first axis is split over the devices.
    split = lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0)

    def more(carry, part):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(mean)(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(more, zero, jax.tree.map(split, batch))[0]


def _decay_figures(opt, params, optim) -> dict:
    """Exponents and ratios by type of module, where the optimizer has them."""
    is_ours = lambda x: isinstance(x, AlphaDecayState)
    found = [s for s in jax.tree.leaves(opt, is_leaf=is_ours) if is_ours(s)]
    if not found:
        return {}
    leaves = [a for a in select(params, modules) if a.name in found[0].ratio]
    state = found[0]
    if optim.rule == "shuffled":  # Its state keeps AlphaDecay's own ratios.
        state = state._replace(ratio=permuted(leaves, state.ratio, optim.shuffle_seed))
    return diagnostics(state, leaves, optim.alphadecay.every, optim.alphadecay.offset)


def evaluate(config, measure, valid, state, key) -> dict:
    """Validation loss over a fixed budget of tokens, and the spectra of all modules.

    Returns:
      val_loss: mean cross-entropy per target, nats (the truth); val_ppl its exponential.
      val_ppl_released: exp(sum of batch means / (batches + 1)), what the published tables
        print (the released evaluation starts its counter at 1). There the last batch goes
        on to its end; here the budget is exact.
      what `actions.spectra_of` finds of every module.

    Args:
      measure: (params, batch) -> summed loss and number of targets, jitted.
    """
    del key
    mesh = jax.sharding.get_abstract_mesh()
    rows = config.eval.batch_size
    parts = batches.validation(valid, rows, *_budget(config))

    placed = None if mesh.empty else meshes.make(**config.mesh)
    found = []
    for part in tqdm(parts, desc="evaluating", leave=False, disable=None):
        part = {k: part[k] for k in ("tokens", "mask")}
        if placed is not None:
            part = meshes.to_devices(part, placed)
        found.append(measure(state.params, part))
    sums, counts = np.array(jax.device_get(found), float).T
    sums, counts = sums[counts > 0], counts[counts > 0]
    loss = sums.sum() / counts.sum()
    released = (sums / counts).sum() / (len(sums) + 1)
    return {
        "val_loss": loss,
        "val_ppl": np.exp(loss),
        "val_ppl_released": np.exp(released),
        "val_tokens": int(counts.sum()),
    } | actions.spectra_of(state.params)


def _budget(config) -> tuple[int, int, bool, bool]:
    data = config.data
    return data.length, config.eval.tokens, data.pack, data.end_cut


def _batches(config, train):
    data, seed = config.data, config.seed + config.data.order_seed
    if data.pack:
        made = batches.packed(train, config.batch_size, data.length, seed)
    else:
        made = batches.rows(train, config.batch_size, data.length, seed, data.end_cut)
    return lambda step: {k: v for k, v in made(step).items() if k in ("tokens", "mask")}


def _check(config, train, valid) -> None:
    devices = meshes.make(**config.mesh).shape["data"]
    for name, rows in (
        ("batch_size", config.batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if rows < 1 or rows % devices:
            raise reject(name, rows, f"a multiple of the {devices} devices of mesh.data")
    if config.accumulate < 1 or (config.batch_size // devices) % config.accumulate:
        allowed = f"a divisor of the {config.batch_size // devices} rows of a device"
        raise reject("accumulate", config.accumulate, allowed)
    largest = max(train.largest, valid.largest, train.pad, valid.pad)
    if config.data.end_cut and not config.data.pack:
        largest = max(largest, train.eos)
    if largest >= config.model.vocab:
        allowed = f"at least {largest + 1} for the tokens of this text"
        raise reject("model.vocab", config.model.vocab, allowed)
    if config.model.depth < 1:
        raise reject("model.depth", config.model.depth, "a whole number from 1 up")
    if config.pure_bf16 and config.model.dtype != "bfloat16":
        raise reject("pure_bf16", True, "False, or model.dtype bfloat16")
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise reject("model.dtype", "float64", "another one, or config.x64 True")
    if config.peak_flops < 0:
        raise reject("peak_flops", config.peak_flops, "0 (known or left out) or more")
    if config.data.length < 2:
        raise reject("data.length", config.data.length, "at least 2")
    if config.eval.tokens < 0:
        raise reject("eval.tokens", config.eval.tokens, "0 (all) or more")

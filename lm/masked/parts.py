"""What training, judging and the actions of a masked diffusion run share, made once.

A model has a row for every token, one for the mask (V; of "ar" the start symbol) and, where
texts are shorter than L, one for what is beyond the end (V + 1).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common import mesh as meshes
from common.errors import reject
from lm import corpus, tokenizers, transformer
from lm.languages import evaluate as judge
from lm.languages.oracle import oracle
from lm.masked import autoregressive, curve, networks, objective
from lm.masked.denoiser import Denoiser
from lm.masked.texts import Source, of_corpus, of_language


class Parts(NamedTuple):
    """Attributes:
    source: of texts.
    model: `transformer`, of all its rows.
    fields: its arguments.
    denoiser: the model as one; None for "ar".
    mask, pad: tokens V, and V + 1 or None.
    curve: jitted; (params, batch, key, start) -> curves of a batch and the loss of each text,
      NaN where it does not count. "loss" is the model's; of a language there are "above",
      this less -log q(x) / L; "exact", the exact denoiser's on the same masks less that; and
      "excess", the model's less the exact denoiser's.
    count: jitted; (params, batch, key, start) -> one draw of each text's NELBO, nats, and its
      tokens: for texts of many lengths, which have no curve.
    likelihood: jitted; (params, batch) -> nats, -log q(x) and tokens of each text, of "ar".
    evaluate: state -> all figures, of the experiment.
    """

    source: Source
    model: transformer.Model
    fields: dict
    denoiser: Denoiser | None
    mask: int
    pad: int | None
    curve: Callable
    count: Callable
    likelihood: Callable
    evaluate: Callable | None = None


def parts_of(config) -> Parts:
    """The parts of a config.

    Raises:
      UserError: the text, the language or the model cannot be.
    """
    source = source_of(config)
    pad = source.vocab + 1 if _padded(config) else None
    fields = dict(
        config.model,
        vocab=source.vocab + 1 + (pad is not None),
        causal=config.kind == "ar",
    )
    fields["vocab"] = _rows(fields["vocab"])
    fields["absolute"] = config.length if config.model.absolute else 0
    model = transformer.transformer(**fields)
    mask, denoiser = source.vocab, None
    if config.kind == "mdm":
        denoiser = networks.denoiser(model, source.vocab, pad=pad)
    return Parts(
        source,
        model,
        fields,
        denoiser,
        mask,
        pad,
        jax.jit(partial(_curve, source, denoiser, config.objective.prompt)),
        jax.jit(partial(_count, source, denoiser)),
        jax.jit(partial(_likelihood, source, model, mask, config.objective.prompt)),
    )


def judged_params(state: Any) -> Any:
    """The parameters that are judged and sampled: the average, where there is one."""
    return state.average.trees[0] if state.average else state.params


def source_of(config) -> Source:
    """Texts of the language of a config, or else of its corpus."""
    if config.language.kind or config.language.path:
        return of_language(config)
    train, valid = corpus.pair(**config.data)
    least = max(reader(train).vocab_size, train.vocab)
    least = max(least, valid.vocab)
    if config.vocab and config.vocab < least:
        raise reject("vocab", config.vocab, f"0 or at least {least}, as the tokenizer has")
    if config.vocab > least and not config.data.path:
        # Shapes can be checked, and programs compiled, without the text.
        warnings.warn(
            f"config.data.path is '': a small text with {least} tokens stands in for a "
            f"STORE of lm.prepare with {config.vocab}.",
            stacklevel=2,
        )
    vocab = config.vocab or least
    pad = vocab + 1 if _padded(config) else None
    return of_corpus(config, train, valid, vocab, pad)


def _rows(tokens: int) -> int:
    """Rows of the embedding: of a large vocabulary a number that devices can share."""
    return tokens if tokens < 1024 else -(-tokens // 128) * 128


def _padded(config) -> bool:
    """Whether a masked model needs a token for what is beyond the end of a text."""
    text = not (config.language.kind or config.language.path)
    ragged = text and not (config.data.pack or config.objective.pad_loss)
    return config.kind == "mdm" and bool(ragged or config.objective.cut)


def reader(text: corpus.Corpus) -> tokenizers.Tokenizer:
    """The tokenizer of a corpus."""
    return tokenizers.tokenizer(text.tokenizer or "bytes")


def _curve(source, denoiser, prompt, params, batch, key, start):
    x, free = source.texts(batch)
    length = x.shape[1] - prompt
    counted = jnp.sum(free, axis=1) == length  # Not the ends of a corpus.
    noised, visible = curve.prepared(key, x, start, denoiser.mask, prompt)
    tally = lambda value: curve.tallied(visible, value, length, counted)
    loss = curve.mean_loss(denoiser, params, x, noised)
    found = {"loss": tally(loss)}
    if source.language is not None:
        exact = curve.mean_loss(oracle(source.vocab), source.language, x, noised)
        entropy = surprise(source.language, x, prompt) / length
        found |= {
            "above": tally(loss - entropy),
            "excess": tally(loss - exact),
            "exact": tally(exact - entropy),
        }
    return meshes.replicate((found, jnp.where(counted, loss, jnp.nan)))


def _count(source, denoiser, params, batch, key, start):
    """One draw of the count objective of each text, stratified over all of them."""
    x, free = source.texts(batch)
    total = jnp.sum(free, axis=1)
    # Multiples of the golden ratio modulo 1, exactly: texts and draws are spread evenly.
    golden = (start + jnp.arange(len(x), dtype=jnp.uint32)) * jnp.uint32(2654435769)
    u = (golden >> 8).astype(jnp.float32) * 2.0**-24
    n = 1 + jnp.minimum((u * total).astype(jnp.int32), jnp.maximum(total - 1, 0))
    masked = objective.chosen(jax.random.uniform(key, x.shape), free, n)
    noised = objective.Noised(jnp.where(masked, denoiser.mask, x), masked, total / n)
    losses = objective.masked_losses(denoiser, params, x, noised)
    nats = noised.weight * jnp.sum(losses, axis=1)
    return meshes.replicate(jnp.stack([nats, total.astype(nats.dtype)]))


def _likelihood(source, model, mask, prompt, params, batch):
    x, free = source.texts(batch)
    each = autoregressive.token_losses(model, params, x, mask)
    control = jnp.zeros(len(x))
    if source.language is not None:
        control = surprise(source.language, x, prompt)
    nats = jnp.sum(jnp.where(free, each, 0.0), axis=1)
    return meshes.replicate(jnp.stack([nats, control, jnp.sum(free, axis=1)]))


def surprise(language, x, prompt: int):
    """-log q of what follows the prompt, given the prompt."""
    whole = -judge.log_prob(language, x)
    return whole + judge.log_prob(language, x[:, :prompt]) if prompt else whole

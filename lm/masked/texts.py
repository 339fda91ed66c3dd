"""Texts to train on and to judge by: of a formal language, or of a corpus.

A language has no data set: text i is drawn anew from a key of its number wherever it is needed,
so a training set of a million texts is a million numbers, and steps, hosts and restarts agree
on it. Held-out texts are numbers of another key.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from common.errors import reject
from lm import batches, corpus
from lm.languages import build, evaluate, hmm

TRAINING, HELD_OUT, SAMPLES, THEORY = 0, 1, 2, 3
LARGEST = 2**31 - 1


class Source(NamedTuple):
    """Texts as pure functions.

    Attributes:
      vocab: V, tokens are 0 ... V - 1.
      language: on the device, float32; None for a corpus.
      batch: host; step -> arrays, for `Experiment.batch`.
      texts: traced; such arrays -> (x int32 [B, L], free bool [B, L]): the tokens, and those
        that are the answer. Others are a prompt, `pad`, or text that no loss is asked for.
      ragged: whether texts are shorter than L, with `pad` after their end.
      held_out: host; number of texts, batch size -> batches of exactly that size. Texts of a
        language do not end.
      train, valid: the corpora; None for a language.
    """

    vocab: int
    language: Any
    batch: Callable[[int], dict]
    texts: Callable[[dict], tuple[Array, Array]]
    held_out: Callable[[int, int], Iterator[dict]]
    ragged: bool = False
    train: corpus.Corpus | None = None
    valid: corpus.Corpus | None = None


def of_language(config) -> Source:
    """Texts of `config.language`, `config.length` tokens long.

    Raises:
      UserError: the language cannot be.
    """
    fields = dict(config.language)
    number = fields.pop("texts")
    if number < 0:
        raise reject("language.texts", number, "0 (always new ones) or more")
    table = build.language(**fields)
    language = hmm.on_device(table)
    seed, size = config.seed, config.batch_size
    if not number and config.steps * size > LARGEST:
        raise reject("language.texts", 0, f"set: {config.steps} steps need too many new texts")

    def batch(step):
        first = step * size
        chosen = np.arange(first, first + size)
        if number:
            epochs, places = np.divmod(chosen, number)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                chosen[here] = batches.permute(places[here], number, (seed, int(epoch)))
        return {"text": chosen.astype(np.int32), "part": np.full(size, TRAINING, np.int32)}

    def texts(batch):
        keys = keys_of(config.language.seed, seed, batch["part"], batch["text"])
        x = evaluate.draw_each(keys, language, config.length)
        return x, _answer(x, config.objective.prompt)

    def held_out(count, size):
        for first in range(0, count, size):
            number = np.arange(first, first + size, dtype=np.int32)
            yield {"text": number, "part": np.full(size, HELD_OUT, np.int32)}

    return Source(hmm.vocab(table), language, batch, texts, held_out)


def keys_of(
    table: int, seed: int, part: Int[Array, " batch"], text: Int[Array, " batch"]
) -> jax.Array:
    """One key per text: of its language's seed, the run's seed, the part and its number.

    Held-out texts are the same for every seed of a run.
    """
    key = jax.random.fold_in(jax.random.key(table), 1)

    def one(part, text):
        run = jnp.where(part == HELD_OUT, 0, seed)
        of_part = jax.random.fold_in(jax.random.fold_in(key, part), run)
        return jax.random.fold_in(of_part, text)

    return jax.vmap(one)(part, text)


def of_corpus(
    config, train: corpus.Corpus, valid: corpus.Corpus, vocab: int, pad: int | None
) -> Source:
    """Windows of a corpus, or its documents, one a row.

    Documents that are shorter than a row are followed by `pad`, which is neither seen nor
    predicted; or, with `objective.pad_loss`, by the tokenizer's own fill, which is a part of
    the text like any other, as in LLaDA's fine-tuning: the model learns to end.

    Args:
      vocab: one more than the largest token that a model shall know.
      pad: the token after an end; None: the tokenizer's fill.
    """
    settings, length = config.data, config.length
    seed = config.seed + settings.order_seed
    whole = config.objective.pad_loss
    if settings.pack:
        made = batches.packed(train, config.batch_size, length, seed)
    else:
        made = batches.rows(train, config.batch_size, length, seed, settings.end_cut)

    def targets(found):
        # Of a window the token before it is no part: a text has L tokens, all predicted.
        x, free = found["tokens"], found["mask"]
        if settings.pack:
            return {"x": x[:, 1:], "free": free}
        # A document has its own first token, which the rows' mask, of targets, leaves out.
        free = np.concatenate([free.any(axis=1)[:, None], free], axis=1)
        if whole:
            return {"x": x, "free": np.broadcast_to(free[:, :1], free.shape)}
        return {"x": x if pad is None else np.where(free, x, pad), "free": free}

    def texts(batch):
        x = batch["x"]
        return x, batch["free"] & _answer(x, config.objective.prompt)

    def held_out(count, size):
        found = batches.validation(
            valid, size, length, count * length, settings.pack, settings.end_cut
        )
        yield from (targets(one) for one in found)

    ragged = not (settings.pack or whole)
    new = lambda step: targets(made(step))
    return Source(vocab, None, new, texts, held_out, ragged, train, valid)


def _answer(x: Int[Array, "batch length"], prompt: int) -> Bool[Array, "batch length"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1]) >= prompt, x.shape)

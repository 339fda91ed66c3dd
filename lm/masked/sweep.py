"""What samplers write, judged: at many numbers of steps, by all that is known of the texts.

Of a formal language: the share of texts that are wrong somewhere (SER), -log q(x) / L over
those that are right (the generative TER, in nats), and beside it the entropies of n-grams,
since a sampler whose law has collapsed has a TER below the optimum. Of a corpus: the texts, to
be judged by an autoregressive model, and the same entropies.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common import mesh as meshes
from lm.languages import evaluate as judge
from lm.masked import autoregressive, blocks, settings
from lm.masked.parts import Parts, surprise
from lm.masked.sample import Result, sample
from lm.masked.texts import SAMPLES

NUMBERS = ("ser", "ser_error", "ter", "ter_error", "unsupported", "calls", "rounds")
DIVERSITY = ("entropy_1", "entropy_2", "entropy_3", "distinct_2", "distinct_3")


def measured(config, parts: Parts, params: Any) -> dict:
    """Samples by every sampler of `config.eval` at each of its numbers of steps.

    Returns:
      NAME_SAMPLER for each of `NUMBERS` (of languages) and `DIVERSITY`: an array over the
      steps; steps_SAMPLER. Of a corpus also texts_SAMPLER, int32 [steps, samples, L].
      A sampler whose calls are no setting has one entry. "ar" is the sampler of kind "ar".
    """
    todo = [
        (name, made)
        for name in (config.eval.samplers if config.kind == "mdm" else ("ar",))
        for made in (variants(config, name, parts.source.vocab) if name != "ar" else (None,))
    ]
    given = config.objective.prompt
    prompt = prompts(config, parts) if given else None
    found: dict[str, list] = {}
    for name, made in tqdm(todo, desc="sampling", leave=False, disable=None):
        start = prompt if made or prompt is None else prompt[:, :given]
        one = drawn(config, parts, params, made, config.eval.samples, start)
        row = scores(parts.source.language, one.tokens, parts.source.vocab, given)
        row |= {"steps": made.steps if made else config.length - given}
        row |= {"calls": np.mean(one.calls), "rounds": one.rounds, "clipped": one.clipped}
        if parts.source.language is None:
            row["texts"] = one.tokens
        for field, value in row.items():
            found.setdefault(f"{field}_{name}", []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def prompts(config, parts: Parts) -> np.ndarray:
    """Held-out texts with all but `objective.prompt` tokens masked: int32 [samples, L]."""
    count = config.eval.samples
    found = [
        np.asarray(parts.source.texts(jax.tree.map(jnp.asarray, one))[0])
        for one in parts.source.held_out(count, config.eval.batch_size)
    ]
    x = np.resize(np.concatenate(found), (count, config.length)).astype(np.int32)
    x[:, config.objective.prompt :] = parts.mask
    return x


def variants(config, kind: str, vocab: int) -> list[settings.Settings]:
    """One sampler for each number of steps, those that are one and the same left out.

    Raises:
      UserError: a sampler cannot be.
    """
    made = [
        settings.settings(**dict(config.sampler) | {"kind": kind, "steps": steps})
        for steps in config.eval.steps
    ]
    fitted = [settings.fit(one, config.length, vocab) for one in made]
    return fitted[:1] if kind in settings.FREE_RUNNING else list(dict.fromkeys(fitted))


def drawn(config, parts: Parts, params: Any, made, samples: int, prompt=None) -> Result:
    """Texts of one sampler, on the host; the same ones whatever the batch size is.

    Args:
      made: a checked sampler; None for autoregressive writing.
      prompt: int32 [samples, L], the mask where free; or None.
    """
    size = min(config.eval.batch_size, samples)
    devices = meshes.current()
    size += -size % devices
    pieces, key = [], jax.random.fold_in(jax.random.key(config.seed), SAMPLES)
    for first in range(0, samples, size):
        given = None
        if prompt is not None:
            given = np.resize(prompt[first : first + size], (size, prompt.shape[1]))
        one = write(config, parts, params, made, key, size, given, first)
        pieces.append(jax.tree.map(np.asarray, jax.device_get(one)))
    join = lambda name: np.concatenate([getattr(p, name) for p in pieces])[:samples]
    rounds = np.mean([p.rounds for p in pieces])
    clipped = int(sum(np.sum(p.clipped) for p in pieces))
    return Result(join("tokens"), join("calls"), rounds, join("when"), None, clipped)


def write(
    config, parts: Parts, params: Any, made, key, size: int, prompt=None, first: int = 0
) -> Result:
    """One batch of texts by one sampler, on the devices; `first` is its first text's number."""
    length, mask = config.length, parts.mask
    if made is None:
        own = settings.of_tokens(**config.sampler)
        return autoregressive.ar(
            key, parts.model, params, size, length, own, mask, prompt=prompt, first=first
        )
    if made.cache != "none":
        return blocks.sample_cached(
            key,
            parts.model,
            params,
            size,
            length,
            made,
            mask,
            prompt,
            pad=parts.pad,
            first=first,
        )
    return sample(key, parts.denoiser, params, size, length, made, prompt, first=first)


def scores(language: Any, tokens: np.ndarray, vocab: int, prompt: int = 0) -> dict:
    """SER and generative TER under a language, and the entropies of n-grams.

    Args:
      language: on the device; None if nothing is known.
      tokens: int32 [samples, L].
      prompt: tokens at the start that were given: the TER is of the others, given these.
    """
    found = judge.diversity(tokens[:, prompt:], vocab)
    if language is None:
        return found
    x = jnp.asarray(tokens)
    right = np.asarray(judge.supported(language, x))
    nats = np.asarray(surprise(language, x, prompt))
    wrong = 1 - right.mean()
    ter = judge.generative(np.where(right, -nats, -np.inf), tokens.shape[1] - prompt)
    return found | {
        "ser": wrong,
        "ser_error": judge.share_error(np.sum(~right), len(right)),
        "ter": ter.mean,
        "ter_error": ter.error,
        "unsupported": ter.unsupported,
    }

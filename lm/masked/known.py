"""What is known of a run's language without any run: closed forms and exact curves."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lm.languages import build, hmm, information, theory
from lm.masked import curve
from lm.masked.settings import Settings, plain_law, weights

WHY_NO_SER = "The language has every text, so its SER is 0 and says nothing."


def table(config) -> Any:
    """The language of a config, float64 on the host."""
    fields = dict(config.language)
    fields.pop("texts")
    return build.language(**fields)


def ancestral(config, steps: Any) -> Float[np.ndarray, " steps"]:
    """w_0 ... w_{T-1} of ancestral sampling with a config's schedule and grid."""
    fields = dict(config.sampler) | {"kind": "ancestral", "steps": int(steps), "block": 0}
    return weights(Settings(**fields))


def sequence_error(
    config, length: int, steps: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"] | None:
    """SER of the exact denoiser, ancestral: of pairs and parity, else None."""
    language = config.language
    if language.path or not exact_law(config):
        return None
    if language.kind == "pairs":
        return np.array(
            [theory.pairs_ser(length, language.vocab, ancestral(config, n)) for n in steps]
        )
    if language.kind == "parity":
        return np.array(
            [theory.parity_ser(length, language.group, ancestral(config, n)) for n in steps]
        )
    return None


def token_gap(
    config, length: int, steps: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"] | None:
    """gap_T of the exact denoiser, ancestral, exactly: of first-order chains, pairs and parity,
    else None."""
    language = table(config)
    if not exact_law(config):
        return None
    if config.language.kind in ("pairs", "parity") and not config.language.path:
        closed = {
            "pairs": lambda w: theory.pairs_nelbo_gap(length, config.language.vocab, w),
            "parity": lambda w: theory.parity_nelbo_gap(length, config.language.group, w),
        }[config.language.kind]
        return np.array([closed(ancestral(config, n)) for n in steps])
    if not information.first_order(language):
        return None
    return np.array([information.gap(language, length, ancestral(config, n)) for n in steps])


def ends(config, length: int) -> tuple[float, float]:
    """h(0) and h(1) of the exact denoiser; by Monte Carlo where there is no exact curve."""
    language, a = table(config), np.array([0.0, 1.0])
    if information.first_order(language):
        return tuple(information.exact_curve(language, length, a).tolist())
    device = hmm.on_device(language)
    h, _ = information.sampled(jax.random.key(0), device, length, a, 1024)
    return tuple(h.tolist())


def gap_bound(config, drop: Any, steps: Any) -> float | None:
    """(h(0) - h(1)) max w of ancestral sampling; None where it does not hold."""
    if not exact_law(config):
        return None
    return theory.gap_bound(float(drop), 0.0, ancestral(config, steps))


def calls(config, length: int, steps: Any) -> float:
    """Expected network calls of a text, ancestral: steps that fill in nothing are skipped."""
    return theory.calls(length, ancestral(config, steps))


def exact_law(config) -> bool:
    """Whether a run's ancestral sampler is the one of the closed forms."""
    fields = dict(config.sampler) | {"kind": "ancestral"}
    return not config.sampler.block and plain_law(Settings(**fields))


def exact_gap(config, found: dict, steps: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """gap_T of the exact denoiser on the held-out texts of a trained masked run.

    Args:
      found: the run's last evaluation.
    """
    h, error = found["exact"], found["exact_error"]
    made = [ancestral(config, n) for n in steps]
    return np.array([curve.linear(h, error, curve.excess(w, len(h))).value for w in made])


def full_support(config) -> bool:
    """Whether every text is in the language."""
    return not build.informative(table(config))

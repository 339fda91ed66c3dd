"""What a sampler is asked for: checked once, hashable, static under jit."""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import jax
import numpy as np

from common.errors import UserError, reject
from lm.masked import schedules

PLANNED = ("ancestral", "count", "first_hitting")
ADAPTIVE = ("confidence", "margin", "entropy", "threshold", "entropy_bound")
KINDS = (*PLANNED, *ADAPTIVE, "remask")
FREE_RUNNING = ("first_hitting", "threshold", "entropy_bound")  # Their calls are no setting.
QUOTA = ("count", "confidence", "margin", "entropy")  # n / T positions a step
CHOICES = {
    "kind": KINDS,
    "grid": schedules.GRIDS,
    "cache": ("none", "prefix", "dual"),
    "candidate": ("sample", "argmax"),
    "final": ("sample", "greedy"),
    "remask": ("cap", "rescale", "conf", "loop"),
}
COUNTS = {"steps": 1, "block": 0, "top_k": 0, "per_call": 1, "rows": 0}
RANGES = {
    "temperature": (0, float("inf")),
    "tau": (0, 1),
    "gamma": (0, float("inf")),
    "eta": (0, 1),
    "t_on": (0, 1),
    "t_off": (0, 1),
}


class Settings(NamedTuple):
    """A sampler. Make it with `settings`, which checks it.

    Attributes:
      kind: ancestral, count, first_hitting (positions planned ahead); confidence, margin,
        entropy, threshold, entropy_bound (positions chosen by what the network says); remask.
      steps: T; of no meaning to first_hitting, threshold and entropy_bound.
      schedule: linear, cosine, poly<P>, or a function alpha(t); of ancestral and remask.
      grid: uniform or cosine; of ancestral and remask.
      block: tokens written before those on their right begin; 0: the whole text.
      cache: none; prefix and dual are for `blocks.sample_cached`.
      temperature: divisor of log f; 0: the most probable token, no noise.
      top_k: draw among the k most probable; 0: all.
      top_p: of those, among the fewest whose probability reaches top_p.
      candidate: of the adaptive kinds; sample, or argmax: the most probable token.
      final: sample, or greedy: tokens of step T - 1 are the most probable ones.
      tau: of threshold, the confidence at which a token is committed.
      gamma: of entropy_bound, in nats.
      per_call: of first_hitting, tokens a call.
      remask: of remask; cap, rescale, conf or loop, with eta, and of loop with t_on, t_off
        and alpha_on.
      rows: positions of a text in one call of the head; 0: by the shapes.
      allow_clamp: whether more steps than positions are made as many, not refused.
    """

    kind: str = "ancestral"
    steps: int = 32
    schedule: str | Callable = "linear"
    grid: str = "uniform"
    block: int = 0
    cache: str = "none"
    temperature: Any = 1.0
    top_k: int = 0
    top_p: float = 1.0
    candidate: str = "sample"
    final: str = "sample"
    tau: Any = 0.9
    gamma: Any = 0.1
    per_call: int = 1
    remask: str = "cap"
    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    rows: int = 0
    allow_clamp: bool = False


def settings(**fields) -> Settings:
    """A checked sampler; what is left out has its default.

    Args:
      fields: of `Settings`, by name.

    Raises:
      UserError: a field is unknown or out of range.
    """
    unknown = sorted(set(fields) - set(Settings._fields))
    if unknown:
        raise UserError(f"A sampler has no field {', '.join(unknown)}.")
    made = Settings(**fields)
    for name, allowed in CHOICES.items():
        value = getattr(made, name)
        if value not in allowed:
            raise reject(f"sampler.{name}", value, f"one of {', '.join(allowed)}")
    for name, least in COUNTS.items():
        value = getattr(made, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise reject(f"sampler.{name}", value, f"a whole number from {least} up")
    for name, (low, high) in RANGES.items():
        value = getattr(made, name)
        if not (_number(value) and low <= value <= high):
            allowed = f"from {low} to {high}" if isfinite(high) else f"from {low} up"
            raise reject(f"sampler.{name}", value, f"a finite number {allowed}")
    if not (_number(made.top_p) and 0 < made.top_p <= 1):
        raise reject("sampler.top_p", made.top_p, "above 0 and at most 1")
    if not (_number(made.alpha_on) and 0 < made.alpha_on < 1):
        raise reject("sampler.alpha_on", made.alpha_on, "above 0 and below 1")
    if not isinstance(made.allow_clamp, bool):
        raise reject("sampler.allow_clamp", made.allow_clamp, "true or false")
    if made.t_off > made.t_on or made.t_on == 1:
        raise reject("sampler.t_on", made.t_on, f"below 1 and at least t_off, {made.t_off}")
    schedules.schedule(made.schedule, "sampler.schedule")
    if made.kind == "remask" and made.cache != "none":
        raise reject("sampler.cache", made.cache, "none with remask, which writes a whole text")
    if made.kind == "remask" and made.block:
        raise reject("sampler.block", made.block, "0 with remask, which writes a whole text")
    return made


def fit(given: Settings, length: int, vocab: int) -> Settings:
    """The settings for texts of L tokens out of V; steps are clamped if they may be.

    Raises:
      UserError: L < 1, a block does not divide L, steps do not divide into blocks or are more
        than positions, or top_k is more than V.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise reject("length", length, "a whole number from 1 up")
    if given.top_k > vocab:
        raise reject("sampler.top_k", given.top_k, f"at most {vocab}, the vocabulary")
    if given.block and length % given.block:
        near = _nearest(given.block, [d for d in range(1, length + 1) if length % d == 0])
        raise reject("sampler.block", given.block, f"0 or a divisor of {length}, as {near}")
    if given.kind in FREE_RUNNING:
        return given
    blocks = length // (given.block or length)
    if given.kind in QUOTA and given.steps > length:
        if not given.allow_clamp:
            raise reject(
                "sampler.steps", given.steps, f"at most {length}, the length, with {given.kind}"
            )
        given = given._replace(steps=length)
    if given.steps % blocks:
        low = given.steps // blocks * blocks
        near = " or ".join(str(n) for n in (low, low + blocks) if n > 0)
        raise reject(
            "sampler.steps", given.steps, f"a multiple of the {blocks} blocks, as {near}"
        )
    return given


def per_block(given: Settings, length: int) -> int:
    """Steps of one block."""
    return given.steps // (length // (given.block or length))


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _nearest(value: int, valid: list[int]) -> str:
    low = [v for v in valid if v < value][-1:]
    return " or ".join(str(v) for v in low + [v for v in valid if v > value][:1])


class Numbers(NamedTuple):
    """What a program takes as data, so that one compilation serves all of its values.

    Attributes:
      steps: of one block, int32 [].
      block: tokens of a block, int32 [].
      per_call: int32 [].
      last: T - 1, int32 [].
      tau, gamma: float [].
      table: of the kind: `plans.table` or `remask.table`, padded.
    """

    steps: Any
    block: Any
    per_call: Any
    last: Any
    tau: Any
    gamma: Any
    table: Any = ()


def numbers(given: Settings, length: int, table: Any = ()) -> Numbers:
    """The settings' data, on the host. Settings fit the length."""
    steps, block = per_block(given, length), given.block or length
    return Numbers(
        *(np.int32(n) for n in (steps, block, given.per_call, given.steps - 1)),
        *(np.float32(n) for n in (given.tau, given.gamma)),
        table,
    )


def shape_of(given: Settings) -> Settings:
    """The settings less their data: what a program is compiled for."""
    return Settings(
        kind=given.kind,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        candidate=given.candidate,
        final=given.final,
        remask="conf" if given.kind == "remask" and given.remask == "conf" else "cap",
        rows=given.rows,
    )


def rows(given: Settings, batch: int, length: int, vocab: int) -> int:
    """Positions of each text in one call of the head.

    Few, where little is filled in at a time: a quarter of the text at most, so that a single
    step takes four. The adaptive kinds look at every masked one.
    """
    if given.rows:
        return min(given.rows, length)
    if given.kind in ADAPTIVE:
        # An accelerator has the memory, and reads a large head for every part.
        logits = 2**20 if jax.default_backend() == "cpu" else 2**28
        return min(length, max(8, logits // (batch * vocab)))
    # As above: a large head is read anew by every call.
    logits = 2**16 if jax.default_backend() == "cpu" else 2**28
    return min(length, max(8, min(length // 4, logits // (batch * vocab))))


def weights(given: Settings) -> np.ndarray:
    """w_0 ... w_{T-1} of a sampler's schedule, grid and steps."""
    return schedules.weights(schedules.schedule(given.schedule), given.grid, given.steps)


def plain_law(given: Settings, autoregressive: bool = False) -> bool:
    """Whether tokens are drawn from f itself: NELBO_T bounds no other law."""
    whole = given.temperature == 1 and not given.top_k and given.top_p == 1
    return whole and (autoregressive or given.final == "sample")


def of_tokens(*, temperature: float, top_k: int, top_p: float, **others: Any) -> Settings:
    """What an autoregressive sampler takes of a config's fields: how a token is drawn."""
    del others
    return settings(temperature=temperature, top_k=top_k, top_p=top_p)

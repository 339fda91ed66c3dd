"""How fast texts are written: masked samplers beside an autoregressive model of the same size.

One masked call reads the whole text, one autoregressive call a token, so with a cache the
latter spends the FLOPs of one masked call on all of its text. Masked writing wins while a call
costs little more than a token does, that is below

    T* = L t_decode(B) / t_forward(B, L)

steps (section 9 of the specification), which depends on the batch: a speed-up quoted at one
batch size is no result. Every time is the least of some repeats, after one run to compile.
"""

import time
from typing import Any

import jax
import numpy as np

from lm.masked import autoregressive, settings, sweep
from lm.masked.parts import Parts
from lm.transformer import transformer

KINDS = (
    "ancestral",
    "count",
    "first_hitting",
    "confidence",
    "margin",
    "entropy",
    "threshold",
    "entropy_bound",
    "remask",
)


def seconds(function: Any, repeats: int) -> tuple[float, float]:
    """The least time of `repeats` calls, and the spread to the median."""
    jax.block_until_ready(function(0))
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(i + 1))
        times.append(time.perf_counter() - start)
    return min(times), float(np.median(times) - min(times))


def measured(config, parts: Parts, params: Any, kinds: tuple[str, ...] = ("count",)) -> dict:
    """Times of a trained masked model, and of an autoregressive one with its blocks.

    The autoregressive model has random weights: its speed does not depend on them. A masked
    call is one of `count`, with the head and the draws of what it fills in.

    Returns:
      batches; length; forward, decode: seconds of one masked call and of one autoregressive
      token; break_even and its error; rows: a dict for each sampler, number of steps and
      batch, with seconds, calls of a text and tokens a second (written ones, no prompt).
    """
    length, s = config.length, config.speed
    other = transformer(**dict(parts.fields) | {"causal": True})
    weights = jax.jit(other.init)(jax.random.key(0))
    keys = lambda i: jax.random.fold_in(jax.random.key(1), i)
    rows, forward, decode, spread = [], [], [], []
    plain = settings.of_tokens(**config.sampler)

    def sampler(kind, steps):
        # Whole texts: blocks and caches are those of the config's own sampler.
        fields = dict(config.sampler) | {"kind": kind, "steps": steps}
        made = settings.settings(**fields | {"block": 0, "cache": "none", "allow_clamp": True})
        return settings.fit(made, length, parts.source.vocab)

    for batch in s.batches:

        def timed(made, batch=batch):
            run = lambda i: sweep.write(config, parts, params, made, keys(i), batch)
            return *seconds(run, s.repeats), float(np.mean(run(1).calls))

        steps = min(s.steps[0], length)
        took, error, _ = timed(sampler("count", steps))
        forward.append(took / steps)
        for name in ("ar", "ar_nocache"):
            run = getattr(autoregressive, name)

            def write(i, run=run, batch=batch):
                return run(keys(i), other, weights, batch, length, plain, parts.mask).tokens

            whole, more = seconds(write, s.repeats)
            rows.append(_row(name, length, batch, whole, length, length))
            if name == "ar":
                decode.append(whole / length)
                spread.append(np.hypot(more / whole, error / took))
        todo = [
            sampler(kind, steps)
            for kind in kinds
            for steps in (s.steps[:1] if kind in settings.FREE_RUNNING else s.steps)
        ]
        own = settings.settings(**config.sampler)
        if own.block:
            todo.append(settings.fit(own, length, parts.source.vocab))
        for made in dict.fromkeys(todo):
            took, _, calls = timed(made)
            cache = f", {made.cache} cache" if made.cache != "none" else ""
            name = f"{made.kind}, blocks of {made.block}{cache}" if made.block else made.kind
            rows.append(_row(name, made.steps, batch, took, calls, length))
    star = length * np.array(decode) / np.array(forward)
    return {
        "batches": list(s.batches),
        "length": length,
        "forward": forward,
        "decode": decode,
        "break_even": star.tolist(),
        "break_even_error": (star * np.array(spread)).tolist(),
        "rows": rows,
    }


def _row(name, steps, batch, took, calls, length) -> dict:
    return {
        "sampler": name,
        "steps": int(steps),
        "batch": batch,
        "seconds": took,
        "calls": calls,
        "tokens_per_second": batch * length / took,
    }


def cost_model(found: dict, batch: np.ndarray) -> np.ndarray:
    """T* = L t_decode / t_forward from three numbers, for every batch.

        t_decode(B) = max(d, p B),   t_forward(B) = max(f, p B L)

    Overheads d and f are those of the smallest batch; p, the price of a token, is that of the
    masked model's largest. So T* at every other batch is a prediction: it falls as 1 / B once a
    call is bound by arithmetic, until tokens are, too, and T* is 1.
    """
    sizes = np.array(found["batches"], float)
    small, large, length = sizes.argmin(), sizes.argmax(), found["length"]
    price = found["forward"][large] / (sizes[large] * length)
    decode = np.maximum(found["decode"][small], price * batch)
    forward = np.maximum(found["forward"][small], price * batch * length)
    return length * decode / forward


def table(found: dict) -> str:
    """Markdown: break-even by batch, and every sampler."""
    lines = [
        "| batch | masked call, ms | autoregressive token, ms | T* |",
        "|---|---|---|---|",
        *(
            f"| {b} | {1e3 * f:.3f} | {1e3 * d:.3f} | {t:.1f} ± {e:.1f} |"
            for b, f, d, t, e in zip(
                found["batches"], found["forward"], found["decode"],
                found["break_even"], found["break_even_error"], strict=True,
            )
        ),
        "",
        "| sampler | steps | batch | calls of a text | tokens a second |",
        "|---|---|---|---|---|",
        *(
            f"| {r['sampler']} | {r['steps']} | {r['batch']} | {r['calls']:.1f} "
            f"| {r['tokens_per_second']:,.0f} |"
            for r in found["rows"]
        ),
    ]  # fmt: skip
    return "\n".join(lines)

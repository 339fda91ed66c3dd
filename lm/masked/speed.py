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
from lm.masked.denoiser import denoise
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

    The autoregressive model has random weights: its speed does not depend on them.

    Returns:
      batches; length; forward, decode: seconds of one masked call and of one autoregressive
      token; break_even and its error; rows: a dict for each sampler, number of steps and
      batch, with seconds, calls of a text and tokens a second (written ones, no prompt).
    """
    length, s = config.length, config.speed
    fields = dict(parts.fields) | {"causal": True}
    other = transformer(**fields)
    weights = jax.jit(other.init)(jax.random.key(0))
    keys = lambda i: jax.random.fold_in(jax.random.key(1), i)
    rows, forward, decode, spread = [], [], [], []
    whole = jax.jit(lambda params, x: denoise(parts.denoiser, params, x))
    plain = settings.settings()
    for batch in s.batches:
        x = np.full((batch, length), parts.mask, np.int32)
        one, error = seconds(lambda i, x=x: whole(params, x), s.repeats)
        forward.append(one)
        for name in ("ar", "ar_nocache"):
            run = getattr(autoregressive, name)

            def write(i, run=run, batch=batch):
                return run(keys(i), other, weights, batch, length, plain, parts.mask).tokens

            took, more = seconds(write, s.repeats)
            rows.append(_row(name, length, batch, took, length, length))
            if name == "ar":
                decode.append(took / length)
                spread.append(np.hypot(more / took, error / one))
        for kind in kinds:
            free = kind in settings.FREE_RUNNING
            for steps in s.steps[:1] if free else s.steps:
                made = settings.settings(
                    **dict(config.sampler) | {"kind": kind, "steps": steps}
                )
                made = settings.fit(made, length, 2**31)

                def write(i, made=made, batch=batch):
                    return sweep.write(config, parts, params, made, keys(i), batch)

                took, _ = seconds(write, s.repeats)
                calls = float(np.mean(write(1).calls))
                rows.append(_row(kind, made.steps, batch, took, calls, length))
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
    """T* = L t_decode / t_forward from two overheads and one price per token.

    t_decode(B) = d + c B and t_forward(B) = f + c' B: the overheads are met at the smallest
    batch, the prices at the largest.
    """
    sizes = np.array(found["batches"], float)
    order = np.argsort(sizes)

    def line(times):
        times = np.array(times)[order]
        b = sizes[order]
        if len(b) == 1:
            return lambda x: np.full_like(x, times[0])
        slope = max((times[-1] - times[0]) / (b[-1] - b[0]), 0)
        return lambda x: times[0] + slope * (x - b[0])

    decode, forward = line(found["decode"]), line(found["forward"])
    return found["length"] * decode(batch) / forward(batch)


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

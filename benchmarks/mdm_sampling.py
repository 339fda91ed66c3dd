"""How fast texts are written: every masked sampler, autoregression and plain PyTorch.

    uv run python -m benchmarks.mdm_sampling [--length 64] [--vocab 8] [--width 64] [--depth 3]
        [--batches 1,16,128] [--repeats 20] [--seconds 60]

Section 9 of the specification of Feng et al., arXiv:2502.09622. Networks have random weights in
float32, T = L / 4 where steps are a setting, and a time is the least of `repeats` calls, peers
in turn in one process; of fewer, at least three, where a round of all peers is so long that
they would take more than so many seconds.

    samplers     all nine, blocks with either cache and none, and autoregression with and
                 without a cache. Random weights are never sure of a token, so threshold and
                 entropy_bound write one a call: their worst case
    loop         `sample` in one program against one program a step called T times by Python,
                 with logits of all positions, as public libraries do, and against the same in
                 plain PyTorch, if there is torch (`uv run --with torch ...`)
    gather       the head for the 8 positions of a step against all 64, V = 8192
    oracle       512 texts of 256 tokens, an HMM of 64 states, T = 64
    programs     what is compiled when T, schedule, tau, block or the language change

Exits with 1 if a bar is missed.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternately
from lm.languages import build, hmm, oracle
from lm.masked import autoregressive, blocks, categorical, networks, plans, reveal, sample
from lm.masked.denoiser import Denoiser, denoise
from lm.masked.settings import KINDS, Settings, numbers, settings
from lm.model import Model
from lm.transformer import transformer

COMPILED = "/jax/core/compile/backend_compile_duration"  # An event of JAX, one a program.
NORM_EPS, ROPE_BASE = 1e-6, 1e4


def main(*arguments: str) -> None:
    """Prints the tables, then the bars, as Markdown."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.mdm_sampling")
    for name, value in (("length", 64), ("vocab", 8), ("width", 64), ("depth", 3)):
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--batches", default="1,16,128")
    flags.add_argument("--repeats", type=int, default=20)
    flags.add_argument("--seconds", type=float, default=60.0)
    f = flags.parse_args(arguments)
    if f.length < 8 or f.length % 8:
        raise SystemExit(f"--length is {f.length}, but must be a multiple of 8.")
    batches = [int(b) for b in f.batches.split(",")]
    limits = f.repeats, f.seconds
    sizes = f.vocab, f.width, f.depth
    print(
        f"L = {f.length}, T = {f.length // 4}, V = {f.vocab}, {f.depth} layers of {f.width}; "
    )
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores\n", flush=True)

    rows = {b: best(samplers(*sizes, f.length, b), *limits) for b in batches}
    print(tokens_table(rows, f.length), flush=True)
    rows = {b: best(loops(*sizes, f.length, b), *limits) for b in batches}
    print(tokens_table(rows, f.length), flush=True)
    if there("torch"):
        print(
            f"torch's logits of the same weights: {torch_difference(*sizes, f.length):.1e} off\n"
        )
    else:
        print("torch is not installed: no comparison with it.\n")
    ratios = {b: rows[b]["step by step"][0] / rows[b]["one program"][0] for b in batches}
    bars = [
        (f"step by step / one program, batch {b}", ratios[b], ">=", 1.3 if b == 1 else 1.0)
        for b in batches
    ]
    for batch in (1, 8):
        took, text = gather(64, 8192, 128, 2, 8, batch, *limits)
        print(text, flush=True)
        bars.append((f"whole logits / 8 rows, batch {batch}", took, ">=", 3.0))
    first, again = oracle_seconds(512, 256, 64, 64)
    print(f"Oracle: {first:.1f} s with compilation, {again:.1f} s without.")
    bars.append(("oracle, with compilation, s", first, "<=", 60.0))
    bars.append(("programs compiled by other settings", compilations(), "<=", 0))
    sys.exit(report(bars))


def network(vocab: int, width: int, depth: int, causal: bool = False) -> tuple[Model, Any]:
    """A model whose rows are V tokens and the mask, and random weights."""
    model = transformer(
        vocab=vocab + 1, dim=width, mlp=4 * -(-2 * width // 3), heads=max(1, width // 16),
        depth=depth, unroll=depth, causal=causal, norm_eps=NORM_EPS, rope_base=ROPE_BASE,
    )  # fmt: skip
    return model, jax.jit(model.init)(jax.random.key(0))


def samplers(vocab: int, width: int, depth: int, length: int, batch: int) -> dict[str, Any]:
    """Name -> () -> Result: whatever there is to write B texts with."""
    (model, params), (causal, other) = (network(vocab, width, depth, c) for c in (False, True))
    denoiser = networks.denoiser(model, vocab)
    made = lambda **fields: settings(steps=length // 4, **fields)
    key = jax.random.key(1)
    plain = partial(sample.sample, key, denoiser, params, batch, length)
    found = {kind: partial(plain, made(kind=kind)) for kind in KINDS}
    block = dict(kind="confidence", block=length // 8)
    found["confidence, 8 blocks"] = partial(plain, made(**block))
    for cache in ("prefix", "dual"):
        found[f"confidence, 8 blocks, {cache} cache"] = partial(
            blocks.sample_cached,
            key, model, params, batch, length, made(**block, cache=cache), vocab,
        )  # fmt: skip
    for name in ("ar", "ar_nocache"):
        write = getattr(autoregressive, name)
        found[name] = partial(write, key, causal, other, batch, length, settings(), vocab)
    return found


def loops(vocab: int, width: int, depth: int, length: int, batch: int) -> dict[str, Any]:
    """Name -> () -> texts: the ancestral sampler of T = L / 4 steps by its peers."""
    model, params = network(vocab, width, depth)
    denoiser, made = networks.denoiser(model, vocab), settings(steps=length // 4)
    key = jax.random.key(1)
    found = {
        "one program": partial(sample.sample, key, denoiser, params, batch, length, made),
        "step by step": partial(by_steps, key, denoiser, params, batch, length, made),
    }
    if there("torch"):
        torch = importlib.import_module("torch")
        torch.set_num_threads(os.cpu_count())
        weights = torch_weights(torch, params)
        found["torch"] = partial(by_torch, torch, weights, vocab, batch, length, made)
    return found


def by_steps(key, denoiser: Denoiser, params, batch: int, length: int, made: Settings):
    """The reverse process of `reveal.literal`, with a program a step: texts int32 [B, L]."""
    x = jnp.full((batch, length), denoiser.mask, jnp.int32)
    for k, share in enumerate(reveal.ratios(made).astype(np.float32)):
        x = one_step(key, params, x, np.int32(k), share, denoiser=denoiser)
    return x


@partial(jax.jit, static_argnames="denoiser", donate_argnames="x")
def one_step(key, params, x, k, share, *, denoiser):
    """From t to s; `share` is (alpha_s - alpha_t) / (1 - alpha_t)."""
    where, what = (jax.random.fold_in(jax.random.fold_in(key, k), i) for i in range(2))
    token = jax.random.categorical(what, denoise(denoiser, params, x))
    shown = (x == denoiser.mask) & (jax.random.uniform(where, x.shape) < share)
    return jnp.where(shown, token.astype(x.dtype), x)


def gather(
    length: int, vocab: int, width: int, depth: int, rows: int, batch: int, repeats, limit
) -> tuple[float, str]:
    """A step that fills `rows` positions in, by their logits and by those of all positions.

    The latter twice: with the noise of the sampler's draws, which gives the same texts, and
    with that of `jax.random.categorical`, which is cheaper.

    Returns:
      the seconds of the cheaper one by those of the sampler, and a line of them all.
    """
    model, params = network(vocab, width, depth)
    denoiser, key = networks.denoiser(model, vocab), jax.random.key(1)
    steps = length // rows
    made = settings(kind="count", steps=steps, rows=rows)
    whole = partial(every_row, key, params, numbers(made, length), denoiser=denoiser)
    mask = lambda: jnp.full((batch, length), vocab, jnp.int32)
    functions = {
        "gathered": lambda: sample.sample(key, denoiser, params, batch, length, made).tokens,
        "whole, same noise": lambda: whole(mask(), settings=made),
        "whole, plain noise": lambda: whole(mask(), settings=None),
    }
    same = np.mean(np.asarray(functions["gathered"]()) == functions["whole, same noise"]())
    took = best(functions, repeats, limit)
    each = ", ".join(f"{name} {1e3 * s / steps:.2f}" for name, (s, *_) in took.items())
    text = f"A step, V = {vocab}, batch {batch}, in ms: {each}; {100 * same:.1f} % same tokens."
    return took["whole, plain noise"][0] / took["gathered"][0], text


@partial(jax.jit, static_argnames=("denoiser", "settings"), donate_argnames="x")
def every_row(key, params, data, x, *, denoiser, settings):
    """`sample` of kind count with all logits and all noise in every step; texts [B, L]."""
    keys = categorical.each(key, len(x))
    k = plans.planned(categorical.fold(keys, 0), "count", data, x == denoiser.mask)
    when, keys = plans.when(k), categorical.fold(keys, 1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)

    def body(k, x):
        log_f = denoise(denoiser, params, x)
        if settings is None:
            token = jax.random.categorical(jax.random.fold_in(key, k), log_f).astype(x.dtype)
        else:
            token = categorical.draw(keys, settings, log_f, positions)
        return jnp.where(when == k, token, x)

    return jax.lax.fori_loop(0, data.steps, body, x)


def oracle_seconds(batch: int, length: int, states: int, steps: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and the least of two others."""
    language = hmm.on_device(build.random_hmm(np.random.default_rng(0), states))
    write = partial(
        sample.sample, jax.random.key(1), oracle.oracle(hmm.vocab(language)), language, batch,
        length, settings(steps=steps),
    )  # fmt: skip
    start = time.perf_counter()
    jax.block_until_ready(write())
    first = time.perf_counter() - start
    return first, min(alternately({"": write}, 2)[""])


def compilations(length: int = 32, batch: int = 2) -> int:
    """Programs made by other values of what is data, after the first of each kind."""
    tables = [build.random_hmm(np.random.default_rng(seed), 8) for seed in range(2)]
    denoiser = oracle.oracle(hmm.vocab(tables[0]))
    model, params = network(8, 16, 1)
    count = 0

    def seen(event, seconds, **rest):
        nonlocal count
        count += event == COMPILED

    def write(seed, made):
        key, language = jax.random.key(seed), hmm.on_device(tables[seed])
        sample.sample(key, denoiser, language, batch, length, made)

    def cached(seed, made):
        key = jax.random.key(seed)
        blocks.sample_cached(key, model, params, batch, length, made, 8)

    several = {
        "ancestral": dict(steps=(8, 13), schedule=("linear", "cosine"), grid=("uniform", "cosine")),
        "count": dict(steps=(8, 16), block=(0, 8)),
        "confidence": dict(steps=(8, 16), block=(0, 8)),
        "threshold": dict(tau=(0.9, 0.5), block=(0, 4)),
        "entropy_bound": dict(gamma=(0.1, 0.3)),
        "remask": dict(steps=(8, 13), eta=(0.02, 0.1)),
    }  # fmt: skip
    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        for seed in range(2):
            count = 0  # Of the second round only what is new counts.
            for kind, fields in several.items():
                write(seed, settings(kind=kind, **{n: v[seed] for n, v in fields.items()}))
            for cache in ("prefix", "dual"):
                cached(seed, settings(steps=(8, 16)[seed], block=8, cache=cache))
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)
    return count


def torch_weights(torch: Any, params: Any) -> Any:
    """The parameters of `lm.transformer` as tensors, matrices [in, out]."""
    return jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params)


def torch_logits(torch: Any, p: Any, x: Any) -> Any:
    """The network of `network` in PyTorch: tokens [B, L] -> logits [B, L, V + 1]."""
    norm = lambda h, scale: torch.nn.functional.rms_norm(h, h.shape[-1:], scale, NORM_EPS)
    (batch, length), width = x.shape, p["embed"]["embedding"].shape[1]
    heads = max(1, width // 16)
    half = width // heads // 2
    angle = torch.arange(length)[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()

    def turned(a):
        first, second = a.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    h = p["embed"]["embedding"][x]
    for i in range(len(p["blocks"]["q"]["kernel"])):
        w = {name: next(iter(leaf.values()))[i] for name, leaf in p["blocks"].items()}
        a = norm(h, w["attention_norm"])
        q, k, v = ((a @ w[n]).view(batch, length, heads, -1).transpose(1, 2) for n in "qkv")
        mixed = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v)
        h = h + mixed.transpose(1, 2).reshape(batch, length, width) @ w["o"]
        a = norm(h, w["mlp_norm"])
        h = h + (torch.nn.functional.silu(a @ w["gate"]) * (a @ w["up"])) @ w["down"]
    return norm(h, p["norm"]["scale"]) @ p["head"]["kernel"]


def by_torch(torch: Any, weights: Any, vocab: int, batch: int, length: int, made: Settings):
    """The ancestral loop as it is written down, in PyTorch: texts [B, L] in NumPy."""
    with torch.inference_mode():
        x = torch.full((batch, length), vocab)
        for share in reveal.ratios(made):
            p = torch_logits(torch, weights, x)[..., :vocab].softmax(-1)
            # An exponential race: the first to ring is v with probability p_v.
            token = (p / torch.empty_like(p).exponential_()).argmax(-1)
            shown = (x == vocab) & (torch.rand(x.shape) < share)
            x = torch.where(shown, token, x)
        return x.numpy()


def torch_difference(vocab: int, width: int, depth: int, length: int) -> float:
    """The largest difference of torch's logits from ours, relative to the largest logit."""
    torch = importlib.import_module("torch")
    model, params = network(vocab, width, depth)
    x = np.random.default_rng(0).integers(0, vocab + 1, (4, length))
    ours = np.asarray(jax.jit(model.apply)(params, jnp.asarray(x, jnp.int32)))
    with torch.inference_mode():
        theirs = torch_logits(torch, torch_weights(torch, params), torch.from_numpy(x)).numpy()
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def best(functions: dict[str, Any], repeats: int, limit: float) -> dict[str, tuple]:
    """The least seconds of each function, of how many rounds, and its calls if it has some."""
    found = alternately(functions, 1)
    rounds = min(repeats - 1, max(2, int(limit / sum(t[0] for t in found.values()))))
    more = alternately(functions, rounds) if rounds else dict.fromkeys(found, [])
    calls = {
        name: float(np.mean(result.calls)) if isinstance(result, sample.Result) else None
        for name, result in ((name, function()) for name, function in functions.items())
    }
    return {n: (min(found[n] + more[n]), 1 + rounds, calls[n]) for n in functions}


def tokens_table(rows: dict[int, dict[str, tuple]], length: int) -> str:
    """Markdown: tokens a second, and network calls of a text, by batch."""
    several = next(iter(rows.values()))
    rounds = ", ".join(str(next(iter(found.values()))[1]) for found in rows.values())
    lines = [
        f"| tokens a second, best of {rounds} | {' | '.join(f'batch {b}' for b in rows)} | calls |",
        "|---" * (2 + len(rows)) + "|",
    ]
    for name in several:
        speed = " | ".join(f"{b * length / rows[b][name][0]:,.0f}" for b in rows)
        calls = several[name][2]
        lines.append(f"| {name} | {speed} | {'' if calls is None else f'{calls:.1f}'} |")
    return "\n".join([*lines, ""])


def report(bars: list[tuple[str, float, str, float]]) -> int:
    """Prints the bars; 1 if one is missed."""
    print("\n| bar | found | allowed | |\n|---|---|---|---|")
    met = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    holds = [met[sign](found, bar) for _, found, sign, bar in bars]
    for (name, found, sign, bar), good in zip(bars, holds, strict=True):
        verdict = "reached" if good else "NOT reached"
        print(f"| {name} | {found:.3g} | {sign} {bar:g} | {verdict} |")
    return int(not all(holds))


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main(*sys.argv[1:])

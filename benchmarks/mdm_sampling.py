"""How fast texts are written: every masked sampler, autoregression and plain PyTorch.

    uv run python -m benchmarks.mdm_sampling [--length 64] [--vocab 8] [--width 64] [--depth 3]
        [--batches 1,16,128] [--repeats 20] [--seconds 60]

Section 9 of the specification of Feng et al., arXiv:2502.09622. Networks have random weights in
float32, T = L / 4 where steps are a setting, and a time is the least of `repeats` calls, peers
in turn in one process; of fewer, at least three, where all would take longer than `seconds`.

    samplers     all nine, blocks with either cache and none, and autoregression with and
                 without a cache. Random weights are never sure of a token, so threshold and
                 entropy_bound write one a call: their worst case
    loop         `sample` in one program against one program a step called T times by Python,
                 with logits of all positions, as public libraries do, and against the same in
                 plain PyTorch, if there is torch (`uv run --with torch ...`)
    gather       logits and noise of the 8 positions of a step against all 64, V = 8192
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
from typing import Any, NamedTuple

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
CHANGES = (  # Pairs of settings that differ in data only.
    dict(kind="ancestral", steps=(8, 12), schedule=("linear", "cosine"), block=(0, 8)),
    dict(kind="count", steps=(8, 16), block=(0, 8)),
    dict(kind="confidence", steps=(8, 16), block=(0, 8)),
    dict(kind="threshold", tau=(0.9, 0.5), block=(0, 4)),
    dict(kind="entropy_bound", gamma=(0.1, 0.3)),
    dict(kind="remask", steps=(8, 13), eta=(0.02, 0.1), grid=("uniform", "cosine")),
    dict(kind="count", steps=(8, 16), block=8, cache="prefix"),
    dict(kind="confidence", steps=(8, 16), block=8, cache="dual"),
)


class Found(NamedTuple):
    """The least seconds of some rounds, and network calls of a text; None: not known."""

    seconds: float
    rounds: int
    calls: float | None


def main(*arguments: str) -> None:
    """Prints the tables, then the bars, as Markdown."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.mdm_sampling")
    for name, value in (("length", 64), ("vocab", 8), ("width", 64), ("depth", 3)):
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--batches", default="1,16,128")
    flags.add_argument("--repeats", type=int, default=20)
    flags.add_argument("--seconds", type=float, default=60.0)
    f = flags.parse_args(arguments)
    if f.length < 16 or f.length % 16:
        raise SystemExit(f"--length is {f.length}, but must be a multiple of 16.")
    batches = [int(b) for b in f.batches.split(",")]
    limits = f.repeats, f.seconds
    sizes = f.vocab, f.width, f.depth
    print(f"L = {f.length}, T = {f.length // 4}, V = {f.vocab}, {f.depth} layers of {f.width},")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores.\n", flush=True)

    for batch in batches:
        found = best(samplers(*sizes, f.length, batch), *limits)
        print(tokens_table(found, f.length, batch), flush=True)
    bars = []
    for batch in batches:
        found = best(loops(*sizes, f.length, batch), *limits)
        print(tokens_table(found, f.length, batch), flush=True)
        ratio = found["step by step"].seconds / found["one program"].seconds
        bar = 1.3 if batch == 1 else 1.0
        bars.append((f"step by step / one program, batch {batch}", ratio, ">=", bar))
    if there("torch"):
        off = torch_difference(*sizes, f.length)
        print(f"Logits of torch with the same weights are {off:.1e} of the largest off.\n")
    else:
        print("No torch is installed to compare with.\n")
    for batch in (1, 8):
        ratio, text = gather(64, 8192, 128, 2, 8, batch, *limits)
        print(text, flush=True)
        bars.append((f"whole logits / 8 rows, batch {batch}", ratio, ">=", 3.0))
    first, again = oracle_seconds(512, 256, 64, 64)
    print(f"Oracle: {first:.1f} s with compilation, {again:.1f} s without.")
    bars.append(("oracle with compilation, seconds", first, "<=", 60.0))
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
    block = dict(kind="confidence", block=length // 4)
    found["confidence, 4 blocks"] = partial(plain, made(**block))
    for cache in ("prefix", "dual"):
        found[f"confidence, 4 blocks, {cache} cache"] = partial(
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
        weights = torch_weights(torch, params)
        for threads in sorted({1, os.cpu_count()}):
            found[f"torch, threads: {threads}"] = partial(
                by_torch, torch, weights, vocab, batch, length, made, threads
            )
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

    The latter twice: with a plain `jax.random.categorical` over [B, L, V], as samplers without
    the gather draw, and with our own noise, a key for each position, which gives the same texts
    and happens to be two to three times as fast on a CPU.

    Returns:
      the seconds of the plain one by those of the sampler, and a line of them all.
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
    took = {n: f.seconds / steps for n, f in best(functions, repeats, limit).items()}
    each = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in took.items())
    text = (
        f"A step, V = {vocab}, batch {batch}, ms: {each}; {100 * same:.1f} % the same tokens."
    )
    return took["whole, plain noise"] / took["gathered"], text


@partial(jax.jit, static_argnames=("denoiser", "settings"), donate_argnames="x")
def every_row(key, params, data, x, *, denoiser, settings):
    """`sample` of kind count with all logits and all noise in every step; texts [B, L]."""
    keys = categorical.each(key, len(x))
    k = plans.planned(categorical.fold(keys, 0), "count", data, x == denoiser.mask)
    when, keys = plans.when(k), categorical.fold(keys, 1)
    spare = jax.random.fold_in(key, len(x))  # Of the text after the last.
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)

    def body(k, x):
        log_f = denoise(denoiser, params, x)
        if settings is None:
            token = jax.random.categorical(jax.random.fold_in(spare, k), log_f).astype(x.dtype)
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


def compilations(changes: tuple = CHANGES, length: int = 32, batch: int = 2) -> int:
    """Programs made by other settings, keys and tables, after the first of each kind."""
    tables = [build.random_hmm(np.random.default_rng(seed), 8) for seed in range(2)]
    languages = [hmm.on_device(table) for table in tables]
    denoiser = oracle.oracle(hmm.vocab(tables[0]))
    model, params = network(8, 16, 1)
    count = 0

    def seen(event, seconds, **rest):
        nonlocal count
        count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        for turn, language in enumerate(languages):
            count = 0  # Only what is new in the second turn counts.
            key = jax.random.key(turn)
            for fields in changes:
                of_turn = lambda v, turn=turn: v[turn] if isinstance(v, tuple) else v
                made = settings(**{name: of_turn(v) for name, v in fields.items()})
                if made.cache == "none":
                    sample.sample(key, denoiser, language, batch, length, made)
                else:
                    blocks.sample_cached(key, model, params, batch, length, made, 8)
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


def by_torch(
    torch: Any, weights: Any, vocab: int, batch: int, length: int, made: Settings, threads: int
) -> np.ndarray:
    """The ancestral loop as it is written down, in PyTorch: texts [B, L]."""
    torch.set_num_threads(threads)
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


def best(functions: dict[str, Any], repeats: int, limit: float) -> dict[str, Found]:
    """Times functions in turn, `repeats` rounds, or as many as take `limit` seconds."""
    results = {name: function() for name, function in functions.items()}
    times = alternately(functions, min(3, repeats))
    once = sum(min(several) for several in times.values())
    more = min(repeats - 3, int(limit / once) - 3)
    if more > 0:
        again = alternately(functions, more)
        times = {name: several + again[name] for name, several in times.items()}
    calls = lambda x: float(np.mean(x.calls)) if isinstance(x, sample.Result) else None
    return {n: Found(min(t), len(t), calls(results[n])) for n, t in times.items()}


def tokens_table(found: dict[str, Found], length: int, batch: int) -> str:
    """Markdown: tokens a second, and network calls of a text."""
    rounds = next(iter(found.values())).rounds
    lines = [
        f"| batch {batch}, best of {rounds} | ms | tokens a second | calls |",
        "|---|---|---|---|",
    ]
    for name, (seconds, _, calls) in found.items():
        calls = "" if calls is None else f"{calls:.1f}"
        speed = f"{batch * length / seconds:,.0f}"
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {speed} | {calls} |")
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

"""The exact posterior pass: ours, NumPy and torch against the rate of a plain matmul.

    uv run python -m benchmarks.optimal_loss [N [D [QUERIES [REPEATS]]]]

N = 50,000 rows of D = 3,072 numbers, 256 draws and 3 rounds unless said otherwise. All do the
same float32 sums by tiles of rows with a running maximum, two products per tile, 4 M N D FLOP
in all, and their results are compared first.

    ours                 `draws.exact`, its noise included; the same for 1,024 draws
    rows on the host     `streaming.exact_from_host`, in four chunks
    matmul               jitted, 2048 x 2048 x 2048: the rate that could be had
    NumPy, torch         the same tiles; torch is no dependency (`uv run --with torch ...`)
    8 levels             eight noise levels that share their draws, and one after the other

CPU-seconds are those of all threads. NumPy's BLAS has as many threads as there are cores.
Memory, growth with N and scaling over devices are measured in processes of their own, k
devices on k cores, on a CPU only. Exits with 1 if a bar is missed.
"""

import importlib
import importlib.util
import os
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks.optimal_loss_alone import critical, growth, normal, scaling
from diffusion import draws
from diffusion.estimators import precision_of
from diffusion.rows import rows
from diffusion.streaming import exact_from_host, on_host

SIDE = 2048  # Of the matrices whose product is the rate that could be had.


def main(n: str = "50000", d: str = "3072", queries: str = "256", repeats: str = "3") -> None:
    """Prints the comparison and the bars as Markdown."""
    n, d, queries, repeats = (int(v) for v in (n, d, queries, repeats))
    tile, cpu = min(4096, max(1, n // 8)), jax.default_backend() == "cpu"
    print(f"{n} x {d}, {queries} draws, tiles of {tile}, {jax.devices()[0].device_kind}, ")
    print(
        f"{os.cpu_count()} cores; torch {'' if there('torch') else 'not '}installed\n",
        flush=True,
    )
    # First, while this process holds no data.
    bars = growth(n, d, queries, tile, repeats) if cpu else []
    bars += scaling(n, d, queries, tile, repeats) if cpu else []

    functions, flops = contestants(n, d, queries, tile)
    agree(functions)
    seconds = alternately(functions, repeats)
    print(table(seconds, flops))
    cost = lambda name: np.array(seconds[name]).T  # [2, rounds]: wall, CPU.
    share = rates(seconds, flops, "ours") / rates(seconds, flops, "matmul")
    levels = cost("8 levels, shared")[0] / cost("8 levels, apart")[0]
    first = [("share of the matmul rate, per CPU-second", np.median(share), ">=", 0.7)]
    for name, least in (("NumPy", 2.0), ("torch", 1.5)):
        if name in seconds:
            ratio = np.median(cost(name) / cost("ours"), -1).min()
            first.append((f"{name} / ours, wall or CPU, the smaller", ratio, ">=", least))
    first.append(("8 levels on shared draws / apart", np.median(levels), "<=", 0.7))
    first.append(("compilations when s, C and the key change", compilations(d), "<=", 0))
    sys.exit(report(first + bars))


def contestants(n, d, queries, tile):
    """Name -> () -> result, and name -> FLOP."""
    y = normal(n, d)
    y -= y.mean(0)
    data, host, s = rows(y, tile=tile), on_host(y), critical(n, d)
    key, precision = jax.random.key(0), precision_of("")
    part, large = (draws.block(0, size, n, seed=0) for size in (queries, 1024))
    one, eight = jnp.asarray([s]), jnp.asarray(s * np.geomspace(0.5, 4, 8))
    exact = lambda some, levels: draws.exact(data, some, key, levels, precision).trcov
    square = jax.random.normal(key, (SIDE, SIDE))
    matmul = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    streamed = dict(chunk=-(-n // 4), tile=tile, precision=precision)
    functions = {
        "ours": lambda: exact(part, one),
        "ours, 1024 draws": lambda: exact(large, one),
        "rows on the host": lambda: (
            exact_from_host(host, [part], key, [s], **streamed)[0].trcov
        ),
        "matmul": lambda: matmul(square),
        "8 levels, shared": lambda: exact(part, eight),
        "8 levels, apart": lambda: [exact(part, level[None]) for level in eight],
    }
    flops = dict.fromkeys(("ours", "rows on the host", "NumPy", "torch"), 4 * queries * n * d)
    flops |= {"ours, 1024 draws": 4 * 1024 * n * d, "matmul": 2 * SIDE**3}
    flops["8 levels, shared"] = 2 * (2 + 8) * queries * n * d
    flops["8 levels, apart"] = 8 * flops["ours"]

    x0 = y[part.index]
    eps = np.array(draws.queries(part, key, jnp.asarray(x0)).eps)
    given = (y, np.einsum("nd,nd->n", y, y), x0, eps, part.index.astype(np.int64))
    functions["NumPy"] = lambda: tiled(np, *given, s, tile)
    if there("torch"):
        torch = importlib.import_module("torch")
        torch.set_num_threads(os.cpu_count())
        tensors = [torch.from_numpy(a) for a in given]
        functions["torch"] = lambda: tiled(torch, *tensors, s, tile).numpy()
    return functions, flops


def tiled(xp, y, square, x0, eps, source, s, tile):
    """trcov [B], by NumPy or torch: what `draws.exact` does for one noise level."""
    own, across = (x0 * x0).sum(1), (x0 * eps).sum(1)
    both = x0 / s**2 + eps / s
    shift = (0.5 * own / s**2 + across / s)[:, None]
    top, weight = xp.zeros(len(x0), dtype=x0.dtype) - 1e30, xp.zeros(len(x0), dtype=x0.dtype)
    total, about = xp.zeros(x0.shape, dtype=x0.dtype), weight
    for at in range(0, len(y), tile):
        part, size = y[at : at + tile], square[at : at + tile]
        logit = both @ part.T
        logit -= 0.5 / s**2 * size
        logit -= shift
        mine = xp.where((source >= at) & (source < at + len(part)))[0]
        logit[mine, source[mine] - at] = -float("inf")
        new = xp.maximum(top, xp.amax(logit, 1))
        before = xp.exp(top - new)
        logit -= new[:, None]
        w = xp.exp(logit, out=logit)
        weight = before * weight + w.sum(1)
        total = before[:, None] * total + w @ part
        about = before * about + w @ size
        top = new
    distance = about - 2 * (total * x0).sum(1) + weight * own
    joint = xp.clip(top, 0, None)
    others, source_weight = xp.exp(top - joint), xp.exp(-joint)
    whole = others * weight + source_weight
    moved = (others / whole)[:, None] * (total - weight[:, None] * x0)
    return others * distance / whole - (moved**2).sum(1)


def agree(functions):
    """All give the same trcov as ours."""
    want = np.asarray(functions["ours"]())[0]
    for name in ("rows on the host", "NumPy", "torch"):
        if name in functions:
            got = np.ravel(functions[name]())
            np.testing.assert_allclose(
                got, want, rtol=1e-3, atol=1e-4 * want.max(), err_msg=name
            )


def alternately(functions, repeats) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each call, to and fro, after one that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    found = {name: [] for name in functions}
    for i in range(repeats):
        for name, function in list(functions.items())[:: 1 if i % 2 else -1]:
            time.sleep(0.1)  # Threads of the one before still spin.
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found[name].append((wall, cpu))
    return found


def rates(seconds, flops, name):
    """GFLOP per CPU-second, of each round."""
    return flops[name] / 1e9 / np.array(seconds[name])[:, 1]


def table(seconds, flops) -> str:
    """Markdown: medians, and the median ratio to ours with its 95 % bootstrap interval."""
    lines = [
        "| | seconds | CPU-seconds | GFLOP per CPU-second | of matmul's rate "
        "| seconds / ours (95 %) | CPU-seconds / ours (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        wall, cpu = np.median(values, 0)
        rate = rates(seconds, flops, name)
        share = np.median(rate / rates(seconds, flops, "matmul"))
        ratios = [interval(r) for r in (np.array(values) / np.array(seconds["ours"])).T]
        lines.append(
            f"| {name} | {wall:.3f} | {cpu:.3f} | {np.median(rate):.1f} | {100 * share:.0f} % "
            f"| {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)


def interval(ratios) -> str:
    middle = f"{np.median(ratios):.2f}"
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        return middle
    rng = np.random.default_rng(0)
    low, high = stats.bootstrap(
        (ratios,), np.median, method="percentile", rng=rng
    ).confidence_interval
    return f"{middle} ({low:.2f} to {high:.2f})"


def compilations(d) -> int:
    """Programs made by other s, C and keys, after the first of each."""
    data = rows(normal(512, d), tile=256)
    programs, made = (draws.exact, draws.by_subset), []
    for seed, s, c in ((0, 1.0, 2.0), (1, 2.0, 5.0), (2, 3.0, 9.0)):
        part, level = draws.block(seed, 16, 512, seed, subset=64), jnp.asarray([s])
        draws.exact(data, part, jax.random.key(seed), level)
        draws.by_subset(data, part, jax.random.key(seed), level, "constant", c)
        made.append(sum(p._cache_size() for p in programs))
    return made[-1] - made[0]


def report(bars) -> int:
    """Prints the bars; 1 if one is missed."""
    print("\n| bar | found | allowed | |\n|---|---|---|---|")
    met = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    holds = [met[sign](found, bar) for _, found, sign, bar in bars]
    for (name, found, sign, bar), good in zip(bars, holds, strict=True):
        print(f"| {name} | {found:.3g} | {sign} {bar:g} | {'yes' if good else 'NO'} |")
    return int(not all(holds))


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main(*sys.argv[1:])

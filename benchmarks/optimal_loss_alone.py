"""The exact posterior pass in processes of their own: memory, growth with N, devices.

    uv run python -m benchmarks.optimal_loss_alone DEVICES N D QUERIES TILE REPEATS PIN

prints one measurement as JSON: seconds (median), bytes of temporaries by the compiler's own
account, and bytes by which the process grew. PIN is 1 for as many cores as devices, else 0.
`benchmarks.optimal_loss` calls it.
"""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from common import mesh as meshes
from diffusion import draws
from diffusion.rows import rows

SPREAD = 0.5


def main(*sizes: str) -> None:
    """Prints seconds, bytes of temporaries and bytes that the process grew by, as JSON."""
    devices, n, d, queries, tile, repeats, pin = map(int, sizes)
    if pin:  # Before JAX starts its threads.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:devices])
    mesh, key = meshes.make(data=devices), jax.random.key(0)
    with jax.set_mesh(mesh):
        data = rows(normal(n, d), tile=tile, mesh=mesh if devices > 1 else None)
        part, level = draws.block(0, queries, n, seed=0), jnp.asarray([critical(n, d)])
        compiled = draws.exact.lower(data, part, key, level).compile()
        run = lambda: jax.block_until_ready(compiled(data, part, key, level))
        temp, grew = compiled.memory_analysis().temp_size_in_bytes, peak(run)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(seconds=float(np.median(seconds)), temp=temp, grew=grew)))


def growth(n, d, queries, tile, repeats) -> list[tuple]:
    """Memory beyond the data, and time, at a quarter, a half and all of the rows."""
    sizes = [max(tile, n // part // tile * tile) for part in (4, 2, 1)]
    found = [alone(1, size, d, queries, tile, repeats) for size in sizes]
    print("| N | seconds | MB of temporaries, compiled | MB that the process grew by |")
    print("|---|---|---|---|")
    for size, f in zip(sizes, found, strict=True):
        print(
            f"| {size} | {f['seconds']:.3f} | {f['temp'] / 1e6:.1f} | {f['grew'] / 1e6:.1f} |"
        )
    print(flush=True)
    floats = 4 * queries * (tile + d)
    slope = np.log(found[-1]["seconds"] / found[0]["seconds"]) / np.log(sizes[-1] / sizes[0])
    spread = max(f["temp"] for f in found) / min(f["temp"] for f in found)
    return [
        (
            "temporaries / (block x tile + block x D) floats",
            found[-1]["temp"] / floats,
            "<=",
            3,
        ),
        ("temporaries, largest / smallest N", spread, "<=", 1.05),
        ("growth of the time with N, exponent", slope, "<=", 1.1),
    ]


def scaling(n, d, queries, tile, repeats) -> list[tuple]:
    """Efficiency of k devices on k cores against one on one."""
    n = max(tile, n // 2 // tile * tile)
    many = [k for k in (1, 2, 4, 8) if k <= cores()]
    tile = max(1, n // max(2, many[-1]) // 2)  # Every device has the same number of tiles.
    found = {k: alone(k, n, d, queries, tile, repeats, pin=True)["seconds"] for k in many}
    return [
        (f"efficiency of {k} devices on {k} cores", found[1] / found[k] / k, ">=", 0.8)
        for k in many[1:]
    ]


def alone(devices, n, d, queries, tile, repeats, pin=False) -> dict:
    """`main` in a process of its own."""
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    )
    sizes = map(str, (devices, n, d, queries, tile, repeats, int(pin)))
    command = [sys.executable, "-m", "benchmarks.optimal_loss_alone", *sizes]
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(run) -> float:
    """Most bytes by which the process grows while it runs; NaN where that cannot be read."""
    if not os.path.exists("/proc/self/statm"):
        return float("nan")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    done, most, before = threading.Event(), [0], resident()

    def watch():
        while not done.wait(0.001):
            most.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(*most, resident()) - before


def normal(n, d):
    return np.random.default_rng(0).standard_normal((n, d), np.float32) * np.float32(SPREAD)


def critical(n, d) -> float:
    """Where the source and all other rows weigh about the same."""
    return float(SPREAD * np.sqrt(d / np.log(n)))


def cores() -> int:
    """That this process may use; 1 where they cannot be chosen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How fast bridges train and predict, beside force fields and the same task in e3nn-jax.

    uv run python -m benchmarks.gdb [--steps 30] [--molecules 64]

Section 12 of the specification of Luo et al., arXiv:2410.24220, on relax_gfn2: F = 48, L = 3,
batches of 32. Times are the least of some repeats, peers in turn in one process.

    training       molecules per second of a whole step (two_frame), against tensor_product
    prediction     milliseconds per molecule of the 10-call sampler, against tensor_product,
                   MMFF94 and, with `--extra xtb`, the GFN2-xTB relaxation that made the data
    programs       compiled in ten more steps and for a second file of molecules: none
    batches        molecules per second that the host puts into packs

Exits with 1 if a bar is missed.
"""

import argparse
import sys
import time

import jax

from benchmarks.timing import alternately
from common import config as configs
from common import runner
from geometry import baselines, dataset, parts
from geometry.records import Record

COMPILED = "/jax/core/compile/backend_compile_duration"  # An event of JAX, one a program.


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--molecules", type=int, default=64)
    options = parser.parse_args(argv)
    programs: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: programs.append(name) if name == COMPILED else None
    )
    found = {name: made(name) for name in ("two_frame", "tensor_product")}
    bars = [*training(found, options.steps, programs), *batches(found["two_frame"])]
    bars += prediction(found, options.molecules, programs)
    for said, value, good in bars:
        print(f"{'ok  ' if good else 'MISS'} {said}: {value}")
    return 0 if all(good for *_, good in bars) else 1


def made(name: str):
    """Parts, programs and the state of a network."""
    config = configs.load("configs/bridge.py:small")
    config = runner.variants(config)["bridge-seed0"]
    configs.apply(config, dict(network=dict(name=name, remat=name == "two_frame")))
    experiment = runner.make(config)
    state = jax.jit(experiment.init)(jax.random.key(0))
    step = jax.jit(experiment.step, donate_argnums=0)
    return dict(config=config, parts=parts.parts_of(config), step=step, state=state)


def training(found: dict, steps: int, programs: list):
    """Molecules per second of the whole step, and programs of later steps."""

    def of(one):
        def run(count=steps):
            for i in range(count):
                batch = one["parts"].batch(i)
                one["state"], values = one["step"](one["state"], batch, jax.random.key(i))
            return values

        run(1)
        return run

    runs = {name: of(one) for name, one in found.items()}
    before = len(programs)
    ours, theirs = (min(times) for times in alternately(runs, 3).values())
    rate = 32 * steps / ours
    yield "training, molecules/s (>= 400)", f"{rate:.0f}", rate >= 400
    yield "training, times tensor_product (>= 1)", f"{theirs / ours:.2f}", theirs > ours
    yield (
        "programs compiled by later steps (0)",
        len(programs) - before,
        len(programs) == before,
    )


def batches(one: dict):
    """Molecules per second that the host packs."""
    begin = time.perf_counter()
    for i in range(200):
        one["parts"].batch(i)
    rate = 200 * 32 / (time.perf_counter() - begin)
    yield "packing, molecules/s (>= 2625)", f"{rate:.0f}", rate >= 2625


def prediction(found: dict, count: int, programs: list):
    """Milliseconds per molecule, whole way from records to positions."""
    records = found["two_frame"]["parts"].sets.test[:count]

    def of(one):
        reach = dataset.reach_of(one["config"])
        key = jax.random.key(0)
        run = lambda some=records: parts.predict(
            one["parts"], one["state"].params, some, reach, one["parts"].sampler, key
        )
        run()
        return run

    runs = {name: of(one) for name, one in found.items()}
    before = len(programs)
    ours, theirs = (min(times) for times in alternately(runs, 5).values())
    each = 1e3 * ours / count
    yield "10 calls, ms per molecule (<= 10)", f"{each:.2f}", each <= 10
    yield "prediction, times tensor_product (>= 1)", f"{theirs / ours:.2f}", theirs > ours
    runs["two_frame"](list(reversed(records)))
    yield (
        "programs compiled by a second file (0)",
        len(programs) - before,
        len(programs) == before,
    )
    begin = time.perf_counter()
    for record in records:
        baselines.mmff94(record)
    field = 1e3 * (time.perf_counter() - begin) / count
    yield "MMFF94 relaxation, ms per molecule", f"{field:.2f}, {field / each:.1f} times", True
    yield from _gfn2(records[:8], each)


def _gfn2(records: list[Record], each: float):
    """The relaxation that made the data, of a few molecules."""
    try:
        from ase import Atoms
        from ase.optimize import BFGS
        from tblite.ase import TBLite
    except ImportError:
        return
    begin = time.perf_counter()
    for record in records:
        atoms = Atoms(numbers=record.numbers, positions=record.start)
        atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
        BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=500)
    field = 1e3 * (time.perf_counter() - begin) / len(records)
    ratio = field / each
    yield (
        "GFN2-xTB, ms per molecule; times ours (>= 10)",
        f"{field:.0f}; {ratio:.0f}",
        ratio >= 10,
    )


if __name__ == "__main__":
    sys.exit(main())

"""What must be settled before the first array: precision, pod, caches, logging."""

import os
import sys
import time
from collections.abc import Callable
from logging import CRITICAL, getLogger
from pathlib import Path

from common.errors import UserError

START = time.monotonic()  # `main` imports this first: the clock of the whole command.


def start(x64: bool) -> None:
    """Prepares JAX. Call before anything that may query devices, NetKet above all.

    Args:
      x64: whether 64-bit numbers exist.

    The environment decides about several processes: on a TPU pod, Slurm or
    Kubernetes JAX finds them itself; elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    os.environ["JAX_ENABLE_X64"] = "1" if x64 else "0"
    os.environ["NETKET_SHARDING"] = "0"  # Else NetKet replaces the mesh.
    # JAX calls LAPACK on the CPU, and its small factorisations wait for OpenBLAS's threads
    # a hundred times longer than they compute when a core is busy with something else.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # With several CPU devices on few cores XLA 0.10 waits for ever in a batched LU within a
    # loop (two devices, two cores, 2048 matrices each); a larger pool of threads does not,
    # but costs one device up to a third of its speed.
    several = ("xla_force_host_platform_device_count", "JAX_NUM_CPU_DEVICES")
    if several[0] in os.environ.get("XLA_FLAGS", "") or several[1] in os.environ:
        os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))
    # NetKet's operators are put together once, from some hundred terms, by a package that
    # Numba would first compile for five seconds in every process.
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        cache = str(Path.home() / ".cache" / "tenfold" / "xla")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache

    import jax
    from absl import logging

    # Orbax has 60 lines a run to say, and prints the errors that it then raises.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    sys.unraisablehook = _but_closed_loops(sys.unraisablehook)
    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_threefry_partitionable", True)
    _join_pod(jax)


def _but_closed_loops(hook: Callable) -> Callable:
    """`hook` for exceptions that nobody can catch, but for one of Orbax's threads.

    After a failed read its event loop is closed while reads that are still on their way
    want to report to it: a traceback beside the one sentence, and only sometimes.
    """

    def filtered(found):
        closed = isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(
            found.exc_value
        )
        if not closed:
            hook(found)

    return filtered


def _join_pod(jax) -> None:
    # Else SIGTERM goes to JAX alone; `stop` hears it itself and says why.
    jax.config.update("jax_enable_preemption_service", False)
    count, index = _place_in_pod()
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        # One process is what JAX calls a missing coordinator.
        if count is not None or "JAX_COORDINATOR_ADDRESS" in os.environ:
            reason = str(error).rstrip(".")
            raise UserError(f"Cannot join the other processes: {reason}.") from error


def _place_in_pod() -> tuple[int | None, int | None]:
    """JAX_NUM_PROCESSES and JAX_PROCESS_ID; JAX itself reads only the address."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    count, index = (os.environ.get(name) for name in names)
    if count is None and index is None:
        return None, None
    for name, text in zip(names, (count, index), strict=True):
        if text is None:
            raise UserError(f"{name} is missing; set {' and '.join(names)}, or neither.")
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}, but must be a whole number.")
    if not int(index) < int(count):
        raise UserError(f"JAX_PROCESS_ID is {index}, but must be below {count}.")
    return int(count), int(index)


def elapsed() -> float:
    """Seconds since the command began."""
    return time.monotonic() - START

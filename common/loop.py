"""The only training loop: resumes exactly, saves whole, never waits for the host."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common import mesh as meshes
from common import metrics, pod, runtime
from common.checkpoint import Checkpoints
from common.errors import UserError
from common.experiment import Experiment
from common.progress import Progress
from common.stop import Stop


class NotFinite(Exception):
    """A metric is not a finite number; `main` prints the sentence and exits with 1."""


class Keys(NamedTuple):
    """What a seed is split into, once."""

    init: jax.Array
    step: jax.Array
    evaluate: jax.Array


def keys(seed: int) -> Keys:
    return Keys(*jax.random.split(jax.random.key(seed), 3))


def shapes(experiment: Experiment, mesh) -> Any:
    """The state as `ShapeDtypeStruct`s with their placement; allocates nothing."""
    abstract = jax.eval_shape(lambda: experiment.init(jax.random.key(0)))
    return meshes.place(abstract, experiment.rules, mesh)


def stepper(experiment: Experiment, placed: Any):
    """The compiled step: (state, batch, key, step number) -> (state, metrics)."""

    def step(state, batch, key, number):
        state, values = experiment.step(state, batch, jax.random.fold_in(key, number))
        return state, values

    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train(
    experiment: Experiment, config: Any, folder: Path, stop: Stop, donor: Any = None
) -> None:
    """Trains one run to its last step, from its newest checkpoint if there is one.

    Args:
      experiment: what to train.
      config: this run's; uses seed, steps, the intervals, keep and mesh.
      folder: gets metrics.jsonl, timing.json and checkpoints/.
      stop: asked after every step. The host is never more than two steps ahead of the
        device, so a signal is answered within about two steps.
      donor: host function returning another run's state, for `experiment.adopt`.

    Raises:
      NotFinite: a metric is not finite; nothing after the last good step is kept.
      UserError: the checkpoint or the disk cannot be used.
      SystemExit: 143 after SIGTERM, saved.

    What is decided from files is the first process's decision, as hosts may not see the
    same files at the same time.
    """
    clock = _Clock()
    mesh = meshes.make(**config.mesh)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", config.keep) as saved:
        placed = shapes(experiment, mesh)
        start = pod.agreed(max(saved.steps(), default=0))
        if start:
            state = saved.restore(start, placed)
        else:
            state = _fresh(experiment, keys(config.seed).init, placed, donor)
        log = metrics.Log(folder / "metrics.jsonl", start)
        work = _Work(experiment, config, folder, mesh, saved, log, stop)
        try:
            if start < config.steps:
                state = work.run(state, placed, start, clock)
            if _evaluation_missing(experiment, log.rows, max(start, config.steps)):
                work.evaluate(state, max(start, config.steps))
        finally:
            log.close()


class _Work:
    """What one call of `train` holds in its hands."""

    def __init__(self, experiment, config, folder, mesh, saved, log, stop):
        self.experiment, self.config, self.folder = experiment, config, folder
        self.mesh, self.saved, self.log, self.stop = mesh, saved, log, stop
        self.keys = keys(config.seed)
        self.good = None  # The newest checkpoint made here.

    def run(self, state, placed, start, clock):
        config, experiment = self.config, self.experiment
        due = start and _evaluation_due(config, experiment, start)
        if due and _evaluation_missing(experiment, self.log.rows, start):
            self.evaluate(state, start)  # It was killed between checkpoint and row.
        step = stepper(experiment, placed)
        progress = Progress(self.folder.name, start, config.steps)
        clock.start = start
        pending = before = None
        with self.stop.after_step():
            batch = self._batch(start)
            for number in range(start, config.steps):
                state, values = step(state, batch, self.keys.step, jnp.uint32(number))
                done = number + 1
                # The device now works on this step; the host makes the next one's batch
                # and reads the step before.
                if done < config.steps:
                    batch = self._batch(done)
                # This step stays queued: no pause for the device, and no long line of
                # steps that a signal or an error would have to wait for.
                jax.block_until_ready(before)
                before = values
                if pending:
                    self._record(pending, progress)
                    pending = None
                clock.tick(done, values)
                progress.step(done)
                leave = self.stop.requested()
                last = done == config.steps
                logged = done % config.log_every == 0 or last
                if logged:
                    pending = (done, values)
                evaluate = not last and _evaluation_due(config, experiment, done)
                save = last or leave or evaluate or done % config.save_every == 0
                if save:
                    self._check(done, values)
                    if pending:
                        self._record(pending, progress)
                        pending = None
                    self._save(done, state)
                if leave:
                    progress.close()
                    self.saved.wait()
                    _say(f"Saved step {done}; the same command continues from there.")
                    raise SystemExit(leave)
                if evaluate:
                    with self.stop.at_rest(), clock.stopped(state):
                        self.evaluate(state, done)
        progress.close()
        clock.write(self.folder / "timing.json", step._cache_size())
        return state

    def evaluate(self, state, step):
        key = jax.random.fold_in(self.keys.evaluate, step)
        values = self.experiment.evaluate(state, key)
        self.log.append(metrics.to_row(step, "eval", values))
        self.log.sync()

    def _batch(self, step):
        return meshes.to_devices(self.experiment.batch(step), self.mesh)

    def _record(self, pending, progress):
        row = metrics.to_row(pending[0], "train", pending[1])
        self._refuse(row)
        self.log.append(row)
        progress.show(self.experiment.headline(row))

    def _check(self, done, values):
        self._refuse(metrics.to_row(done, "train", values))

    def _refuse(self, row):
        bad = metrics.first_bad(row)
        if bad:
            good = self.saved.steps()
            kept = f"step {good[-1]}" if good else "none was saved yet"
            raise NotFinite(
                f"{self.folder.name}: {bad} is not finite at step {row['step']}; "
                f"the last good checkpoint: {kept}."
            )

    def _save(self, done, state):
        if self.good == done:
            return
        self.log.sync()  # Rows first: a checkpoint never lacks the rows before it.
        self.saved.save(done, state)
        self.good = done


class _Clock:
    """How long things took; kept apart from the metrics, which must repeat exactly."""

    measured_command = False  # The time since the command began tells of one run only.

    def __init__(self):
        self.began = time.monotonic()
        self.start = 0  # The step that `run` begins after.
        self.first = self.from_command = self.warm = None
        self.paused = 0.0

    def tick(self, done: int, values: Any) -> None:
        if done == self.start + 1:
            jax.block_until_ready(values)
            self.warm = time.monotonic()
            self.first = self.warm - self.began
            if not _Clock.measured_command:
                self.from_command = runtime.elapsed()
                _Clock.measured_command = True
        self.done, self.values = done, values

    @contextmanager
    def stopped(self, state: Any) -> Iterator[None]:
        """Evaluations do not count among the seconds of steps."""
        jax.block_until_ready(state)
        before = time.monotonic()
        yield
        self.paused += time.monotonic() - before

    def write(self, path: Path, compilations: int) -> None:
        jax.block_until_ready(self.values)
        after = self.done - self.start - 1
        seconds = time.monotonic() - self.warm - self.paused
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        found = {
            "seconds_from_command_to_first_step": self.from_command,
            "seconds_to_first_step": self.first,
            "seconds_in_all": time.monotonic() - self.began,
            "steps_per_second": after / seconds if after else None,
            "steps_timed": after,
            "compilations": compilations,
            "peak_host_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (1 if sys.platform == "darwin" else 1024)
            / (1024 if sys.platform == "darwin" else 1),
            "peak_device_memory_mb": stats.get("peak_bytes_in_use", 0) / 2**20,
            "devices": f"{jax.device_count()} x {device.device_kind}",
            "processes": jax.process_count(),
        }
        if jax.process_index() == 0:
            metrics.write(path, json.dumps(found, indent=2) + "\n")


def _fresh(experiment, key, placed, donor):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    state = jax.jit(experiment.init, out_shardings=shardings)(key)
    if donor is None:
        return state
    if experiment.adopt is None:
        raise UserError("config.init_from is set, but this experiment cannot adopt.")
    return jax.device_put(experiment.adopt(state, donor()), shardings)


def _evaluation_due(config, experiment, done):
    every = config.eval_every
    return experiment.evaluate is not None and every > 0 and done % every == 0


def _evaluation_missing(experiment, rows, step):
    if experiment.evaluate is None:
        return False
    there = any(r["step"] == step and r["split"] == "eval" for r in rows)
    return bool(pod.agreed(not there))


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)

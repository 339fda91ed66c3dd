"""config -> runs -> report. Owns the workdir."""

import fcntl
import importlib
import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from common import aot, loop, metrics
from common import config as configs
from common import mesh as meshes
from common.checkpoint import Checkpoints, disk_error
from common.errors import Unfit, UserError, reject
from common.experiment import Experiment, Run
from common.pod import barrier, first
from common.stop import Stop


def main(config, workdir: str, do: str, given: str, overrides: tuple) -> int:
    """Runs a command that `main.py` has parsed. Returns the exit code."""
    try:
        if do:
            act(config, Path(workdir), do, given, overrides)
        else:
            run(config, Path(workdir))
        return 0
    except loop.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        return _leave(130)
    except Exception as error:
        if isinstance(error, OSError) and (reason := disk_error(error)):
            print(f"error: Cannot use {workdir}: {reason}.", file=sys.stderr)
            return _leave(2)
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        return _leave(1)


def _leave(code: int) -> int:
    """The exit code. One of several processes leaves at once: JAX would wait for the
    others, and they for it."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains every run of the config that is not finished, then reports."""
    _check_shared(config)
    stop = Stop()
    todo = variants(config)
    # Mistakes come first: after this the workdir belongs to the config.
    made = {name: make(each) for name, each in todo.items()}
    for i, (name, each) in enumerate(todo.items()):
        _check_mesh(made[name], each)
        _check_donor(made[name], each, workdir, workdir / name, list(todo)[:i])
    with _Workdir(workdir, config):
        for name, each in todo.items():
            folder = workdir / name
            first(lambda f=folder, c=each: _settle(f, c))
            loop.train(made[name], each, folder, stop, _donor(each, workdir, folder))
            jax.clear_caches()  # Else the programs of all runs stay in memory.
            if code := stop.requested():
                raise SystemExit(code)
        report(made, todo, workdir)


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
    """Run name -> its config: every variant of `config.runs` with every seed.

    Alphabetical, as `ConfigDict` is, but a run comes after the one it starts from.

    Raises:
      UserError: runs start from each other in a circle.
    """
    found = {}
    for variant, changes in config.runs.items() if config.runs else [("", {})]:
        for seed in range(config.seed, config.seed + config.n_seeds):
            each = ConfigDict(config.to_dict())
            each.runs = ConfigDict()
            each.lock()
            configs.apply(each, changes)
            each.seed = seed
            found[f"{variant}-seed{seed}" if variant else f"seed{seed}"] = each
    ordered: dict[str, ConfigDict] = {}
    while found:
        ready = next((n for n, c in found.items() if c.init_from not in found), None)
        if ready is None:
            raise UserError(f"The runs {', '.join(found)} start from each other.")
        ordered[ready] = found.pop(ready)
    return ordered


def make(config: ConfigDict) -> Experiment:
    """The experiment that a config names."""
    try:
        module = importlib.import_module(config.experiment)
    except ModuleNotFoundError as error:
        if error.name and config.experiment.startswith(error.name):
            wanted = "the name of a module with make(config)"
            raise reject("experiment", config.experiment, wanted) from error
        raise
    return module.make(config)


def report(made: dict, todo: dict, workdir: Path) -> None:
    """Writes report.md, summary.json and figures/, and says where they are."""
    first = next(iter(made.values()))
    if first.report is None:
        return
    barrier("report")
    runs = {name: load(made[name], todo[name], workdir / name, name) for name in made}
    with tempfile.TemporaryDirectory() as scratch:
        leader = jax.process_index() == 0
        figures = workdir / "figures" if leader else Path(scratch)
        with jax.set_mesh(meshes.make(**next(iter(todo.values())).mesh)):
            made_report = first.report(runs, figures)
        if leader:
            metrics.write(workdir / "report.md", made_report.text.rstrip() + "\n")
            text = json.dumps(made_report.summary, indent=2, allow_nan=False)
            metrics.write(workdir / "summary.json", text + "\n")
            print(
                f"{made_report.result} Report: {workdir / 'report.md'}, "
                f"figures: {workdir / 'figures'}.",
                flush=True,
            )
    barrier("done")


def load(experiment: Experiment, config: Any, folder: Path, name: str, given: str = "") -> Run:
    """A finished run, its state left on the disk until somebody asks for it."""

    def state(step=None):
        mesh = meshes.make(**config.mesh)
        with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", keep=0) as c:
            if not c.steps():
                raise UserError(f"There is no checkpoint in {folder}.")
            return c.restore(step or c.steps()[-1], loop.shapes(experiment, mesh))

    def saved():
        with Checkpoints(folder / "checkpoints", keep=0) as c:
            return {step: partial(state, step) for step in c.steps()}

    return Run(
        name=name,
        config=config,
        rows=metrics.read(folder / "metrics.jsonl"),
        timing=_timing(folder / "timing.json"),
        state=state,
        input=given,
        saved=saved,
    )


def _timing(path: Path) -> dict:
    """What timing.json holds; nothing depends on it, so a damaged one is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def act(config, workdir: Path, do: str, given: str, overrides: tuple) -> None:
    """`--do=NAME`: uses the finished runs of a workdir.

    The settings are those of the workdir, changed only by what stands on this command
    line. Runs whose experiment lacks the action, or that its input is not for (`Unfit`), are
    left out where others are not.

    `compile` needs no run: it compiles the step, for the TPUs that `--input` describes if it
    does, and prints what it would cost.
    """
    if jax.process_count() == 1:
        Stop()  # A signal ends the program without a traceback.
    if do == "compile":
        here = ConfigDict(config.to_dict())
        if given:  # Those devices' mesh is judged where it is made.
            here.mesh = ConfigDict(dict(data=-1, model=1))
        _check_shared(here)
        experiment = make(here)
        _check_mesh(experiment, config)
        print(aot.describe(aot.compile_step(experiment, config, topology=given)))
        return
    # The experiments' own lists first: a misspelt action matters more than a missing run.
    _check_action(do, variants(config))
    if not (workdir / "config.json").exists():
        raise UserError(f"There is no finished run in {workdir}; train one first.")
    config = configs.restore(config, configs.read(workdir / "config.json"))
    for field, text in overrides:
        configs.override(config, field, text)
    _check_shared(config)
    todo = variants(config)
    for name in todo:
        if not _begun(workdir / name):
            raise UserError(f"The run {workdir / name} has no checkpoint; train it first.")
    _check_action(do, todo)
    parts, unfit = [], {}
    for name, each in todo.items():
        experiment = make(each)
        if do not in experiment.actions:
            continue
        _check_mesh(experiment, each)
        folder = workdir / name
        _warn_of_unfinished(folder, each.steps)
        target = workdir / do / name
        first(lambda f=target: f.mkdir(parents=True, exist_ok=True))
        try:
            with jax.set_mesh(meshes.make(**each.mesh)):
                run = load(experiment, each, folder, name, given)
                text = experiment.actions[do](run, target)
        except UserError as error:
            first(lambda f=target: _drop(f))
            if not isinstance(error, Unfit):
                raise
            unfit[name] = error
            continue
        parts.append(f"# {do}: {name}\n\n{text.strip()}\n")
    if not parts:
        raise list(unfit.values())[-1]
    if jax.process_index() == 0:
        for name, error in unfit.items():
            print(f"note: {name} is left out: {error}", file=sys.stderr)
        metrics.write(workdir / f"{do}.md", "\n".join(parts))
        print("\n".join(parts))
        print(f"Written: {workdir / f'{do}.md'}, files: {workdir / do}.")


def _check_action(do: str, todo: dict[str, ConfigDict]) -> None:
    kinds = {each.experiment: each for each in todo.values()}
    known = list(dict.fromkeys(n for each in kinds.values() for n in make(each).actions))
    if do not in known:
        names = ", ".join([*known, "compile"])
        raise UserError(f"There is no action {do!r}; this experiment has {names}.")


def _drop(folder: Path) -> None:
    """Removes an empty folder, and the one around it if it is empty then."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _warn_of_unfinished(folder: Path, steps: int) -> None:
    with Checkpoints(folder / "checkpoints", keep=0) as saved:
        newest = max(saved.steps(), default=0)
    if newest < steps and jax.process_index() == 0:
        print(f"warning: {folder} is at step {newest} of {steps}.", file=sys.stderr)


class _Workdir:
    """The folder of one command: made, checked and locked against a second one."""

    def __init__(self, folder: Path, config: ConfigDict):
        self.folder, self.config = folder, config
        self._lock = None

    def __enter__(self):
        first(self._prepare)
        return self

    def __exit__(self, *error):
        if self._lock:
            self._lock.close()

    def _prepare(self):
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strangers = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
            if strangers and not (folder / "config.json").exists():
                raise UserError(
                    f"The folder {folder} holds {strangers[0]!r} but no config.json: it is "
                    "not a workdir. Choose another with --workdir."
                )
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process is at work in {folder}.") from error
        except OSError as error:  # Some network file systems have no locks.
            print(
                f"warning: {folder} cannot be locked ({error.strerror}); start no second "
                "command in it.",
                file=sys.stderr,
            )
        _settle(folder, self.config)


def _settle(folder: Path, config: ConfigDict) -> None:
    """Writes config.json, or refuses if the one there differs."""
    path = folder / "config.json"
    # A command that failed before its first checkpoint has left nothing to protect.
    begun = _begun(folder) or any(_begun(each) for each in folder.glob("*/"))
    found = configs.differences(config, configs.read(path)) if begun and path.exists() else []
    if found:
        raise UserError(
            f"The workdir {folder} belongs to other settings: {'; '.join(found)}. "
            "Choose another with --workdir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error
    text = json.dumps(configs.to_dict(config), indent=2)
    metrics.write(path, text + "\n")


def _begun(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint."""
    return any((folder / "checkpoints").glob("[0-9]*"))


def _check_donor(
    experiment: Experiment, config: ConfigDict, workdir: Path, folder: Path, ahead: list
):
    """Refuses an `init_from` that cannot work, as far as can be known without loading.

    Args:
      ahead: the runs that this command trains before; their folders need not exist yet.
    """
    if config.init_from and experiment.adopt is None:
        raise reject("init_from", config.init_from, "'', as this experiment cannot adopt")
    if config.init_from not in ahead:
        _donor(config, workdir, folder)


def _donor(config: ConfigDict, workdir: Path, run: Path):
    """The function that loads the state named in `config.init_from`, or None.

    None as well for a run that has begun: it needs its donor no more.
    """
    if not config.init_from or _begun(run):
        return None
    folder = next(
        (
            f
            for f in (workdir / config.init_from, Path(config.init_from))
            if (f / "config.json").exists() and _begun(f)
        ),
        None,
    )
    if folder is None:
        allowed = "a run's folder, with config.json and checkpoints"
        raise reject("init_from", config.init_from, allowed)
    theirs = configs.restore(config, configs.read(folder / "config.json"))
    return load(make(theirs), theirs, folder, folder.name).state


def _check_shared(config: ConfigDict) -> None:
    least = dict(steps=1, log_every=1, eval_every=0, save_every=1, keep=1, n_seeds=1)
    for field, bound in least.items():
        if config[field] < bound:
            raise reject(field, config[field], f"a whole number from {bound} up")
    if not 0 <= config.seed < 2**32:
        raise reject("seed", config.seed, "a whole number from 0 to 4294967295")
    meshes.make(**config.mesh)


def _check_mesh(experiment: Experiment, config: ConfigDict) -> None:
    split = any("model" in _axes(spec) for _, spec in experiment.rules)
    if config.mesh.model > 1 and not split:
        why = "1: this experiment splits nothing over `model`, more would repeat its work"
        raise reject("mesh.model", config.mesh.model, why)


def _axes(spec: Any) -> set[str]:
    """The mesh axes that a placement mentions."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return {axis for part in parts for axis in part}

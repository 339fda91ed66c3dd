"""The protocol: an experiment is a tuple of pure functions, as an optimizer is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

Key = jax.Array  # A typed key of `jax.random.key`.
State = Any  # All arrays, all in the checkpoint, nothing else is.
Batch = Any
Metrics = dict[str, Any]  # Arrays; `step` returns scalars, `evaluate` any shape.


class Run(NamedTuple):
    """A finished run, as `report` and the actions see it."""

    name: str
    config: Any
    rows: list[dict]  # metrics.jsonl
    timing: dict  # timing.json: how long it took, on what
    state: Callable[[], State]  # Loads the last checkpoint; sharded as in training.
    input: str = ""  # The flag --input, for actions that read a user's file or number.
    # Every kept checkpoint: its step, ascending, and what loads it, as `state` does.
    saved: Callable[[], dict[int, Callable[[], State]]] = dict


class Report(NamedTuple):
    """What a person reads, what a program reads, and the closing line."""

    text: str  # Markdown
    summary: dict  # Stable names; an error bar stands beside its number.
    result: str  # One line


class Experiment(NamedTuple):
    """Pure functions of arrays, and a few host functions around them.

    Attributes:
      init: traced; the state at step 0.
      step: traced; (state, batch, key) -> (state, scalar metrics). State is donated.
        The metrics must contain something that sees the update, such as its norm:
        the loop stops when one is not finite.
      batch: host; step -> arrays whose first axis is split over the devices, but for
        those that are on devices already. The same step gives the same batch, so no
        iterator has to be saved.
      evaluate: host, may jit inside; (state, key) -> metrics. Never changes state.
      report: host; ({run name: Run}, folder for figures) -> Report.
      adopt: host; (fresh state, donor's state) -> state, for `config.init_from`.
      rules: (regular expression on a state path, placement); the first match wins,
        no match means replicated.
      actions: `--do=NAME`: (finished run, folder) -> Markdown.
      headline: host; a row of metrics -> the figures that matter, for the progress
        line.
      cost: host; part -> FLOPs of one step, all devices together.
    """

    init: Callable[[Key], State]
    step: Callable[[State, Batch, Key], tuple[State, Metrics]]
    batch: Callable[[int], Batch] = lambda step: ()
    evaluate: Callable[[State, Key], Metrics] | None = None
    report: Callable[[dict[str, Run], Path], Report] | None = None
    adopt: Callable[[State, State], State] | None = None
    rules: tuple[tuple[str, PartitionSpec], ...] = ()
    actions: dict[str, Callable[[Run, Path], str]] = {}  # noqa: RUF012 - never mutated
    headline: Callable[[dict], str] = lambda row: ""
    cost: Callable[[], dict[str, float]] | None = None

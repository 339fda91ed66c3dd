"""What a trained bridge is measured by: metrics of held-out structures, call by call."""

from typing import Any

import jax
import numpy as np

from common.errors import reject
from geometry import dataset, metrics
from geometry.data import align
from geometry.parts import Parts, predict, sampler_of
from geometry.records import Record
from geometry.samplers import sampler

POINT = ("d_mae", "d_rmse", "c_rmsd", "rmsd", "adwt")


def judged_params(state: Any) -> Any:
    """The parameters that are judged: the average, where there is one."""
    return state.average.trees[0] if state.average else state.params


def held_out(config, parts: Parts) -> list[Record]:
    """The structures that a run is judged by.

    Raises:
      UserError: an unknown split, or an empty one.
    """
    if config.eval.split not in dataset.PARTS:
        raise reject("eval.split", config.eval.split, f"one of {', '.join(dataset.PARTS)}")
    records = getattr(parts.sets, config.eval.split)[: config.eval.limit or None]
    if not records:
        raise reject("eval.split", config.eval.split, "a split with structures")
    return records


def evaluate(config, parts: Parts, state: Any, key: jax.Array) -> dict:
    """Metrics of the held-out structures.

    Returns:
      calls; d_mae, d_rmse, c_rmsd, rmsd, adwt: by number of calls of `config.sampler`; the
      same of the unchanged start as identity_*, and their errors, d_mae_error and so on, by
      resampling structures; with `eval.samples` also best_*, mean_* and diversity of so many
      draws of the sampler "bridge".
    """
    records, reach = held_out(config, parts), dataset.reach_of(config)
    params = judged_params(state)
    found = [metrics.symmetries(record) for record in records]
    score = lambda x: scored(config, records, x, found)
    start = score([record.start for record in records])
    values = {f"identity_{name}": value for name, value in start.items()}
    rows, calls = [], []
    for n in config.eval.calls if config.kind != "direct" else (1,):
        own = sampler_of(config, n)
        total = own.steps * (config.chain.segments if config.kind == "chain" else 1)
        if total in calls:
            continue
        calls.append(total)
        rows.append(score(ends(config, predict(parts, params, records, reach, own, key))))
    values["calls"] = np.array(calls)
    values |= {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if config.eval.samples and config.kind == "bridge" and int(state.done) >= config.steps:
        values |= _several(config, parts, params, records, reach, found, key)
    return values


def ends(config, states: list[np.ndarray]) -> list[np.ndarray]:
    """The last frame of each structure."""
    return [x[-1] for x in states] if config.kind == "chain" else states


def scored(config, records, x, found) -> dict:
    """Point metrics, each with its standard error over structures."""
    e = config.eval
    whole = metrics.evaluate(records, x, e.pairs, e.labels, found)
    values = {name: whole[name] for name in POINT}
    # Jackknife over ten groups of structures: pooled metrics are ratios of sums.
    groups = [np.arange(len(records)) % 10 != g for g in range(min(10, len(records)))]
    if len(groups) > 1 and len(records) > 10:
        each = []
        for keep in groups:
            some = [k for k in range(len(records)) if keep[k]]
            pick = lambda values, some=some: [values[k] for k in some]
            each.append(
                metrics.evaluate(pick(records), pick(x), e.pairs, e.labels, pick(found))
            )
        for name in POINT:
            spread = np.var([row[name] for row in each])
            values[f"{name}_error"] = float(np.sqrt((len(groups) - 1) * spread))
    return values


def _several(config, parts, params, records, reach, found, key) -> dict:
    """Draws of the stochastic bridge: best and mean of them."""
    own = sampler(
        **dict(config.sampler) | {"name": "bridge", "steps": config.eval.sample_steps}
    )
    draws = [
        predict(parts, params, records, reach, own, jax.random.fold_in(key, 1 + k))
        for k in range(config.eval.samples)
    ]
    rows = [
        metrics.several(record, np.stack([d[i] for d in draws]), found[i])
        for i, record in enumerate(records)
    ]
    mean = lambda name: float(np.mean([row[name] for row in rows]))
    every = [
        [float(np.sqrt(align.squares(d[i][None], r.end)[0])) for d in draws]
        for i, r in enumerate(records)
    ]
    return {
        "samples_best_c_rmsd": mean("best"),
        "samples_mean_c_rmsd": mean("mean"),
        "samples_best_d_mae": mean("best_d_mae"),
        "samples_mean_d_mae": mean("mean_d_mae"),
        "samples_diversity": mean("diversity"),
        "samples_best_rmsd": float(np.mean(np.min(every, axis=1))),
        "samples_mean_rmsd": float(np.mean(every)),
    }

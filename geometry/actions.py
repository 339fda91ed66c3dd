"""What can be done with a trained bridge: `--do=evaluate`, predict, animate."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import metrics as rows
from common.errors import Unfit, UserError
from common.experiment import Run
from geometry import dataset, evaluation, figures
from geometry.data import checks, molecules, structures
from geometry.parts import Parts, predict


def evaluate(config, parts: Parts, run: Run, folder: Path) -> str:
    """Metrics of the held-out structures, with today's settings."""
    del folder
    if run.input:
        raise Unfit(f"--input={run.input} is for predict and animate.")
    found = evaluation.evaluate(config, parts, run.state(), jax.random.key(config.seed))
    lines = [
        f"| {name} | {', '.join(f'{v:.4f}' for v in np.atleast_1d(value))} |"
        for name, value in rows.to_row(0, "eval", found).items()
        if not isinstance(value, str) and name != "step"
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def predicted(config, parts: Parts, run: Run, folder: Path) -> str:
    """Ends of the structures in --input: .xyz, .extxyz, .traj, .db, .sdf, .mol, .smi or .txt.

    Writes predicted.extxyz, predicted.sdf where all are molecules with bonds, and path.extxyz
    with the states between.
    """
    records = given(config, run)
    key = jax.random.key(config.seed)
    params = evaluation.judged_params(run.state())
    reach = dataset.reach_of(config)
    found = predict(parts, params, records, reach, parts.sampler, key, path=True)
    last = [x[-1] for x in found]
    structures.write(folder / "predicted.extxyz", records, [x[None] for x in last])
    structures.write(folder / "path.extxyz", records, found)
    written = ["predicted.extxyz", "path.extxyz"]
    if all(len(r.bonds) and not r.pbc.any() for r in records):
        structures.write(folder / "predicted.sdf", records, [x[None] for x in last])
        written.append("predicted.sdf")
    lines = [
        f"| {r.id} | {len(r.numbers)} | {np.sqrt(np.square(x - r.start).sum(-1).mean()):.3f} "
        f"| {'yes' if molecules.valid(r, x) else 'no'} |"
        for r, x in list(zip(records, last, strict=True))[:50]
    ]
    more = f"\n\nand {len(records) - 50} more" if len(records) > 50 else ""
    head = "| structure | atoms | moved by, A rms | bonds kept |\n|---|---|---|---|"
    files = ", ".join(str(folder / name) for name in written)
    return f"{len(records)} structures: {files}.\n\n{head}\n" + "\n".join(lines) + more


def animated(config, parts: Parts, run: Run, folder: Path) -> str:
    """One bridge as a GIF: of the first structure in --input, or of a held-out one."""
    records = given(config, run) if run.input else evaluation.held_out(config, parts)
    record = records[0]
    params = evaluation.judged_params(run.state())
    key, reach = jax.random.key(config.seed), dataset.reach_of(config)
    path = predict(parts, params, [record], reach, parts.sampler, key, path=True)[0]
    figures.animation(record, path, folder / "bridge.gif")
    return f"![One bridge of {record.id}]({folder / 'bridge.gif'})"


def given(config, run: Run) -> list:
    """The checked structures of --input.

    Raises:
      UserError: there is no such file, or something in it cannot be.
    """
    if not run.input:
        raise UserError("--do=predict needs --input=FILE with structures or SMILES.")
    records = structures.read(run.input)
    if not records:
        raise UserError(f"There is no structure in {run.input}.")
    supported = range(1, config.network.species)
    return [checks.checked(record, supported) for record in records]


ALL: dict[str, Any] = {"evaluate": evaluate, "predict": predicted, "animate": animated}

"""Pictures of bridges: errors against calls, structures in space, one bridge moving."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from common import plots
from common.experiment import Run
from geometry.data import align, elements
from geometry.records import Record

# Jmol's, of the elements that molecules and slabs here are made of.
COLOURS = {
    1: "#bbbbbb", 6: "#444444", 7: "#3050f8", 8: "#e01010", 9: "#50c050", 13: "#bfa6a6",
    15: "#ff8000", 16: "#d0c000", 17: "#1ff01f", 28: "#50d050", 29: "#c88033", 46: "#006985",
    47: "#909090", 78: "#d0d0e0", 79: "#ffd123",
}  # fmt: skip


def last(run: Run) -> dict:
    """The last evaluation of a run."""
    found = [row for row in run.rows if row["split"] == "eval"][-1]
    return {k: np.array(v) if isinstance(v, list) else v for k, v in found.items()}


def variants(runs: dict[str, Run]) -> dict[str, list[Run]]:
    """Runs by name, all seeds together."""
    found: dict[str, list[Run]] = {}
    for run in runs.values():
        found.setdefault(run.name.rpartition("seed")[0].rstrip("-") or "main", []).append(run)
    return found


def over_seeds(runs: list[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and its error: between seeds and over structures, which they share."""
    values = np.array([np.atleast_1d(last(r)[name]) for r in runs], float)
    own = np.array([np.atleast_1d(last(r).get(f"{name}_error", 0.0)) for r in runs], float)
    between = values.std(axis=0, ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else 0.0
    own = np.broadcast_to(own, values.shape)
    return values.mean(axis=0), np.hypot(own.mean(axis=0), between)


def calls(runs: dict[str, Run], path: Path) -> list[tuple[str, str]]:
    """D-MAE and C-RMSD against the number of network calls."""
    with plots.figure(path, 2) as axes:
        for axis, name, label in zip(
            axes, ("d_mae", "c_rmsd"), ("D-MAE, A", "C-RMSD of heavy atoms, A"), strict=True
        ):
            for i, (variant, each) in enumerate(variants(runs).items()):
                mean, error = over_seeds(each, name)
                n = np.atleast_1d(last(each[0])["calls"])
                axis.errorbar(
                    n, mean, error, fmt="o-", ms=4, lw=1, color=plots.colour(i), label=variant
                )
            start, _ = over_seeds(next(iter(variants(runs).values())), f"identity_{name}")
            axis.axhline(start[0], color="k", ls=":", label="unchanged start")
            axis.set(xscale="log", xlabel="network calls", ylabel=label)
            axis.legend(fontsize=7)
    said = "Error of held-out structures against network calls; bars: one standard error."
    return [(said, path.name)]


def overlay(
    records: list[Record], predicted: list[np.ndarray], rmsd: list[float], path: Path
) -> list[tuple[str, str]]:
    """Start (grey), prediction (colour) and truth (outline) of some structures."""
    with plots.panels(path, len(records), subplot_kw=dict(projection="3d")) as axes:
        for axis, record, x, error in zip(axes, records, predicted, rmsd, strict=True):
            turn = flat(record.end)
            end = (record.end - record.end.mean(0)) @ turn
            fit = lambda y, record=record, turn=turn: (
                (
                    (align.kabsch(y, record.end) if align.centred(record) else y)
                    - record.end.mean(0)
                )
                @ turn
            )
            sticks(axis, record, fit(record.start), "#bbbbbb", 1.0, small=True)
            sticks(axis, record, end, "#2e8b57", 3.0, small=True)
            sticks(axis, record, fit(x), None, 1.6)
            axis.set_title(f"{record.smiles or record.id}: {error:.3f} A", fontsize=8)
    said = (
        "Start (grey), prediction (atoms in colour) and truth (green), aligned on the truth, "
        "with the prediction's C-RMSD."
    )
    return [(said, path.name)]


def animation(record: Record, path: Float[np.ndarray, "points atoms 3"], file: Path) -> None:
    """One bridge, state by state, with the truth behind it where it is known."""
    goal = record.end if record.end is not None else path[-1]
    turn, centre = flat(goal), goal.mean(0)
    span = float(np.abs(path - centre).max())
    with plots.animation(file, subplot_kw=dict(projection="3d")) as (axis, grab):
        for k, x in [*enumerate(path), *[(len(path) - 1, path[-1])] * 6]:
            axis.clear()
            if record.end is not None:
                sticks(axis, record, (record.end - centre) @ turn, "#9fd8b5", 3.0, small=True)
            sticks(axis, record, (x - centre) @ turn, None, 1.6)
            axis.set(xlim=(-span, span), ylim=(-span, span), zlim=(-span, span))
            axis.set_title(f"{record.smiles or record.id}, state {k}", fontsize=9)
            grab()


def flat(x: Float[np.ndarray, "atoms 3"]) -> Float[np.ndarray, "3 3"]:
    """The turn that lays a structure's two widest directions into the picture."""
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    axes = np.vstack([axes, np.eye(3)])[:3] if len(axes) < 3 else axes
    return axes.T[:, [0, 2, 1]]


def sticks(axis, record: Record, x, colour: str | None, width: float, small=False) -> None:
    """Bonds as lines and atoms as dots; `colour` None: each element its own."""
    radii = elements.RADII[record.numbers]
    pairs = record.bonds[:, :2]
    if not len(pairs):
        d = np.linalg.norm(x[:, None] - x[None], axis=-1)
        near = np.triu(d < elements.BONDED * (radii[:, None] + radii[None]), 1)
        pairs = np.argwhere(near)
    for i, j in pairs:
        axis.plot(*x[[i, j]].T, color=colour or "#666666", lw=width, zorder=1)
    if not small:
        shown = [COLOURS.get(int(z), "#b060c0") for z in record.numbers]
        axis.scatter(*x.T, c=shown, s=60 * radii, depthshade=False, zorder=2)
    axis.set_axis_off()
    axis.set_box_aspect((1, 1, 1))
    low, high = x.min(), x.max()
    axis.set(xlim=(low, high), ylim=(low, high), zlim=(low, high))
    axis.view_init(elev=12, azim=-80)

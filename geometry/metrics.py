"""Metrics of predicted structures, section 9, exactly as the public benchmarks count.

With d(X)_ij = |X_i - X_j|, over molecules m of n_m atoms, hydrogens included, all n^2 entries,
the zero diagonal too, pooled over the set:

    D-MAE  = sum |d(P) - d(R)| / sum n_m^2
    D-RMSE = sqrt( sum (d(P) - d(R))^2 / sum n_m^2 )
    C-RMSD = mean over m of the least rms distance of heavy atoms over proper rigid motions
             and symmetries of the molecule
    ADwT   = 100 mean over thresholds 0.010, 0.011, ..., 0.499 of the share of structures whose
             mean distance of free atoms, minimum image, is below (strictly)

All in angstrom, on the host, in float64.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from common.errors import reject
from geometry.data import align, symmetry
from geometry.records import Record

THRESHOLDS = np.arange(0.01, 0.5, 0.001)


def distances(x: Float[np.ndarray, "*b atoms 3"]) -> Float[np.ndarray, "*b atoms atoms"]:
    """d(X)."""
    return np.linalg.norm(x[..., :, None, :] - x[..., None, :, :], axis=-1)


def distance_errors(
    predicted: Sequence[np.ndarray], reference: Sequence[np.ndarray], pairs: str = "n2"
) -> tuple[float, float]:
    """D-MAE and D-RMSE of a set.

    Args:
      predicted, reference: of each structure [atoms, 3].
      pairs: what the sums are divided by: "n2", or "offdiag" for n (n - 1).

    Raises:
      UserError: other pairs, or no structures.
    """
    if pairs not in ("n2", "offdiag"):
        raise reject("metrics.pairs", pairs, "n2 or offdiag")
    if not len(reference):
        raise reject("metrics", "an empty set", "taken of at least one structure")
    absolute = square = count = 0.0
    for p, r in zip(predicted, reference, strict=True):
        error = distances(np.asarray(p, float)) - distances(np.asarray(r, float))
        absolute += float(np.abs(error).sum())
        square += float(np.square(error).sum())
        count += len(r) * (len(r) - (pairs == "offdiag"))
    return absolute / max(count, 1), float(np.sqrt(square / max(count, 1)))


def heavy(numbers: Int[np.ndarray, " atoms"]) -> Bool[np.ndarray, " atoms"]:
    """Atoms that C-RMSD sees: all but hydrogens, and all of a structure of hydrogens."""
    chosen = numbers != 1
    return chosen if chosen.any() else np.ones_like(chosen)


def symmetries(record: Record) -> Int[np.ndarray, "found heavy"]:
    """Symmetries of the heavy atoms among themselves; once per molecule.

    As RDKit's GetBestRMS: hydrogens are off, and terminal O (or N) on one atom, one by a single
    and one by a double bond, are alike.
    """
    chosen = np.flatnonzero(heavy(record.numbers))
    place = np.full(len(record.numbers), -1)
    place[chosen] = np.arange(len(chosen))
    bonds = np.array(record.bonds)
    bonds[:, :2] = place[bonds[:, :2]]
    bonds = bonds[(bonds[:, :2] >= 0).all(axis=1)]
    numbers = record.numbers[chosen]
    return symmetry.core(numbers, _alike(numbers, bonds))


def _alike(numbers: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Bonds with those of conjugated terminal groups in a class of their own, 5."""
    near = symmetry.neighbours(len(numbers), bonds)
    ends = {a for a in range(len(near)) if len(near[a]) == 1 and numbers[a] in (7, 8)}
    bonds = bonds.copy()
    for row in bonds:
        for end, middle in ((row[0], row[1]), (row[1], row[0])):
            kinds = {near[middle][int(b)] for b in near[middle] if b in ends}
            if int(end) in ends and {1, 2} <= kinds and row[2] in (1, 2):
                row[2] = 5
                break
    return bonds


def c_rmsd(
    record: Record,
    predicted: Float[np.ndarray, "atoms 3"],
    reference: Float[np.ndarray, "atoms 3"] | None = None,
    found: Int[np.ndarray, "found heavy"] | None = None,
) -> float:
    """C-RMSD of one molecule.

    Args:
      record: whose end is the reference where no other is given.
      found: `symmetries(record)`, where they are known; `symmetry.core` of no bonds, the
        identity, for Kabsch only.
    """
    reference = record.end if reference is None else reference
    chosen = heavy(record.numbers)
    p, r = np.asarray(predicted, float)[chosen], np.asarray(reference, float)[chosen]
    found = symmetries(record) if found is None else found
    return float(np.sqrt(align.squares(p[found], r).min()))


def adwt(deltas: Float[np.ndarray, " structures"]) -> float:
    """ADwT in percent of mean distances, see `mean_distance`."""
    return float(100 * np.mean(np.asarray(deltas)[:, None] < THRESHOLDS))


def mean_distance(record: Record, predicted: Float[np.ndarray, "atoms 3"]) -> float:
    """Mean over free atoms of the distance to the record's end, minimum image."""
    delta = align.mic(np.asarray(predicted, float) - record.end, record.cell, record.pbc)
    return float(np.linalg.norm(delta[record.free], axis=-1).mean())


def evaluate(
    records: Sequence[Record],
    predicted: Sequence[np.ndarray],
    pairs: str = "n2",
    labels: str = "given",
    found: Sequence[np.ndarray] | None = None,
) -> dict[str, float]:
    """All point metrics of a set whose records have ends.

    Args:
      records: with the reference as `end`.
      predicted: of each record [atoms, 3].
      pairs: see `distance_errors`.
      labels: "given", or "matched" to relabel the reference first by the automorphism that
        brings it nearest to the prediction.
      found: `symmetries` of each record, where they are known.

    Returns:
      d_mae, d_rmse, c_rmsd (symmetries), c_rmsd_kabsch (rotation only), rmsd (all atoms,
      rotation only; anchored structures are not turned), and adwt.
    """
    if labels not in ("given", "matched"):
        raise reject("metrics.labels", labels, "given or matched")
    predicted = [np.asarray(p, float) for p in predicted]
    if labels == "matched":
        records = [_matched(r, p) for r, p in zip(records, predicted, strict=True)]
    mae, rmse = distance_errors(predicted, [r.end for r in records], pairs)
    rows = []
    for k, (record, p) in enumerate(zip(records, predicted, strict=True)):
        chosen = heavy(record.numbers)
        if align.centred(record):
            known = symmetries(record) if found is None else found[k]
            best = c_rmsd(record, p, found=known)
            plain = float(np.sqrt(align.squares(p[chosen][None], record.end[chosen])[0]))
            every = float(np.sqrt(align.squares(p[None], record.end)[0]))
        else:
            delta = align.mic(p - record.end, record.cell, record.pbc)
            square = np.sum(delta[record.free] ** 2, axis=-1)
            best = plain = every = float(np.sqrt(square.mean()))
        rows.append((best, plain, every, mean_distance(record, p)))
    best, plain, every, deltas = np.array(rows).T
    return dict(
        d_mae=mae,
        d_rmse=rmse,
        c_rmsd=float(best.mean()),
        c_rmsd_kabsch=float(plain.mean()),
        rmsd=float(every.mean()),
        adwt=adwt(deltas),
    )


def several(
    record: Record,
    samples: Float[np.ndarray, "k atoms 3"],
    found: Int[np.ndarray, "found heavy"] | None = None,
) -> dict[str, float]:
    """Metrics of k samples of one molecule.

    Returns:
      best and mean: C-RMSD to the record's end, of the best sample and on the average;
      best_d_mae, mean_d_mae; diversity: mean C-RMSD between two samples (0 for one).
    """
    found = symmetries(record) if found is None else found
    near = [c_rmsd(record, s, found=found) for s in samples]
    mae = [distance_errors([s], [record.end])[0] for s in samples]
    between = [
        c_rmsd(record, a, b, found) for k, a in enumerate(samples) for b in samples[k + 1 :]
    ]
    return dict(
        best=min(near),
        mean=float(np.mean(near)),
        best_d_mae=min(mae),
        mean_d_mae=float(np.mean(mae)),
        diversity=float(np.mean(between)) if between else 0.0,
    )


def _matched(record: Record, predicted: np.ndarray) -> Record:
    if not align.centred(record) or not len(record.bonds):
        return record
    p = align.relabelling(record.numbers, record.bonds, record.end, predicted)
    return record._replace(end=record.end[p])

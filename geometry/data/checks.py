"""What a structure must be before anything is learned from it, section 14.

Errors are a `UserError`, one sentence with the id of the record. Warnings go through the
`warnings` module, what concerns a set once for all of it.
"""

import warnings
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int

from common.errors import UserError
from geometry.data import align, elements, symmetry
from geometry.records import Record

TOUCHING = 0.1  # Angstrom between two atoms that stand on one place.
PATH_ENDS = 0.05  # Angstrom rms between the last frame and the target.
NOBLE = (2, 10, 18, 36, 54, 86)


def joined(
    start: Record, end_numbers: Int[np.ndarray, " atoms"], end: Float[np.ndarray, "atoms 3"]
) -> Record:
    """The pair of a start and the target read from elsewhere.

    Raises:
      UserError: they are not the same atoms in the same order.
    """
    first, second = elements.formula(start.numbers), elements.formula(end_numbers)
    if first != second:
        raise UserError(
            f"The two ends of {start.id} differ: {first} at the start, {second} at the target."
        )
    if not np.array_equal(start.numbers, end_numbers):
        k = int(np.flatnonzero(start.numbers != end_numbers)[0])
        raise UserError(
            f"The two ends of {start.id}, both {first}, list their atoms in another order: "
            f"atom {k} is {elements.symbol(int(start.numbers[k]))} at the start and "
            f"{elements.symbol(int(end_numbers[k]))} at the target."
        )
    return start._replace(end=np.asarray(end, np.float64))


def checked(record: Record, supported: Collection[int] = range(1, 119)) -> Record:
    """The record in its frame (`align.aligned`), or an error that says what is wrong.

    Args:
      supported: atomic numbers that the network knows.

    Returns:
      The record, aligned. A path of fewer than two distinct frames is dropped, repeated
      frames are, with a warning.

    Raises:
      UserError: see the module.
    """
    _atoms(record, supported)
    if record.pbc.any():
        _cell(record)
    for name, x in _states(record):
        if x.shape != (len(record.numbers), 3):
            raise UserError(
                f"Record {record.id} has {len(record.numbers)} atoms, but its {name} has "
                f"positions of shape {x.shape}."
            )
        if not np.isfinite(x).all():
            raise UserError(f"Record {record.id} has a position that is NaN or infinite.")
    _units(record)
    for name, x in _states(record):
        _apart(record, name, x)
    _pieces(record)
    record = align.aligned(_distinct(record))
    if record.end is not None:
        _displacements(record)
    if record.frames is not None and record.end is not None:
        _path(record)
    return record


def checked_set(
    records: Sequence[Record],
    supported: Collection[int] = range(1, 119),
    labels: str = "given",
    mirror: str = "off",
) -> tuple[list[Record], dict[str, str]]:
    """All records, aligned, but for those whose target is another stereoisomer.

    Args:
      supported: see `checked`.
      labels, mirror: see `align.aligned`.

    Returns:
      The records that stay, and of those that do not: id -> reason.

    Raises:
      UserError: of the first record with an error.
    """
    kept, dropped, turned, said = [], {}, 0, []
    for record in records:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            made = checked(record, supported)
        said += [str(warning.message) for warning in heard]
        if made.end is not None:
            turned += _unrelated(record, made)
            reason = other_hand(made)
            if reason:
                dropped[record.id] = reason
                continue
        kept.append(align.aligned(made, labels, mirror))
    for message in said[:3]:
        warnings.warn(message, stacklevel=2)
    if len(said) > 3:
        warnings.warn(f"{len(said) - 3} more warnings of this kind.", stacklevel=2)
    if turned:
        warnings.warn(
            f"{turned} of {len(records)} targets stood in a frame unrelated to their start's "
            "and were turned onto it.",
            stacklevel=2,
        )
    if dropped:
        name = next(iter(dropped))
        warnings.warn(
            f"{len(dropped)} of {len(records)} records were dropped; {name}: {dropped[name]}",
            stacklevel=2,
        )
    return kept, dropped


def other_hand(record: Record) -> str:
    """Why the target is not the start's stereoisomer; "" where it is, or bonds are unknown."""
    if record.end is None or not len(record.bonds):
        return ""
    found = symmetry.stereo(record.numbers, record.bonds, record.start, record.end)
    return {
        "same": "",
        "mirror": "the target is the mirror image of the start.",
        "other": "the target is another stereoisomer than the start.",
    }[found]


def heights(record: Record) -> Float[np.ndarray, " periodic"]:
    """Distances of opposite cell faces along periodic directions, angstrom."""
    cell = align.full_cell(record.cell, record.pbc)
    return (1 / np.linalg.norm(np.linalg.inv(cell), axis=0))[record.pbc]


def _states(record: Record):
    yield "start", record.start
    if record.end is not None:
        yield "target", record.end
    for k, frame in enumerate(() if record.frames is None else record.frames):
        yield f"frame {k}", frame


def _atoms(record: Record, supported: Collection[int]) -> None:
    n = len(record.numbers)
    if n == 0:
        raise UserError(f"Record {record.id} has no atoms.")
    if not record.free.any():
        raise UserError(f"All atoms of record {record.id} are fixed: nothing can move.")
    if n == 1 and not record.pbc.any():
        raise UserError(
            f"Record {record.id} is a single atom, which is allowed only in a periodic cell."
        )
    unknown = sorted({int(z) for z in record.numbers} - {int(z) for z in supported})
    if unknown:
        raise UserError(
            f"Record {record.id} contains {elements.names(unknown)}, but supported are "
            f"{elements.names(supported)}."
        )


def _cell(record: Record) -> None:
    rows = record.cell[record.pbc]
    if not np.isfinite(rows).all() or np.linalg.matrix_rank(rows, tol=1e-3) < len(rows):
        raise UserError(
            f"Record {record.id} is periodic along {int(record.pbc.sum())} directions, but its "
            f"cell {np.round(record.cell, 3).tolist()} is singular."
        )


def _apart(record: Record, name: str, x: np.ndarray) -> None:
    if len(x) < 2:
        return
    delta = align.mic(x[:, None] - x[None], record.cell, record.pbc)
    distance = np.linalg.norm(delta, axis=-1) + 1e9 * np.eye(len(x))
    if distance.min() < TOUCHING:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        raise UserError(
            f"Atoms {i} and {j} of record {record.id} stand {distance.min():.3f} angstrom "
            f"apart at the {name}; atoms must be at least {TOUCHING} angstrom apart."
        )


def _units(record: Record) -> None:
    """By the typical distance of nearest atoms over the sum of their covalent radii: about 1
    in angstrom, 0.1 if these were nanometres, 1.9 if they were bohr."""
    if len(record.numbers) < 3 or np.isin(record.numbers, NOBLE).all():
        return
    delta = align.mic(record.start[:, None] - record.start[None], record.cell, record.pbc)
    distance = np.linalg.norm(delta, axis=-1) + 1e9 * np.eye(len(delta))
    near = distance.argmin(axis=1)
    radii = elements.RADII[record.numbers]
    ratio = float(np.median(distance.min(axis=1) / (radii + radii[near])))
    if 0.05 < ratio < 0.4:
        raise UserError(
            f"Nearest atoms of record {record.id} are {ratio:.2f} times the sum of their "
            "covalent radii apart: the positions look like nanometres, but must be angstrom."
        )
    if 1.6 < ratio < 2.2:
        warnings.warn(
            f"Nearest atoms of record {record.id} are {ratio:.2f} times the sum of their "
            "covalent radii apart: are the positions in bohr? They must be angstrom.",
            stacklevel=3,
        )


def _pieces(record: Record) -> None:
    if not len(record.bonds) or record.pbc.any():
        return
    root = list(range(len(record.numbers)))

    def find(a):
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        return a

    for a, b, _ in record.bonds.tolist():
        root[find(a)] = find(b)
    count = len({find(a) for a in root})
    if count > 1:
        warnings.warn(
            f"Record {record.id} is {count} molecules that no bond joins; all their atoms "
            "see each other.",
            stacklevel=3,
        )


def _distinct(record: Record) -> Record:
    frames = record.frames
    if frames is None:
        return record
    moved = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2), initial=0) > 1e-6
    keep = np.concatenate([[True], moved])[: len(frames)]
    if keep.all() and len(frames) > 1:
        return record
    distinct = int(keep.sum())
    what = f"{len(frames)} frames, of which {distinct} differ from the one before"
    if distinct < 2:
        warnings.warn(
            f"The path of record {record.id} has {what}: it is left out.", stacklevel=3
        )
        return record._replace(frames=None)
    warnings.warn(
        f"The path of record {record.id} has {what}: repeated ones are left out.", stacklevel=3
    )
    return record._replace(frames=frames[keep])


def _displacements(record: Record) -> None:
    if not record.pbc.any():
        return
    length = np.linalg.norm(record.end - record.start, axis=-1)[record.free]
    most = float(heights(record).min()) / 2
    if length.max() > most:
        raise UserError(
            f"An atom of record {record.id} moves {length.max():.2f} angstrom, more than half "
            f"the shortest cell height, {most:.2f}: its way around the cell is not known."
        )
    fixed = np.linalg.norm(record.end - record.start, axis=-1)[~record.free]
    if fixed.max(initial=0) > 0.01:
        warnings.warn(
            f"A fixed atom of record {record.id} moves {fixed.max():.3f} angstrom; its place "
            "at the start is kept.",
            stacklevel=3,
        )


def _path(record: Record) -> None:
    last, end = record.frames[-1], record.end
    if align.centred(record):
        apart = float(align.rmsd(last, end))
    else:
        delta = align.mic(last - end, record.cell, record.pbc)
        apart = float(np.sqrt(np.mean(np.sum(delta**2, axis=-1))))
    if apart > PATH_ENDS:
        raise UserError(
            f"The last frame of the path of record {record.id} is {apart:.3f} angstrom rms "
            f"from its target; at most {PATH_ENDS} is allowed."
        )


def _unrelated(before: Record, after: Record) -> bool:
    """Did turning help much?"""
    if not align.centred(before):
        return False
    apart = (before.end - before.end.mean(axis=0)) - (before.start - before.start.mean(axis=0))
    return bool(np.sum(apart**2) > 4 * np.sum((after.end - after.start) ** 2) + 1e-6)

"""Structures from and to a user's files, by ending.

    .xyz .extxyz    ASE: Lattice, pbc, move_mask; frames of one info["pair_id"] are one record
    .traj           ASE: the frames of one relaxation, one record
    .db             ASE: a row per structure; rows of one key `pair_id` are one record
    .sdf .mol       RDKit: bonds and hydrogens as they stand there
    .smi .txt       SMILES, one a line: conformers are made
    .npz            a packed set, see `packed`

Of several frames the first is the start, the last the target, and three or more are a path.
Positions stay unwrapped; a structure that is written alone is wrapped into its cell.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from common.errors import UserError
from geometry.data import checks, elements
from geometry.records import Record

ENDINGS = (".xyz", ".extxyz", ".traj", ".db", ".sdf", ".mol", ".smi", ".txt", ".npz")
PERCEIVED = 200  # Atoms of the largest molecule whose bonds are looked for.


def read(path: str | Path, seed: int | None = None, perceive: bool = True) -> list[Record]:
    """The records of a file.

    Args:
      path: see the module for what its ending says.
      seed: of conformers of SMILES.
      perceive: find bonds of molecules in files that have none.

    Raises:
      UserError: no such file, another ending, something that cannot be read, or frames of one
        record with other atoms.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"{path} ends in {ending!r}, but must end in {', '.join(ENDINGS)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if ending == ".npz":
        from geometry.data import packed

        return packed.read(path, "x_final")[0]
    if ending in (".sdf", ".mol", ".smi", ".txt"):
        from geometry.data import molecules

        if ending in (".sdf", ".mol"):
            return molecules.read_sdf(path)
        return molecules.read_smiles(path, molecules.SEED if seed is None else seed)
    records = [_record(frames, name) for name, frames in _frames(path, ending).items()]
    return [with_bonds(r) for r in records] if perceive else records


def write(
    path: str | Path,
    records: Sequence[Record],
    states: Sequence[np.ndarray],
) -> None:
    """Writes states of records, several of one record as frames of one `pair_id`.

    Args:
      path: .xyz, .extxyz, .traj (of one record), .db or .sdf (one state each).
      states: of each record [frames, atoms, 3].

    Raises:
      UserError: another ending, or states that it cannot hold.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".xyz", ".extxyz", ".traj", ".db", ".sdf"):
        raise UserError(
            f"{path} ends in {ending!r}, but structures are written to .xyz, .extxyz, .traj, "
            ".db or .sdf."
        )
    if ending == ".sdf":
        from geometry.data import molecules

        if any(len(s) != 1 for s in states):
            raise UserError(f"{path} takes one state of a molecule, not a path; use .extxyz.")
        return molecules.write_sdf(path, records, [s[0] for s in states])
    if ending == ".traj" and len(records) != 1:
        raise UserError(f"{path} takes one record, not {len(records)}; use .extxyz.")
    images = [
        to_atoms(record, x, wrap=len(of) == 1, frame=k)
        for record, of in zip(records, states, strict=True)
        for k, x in enumerate(of)
    ]
    import ase.io

    path.unlink(missing_ok=True)  # A database would be added to.
    if ending == ".db":
        from ase.db import connect

        with connect(str(path)) as db:
            for image in images:
                db.write(image, key_value_pairs=dict(image.info))
    elif ending == ".traj":
        ase.io.write(str(path), images, format="traj")
    else:
        fixed = any(image.constraints for image in images)
        columns = ["symbols", "positions"] + ["move_mask"] * fixed
        ase.io.write(str(path), images, format="extxyz", columns=columns)


def to_atoms(
    record: Record, positions: Float[np.ndarray, "atoms 3"], wrap: bool = False, frame: int = 0
) -> Any:
    """ASE's `Atoms`, fixed atoms as a constraint, the id as info["pair_id"]."""
    from ase import Atoms
    from ase.constraints import FixAtoms

    atoms = Atoms(
        numbers=record.numbers,
        positions=np.asarray(positions, float),
        cell=record.cell,
        pbc=record.pbc,
    )
    if not record.free.all():
        atoms.set_constraint(FixAtoms(indices=np.flatnonzero(~record.free)))
    if wrap and record.pbc.any():
        atoms.wrap()
    # Words that look like numbers would come back as numbers.
    atoms.info["pair_id"] = record.id
    atoms.info["frame"] = frame
    if record.smiles:
        atoms.info["smiles"] = record.smiles
    return atoms


def from_atoms(atoms: Any, name: str) -> Record:
    """A record whose start is an ASE `Atoms`; its group is the SMILES or the composition."""
    numbers = np.asarray(atoms.numbers, np.int32)
    smiles = str(atoms.info.get("smiles", ""))
    return Record(
        id=name,
        numbers=numbers,
        start=np.array(atoms.get_positions(), np.float64),
        end=None,
        frames=None,
        bonds=np.zeros((0, 3), np.int32),
        cell=np.array(atoms.cell.array, np.float64),
        pbc=np.array(atoms.pbc, bool),
        free=free(atoms),
        smiles=smiles,
        group=smiles or elements.formula(numbers),
    )


def free(atoms: Any) -> Bool[np.ndarray, " atoms"]:
    """Atoms that no constraint holds in all directions.

    Raises:
      UserError: a constraint that holds an atom in some directions only.
    """
    from ase.constraints import FixAtoms, FixCartesian

    moving = np.ones(len(atoms), bool)
    for constraint in atoms.constraints:
        whole = isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and np.all(constraint.mask)
        )
        if not whole:
            raise UserError(
                f"A structure has the constraint {type(constraint).__name__}, but atoms can be "
                "fixed in all directions only (FixAtoms)."
            )
        moving[constraint.index] = False
    return moving


def with_bonds(record: Record) -> Record:
    """The record with bonds found from distances, where it is a molecule that lacks them."""
    from geometry.data import molecules

    if len(record.bonds) or record.pbc.any() or not 1 < len(record.numbers) <= PERCEIVED:
        return record
    x = record.start if record.end is None else record.end
    if not np.isfinite(x).all() or not elements.bonded(record.numbers, x).any():
        return record
    try:
        found = record._replace(bonds=molecules.perceived_bonds(record, x))
        named = molecules.from_rdkit(molecules.to_rdkit(found, x), record.id)
    except UserError as error:
        warnings.warn(f"{error} It is used without bonds.", stacklevel=2)
        return record
    smiles = record.smiles or named.smiles
    return found._replace(smiles=smiles, group=record.smiles or named.group)


def _frames(path: Path, ending: str) -> dict[str, list]:
    """Name of a record -> its frames, in the order of the file."""
    import ase.io

    try:
        if ending == ".db":
            from ase.db import connect

            with connect(str(path)) as db:
                images = [row.toatoms() for row in db.select()]
                keys = [row.key_value_pairs for row in db.select()]
            for image, extra in zip(images, keys, strict=True):
                image.info.update(extra)
        else:
            kind = "traj" if ending == ".traj" else "extxyz"
            images = list(ase.io.iread(str(path), index=":", format=kind))
    except Exception as error:  # ASE raises whatever the parser met.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as {ending}: {reason}") from error
    if not images:
        raise UserError(f"The file {path} holds no structure.")
    if ending == ".traj":
        return {str(images[0].info.get("pair_id", path.stem)): images}
    found: dict[str, list] = {}
    for k, image in enumerate(images):
        found.setdefault(str(image.info.get("pair_id", f"{path.stem}-{k}")), []).append(image)
    return found


def _record(frames: list, name: str) -> Record:
    record = from_atoms(frames[0], name)
    for image in frames[1:]:
        record = checks.joined(
            record, np.asarray(image.numbers, np.int32), image.get_positions()
        )
        if not np.allclose(image.cell.array, record.cell, atol=1e-6):
            raise UserError(
                f"The cell of record {name} changes along its path; a fixed one is needed."
            )
    if len(frames) > 2:
        path = np.stack([np.array(image.get_positions(), np.float64) for image in frames])
        record = record._replace(frames=path)
    return record

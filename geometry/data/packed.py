"""Sets of pairs as one `.npz`: every array once, structures one after the other.

    n_atoms, n_bonds [m]                        z [atoms]
    x_init, x_final, ... [atoms, 3]             traj [atoms, frames, 3]
    bond_index [bonds, 2], bond_type [bonds]    1, 2, 3, 4 aromatic; indices within a molecule
    smiles, source_id, split [m]                0 train, 1 valid, 2 test
    id, group [m]; cell [m, 3, 3], pbc [m, 3], free [atoms]     where they say something

Reading an array of an open NpzFile decompresses all of it each time, so all are read first.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from common.errors import UserError, reject
from geometry.data import splits
from geometry.records import Record


def read(
    path: str | Path, target: str = "x_final"
) -> tuple[list[Record], Int[np.ndarray, " records"]]:
    """All records of a file, and the split of each.

    Args:
      path: of the `.npz`.
      target: name of the array that holds R^T; "" for none.

    Raises:
      UserError: no such file, or one that lacks arrays or has them of other lengths.
    """
    try:
        with np.load(path) as file:
            data = dict(file)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The file {path} is no packed set: {error}.") from error
    for name in ("n_atoms", "z", "x_init"):
        if name not in data:
            raise UserError(f"The file {path} lacks the array {name!r} of a packed set.")
    if target and target not in data:
        targets = ", ".join(sorted(n for n in data if n.startswith("x_") and n != "x_init"))
        raise reject("data.target", target, f"an array of {path}: {targets}")
    count, atoms = len(data["n_atoms"]), int(data["n_atoms"].sum())
    for name in ("z", "x_init", "traj", "free", target):
        if name in data and len(data[name]) != atoms:
            raise UserError(
                f"In {path} the array {name!r} has {len(data[name])} rows, but n_atoms "
                f"adds up to {atoms}."
            )
    at = _offsets(data["n_atoms"])
    bonds_at = _offsets(data.get("n_bonds", np.zeros(count, int)))
    bonds = np.zeros((0, 3), np.int32)
    if "bond_index" in data:
        kinds = data["bond_type"][:, None]
        bonds = np.concatenate([data["bond_index"], kinds], axis=1).astype(np.int32)
    if bonds_at[-1] != len(bonds):
        raise UserError(
            f"In {path} there are {len(bonds)} bonds, but n_bonds adds up to {bonds_at[-1]}."
        )
    texts = {
        name: data[name].tolist() if name in data else [""] * count
        for name in ("id", "smiles", "group")
    }
    if "id" not in data:
        texts["id"] = [str(i) for i in data.get("source_id", np.arange(count)).tolist()]
    if "group" not in data:
        texts["group"] = texts["smiles"]
    x = {name: data[name].astype(np.float64) for name in ("x_init", target) if name in data}
    traj = data.get("traj")
    frames = None if traj is None else np.swapaxes(traj, 0, 1).astype(np.float64)
    cell = data.get("cell", np.zeros((count, 3, 3))).astype(np.float64)
    pbc = data.get("pbc", np.zeros((count, 3))).astype(bool)
    free = data.get("free", np.ones(atoms)).astype(bool)
    numbers = data["z"].astype(np.int32)
    records = []
    for m in range(count):
        a = slice(at[m], at[m + 1])
        path_of = None if frames is None else frames[:, a]
        if path_of is not None and not np.isfinite(path_of).all():
            path_of = None  # Written without a path, among others with one.
        end = x[target][a] if target else None
        if end is not None and np.isnan(end).all():
            end = None
        records.append(
            Record(
                id=texts["id"][m],
                numbers=numbers[a],
                start=x["x_init"][a],
                end=end,
                frames=path_of,
                bonds=bonds[bonds_at[m] : bonds_at[m + 1]],
                cell=cell[m],
                pbc=pbc[m],
                free=free[a],
                smiles=texts["smiles"][m],
                group=texts["group"][m],
            )
        )
    if "split" in data:
        return records, data["split"].astype(np.int64)
    return records, splits.split(records)


def write(
    path: str | Path,
    records: Sequence[Record],
    split: Int[np.ndarray, " records"] | None = None,
) -> None:
    """Writes a set, float32, whole or not at all; the same records give the same bytes.

    Args:
      split: by default that of the hash rule.

    Raises:
      UserError: no records, or paths of several lengths.
    """
    if not records:
        raise UserError(f"There is no record to write to {path}.")
    lengths = {len(r.frames) for r in records if r.frames is not None}
    if len(lengths) > 1:
        raise UserError(
            f"The paths for {path} have {', '.join(map(str, sorted(lengths)))} frames; a "
            "packed set needs one number: resample them first."
        )
    records = list(records)
    nothing = lambda r: np.full_like(r.start, np.nan)
    per_atom = {
        "z": [r.numbers for r in records],
        "x_init": [r.start for r in records],
        "x_final": [nothing(r) if r.end is None else r.end for r in records],
    }
    if lengths:
        (k,) = lengths
        per_atom["traj"] = [
            np.full((len(r.numbers), k, 3), np.nan)
            if r.frames is None
            else np.swapaxes(r.frames, 0, 1)
            for r in records
        ]
    data = {name: np.concatenate(parts) for name, parts in per_atom.items()}
    data = {n: v.astype(np.uint8 if n == "z" else np.float32) for n, v in data.items()}
    if all(r.end is None for r in records):
        del data["x_final"]
    bonds = np.concatenate([r.bonds for r in records])
    data["n_atoms"] = np.array([len(r.numbers) for r in records], np.int32)
    data["n_bonds"] = np.array([len(r.bonds) for r in records], np.int32)
    data["bond_index"] = bonds[:, :2].astype(np.min_scalar_type(bonds[:, :2].max(initial=0)))
    data["bond_type"] = bonds[:, 2].astype(np.uint8)
    data["split"] = splits.split(records) if split is None else np.asarray(split)
    data["split"] = data["split"].astype(np.uint8)
    for name in ("id", "smiles", "group"):
        data[name] = np.array([getattr(r, name) for r in records])
    if any(r.cell.any() for r in records):
        data["cell"] = np.stack([r.cell for r in records]).astype(np.float32)
        data["pbc"] = np.stack([r.pbc for r in records])
    if not all(r.free.all() for r in records):
        data["free"] = np.concatenate([r.free for r in records])
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def stream(folder: str | Path, target: str = "x_final") -> Iterator[Record]:
    """The records of all `.npz` of a folder, file after file; never more than one is read.

    Raises:
      UserError: there are none; later, see `read`.
    """
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise UserError(f"There is no .npz in {folder}.")
    return (record for path in paths for record in read(path, target)[0])


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

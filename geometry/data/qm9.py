"""QM9: 133 885 molecules at B3LYP/6-31G(2df,p), of which 3 054 are uncharacterised.

Either `gdb9.sdf` (bonds included) or the raw `dsgdb9nsd_*.xyz`, whose numbers may be written
as 1.5*^-6, beside the list `uncharacterized.txt` of entries to drop. A record's end is the
equilibrium geometry, its start a conformer of the same stereoisomer.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError
from geometry.data import elements, molecules, sdf
from geometry.records import Record

NAMES = ("uncharacterized.txt", "3195404")  # The second as it is downloaded.
DROPPED = 3054


def read(
    folder: str | Path, seed: int = molecules.SEED, first: int = 0, count: int | None = None
) -> Iterator[Record]:
    """Pairs of `gdb9.sdf`, one after the other.

    Molecules that RDKit cannot read or embed as that stereoisomer are left out.

    Args:
      folder: with `gdb9.sdf` and `uncharacterized.txt`.
      seed: of the embedding; that of entry k (from 1 on, as in gdb_k) is seed + k.
      first, count: of the entries of the file, to share the work.

    Raises:
      UserError: a file is missing or damaged.
    """
    path, places, drop = _opened(folder)
    last = len(places) - 1 if count is None else min(len(places) - 1, first + count)
    for k in range(first, last):
        if k + 1 in drop:
            continue
        found = sdf.molecule(path, *places[k : k + 2].tolist())
        made = found and molecules.pair(found, f"gdb_{k + 1}", seed + k + 1)
        if made is not None:
            yield made


def entries(folder: str | Path) -> int:
    """How many entries `gdb9.sdf` has, dropped ones included.

    Raises:
      UserError: see `read`.
    """
    return len(_opened(folder)[1]) - 1


def uncharacterised(folder: str | Path, expected: int = DROPPED) -> set[int]:
    """Numbers of the entries whose geometry is no minimum of their graph.

    Args:
      expected: how many the list must have; 0 for any.

    Raises:
      UserError: the list is missing or shorter.
    """
    paths = [Path(folder) / name for name in NAMES]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise UserError(
            f"There is no {NAMES[0]} in {folder}: the list of {DROPPED} entries to drop."
        )
    # Rows begin with the number; title and rules of the table do not, its last line says
    # the total.
    rows = [line.split() for line in path.read_text().splitlines()]
    found = {int(row[0]) for row in rows if len(row) > 2 and row[0].isdigit()}
    if expected and len(found) != expected:
        raise UserError(f"{path} names {len(found)} entries, but QM9 drops {expected}.")
    return found


def read_xyz(path: str | Path) -> Record:
    """One raw file: its geometry as start, without bonds; smiles and group as written there.

    Raises:
      UserError: no such file, or not in QM9's format.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
        n = int(lines[0])
        rows = [line.split() for line in lines[2 : 2 + n]]
        x = np.array([[number(word) for word in row[1:4]] for row in rows], np.float64)
        numbers = np.array([_number_of(row[0]) for row in rows], np.int32)
        # gdb9 SMILES, then that of the relaxed geometry, which names the record.
        smiles = lines[3 + n].split()[-1]
        name = "gdb_" + re.search(r"\d+", lines[1].split("\t")[0].split()[1]).group()
        x = x.reshape(n, 3)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no file of QM9: {error}.") from error
    return Record(
        id=name,
        numbers=numbers,
        start=x,
        end=None,
        frames=None,
        bonds=np.zeros((0, 3), np.int32),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        free=np.ones(n, bool),
        smiles=smiles,
        group=smiles,
    )


def _opened(folder: str | Path) -> tuple[Path, np.ndarray, set[int]]:
    path = Path(folder) / "gdb9.sdf"
    if not path.is_file():
        raise UserError(f"There is no gdb9.sdf in {folder}.")
    return path, sdf.offsets(path), uncharacterised(folder)


def number(word: str) -> float:
    """1.5*^-6 as 1.5e-6."""
    return float(word.replace("*^", "e"))


def _number_of(symbol: str) -> int:
    return elements.chemical_symbols.index(symbol)

"""Large SDF files, a molecule at a time: by an index of byte offsets, made once."""

import mmap
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rdkit import Chem, rdBase

END = b"$$$$"


def offsets(path: str | Path) -> Int[np.ndarray, " entries"]:
    """Where each molecule of an SDF begins, and where the last one ends, bytes.

    Kept as `NAME.sdf.offsets.npy`, which is made anew when the shard is newer or longer.
    """
    path = Path(path)
    kept = path.with_name(path.name + ".offsets.npy")
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    if kept.is_file() and kept.stat().st_mtime_ns >= changed:
        found = np.load(kept)
        if len(found) and found[-1] <= size:
            return found
    if not size:
        return np.zeros(1, np.int64)
    places = [0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.find(END)
        while at >= 0:
            line = text.find(b"\n", at)
            # Only at the beginning of a line it ends a molecule.
            if text[at - 1 : at] == b"\n":
                places.append(size if line < 0 else line + 1)
            at = text.find(END, at + len(END))
    found = np.array(places, np.int64)
    temporary = kept.with_name(f".{kept.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, found)
        os.replace(temporary, kept)
    except OSError:
        pass  # A folder that cannot be written is indexed every time.
    return found


def molecule(path: str | Path, begin: int, end: int) -> Chem.Mol | None:
    """The molecule between two offsets, hydrogens included; None where it cannot be read."""
    with Path(path).open("rb") as file:
        file.seek(begin)
        text = file.read(end - begin).decode("latin-1")
    with rdBase.BlockLogs():
        return Chem.MolFromMolBlock(text, removeHs=False)

"""OC22 IS2RS: LMDB files of pickled graph objects, turned into a packed set once.

An entry has `pos`, `pos_relaxed` (absent in test sets), `atomic_numbers`, `cell` [1, 3, 3],
`fixed`, `tags` and `sid`. The objects are of torch_geometric, which is not needed: only names
on a list are unpickled, and classes of that package become plain bags of attributes. Tensors
need torch, which is imported when the first one is met.
"""

import codecs
import collections
import importlib
import io
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.progress import Progress
from geometry.data import elements, packed
from geometry.records import Record

NUMPY = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
# Protocol 2 writes bytes as an encoded string.
PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): codecs.encode,
}
TORCH = {
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_tensor"),
    "torch.storage": ("_load_from_bytes", "UntypedStorage", "TypedStorage"),
    "torch": (
        *("Size", "device", "Tensor", "float32", "float64", "int64", "int32", "bool"),
        *("FloatStorage", "DoubleStorage", "LongStorage", "IntStorage", "BoolStorage"),
    ),
}


class Unpickler(pickle.Unpickler):
    """Knows graph objects, arrays and tensors; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        root = module.partition(".")[0]
        if root == "torch_geometric":
            return types.SimpleNamespace
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if root == "numpy" and name in NUMPY:
            return getattr(importlib.import_module(module), name)
        if name in TORCH.get(module, ()):
            try:
                torch = importlib.import_module("torch")
            except ImportError as error:
                raise UserError(
                    "This LMDB holds tensors of torch, which is needed to convert it once: "
                    "`pip install torch`."
                ) from error
            if name == "_load_from_bytes":
                # Its own would unpickle anything.
                return lambda data: torch.load(io.BytesIO(data), weights_only=True)
            return getattr(importlib.import_module(module), name)
        raise UserError(f"An entry of the LMDB names {module}.{name}, which is not unpickled.")


def entries(path: str | Path) -> Iterator[dict[str, Any]]:
    """The attributes of the objects of a file or of all `.lmdb` of a folder, in order.

    Raises:
      UserError: the package lmdb is missing, there is no such file, or an entry is refused.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError(
            "Reading an LMDB needs the package lmdb: `uv sync --extra oc22`."
        ) from error
    path = Path(path)
    files = sorted(path.glob("*.lmdb")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"There is no .lmdb at {path}.")
    for file in files:
        try:
            store = lmdb.open(
                str(file), subdir=False, readonly=True, lock=False, readahead=False
            )
        except lmdb.Error as error:
            raise UserError(f"{file} is no LMDB: {error}.") from error
        with store, store.begin() as inside:
            for k in range(_length(inside, store)):
                data = inside.get(str(k).encode())
                if data is None:
                    raise UserError(f"{file} lacks entry {k}.")
                yield attributes(data)


def attributes(data: bytes) -> dict[str, Any]:
    """Of one pickled graph object, of any version of torch_geometric.

    Raises:
      UserError: it names what is not unpickled, or is damaged.
    """
    try:
        found = Unpickler(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # A damaged pickle raises whatever it stumbles on.
        raise UserError(f"An entry of the LMDB cannot be unpickled: {error}.") from error
    state = dict(found) if isinstance(found, dict) else dict(vars(found))
    # Since version 2 attributes lie in _store._mapping.
    inner = state.pop("_store", None)
    while inner is not None:
        values = dict(inner) if isinstance(inner, dict) else dict(vars(inner))
        state.update(values.pop("_mapping", {}))
        state.update({k: v for k, v in values.items() if not k.startswith("_")})
        inner = values.get("_store")
    return state


def record(entry: dict[str, Any]) -> Record:
    """An entry as a record, periodic in all directions; the group is its composition.

    Raises:
      UserError: an attribute is missing.
    """
    for name in ("pos", "atomic_numbers", "cell", "sid"):
        if entry.get(name) is None:
            raise UserError(f"An entry of the LMDB has no {name!r}.")
    numbers = np.asarray(entry["atomic_numbers"]).astype(np.int32).reshape(-1)
    fixed = np.asarray(entry.get("fixed", np.zeros(len(numbers)))).astype(bool).reshape(-1)
    end = entry.get("pos_relaxed")
    sid = np.asarray(entry["sid"]).reshape(-1)[0]
    return Record(
        id=str(sid),
        numbers=numbers,
        start=np.asarray(entry["pos"], np.float64),
        end=None if end is None else np.asarray(end, np.float64),
        frames=None,
        bonds=np.zeros((0, 3), np.int32),
        cell=np.asarray(entry["cell"], np.float64).reshape(3, 3),
        pbc=np.ones(3, bool),
        free=~fixed,
        smiles="",
        group=elements.formula(numbers),
    )


def convert(path: str | Path, out: str | Path, split: int = 0) -> int:
    """Writes a packed set of an LMDB, or of a folder of them; returns how many records.

    Args:
      split: of all of them: 0 train, 1 valid, 2 test; the published sets are split by file.

    Raises:
      UserError: see `entries` and `record`.
    """
    records, progress = [], None
    for entry in entries(path):
        records.append(record(entry))
        progress = progress or Progress("oc22", 0, 0)
        progress.step(len(records))
    if progress is not None:
        progress.close()
    packed.write(out, records, np.full(len(records), split))
    return len(records)


def _length(inside: Any, store: Any) -> int:
    found = inside.get(b"length")
    return int(Unpickler(io.BytesIO(found)).load()) if found else store.stat()["entries"]

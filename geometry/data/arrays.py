"""A set of records as concatenated arrays, and packs gathered from them.

A pack is a `geometry.graphs.Batch` of several structures and of fixed size. Complete graphs of
one size share their edges, so a large set of molecules costs 36 bytes an atom and 5 a bond.
`save` and `load` keep the arrays on disk, where a set larger than the memory is read by pieces.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from common.errors import UserError
from geometry.data.align import centred
from geometry.data.edges import Edges, Reach, bonds, complete, edges
from geometry.graphs import Batch, Graph
from geometry.records import Record


class Budget(NamedTuple):
    """The shape of a pack, the last atom and structure, which are padding, included."""

    atoms: int
    edges: int
    graphs: int


class Arrays(NamedTuple):
    """A set, structures one after the other. Complete graphs of one size share their edges.

    Attributes:
      atoms_at: [m + 1], where the atoms of each structure begin.
      numbers, free, start, end, frames: of atoms, as in `Graph` and `Batch`, but frames
        [atoms, frames, 3].
      edges_at, edges: [m], where the edges of each structure begin, and their number.
      senders, receivers, shifts: of edges; atoms counted within their structure.
      bonds_at: [m + 1], where bonds begin.
      bond_edges, bond_kinds: place of a bond among the edges of its structure, and its class;
        both ways.
      centred, ids: of structures.
    """

    atoms_at: Int[np.ndarray, " begins"]
    numbers: UInt8[np.ndarray, " atoms"]
    free: Bool[np.ndarray, " atoms"]
    start: Float[np.ndarray, "atoms 3"]
    end: Float[np.ndarray, "atoms 3"]
    frames: Float[np.ndarray, "atoms frames 3"]
    edges_at: Int[np.ndarray, " structures"]
    edges: Int[np.ndarray, " structures"]
    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]
    shifts: Float[np.ndarray, "edges 3"]
    bonds_at: Int[np.ndarray, " begins"]
    bond_edges: Int[np.ndarray, " bonds"]
    bond_kinds: UInt8[np.ndarray, " bonds"]
    centred: Bool[np.ndarray, " structures"]
    ids: Int[np.ndarray, " structures"]


def prepare(
    records: Iterable[Record],
    reach: Reach = Reach(),  # noqa: B008
    frames: bool = False,
    ids: Sequence[int] | None = None,
    dtype: Any = np.float32,
) -> Arrays:
    """Concatenates a set; molecules are centred.

    Args:
      records: may be a generator; each is let go once it was seen.
      reach: which atoms see each other.
      frames: take paths along. Structures without one move straight, with as many frames.
      ids: global number of each structure; by default its place.
      dtype: of positions.

    Raises:
      UserError: no records, or paths of several lengths.
    """
    known: dict[int, tuple[int, Edges]] = {}  # Complete graphs by size.
    kept: list[Edges] = []
    at, sizes_, edges_at, counts, straight, states = 0, [], [], [], [], []
    numbers, free, places, kinds, anchored = [], [], [], [], []
    for record in records:
        n = len(record.numbers)
        full = complete(record, reach)
        if full and n in known:
            begin, made = known[n]
        else:
            begin, made = at, edges(record, reach)
            kept.append(made)
            at += len(made.senders)
        if full:
            known[n] = begin, made
        place, kind = bonds(record, made)
        edges_at.append(begin)
        counts.append(len(made.senders))
        places.append(place)
        kinds.append(kind)
        sizes_.append(n)
        numbers.append(record.numbers.astype(np.uint8))
        free.append(record.free)
        anchored.append(not centred(record))
        path = record.frames if frames else np.zeros((0, n, 3))
        straight.append(path is None)
        end = record.start if record.end is None else record.end
        state = np.stack([record.start, end, *([] if path is None else path)])
        if not anchored[-1]:
            state = state - state.mean(axis=1, keepdims=True)
        states.append(state.astype(dtype))
    if not states:
        raise UserError("There is no structure to make a batch of.")
    lengths = {len(s) - 2 for s, none in zip(states, straight, strict=True) if not none}
    if len(lengths) > 1:
        raise UserError(
            f"Paths have {', '.join(map(str, sorted(lengths)))} frames, but those of one set "
            "must have equally many: resample them."
        )
    if not lengths:
        raise UserError("No structure has a path, but a chain of bridges needs them.")
    share = np.linspace(0, 1, lengths.pop())[:, None, None].astype(dtype)
    for k in np.flatnonzero(straight):
        start, end = states[k]
        states[k] = np.concatenate([states[k], start + share * (end - start)])
    x = np.concatenate(states, axis=1)
    return Arrays(
        atoms_at=_offsets(sizes_),
        numbers=np.concatenate(numbers),
        free=np.concatenate(free),
        start=x[0],
        end=x[1],
        frames=np.ascontiguousarray(np.swapaxes(x[2:], 0, 1)),
        edges_at=np.array(edges_at, np.int64),
        edges=np.array(counts, np.int64),
        senders=np.concatenate([e.senders for e in kept]),
        receivers=np.concatenate([e.receivers for e in kept]),
        shifts=np.concatenate([e.shifts for e in kept]).astype(dtype),
        bonds_at=_offsets([len(p) for p in places]),
        bond_edges=np.concatenate(places),
        bond_kinds=np.concatenate(kinds),
        centred=~np.array(anchored),
        ids=np.arange(len(states), dtype=np.int32) if ids is None else np.array(ids, np.int32),
    )


def sizes(arrays: Arrays) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Atoms and edges of each structure."""
    return np.diff(arrays.atoms_at), arrays.edges


def save(folder: str | Path, arrays: Arrays) -> None:
    """Writes one `.npy` per field."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, values in arrays._asdict().items():
        np.save(Path(folder) / f"{name}.npy", values)


def load(folder: str | Path) -> Arrays:
    """What `save` wrote, read from the disk when a batch needs it.

    Raises:
      UserError: a field is not there.
    """
    try:
        return Arrays(
            *(np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in Arrays._fields)
        )
    except FileNotFoundError as error:
        raise UserError(f"The folder {folder} holds no arrays of a set.") from error


def assemble(arrays: Arrays, rows: Int[np.ndarray, "packs graphs"], budget: Budget) -> Batch:
    """The batch of given structures, those of each pack in the order given; -1 is none."""
    packs = [_pack(arrays, row[row >= 0], budget) for row in rows]
    graph = Graph(*(np.stack(parts) for parts in zip(*(g for g, *_ in packs), strict=True)))
    return Batch(
        graph, *(np.stack(parts) for parts in zip(*(r for _, *r in packs), strict=True))
    )


def unpack(batch: Batch, values: Any) -> dict[int, np.ndarray]:
    """Values [packs, atoms, ...] as one array per structure, by their ids."""
    found = {}
    for own, mask, names, value in zip(
        *map(np.asarray, (batch.graph.owner, batch.graph.mask, batch.graph.ids, values)),
        strict=True,
    ):
        count = int(mask.sum())
        if count:
            parts = np.split(value[:count], np.flatnonzero(np.diff(own[:count])) + 1)
            found.update(zip(names[: len(parts)].tolist(), parts, strict=True))
    return found


def _pack(arrays: Arrays, chosen: np.ndarray, budget: Budget) -> tuple:
    count = arrays.atoms_at[chosen + 1] - arrays.atoms_at[chosen]
    lines = arrays.edges[chosen]
    kinds = arrays.bonds_at[chosen + 1] - arrays.bonds_at[chosen]
    atoms = _ragged(arrays.atoms_at[chosen], count)
    places = _ragged(arrays.edges_at[chosen], lines)
    bonded = _ragged(arrays.bonds_at[chosen], kinds)
    first = np.repeat(_offsets(count)[:-1], lines)
    bonds = np.zeros(budget.edges, np.int32)
    bonds[arrays.bond_edges[bonded] + np.repeat(_offsets(lines)[:-1], kinds)] = (
        arrays.bond_kinds[bonded]
    )

    def full(values, length, padding=0, dtype=None):
        made = np.full((length, *values.shape[1:]), padding, dtype or values.dtype)
        made[: len(values)] = values
        return made

    n, e, g = budget
    graph = Graph(
        numbers=full(arrays.numbers[atoms], n, 0, np.int32),
        mask=full(np.ones(len(atoms), np.float32), n),
        free=full(arrays.free[atoms], n, 0, np.float32),
        owner=full(np.repeat(np.arange(len(chosen)), count), n, g - 1, np.int32),
        index=full(_ragged(np.zeros_like(count), count), n, 0, np.int32),
        senders=full(arrays.senders[places] + first, e, n - 1, np.int32),
        receivers=full(arrays.receivers[places] + first, e, n - 1, np.int32),
        bonds=bonds,
        shifts=full(arrays.shifts[places], e),
        edge_mask=full(np.ones(len(places), np.float32), e),
        centred=full(arrays.centred[chosen], g, 0, np.float32),
        ids=full(arrays.ids[chosen], g, -1),
    )
    frames = np.ascontiguousarray(np.swapaxes(full(arrays.frames[atoms], n), 0, 1))
    return graph, full(arrays.start[atoms], n), full(arrays.end[atoms], n), frames


def _ragged(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... counts[0] of them, then those of the next."""
    gap = begins - _offsets(counts)[:-1]
    return np.repeat(gap, counts) + np.arange(counts.sum())


def _offsets(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

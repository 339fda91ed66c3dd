"""Symmetries of molecular graphs, and handedness read from positions.

An automorphism is a permutation p of atoms that keeps elements and bonds: p[i] is the atom
that stands where i stood. They come as those of the core, found by search, times the orders of
hydrogens on one atom, which is a product and needs no search. "Hydrogens" here are hydrogens
with one neighbour that is none itself; the core is everything else.

Handedness: the sign of the volume spanned by the neighbours of an atom with four of them, of
which at most one is a hydrogen (two could be exchanged), and the side on which substituents of
a double bond stand. Two sets of positions are the same stereoisomer where an automorphism
exists under which all signs agree, and mirror images where volumes are opposite and sides
agree; so meso forms, rings and spiro centres need no rules of their own. Axial chirality
without such an atom (allenes, hindered rotation) is not seen.
"""

from collections.abc import Iterator
from itertools import permutations

import numpy as np
from jaxtyping import Float, Int

LIMIT = 20_000
FLAT = 0.3  # Volume of unit vectors below which an atom has no hand; 3.08 is a tetrahedron's.


def colours(numbers: Int[np.ndarray, " atoms"], bonds: Int[np.ndarray, "bonds 3"]) -> list[int]:
    """Classes of atoms that refinement by neighbours cannot tell apart."""
    near = neighbours(len(numbers), bonds)
    colour = [int(z) for z in numbers]
    while True:
        signs = [
            (colour[a], tuple(sorted((kind, colour[b]) for b, kind in near[a].items())))
            for a in range(len(near))
        ]
        rank = {sign: k for k, sign in enumerate(sorted(set(signs)))}
        new = [rank[sign] for sign in signs]
        if len(rank) == len(set(colour)):
            return new
        colour = new


def neighbours(atoms: int, bonds: Int[np.ndarray, "bonds 3"]) -> list[dict[int, int]]:
    """Of each atom: neighbour -> class of the bond."""
    near: list[dict[int, int]] = [{} for _ in range(atoms)]
    for a, b, kind in bonds.tolist():
        near[a][b] = near[b][a] = kind
    return near


def core(
    numbers: Int[np.ndarray, " atoms"], bonds: Int[np.ndarray, "bonds 3"], limit: int = LIMIT
) -> Int[np.ndarray, "found atoms"]:
    """Automorphisms that keep the order of hydrogens on one atom; the identity first.

    Args:
      numbers, bonds: the graph. Without bonds there is the identity only.
      limit: of their number; the search stops there.
    """
    if not len(bonds):
        return np.arange(len(numbers))[None]
    near, colour = neighbours(len(numbers), bonds), colours(numbers, bonds)
    leaves = hydrogens(numbers, bonds)
    hanging = {h for group in leaves.values() for h in group}
    inner = [a for a in range(len(numbers)) if a not in hanging]
    found = []
    for image in _search(inner, near, colour):
        p = np.arange(len(numbers))
        for a, b in image.items():
            p[a] = b
            p[leaves.get(a, [])] = leaves.get(b, [])
        found.append(p)
        if len(found) == limit:
            break
    return np.stack(found)


def hydrogens(
    numbers: Int[np.ndarray, " atoms"], bonds: Int[np.ndarray, "bonds 3"]
) -> dict[int, list[int]]:
    """Atom of the core -> its hydrogens, ascending; only atoms that have some."""
    near = neighbours(len(numbers), bonds)
    found: dict[int, list[int]] = {}
    for h in np.flatnonzero(numbers == 1).tolist():
        if len(near[h]) == 1 and numbers[next(iter(near[h]))] != 1:
            found.setdefault(next(iter(near[h])), []).append(h)
    return found


def swaps(
    numbers: Int[np.ndarray, " atoms"], bonds: Int[np.ndarray, "bonds 3"], limit: int = LIMIT
) -> Int[np.ndarray, "found atoms"] | None:
    """All orders of hydrogens on their atoms, the identity first; None above `limit`."""
    p = np.arange(len(numbers))[None]
    for group in hydrogens(numbers, bonds).values():
        orders = list(permutations(group))
        if len(p) * len(orders) > limit:
            return None
        p = np.repeat(p, len(orders), axis=0)
        p[:, group] = np.tile(orders, (len(p) // len(orders), 1))
    return p


def automorphisms(
    numbers: Int[np.ndarray, " atoms"], bonds: Int[np.ndarray, "bonds 3"], limit: int = LIMIT
) -> Int[np.ndarray, "found atoms"] | None:
    """All automorphisms, the identity first; None where there are more than `limit`."""
    outer = swaps(numbers, bonds, limit)
    if outer is None:
        return None
    inner = core(numbers, bonds, limit // len(outer) + 1)
    if len(inner) * len(outer) > limit:
        return None
    return inner[:, outer].reshape(-1, len(numbers))


def stereo(
    numbers: Int[np.ndarray, " atoms"],
    bonds: Int[np.ndarray, "bonds 3"],
    start: Float[np.ndarray, "atoms 3"],
    end: Float[np.ndarray, "atoms 3"],
) -> str:
    """What the end is to the start: "same", "mirror" or "other"."""
    if same(numbers, bonds, start, end, 1):
        return "same"
    return "mirror" if same(numbers, bonds, start, end, -1) else "other"


def same(
    numbers: Int[np.ndarray, " atoms"],
    bonds: Int[np.ndarray, "bonds 3"],
    start: Float[np.ndarray, "atoms 3"],
    end: Float[np.ndarray, "atoms 3"],
    hand: int,
) -> bool:
    """Is there a relabelling of the end with the hands of the start, or (hand = -1) opposite?

    `same(..., x, x, -1)` says that a molecule is achiral.
    """
    near, leaves = neighbours(len(numbers), bonds), hydrogens(numbers, bonds)
    centres = np.array(
        [
            [a, *near[a]]
            for a in range(len(near))
            if len(near[a]) == 4 and len(leaves.get(a, ())) < 2
        ],
        int,
    ).reshape(-1, 5)
    sides = np.array(
        [
            [i, a, b, j]
            for a, b, kind in bonds.tolist()
            if kind == 2 and max(len(leaves.get(a, ())), len(leaves.get(b, ()))) < 2
            for i in near[a]
            if i != b
            for j in near[b]
            if j != a
        ],
        int,
    ).reshape(-1, 4)
    if not len(centres) and not len(sides):
        return True
    volumes, cis = _volumes(start, centres) * hand, _cis(start, sides)
    for p in core(numbers, bonds):
        if np.all(volumes * _volumes(end, p[centres]) >= 0) and np.all(
            cis * _cis(end, p[sides]) >= 0
        ):
            return True
    return False


def _volumes(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    u = x[centres[:, 1:]] - x[centres[:, :1]]
    u = u / np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-9)
    volume = np.linalg.det(u[:, :3] - u[:, 3:])
    return np.where(np.abs(volume) < FLAT, 0.0, np.sign(volume))


def _cis(x: np.ndarray, sides: np.ndarray) -> np.ndarray:
    i, a, b, j = (x[sides[:, k]] for k in range(4))
    left = np.cross(i - a, b - a)
    right = np.cross(j - b, b - a)
    scale = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosine = np.sum(left * right, axis=-1) / np.maximum(scale, 1e-9)
    return np.where(np.abs(cosine) < FLAT, 0.0, np.sign(cosine))


def _search(
    inner: list[int], near: list[dict[int, int]], colour: list[int]
) -> Iterator[dict[int, int]]:
    """Bijections of the core, by placing each atom beside one that was placed before."""
    inside, order, parent = set(inner), [], {}
    size = {c: colour.count(c) for c in set(colour)}
    for root in sorted(inner, key=lambda a: (size[colour[a]], a)):
        queue = [] if root in parent else [root]
        parent.setdefault(root, None)
        while queue:
            a = queue.pop(0)
            order.append(a)
            for b in sorted(near[a], key=lambda b: (size[colour[b]], b)):
                if b in inside and b not in parent:
                    parent[b] = a
                    queue.append(b)
    image: dict[int, int] = {}
    used: set[int] = set()

    def options(a):
        before = parent[a]
        there = inner if before is None else [b for b in near[image[before]] if b in inside]
        # The identity comes first.
        for b in sorted(there, key=lambda b: (b != a, b)):
            if (
                b not in used
                and colour[b] == colour[a]
                and all(near[b].get(image[c]) == k for c, k in near[a].items() if c in image)
            ):
                yield b

    pending = [options(order[0])]
    while pending:
        a = order[len(pending) - 1]
        if a in image:
            used.discard(image.pop(a))
        b = next(pending[-1], None)
        if b is None:
            pending.pop()
            continue
        image[a] = b
        used.add(b)
        if len(pending) == len(order):
            yield dict(image)
        else:
            pending.append(options(order[len(pending)]))

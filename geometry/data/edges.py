"""Which atoms see each other: one static edge list per structure, for training and prediction.

    up to n_full atoms            all ordered pairs
    more atoms                    pairs within cutoff + margin in R^0
    periodic                      the same with all images, as lattice shifts

    r = x[sender] + shift - x[receiver]

Edges come both ways and are ordered by receiver.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial import cKDTree

from common.errors import reject
from geometry.data.align import full_cell
from geometry.records import Record

TIE = 1e-3  # Angstrom: neighbours this much farther than the last kept one are kept, too.


class Reach(NamedTuple):
    """Fields of a config.

    Attributes:
      cutoff: angstrom, of the network's radial functions.
      margin: angstrom, added to it: atoms move.
      n_full: molecules up to this size get all pairs.
      max_neighbours: an edge stays if one of its ends counts the other among its nearest so
        many, ties included, so that edges stay both ways; 0 for all.
    """

    cutoff: float = 8.0
    margin: float = 1.0
    n_full: int = 32
    max_neighbours: int = 0


class Edges(NamedTuple):
    """Of one structure: atoms, ascending in the receiver, and shifts in angstrom."""

    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]
    shifts: Float[np.ndarray, "edges 3"]


def reach(**fields) -> Reach:
    """A checked `Reach`.

    Raises:
      UserError: a length or number that cannot be.
    """
    made = Reach(**fields)
    if not made.cutoff > 0:
        raise reject("data.cutoff", made.cutoff, "a length in angstrom above 0")
    if not made.margin >= 0:
        raise reject("data.margin", made.margin, "a length in angstrom from 0 on")
    if made.n_full < 0:
        raise reject("data.n_full", made.n_full, "a number of atoms from 0 on")
    if made.max_neighbours < 0:
        raise reject("data.max_neighbours", made.max_neighbours, "a number from 0 on")
    return made


def complete(record: Record, reach: Reach) -> bool:
    """True where all pairs see each other."""
    return not record.pbc.any() and len(record.numbers) <= reach.n_full


def edges(record: Record, reach: Reach = Reach()) -> Edges:  # noqa: B008
    """The edges of a structure; see the module."""
    n = len(record.numbers)
    if complete(record, reach):
        receivers, senders = np.nonzero(~np.eye(n, dtype=bool))
        shifts = np.zeros((len(senders), 3))
    else:
        senders, receivers, shifts = _near(record, reach)
    return Edges(senders.astype(np.int32), receivers.astype(np.int32), shifts)


def bonds(
    record: Record, edges: Edges
) -> tuple[Int[np.ndarray, " bonds"], UInt8[np.ndarray, " bonds"]]:
    """Places of bonds among the edges, both ways, and their classes.

    A bond longer than the reach has no edge and is left out.
    """
    n = len(record.numbers)
    a, b, kind = record.bonds.astype(np.int64).T
    keys = np.concatenate([a * n + b, b * n + a])
    here = np.flatnonzero(~edges.shifts.any(axis=1))
    have = edges.receivers[here].astype(np.int64) * n + edges.senders[here]
    at = np.minimum(np.searchsorted(have, keys), max(len(have) - 1, 0))
    hit = have[at] == keys if len(have) else np.zeros(len(keys), bool)
    return here[at[hit]].astype(np.int32), np.tile(kind, 2)[hit].astype(np.uint8)


def _near(record: Record, reach: Reach) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers and shifts within reach, all images of all atoms being looked at."""
    far = reach.cutoff + reach.margin
    cell, inside = np.eye(3), np.zeros((len(record.start), 3))
    spans = [0, 0, 0]
    if record.pbc.any():
        cell = full_cell(record.cell, record.pbc)
        inverse = np.linalg.inv(cell)
        inside = np.floor(record.start @ inverse) * record.pbc
        heights = 1 / np.linalg.norm(inverse, axis=0)
        spans = np.where(record.pbc, np.ceil(far / heights), 0).astype(int)
    grid = np.meshgrid(*(np.arange(-m, m + 1) for m in spans), indexing="ij")
    offsets = np.stack(grid, -1).reshape(-1, 3)
    x = record.start - inside @ cell
    points = (x[None] + (offsets @ cell)[:, None]).reshape(-1, 3)
    close = np.all((points >= x.min(0) - far) & (points <= x.max(0) + far), axis=1)
    which = np.flatnonzero(close)
    found = cKDTree(x).sparse_distance_matrix(
        cKDTree(points[which]), far, output_type="coo_matrix"
    )
    receivers, (offset, senders) = found.row, np.divmod(which[found.col], len(x))
    images = (offsets[offset] - inside[senders] + inside[receivers]).astype(int)
    # Half of them, and these again the other way: rounding cannot tear a pair apart.
    forth = images @ [10**8, 10**4, 1] > 0
    half = (receivers < senders) | ((receivers == senders) & forth)
    i, j, images = receivers[half], senders[half], images[half]
    receivers, senders = np.concatenate([i, j]), np.concatenate([j, i])
    images, length = np.concatenate([images, -images]), np.tile(found.data[half], 2)
    if reach.max_neighbours:
        keep = _nearest(receivers, length, reach.max_neighbours)
        receivers, senders, images = receivers[keep], senders[keep], images[keep]
    order = np.lexsort((*images.T[::-1], senders, receivers))
    return senders[order], receivers[order], (images @ cell)[order]


def _nearest(receivers: np.ndarray, length: np.ndarray, most: int) -> np.ndarray:
    """Edges that one of their two ends counts among its nearest; the second half of the edges
    are those of the first the other way."""
    order = np.lexsort((length, receivers))
    first = np.searchsorted(receivers[order], np.arange(receivers.max(initial=-1) + 1))
    rank = np.arange(len(order)) - first[receivers[order]]
    last = np.full(len(first), np.inf)
    last[receivers[order][rank == most - 1]] = length[order][rank == most - 1]
    wanted = length <= last[receivers] + TIE
    return wanted | np.roll(wanted, len(wanted) // 2)

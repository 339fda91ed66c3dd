"""Records as batches of one shape: packs that are filled evenly and never change size.

A pack is a graph of several structures. Which *sizes* share a pack is settled once: structures
ordered by size fall into classes of nearly equal size, and the sizes of the set are dealt out,
largest first, to the pack with fewest edges. So all packs are nearly full, every structure is
in every epoch once, and an epoch always has the same number of packs. An epoch then is a
permutation of the structures within their classes and one of the packs: a pure function of
(seed, epoch), and a step is found without those before.
"""

import heapq
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from common.errors import UserError, reject
from geometry.data.arrays import Arrays, Budget, assemble, sizes
from geometry.graphs import Batch

CLASS = 1.03  # Largest ratio of sizes in one class.


class Plan(NamedTuple):
    """Which sizes share a pack.

    Attributes:
      budget: that holds every pack.
      rows: of each pack the places, in the order of sizes, of its structures; -1 is none.
      order: structures in the order of sizes.
      classes: class of each place in that order.
      fill: share of the edge budget that is used.
    """

    budget: Budget
    rows: Int[np.ndarray, "all_packs graphs"]
    order: Int[np.ndarray, " structures"]
    classes: Int[np.ndarray, " structures"]
    fill: float


def plan(arrays: Arrays, molecules: int, packs: int = 1, budget: Budget | None = None) -> Plan:
    """Deals the sizes of a set out to packs.

    Args:
      molecules: structures per pack, on the average; fewer where they do not fit the budget.
      packs: of one batch. The number of packs of an epoch is a multiple of it.
      budget: a pack's; by default what the fullest pack needs.

    Raises:
      UserError: a budget that a structure exceeds, or a number that cannot be.
    """
    for name, value in (("molecules", molecules), ("packs", packs)):
        if value < 1:
            raise reject(f"data.{name}", value, "a whole number from 1 on")
    atoms, lines = sizes(arrays)
    if budget is not None:
        check(arrays, budget)
    order = np.lexsort((atoms, lines))
    a, e = atoms[order].astype(np.float64), lines[order].astype(np.float64)
    begins = _classes(a, e)
    classes = np.repeat(np.arange(len(begins)), np.diff([*begins, len(order)]))
    a, e = np.maximum.reduceat(a, begins)[classes], np.maximum.reduceat(e, begins)[classes]
    count = max(round(len(order) / molecules / packs), 1) * packs
    if budget is not None:
        least = [a.sum() / (budget.atoms - 1), e.sum() / max(budget.edges, 1)]
        least = max(*least, len(order) / (budget.graphs - 1))
        count = max(count, -(-int(np.ceil(least)) // packs) * packs)
    while True:
        rows = _deal(a, e, count)
        need = _needed(rows, a, e)
        if budget is None or all(n <= b for n, b in zip(need, budget, strict=True)):
            break
        count += packs * max(1, count // (100 * packs))
    budget = budget or need
    table = np.full((count, budget.graphs - 1), -1)
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
    return Plan(budget, table, order, classes, lines.sum() / max(count * budget.edges, 1))


def check(arrays: Arrays, budget: Budget) -> None:
    """Raises a UserError where a structure is larger than a pack."""
    atoms, lines = sizes(arrays)
    for name, need, have in (
        ("atoms", atoms + 1, budget.atoms),
        ("edges", lines, budget.edges),
        ("graphs", np.full_like(atoms, 2), budget.graphs),
    ):
        if need.max() > have:
            raise UserError(
                f"Structure {int(arrays.ids[need.argmax()])} needs a budget of "
                f"{int(need.max())} {name} (padding included), but it is {have}."
            )


def epoch(
    plan: Plan, packs: int, seed: int, number: int
) -> Int[np.ndarray, "steps packs graphs"]:
    """The structures of every batch of an epoch; -1 is none. Every structure is in it once."""
    rng = np.random.default_rng((seed, number))
    # A random order within classes: classes ascend, so sorting by both keeps them in place.
    order = plan.order[np.lexsort((rng.random(len(plan.order)), plan.classes))]
    rows = plan.rows[rng.permutation(len(plan.rows))]
    return np.where(rows < 0, -1, order[rows]).reshape(-1, packs, rows.shape[-1])


def training(
    arrays: Arrays,
    molecules: int,
    packs: int = 1,
    seed: int = 0,
    budget: Budget | None = None,
) -> tuple[Callable[[int], Batch], Plan]:
    """Batches as a pure function of the step.

    Returns:
      step -> Batch with a leading axis of packs, on the host; and the plan.

    Raises:
      UserError: see `plan`.
    """
    made = plan(arrays, molecules, packs, budget)
    of = lru_cache(2)(lambda number: epoch(made, packs, seed, number))

    def batch(step: int) -> Batch:
        number, place = divmod(int(step), len(made.rows) // packs)
        return assemble(arrays, of(number)[place], made.budget)

    return batch, made


def in_order(
    arrays: Arrays, budget: Budget, packs: int = 1
) -> Int[np.ndarray, "steps packs graphs"]:
    """All structures once, in their order: for `assemble`, to evaluate.

    Raises:
      UserError: a structure exceeds the budget.
    """
    check(arrays, budget)
    rows: list[list[int]] = []
    left = (0, 0, 0)
    for k, need in enumerate(zip(*sizes(arrays), np.ones(len(arrays.ids), int), strict=True)):
        if any(n > l for n, l in zip(need, left, strict=True)):
            rows.append([])
            left = (budget.atoms - 1, budget.edges, budget.graphs - 1)
        rows[-1].append(k)
        left = tuple(l - n for n, l in zip(need, left, strict=True))
    table = np.full((-(-len(rows) // packs) * packs, budget.graphs - 1), -1)
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
    return table.reshape(-1, packs, budget.graphs - 1)


def for_prediction(
    arrays: Arrays, most: int = 2**16
) -> tuple[Int[np.ndarray, "steps packs graphs"], Budget]:
    """Batches of one shape for a set of any sizes, such as a user's file.

    Structures large and small share packs, so one shape serves all of them. Its numbers are
    rounded up to steps of an eighth, so that other files often have it, too.

    Args:
      most: edges per pack, unless one structure has more.
    """
    _, lines = sizes(arrays)
    count = max(1, -(-int(lines.sum()) // max(most, int(lines.max()))))
    made = plan(arrays, -(-len(lines) // count))
    budget = Budget(*map(_rounded, made.budget))
    rows = np.full((len(made.rows), budget.graphs - 1), -1)
    rows[:, : made.rows.shape[1]] = np.where(made.rows < 0, -1, made.order[made.rows])
    return rows[:, None], budget


def _classes(atoms: np.ndarray, lines: np.ndarray) -> list[int]:
    """Where runs of nearly equal sizes begin."""
    begins, first, low, high = [], 0.0, np.inf, 0.0
    for k, (a, e) in enumerate(zip(atoms.tolist(), lines.tolist(), strict=True)):
        low, high = min(low, a), max(high, a)
        if not begins or e > CLASS * first or high > CLASS * low:
            begins.append(k)
            first, low, high = e, a, a
    return begins


def _deal(atoms: np.ndarray, lines: np.ndarray, count: int) -> list[list[int]]:
    """Largest first, to the pack with fewest edges; equal ones in turns."""
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, 0.0, k) for k in range(count)]
    for k in range(len(lines) - 1, -1, -1):
        e, a, pack = heapq.heappop(heap)
        rows[pack].append(k)
        heapq.heappush(heap, (e + lines[k], a + atoms[k], pack))
    return rows


def _needed(rows: list[list[int]], atoms: np.ndarray, lines: np.ndarray) -> Budget:
    return Budget(
        max(int(atoms[row].sum()) for row in rows) + 1,
        max(1, *(int(lines[row].sum()) for row in rows)),
        max(map(len, rows)) + 1,
    )


def _rounded(number: int) -> int:
    """Up to the next of 8, 9, ..., 15 times a power of two."""
    step = 2 ** max(int(number).bit_length() - 4, 0)
    return -(-int(number) // step) * step

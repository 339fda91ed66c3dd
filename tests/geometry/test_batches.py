"""Batches against graphs made by hand; plans; neighbour lists against brute force."""

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import align, arrays, batches, packed
from geometry.data.edges import Reach, edges, reach
from tests.geometry.molecules_made import BUNDLED, record, water


@pytest.fixture(scope="module")
def records():
    return packed.read(BUNDLED)[0][:300]


@pytest.fixture(scope="module")
def stored(records):
    return arrays.prepare(records, frames=True)


def by_hand(record, reach):
    """(receiver, sender, shift) of every edge, by trying all images."""
    n, pbc = len(record.numbers), record.pbc
    if not pbc.any() and n <= reach.n_full:
        return {(i, j, (0.0, 0.0, 0.0)) for i in range(n) for j in range(n) if i != j}
    far, found = reach.cutoff + reach.margin, set()
    spans = [range(-6, 7) if p else range(1) for p in pbc]
    for i in range(n):
        for j in range(n):
            for s in np.stack(np.meshgrid(*spans), -1).reshape(-1, 3):
                shift = s @ record.cell
                d = np.linalg.norm(record.start[j] + shift - record.start[i])
                if d < far and not (i == j and not s.any()):
                    found.add((i, j, tuple(np.round(shift, 6).tolist())))
    return found


def as_set(made):
    return {
        (i, j, tuple((np.round(s, 6) + 0.0).tolist()))
        for i, j, s in zip(
            made.receivers.tolist(), made.senders.tolist(), made.shifts, strict=True
        )
    }


def slab(seed, n=7, **fields):
    rng = np.random.default_rng(seed)
    cell = np.array([[5.0, 0, 0], [1.5, 4.5, 0], [0, 0, 12]])
    x = rng.random((n, 3)) @ (cell * [[1], [1], [0.4]])
    given = dict(cell=cell, pbc=np.array([True, True, False]), free=np.arange(n) > 1)
    return record([29] * n, x, x + 0.1 * rng.standard_normal((n, 3)), **{**given, **fields})


@pytest.mark.parametrize("n_full", [32, 2])
def test_edges_of_molecules(records, n_full):
    given = Reach(cutoff=2.0, margin=0.5, n_full=n_full)
    for r in records[:5]:
        assert as_set(edges(r, given)) == by_hand(r, given)


@pytest.mark.parametrize("pbc", [(True, True, False), (True, True, True), (False, True, False)])
def test_edges_of_periodic_cells(pbc):
    given = Reach(cutoff=3.5, margin=0.5)
    r = slab(0, pbc=np.array(pbc))
    r.start[3] += (np.array([1, -2, 1]) * pbc) @ r.cell  # Positions need not be inside.
    made = edges(r, given)
    assert as_set(made) == by_hand(r, given)
    assert len(made.senders) == len(as_set(made)) > 0
    assert np.all(np.diff(made.receivers) >= 0)
    # The same the other way about.
    assert {(j, i, tuple(-np.array(s) + 0.0)) for i, j, s in as_set(made)} == as_set(made)


def test_most_neighbours_stay_both_ways():
    full = edges(slab(1, 12), Reach(cutoff=5.0, margin=0.0))
    made = edges(slab(1, 12), Reach(cutoff=5.0, margin=0.0, max_neighbours=6))
    assert as_set(made) < as_set(full)
    assert {(j, i, tuple(-np.array(s) + 0.0)) for i, j, s in as_set(made)} == as_set(made)
    x = slab(1, 12).start

    def lengths(e):
        return np.linalg.norm(x[e.senders] + e.shifts - x[e.receivers], axis=1)

    for i in range(12):
        mine = np.sort(lengths(full)[full.receivers == i])[:6]
        kept = lengths(made)[made.receivers == i]
        assert np.isin(np.round(mine, 6), np.round(kept, 6)).all()
    # No edge is there that neither end asked for.
    for i, j, length in zip(made.receivers, made.senders, lengths(made), strict=True):
        ends = [np.sort(lengths(full)[full.receivers == k])[5] for k in (i, j)]
        assert length <= max(ends) + 2e-3


def check_pack(batch, pack, records, given):
    """One pack against its records, edge by edge."""
    g = [np.asarray(v)[pack] for v in batch.graph]
    graph = dict(zip(batch.graph._fields, g, strict=True))
    atoms, graphs = len(graph["mask"]), len(graph["ids"])
    at = 0
    for place, k in enumerate(graph["ids"].tolist()):
        if k < 0:
            continue
        r = records[k]
        n = len(r.numbers)
        own = slice(at, at + n)
        np.testing.assert_array_equal(graph["numbers"][own], r.numbers)
        np.testing.assert_array_equal(graph["free"][own], r.free)
        np.testing.assert_array_equal(graph["owner"][own], place)
        np.testing.assert_array_equal(graph["index"][own], np.arange(n))
        centre = lambda x, r=r: x - x.mean(axis=-2, keepdims=True) * align.centred(r)
        for name, x in (("start", r.start), ("end", r.end)):
            np.testing.assert_allclose(getattr(batch, name)[pack, own], centre(x), atol=1e-5)
        if batch.frames.shape[1]:
            np.testing.assert_allclose(batch.frames[pack][:, own], centre(r.frames), atol=1e-5)
        here = (graph["receivers"] >= at) & (graph["receivers"] < at + n)
        here &= graph["edge_mask"] > 0
        found = {
            (i - at, j - at, tuple((np.round(s, 4) + 0.0).tolist()))
            for i, j, s in zip(
                graph["receivers"][here].tolist(),
                graph["senders"][here].tolist(),
                graph["shifts"][here].astype(float),
                strict=True,
            )
        }
        wanted = {
            (i, j, tuple((np.round(s, 4) + 0.0).tolist())) for i, j, s in by_hand(r, given)
        }
        assert found == wanted
        assert here.sum() == len(wanted)
        kinds = np.zeros((n, n), int)
        for a, b, kind in r.bonds:
            kinds[a, b] = kinds[b, a] = kind
        inside = here & ~graph["shifts"].any(axis=1)
        np.testing.assert_array_equal(
            graph["bonds"][inside],
            kinds[graph["receivers"][inside] - at, graph["senders"][inside] - at],
        )
        assert graph["centred"][place] == align.centred(r)
        at += n
    np.testing.assert_array_equal(graph["mask"], np.arange(atoms) < at)
    real = int(graph["edge_mask"].sum())
    np.testing.assert_array_equal(graph["edge_mask"], np.arange(len(graph["bonds"])) < real)
    assert graph["mask"][-1] == 0
    assert graph["ids"][-1] == -1
    for name in ("senders", "receivers"):
        assert np.all(graph[name][real:] == atoms - 1)
    assert np.all(graph["owner"][at:] == graphs - 1)
    assert np.all(np.diff(graph["receivers"]) >= 0)
    assert np.all(np.diff(graph["owner"]) >= 0)
    for name in ("numbers", "free", "index"):
        assert not graph[name][at:].any()
    assert not graph["bonds"][real:].any()
    assert not graph["shifts"][real:].any()
    for x in (batch.start[pack], batch.end[pack], *batch.frames[pack]):
        assert not np.asarray(x)[at:].any()


def test_a_batch_is_its_records(records, stored):
    batch, plan = batches.training(stored, 16, packs=2, seed=3)
    made = batch(1)
    assert made.start.dtype == np.float32
    assert made.graph.numbers.dtype == np.int32
    assert made.start.shape == (2, plan.budget.atoms, 3)
    for pack in range(2):
        check_pack(made, pack, records, Reach())


def test_a_batch_of_mixed_kinds(records):
    given = Reach(cutoff=3.5, margin=0.5, n_full=10)
    mixed = [*records[:4], slab(2), records[5], slab(3, 9), water()]
    stored = arrays.prepare(mixed, given)
    rows, budget = batches.for_prediction(stored)
    made = arrays.assemble(stored, rows[0], budget)
    check_pack(made, 0, mixed, given)
    assert made.frames.shape == (1, 0, budget.atoms, 3)
    back = arrays.unpack(made, made.end)
    assert sorted(back) == list(range(8))
    np.testing.assert_allclose(back[4], mixed[4].end, atol=1e-5)


def test_an_epoch_is_every_structure_once_and_full(stored):
    plan = batches.plan(stored, 16, packs=4)
    assert plan.fill > 0.95
    for number in range(3):
        rows = batches.epoch(plan, 4, 0, number)
        chosen = rows[rows >= 0]
        np.testing.assert_array_equal(np.sort(chosen), np.arange(300))
    assert rows.shape[1] == 4
    np.testing.assert_array_equal(rows, batches.epoch(plan, 4, 0, 2))
    for other in (batches.epoch(plan, 4, 0, 1), batches.epoch(plan, 4, 1, 2)):
        assert np.any(rows != other)
    # The order of packs changes, too: the step at which the largest structure comes.
    largest = {
        int(np.argwhere(batches.epoch(plan, 4, 0, k) == arrays.sizes(stored)[1].argmax())[0, 0])
        for k in range(12)
    }
    assert len(largest) > 2
    # Partners change: hardly a pair that shares a pack does so in the next epoch.
    pairs = lambda rows: {
        (a, b)
        for row in rows.reshape(-1, rows.shape[-1])
        for a in row
        for b in row
        if 0 <= a < b
    }
    both = pairs(rows) & pairs(batches.epoch(plan, 4, 0, 1))
    assert len(both) < 0.15 * len(pairs(rows))


def test_steps_are_random_access(stored):
    one, plan = batches.training(stored, 16, seed=5)
    other, _ = batches.training(stored, 16, seed=5)
    length = len(plan.rows)
    expected = {step: one(step) for step in range(length + 2)}
    for step in (length + 1, 0, length - 1, length):
        for a, b in zip(expected[step].graph, other(step).graph, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(expected[step].start, other(step).start)
    assert np.any(expected[0].graph.ids != expected[length].graph.ids)


def test_budgets_are_kept_or_refused(stored):
    budget = batches.Budget(200, 2000, 20)
    plan = batches.plan(stored, 64, budget=budget)
    atoms, lines = arrays.sizes(stored)
    for row in batches.epoch(plan, 1, 0, 0).reshape(-1, 19):
        chosen = row[row >= 0]
        assert atoms[chosen].sum() < 200
        assert lines[chosen].sum() <= 2000
        assert len(chosen) < 20
    assert plan.fill > 0.9
    for small, words in (
        (batches.Budget(16, 2000, 20), "20 atoms .* is 16"),
        (batches.Budget(200, 200, 20), "edges .* is 200"),
        (batches.Budget(200, 2000, 1), "2 graphs .* is 1"),
    ):
        for function in (
            lambda b: batches.plan(stored, 64, budget=b),
            lambda b: batches.in_order(stored, b),
        ):
            with pytest.raises(UserError, match=words):
                function(small)


def test_in_order_is_everything_once(stored):
    budget = batches.plan(stored, 16).budget
    rows = batches.in_order(stored, budget, packs=4)
    flat = rows.reshape(-1)
    np.testing.assert_array_equal(flat[flat >= 0], np.arange(300))
    found = {}
    for row in rows:
        made = arrays.assemble(stored, row, budget)
        assert made.graph.ids.shape == (4, budget.graphs)
        found |= arrays.unpack(made, made.start)
    assert len(found) == 300


def test_one_shape_for_a_file_of_all_sizes(records):
    big = record([6] * 60, np.random.default_rng(0).standard_normal((60, 3)) * 9)
    stored = arrays.prepare([*records[:40], big, *records[40:90]], Reach(cutoff=20.0))
    rows, budget = batches.for_prediction(stored, most=2000)
    assert rows.ndim == 3
    assert rows.shape[1] == 1
    assert rows.shape[2] == budget.graphs - 1
    flat = rows.reshape(-1)
    np.testing.assert_array_equal(np.sort(flat[flat >= 0]), np.arange(91))
    lines = sum(int(arrays.sizes(stored)[1][k]) for k in flat[flat >= 0])
    assert lines / (len(rows) * budget.edges) > 0.75
    found = {}
    for row in rows:
        made = arrays.assemble(stored, row, budget)
        found |= arrays.unpack(made, made.start)
    assert sorted(found) == list(range(91))
    for number in (1, 7, 15, 16, 17, 1000, 4097):
        assert number <= batches._rounded(number) <= 1.125 * number + 1


def test_paths(records):
    straight = water()
    stored = arrays.prepare([records[0], straight], frames=True)
    made = arrays.assemble(stored, np.array([[0, 1]]), batches.for_prediction(stored)[1])
    path = arrays.unpack(made, np.moveaxis(made.frames, 1, 2))[1]
    centre = lambda x: x - x.mean(axis=0)
    for k, share in enumerate(np.linspace(0, 1, 9)):
        mixed = (1 - share) * centre(straight.start) + share * centre(straight.end)
        np.testing.assert_allclose(path[:, k], mixed, atol=1e-6)
    with pytest.raises(UserError, match="No structure has a path"):
        arrays.prepare([straight], frames=True)
    short = records[1]._replace(frames=records[1].frames[:4])
    with pytest.raises(UserError, match="4, 9 frames"):
        arrays.prepare([records[0], short], frames=True)
    with pytest.raises(UserError, match="no structure"):
        arrays.prepare([])


def test_arrays_come_back_from_the_disk(stored, tmp_path):
    arrays.save(tmp_path / "set", stored)
    back = arrays.load(tmp_path / "set")
    one, _ = batches.training(stored, 16)
    other, _ = batches.training(back, 16)
    np.testing.assert_array_equal(one(3).start, other(3).start)
    np.testing.assert_array_equal(one(3).graph.bonds, other(3).graph.bonds)
    with pytest.raises(UserError, match="holds no arrays"):
        arrays.load(tmp_path)


def test_no_network_sees_another_molecule(records, stored):
    """64-bit arrays stay so, and projected positions are those of each structure alone."""
    import jax

    from geometry import graphs

    double = arrays.prepare(records[:6], dtype=np.float64)
    rows, budget = batches.for_prediction(double)
    made = arrays.assemble(double, rows[0], budget)
    assert made.start.dtype == np.float64
    one = jax.tree.map(lambda v: v[0], made)
    with jax.enable_x64(True):
        graph = jax.tree.map(jax.numpy.asarray, one.graph)
        found = graphs.project(graph, jax.numpy.asarray(one.end) + 3.0)
    np.testing.assert_allclose(np.asarray(found), one.end, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("cutoff", 0.0), ("margin", -1.0), ("n_full", -1), ("max_neighbours", -2)],
)
def test_reach_is_checked(field, value):
    with pytest.raises(UserError, match=field):
        reach(**{field: value})
    assert reach() == Reach()
    with pytest.raises(UserError, match="molecules"):
        batches.plan(arrays.prepare([water()]), 0)

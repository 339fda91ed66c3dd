"""Order, windows, rows and validation, against slow references written on their own."""

import itertools
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from lm import batches
from lm.corpus import Corpus


def corpus(sizes, pad=0, eos=1, vocab=1000):
    """Documents of these sizes; token i is i + 2, so that a token tells its place."""
    total = sum(sizes)
    return Corpus(
        tokens=np.arange(2, total + 2).astype(np.uint16),
        offsets=np.cumsum([0, *sizes]).astype(np.int64),
        vocab=vocab,
        largest=total + 1,
        pad=pad,
        eos=eos,
        tokenizer="test",
        path="test",
    )


def windows(source, length):
    """How many an epoch has: each target is in one of them."""
    made = batches.packed(source, 1, length, seed=0)
    targets, seen = len(source.tokens) - 1, 0
    for step in itertools.count():
        if seen >= targets:
            return step
        seen += int(made(step)["mask"].sum())


def taken(made, epoch, count):
    """The rows of one epoch, whatever the batch is: batches of one row."""
    return [made(epoch * count + i) for i in range(count)]


@pytest.mark.parametrize("count", [*range(1, 40), 64, 65, 127, 1000, 4097])
def test_the_order_is_a_bijection(count):
    places = np.arange(count)
    for key in [(0, 0), (0, 1), (1, 0), (2**40, 7)]:
        assert sorted(batches.permute(places, count, key)) == list(range(count))


def test_the_order_of_many_is_that_of_one():
    count = 2**61 + 12345
    places = np.random.default_rng(0).integers(0, count, 300)
    found = batches.permute(places, count, (3, 4))
    assert found.dtype == np.int64
    assert 0 <= found.min() <= found.max() < count
    assert len(set(found.tolist())) == len(set(places.tolist()))
    for i in (0, 17, 299):
        assert batches.permute(places[i : i + 1], count, (3, 4))[0] == found[i]


def test_the_order_looks_random():
    """Over 2000 keys each of 8 numbers stands at each place, and each pair in each order."""
    keys, count = 2000, 8
    orders = np.array([batches.permute(np.arange(count), count, (k, 0)) for k in range(keys)])
    seen = np.array([np.bincount(orders[:, i], minlength=count) for i in range(count)])
    chi = ((seen - keys / count) ** 2 / (keys / count)).sum()
    assert chi < 49 + 5 * np.sqrt(2 * 49)  # 49 degrees of freedom.
    first = (orders[:, :-1] < orders[:, 1:]).mean(0)
    np.testing.assert_allclose(first, 0.5, atol=5 * 0.5 / np.sqrt(keys))
    # Neighbours are torn apart in a long order.
    long = batches.permute(np.arange(5000), 5000, (1, 1))
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.07
    assert abs(np.corrcoef(np.arange(5000), long)[0, 1]) < 0.07


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("extra", [0, 1, 2, 3, 5, 8, 15, 16, 40])
def test_each_token_is_a_target_once_per_epoch(length, extra):
    source = corpus([length + 1 + extra])
    count = windows(source, length)
    made = batches.packed(source, 1, length, seed=5)
    for epoch in range(4):
        seen = Counter()
        for one in taken(made, epoch, count):
            tokens, mask = one["tokens"], one["mask"]
            assert (tokens.shape, mask.shape) == ((1, length + 1), (1, length))
            assert (tokens.dtype, mask.dtype) == (np.int32, bool)
            np.testing.assert_array_equal(np.diff(tokens), 1)  # Real text throughout.
            assert mask.any()
            seen.update(tokens[:, 1:][mask].tolist())
        assert seen == Counter(source.tokens[1:].tolist())


def test_windows_tile_the_text():
    """The targets of an epoch's windows, sorted, are runs without gaps, full ones inside."""
    length, source = 6, corpus([20, 3, 30, 11])
    count = windows(source, length)
    made = batches.packed(source, 1, length, seed=2)
    for epoch in range(3):
        rows = taken(made, epoch, count)
        own = [sorted(r["tokens"][:, 1:][r["mask"]].tolist()) for r in rows]
        ordered = sorted(own)
        expected, place = [], 3
        for size in map(len, ordered):
            expected.append(list(range(place, place + size)))
            place += size
        assert ordered == expected
        assert all(len(run) == length for run in ordered[1:-1])


def test_epochs_differ_in_order_and_in_offset():
    source, length = corpus([500]), 10
    count = windows(source, length)
    made = batches.packed(source, count, length, seed=1)
    orders, offsets = set(), set()
    for epoch in range(40):
        first = made(epoch)["tokens"][:, 0] - 2
        inner = first[(first > 0) & (first < 499 - length)]
        offsets.add(int(inner[0] % length))
        orders.add(tuple((first // length).tolist()))
    assert len(orders) == 40
    assert len(offsets) >= length // 2


@pytest.mark.parametrize("kind", ["packed", "rows"])
def test_a_step_is_a_pure_function_of_its_number(kind):
    source, length = corpus([9, 2, 14, 7, 1, 30, 5]), 6
    make = getattr(batches, kind)
    count = windows(source, length) if kind == "packed" else 7
    # Three epochs of windows at once; a batch of documents has none twice.
    epochs = 3 if kind == "packed" else 1
    one, four, whole = (make(source, b, length, 3) for b in (1, 4, epochs * count))
    again = make(source, 4, length, 3)
    for step in (5, 0, 3):  # In any order, from any object.
        for name in ("tokens", "mask"):
            np.testing.assert_array_equal(four(step)[name], again(step)[name])
            wanted = np.concatenate([one(4 * step + i)[name] for i in range(4)])
            np.testing.assert_array_equal(four(step)[name], wanted)
    wanted = np.concatenate([one(i)["tokens"] for i in range(epochs * count)])
    np.testing.assert_array_equal(whole(0)["tokens"], wanted)
    assert not np.array_equal(four(0)["tokens"], make(source, 4, length, 4)(0)["tokens"])


def test_segments_count_documents_within_a_row():
    sizes = [4, 1, 9, 2, 20, 3]
    source = corpus(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    made = batches.packed(source, 5, 8, seed=0, segments=True)
    for step in range(4):
        found = made(step)
        of_token = document[found["tokens"] - 2]
        np.testing.assert_array_equal(found["segments"], of_token - of_token[:, :1])
        assert found["segments"].dtype == np.int32


def slow_row(source, i, length, end_cut):
    """Document i as a list, padded, and whether each target is real."""
    text = source.tokens[source.offsets[i] : source.offsets[i + 1]].tolist()
    row = text[:length]
    if end_cut and len(text) > length and source.eos >= 0:
        row = [*row[:-1], source.eos]
    fill = max(source.pad, 0)
    return row + [fill] * (length - len(row)), [j < len(row) for j in range(1, length)]


@pytest.mark.parametrize("end_cut", [False, True])
@pytest.mark.parametrize(("pad", "eos"), [(0, 1), (3, -1), (-1, -1)])
def test_rows_equal_a_slow_reference(pad, eos, end_cut):
    source, length = corpus([3, 1, 12, 6, 7, 5, 2], pad, eos), 6
    made = batches.rows(source, 2, length, seed=9, end_cut=end_cut)
    single = batches.rows(source, 1, length, seed=9, end_cut=end_cut)
    orders = []
    for epoch in range(3):
        # Token i is i + 2 and no document is empty: the first token names the document.
        first = [int(one["tokens"][0, 0]) - 2 for one in taken(single, epoch, 7)]
        orders.append([source.offsets.tolist().index(f) for f in first])
        assert sorted(orders[-1]) == list(range(7))
    assert orders[0] != orders[1]
    flat = list(itertools.chain(*orders))
    for step in range(10):
        found = made(step)
        wanted = [slow_row(source, i, length, end_cut) for i in flat[2 * step : 2 * step + 2]]
        np.testing.assert_array_equal(found["tokens"], [w[0] for w in wanted])
        np.testing.assert_array_equal(found["mask"], [w[1] for w in wanted])
        assert (found["tokens"].dtype, found["mask"].dtype) == (np.int32, bool)


@pytest.mark.parametrize("budget", [1, 5, 6, 7, 12, 13, 30, 43, 0, 44, 1000])
def test_validation_spends_its_budget_exactly(budget):
    source = corpus([10, 4, 30])
    found = batches.validation(source, 3, 6, budget)
    targets = np.concatenate([b["tokens"][:, 1:][b["mask"]] for b in found])
    want = min(budget or 43, 43)
    np.testing.assert_array_equal(targets, np.arange(3, 3 + want))  # In order, each once.
    for one in found:
        assert (one["tokens"].shape, one["mask"].shape) == ((3, 7), (3, 6))
        assert (one["tokens"].dtype, one["mask"].dtype) == (np.int32, bool)
        assert one["mask"].any()
        inputs = one["tokens"][:, :-1][one["mask"]]
        np.testing.assert_array_equal(inputs + 1, one["tokens"][:, 1:][one["mask"]])


@pytest.mark.parametrize("budget", [1, 4, 5, 9, 16, 0, 1000])
def test_validation_of_rows_spends_its_budget_exactly(budget):
    source, length = corpus([3, 1, 12, 6, 2]), 6
    found = batches.validation(source, 2, length, budget, pack=False)
    slow = [slow_row(source, i, length, False) for i in range(5)]
    every = [t for row, real in slow for t, r in zip(row[1:], real, strict=True) if r]
    targets = np.concatenate([b["tokens"][:, 1:][b["mask"]] for b in found])
    np.testing.assert_array_equal(targets, every[: budget or None])
    for one in found:
        assert (one["tokens"].shape, one["mask"].shape) == ((2, length), (2, length - 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: batches.packed(c, 2, 44, 0),
            r"data\.length is 44, but must be at most 43 for the 44 tokens of test",
        ),
        (lambda c: batches.packed(c, 2, 0, 0), r"data\.length is 0, but must be at least 1"),
        (
            lambda c: batches.packed(c, 0, 4, 0),
            r"config\.batch_size is 0, but must be at least 1",
        ),
        (
            lambda c: batches.packed(c, 2, 4, -1),
            r"data\.order_seed and config\.seed add up to -1",
        ),
        (lambda c: batches.rows(c, 2, 1, 0), r"data\.length is 1, but must be at least 2"),
        (
            lambda c: batches.rows(c, 4, 8, 0)(1),
            r"data\.pack is False, .* 4 documents .* has 3,",
        ),
        (
            lambda c: batches.validation(c, 2, 0, 5),
            r"data\.length is 0, but must be at least 1",
        ),
        (
            lambda c: batches.validation(c, 2, 1, 5, pack=False),
            r"data\.length is 1, but must be at least 2",
        ),
        (lambda c: batches.validation(c, 0, 4, 5), r"eval\.batch_size is 0"),
        (lambda c: batches.validation(c, 2, 4, -5), r"eval\.tokens is -5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(corpus([10, 4, 30]))


def test_few_documents_give_their_shapes():
    assert batches.rows(corpus([10, 4, 30]), 4, 8, 0)(0)["tokens"].shape == (4, 8)


def test_a_token_beyond_the_vocabulary_is_named():
    source = corpus([10, 4, 30], vocab=40)
    with pytest.raises(UserError, match=r"test is damaged: token \d+ is beyond"):
        [batches.packed(source, 4, 6, 0)(i) for i in range(3)]

"""Rows of a step."""

import json

import numpy as np
import pytest

from common import data, metrics
from common.errors import UserError


def test_every_epoch_holds_every_row_once():
    seen = np.concatenate([data.indices(i, 10, 4, seed=3) for i in range(5)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:20]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:20])


def test_a_step_does_not_depend_on_the_ones_before():
    whole = np.concatenate([data.indices(i, 7, 5, seed=1) for i in range(6)])
    wide = np.concatenate([data.indices(i, 7, 10, seed=1) for i in range(3)])
    np.testing.assert_array_equal(whole, wide)
    np.testing.assert_array_equal(data.indices(4, 7, 5, 1), data.indices(4, 7, 5, 1))


def test_a_batch_may_exceed_an_epoch():
    assert np.bincount(data.indices(0, 3, 9, seed=0)).tolist() == [3, 3, 3]


def test_rows_after_the_step_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.Log(path, 0)
    for step in (1, 2, 3):
        log.append({"step": step, "split": "train", "loss": 0.1 * step})
    log.close()
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "split": "tr')
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 3]
    log = metrics.Log(path, 2)
    log.append({"step": 3, "split": "train", "loss": 0.1 * 3})
    log.close()
    assert path.read_text() == whole


def test_first_bad_names_the_metric():
    assert metrics.first_bad({"step": 1, "split": "train", "a": 1.0, "b": [1.0]}) is None
    assert metrics.first_bad({"step": 1, "split": "train", "a": 1.0, "b": float("nan")}) == "b"
    assert metrics.first_bad({"step": 1, "split": "t", "a": [1.0, float("inf")]}) == "a"


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"5\n", b'{"a": 1}\n', b'{"step": 2, \n'])
def test_damage_before_the_last_line_is_named_and_nothing_is_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    row = lambda step: json.dumps({"step": step, "split": "train"}).encode() + b"\n"
    spoiled = row(1) + damage + row(3)
    path.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2 is no row"):
        metrics.Log(path, 3)
    assert path.read_bytes() == spoiled
    path.write_bytes(row(1) + damage)
    with pytest.raises(UserError, match="line 2"):
        metrics.read(path)
    path.write_bytes(row(1) + damage.rstrip(b"\n"))  # Torn by a kill.
    assert [r["step"] for r in metrics.read(path)] == [1]

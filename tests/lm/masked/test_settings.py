"""Settings: all that section 10 of the specification has about samplers."""

import numpy as np
import pytest

from common.errors import UserError
from lm.masked.settings import Settings, fit, numbers, per_block, rows, settings, shape_of


def test_defaults_are_checked_and_hashable():
    made = settings()
    assert made == Settings()
    assert hash(made) == hash(settings(kind="ancestral"))
    assert fit(made, 64, 10) == made


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("kind", ["ancestrall", "", None], "one of ancestral, count, first_hitting, conf"),
        ("steps", [0, -1, 2.0, "8", True], "a whole number from 1 up"),
        ("schedule", ["linera", "poly0"], "linear, cosine or poly"),
        ("grid", ["even"], "one of uniform, cosine"),
        ("block", [-1, 1.5], "a whole number from 0 up"),
        ("cache", ["full"], "one of none, prefix, dual"),
        ("temperature", [-0.1, float("nan"), float("inf"), "1"], "a finite number from 0 up"),
        ("top_k", [-1, 0.5], "a whole number from 0 up"),
        ("top_p", [0, -0.5, 1.1, float("nan")], "above 0 and at most 1"),
        ("candidate", ["best"], "one of sample, argmax"),
        ("final", ["argmax"], "one of sample, greedy"),
        ("tau", [-0.1, 1.1, float("nan")], "a finite number from 0 to 1"),
        ("gamma", [-1e-9, float("inf")], "a finite number from 0 up"),
        ("per_call", [0], "a whole number from 1 up"),
        ("remask", ["max"], "one of cap, rescale, conf, loop"),
        ("eta", [-0.1, 1.5], "a finite number from 0 to 1"),
        ("t_on", [1.5, 1, 0.01], "at least t_off|from 0 to 1"),
        ("t_off", [-0.1], "a finite number from 0 to 1"),
        ("alpha_on", [0, 1, -1], "above 0 and below 1"),
        ("rows", [-1], "a whole number from 0 up"),
        ("allow_clamp", [1, "yes"], "true or false"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(field, values, allowed):
    for value in values:
        with pytest.raises(UserError, match=allowed) as caught:
            settings(**{field: value})
        assert f"config.sampler.{field} is {value!r}, but must be " in str(caught.value)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match=r"config\.sampler\.block is 4, but must be 0 with rem"):
        settings(kind="remask", block=4)
    with pytest.raises(UserError, match="A sampler has no field step, temp"):
        settings(step=3, temp=1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(kind="count", steps=9),
            "steps is 9, but must be at most 8, the length, with count",
        ),
        (dict(kind="confidence", steps=9), "at most 8, the length, with confidence"),
        (dict(kind="margin", steps=9), "at most 8"),
        (dict(kind="entropy", steps=9), "at most 8"),
        (dict(block=3), "block is 3, but must be 0 or a divisor of 8, as 2 or 4"),
        (dict(block=9), "0 or a divisor of 8, as 8"),
        (dict(block=2, steps=6), "a multiple of the 4 blocks, as 4 or 8"),
        (dict(block=2, steps=3), "a multiple of the 4 blocks, as 4"),
        (dict(top_k=11), "top_k is 11, but must be at most 10, the vocabulary"),
    ],
)
def test_what_does_not_fit_the_text_is_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(settings(**fields), 8, 10)


@pytest.mark.parametrize("length", [0, -1, True])
def test_a_length_is_a_whole_number_from_one(length):
    with pytest.raises(UserError, match=f"config.length is {length}, but must be a whole num"):
        fit(settings(), length, 10)


def test_steps_are_clamped_if_they_may_be():
    for kind in ("count", "confidence", "margin", "entropy"):
        made = settings(kind=kind, steps=100, allow_clamp=True, block=2)
        assert fit(made, 8, 10).steps == 8
    # What has no quota keeps its own T, or has none.
    assert fit(settings(steps=100), 8, 10).steps == 100
    for kind in ("first_hitting", "threshold", "entropy_bound"):
        assert fit(settings(kind=kind, steps=100, block=2), 8, 10).steps == 100
    assert per_block(settings(steps=12, block=2), 8) == 3
    assert per_block(settings(steps=12), 8) == 12


def test_data_is_no_part_of_the_shape():
    one = settings(kind="entropy_bound", steps=4, gamma=0.5, block=2, schedule="cosine")
    two = settings(kind="entropy_bound", steps=8, gamma=0.1, tau=0.2, eta=0.3)
    assert one != two
    assert shape_of(one) == shape_of(two)
    assert shape_of(one) != shape_of(settings(kind="entropy_bound", temperature=0.5))
    data = numbers(one, 8)
    assert (data.steps, data.block, data.last, data.gamma) == (1, 2, 3, np.float32(0.5))
    assert numbers(two, 8).block == 8


def test_an_accelerator_reads_a_large_head_seldom(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert rows(settings(), 1, 1024, 50257) == 256
    assert rows(settings(), 256, 1024, 50257) == 20


def test_rows_of_the_head_follow_the_shapes():
    assert rows(settings(rows=5), 4, 64, 100) == 5
    assert rows(settings(rows=500), 4, 64, 100) == 64
    assert rows(settings(), 1, 64, 8192) == 8
    assert rows(settings(), 64, 1024, 50257) == 8
    assert rows(settings(), 16, 64, 8) == 16
    assert rows(settings(), 16, 6, 8) == 6
    assert rows(settings(kind="margin"), 1, 64, 8192) == 64

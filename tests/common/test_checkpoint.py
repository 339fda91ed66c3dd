"""Checkpoints: whole, checked, and readable on another mesh."""

import errno
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from common import mesh as meshes
from common.checkpoint import Checkpoints, digest, disk_error
from common.errors import UserError

RULES = ((r"^x$", P("data")),)


def tree(key=0):
    a, x, k = jax.random.split(jax.random.key(key), 3)
    return {
        "w": {"a": jax.random.normal(a, (8, 3)), "b": jnp.arange(5, dtype=jnp.int8)},
        "x": jax.random.normal(x, (16, 2)),
        "flag": jnp.array([True, False]),
        "half": jnp.ones(3, jnp.bfloat16),
        "key": k,
    }


def on(devices, state):
    mesh = meshes.make(devices, 1)
    shapes = meshes.place(state, RULES, mesh)
    return shapes, jax.device_put(state, jax.tree.map(lambda s: s.sharding, shapes))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (8, 8), (8, 1), (1, 8)])
def test_restores_every_kind_of_array_on_any_mesh(tmp_path, before, after):
    _, state = on(before, tree())
    with Checkpoints(tmp_path / "c", keep=2) as c:
        for step in (1, 2, 3):
            c.save(step, state)
        c.wait()
        assert c.steps() == [2, 3]
    shapes, want = on(after, tree())
    with Checkpoints(tmp_path / "c") as c:
        got = c.restore(3, shapes)
    assert got["x"].sharding == want["x"].sharding
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, {k: v for k, v in got.items() if k != "key"}),
        jax.tree.map(np.asarray, {k: v for k, v in want.items() if k != "key"}),
    )
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(want["key"])).all()


def test_digest_sees_every_bit_and_no_mesh():
    whole = int(digest(on(1, tree())[1]))
    assert whole == int(digest(on(8, tree())[1]))
    state = tree()
    for path, value in (
        ("x", state["x"].at[3, 1].add(1e-6)),
        ("flag", ~state["flag"]),
        ("half", state["half"].at[1].set(2)),
        ("key", jax.random.key(1)),
    ):
        assert int(digest(state | {path: value})) != whole, path
    swapped = state["x"].at[0].set(state["x"][1]).at[1].set(state["x"][0])
    assert int(digest(state | {"x": swapped})) != whole


def test_another_model_is_named(tmp_path):
    shapes, state = on(1, tree())
    with Checkpoints(tmp_path / "c") as c:
        c.save(1, state)
        c.wait()
        other = shapes | {"x": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
        with pytest.raises(
            UserError, match=r"x is float32\[16, 2\] there and float32\[4, 2\] here"
        ):
            c.restore(1, other)
        less = {k: v for k, v in shapes.items() if k != "flag"}
        with pytest.raises(UserError, match=r"flag is bool\[2\] there and absent here"):
            c.restore(1, less)


@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_damage_is_found_and_the_way_out_is_said(tmp_path, how):
    shapes, state = on(1, tree())
    with Checkpoints(tmp_path / "c", keep=3) as c:
        c.save(1, state)
        c.save(2, tree(1))
        c.wait()
    damaged = [f for f in (tmp_path / "c" / "2").rglob("d/*") if f.is_file()]
    assert damaged
    for file in damaged:
        content = bytearray(file.read_bytes())
        if how == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif how == "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        else:
            file.unlink()
    with Checkpoints(tmp_path / "c", keep=3) as c:
        with pytest.raises(UserError, match=r"c/2 is damaged .* to continue from step 1\."):
            c.restore(2, shapes)
        c.restore(1, shapes)


def test_a_reader_leaves_a_checkpoint_in_flight_alone(tmp_path):
    shapes, state = on(1, tree())
    with Checkpoints(tmp_path / "c") as c:
        for step in (1, 2):
            c.save(step, state)
    flight = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    (flight / "d").mkdir(parents=True)
    with Checkpoints(tmp_path / "c", keep=0) as c:
        c.restore(2, shapes)
    time.sleep(0.3)  # Orbax cleans up in the background.
    assert flight.exists()
    with Checkpoints(tmp_path / "c") as c:
        c.save(4, state)  # Waits for it.
    assert not flight.exists()


def chained(cause):
    def load(*_):
        try:
            raise cause
        except type(cause) as error:
            raise KeyError("incompatible handler") from error  # As Orbax does.

    return load


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
        ValueError("INTERNAL: Error reading x: [OS error 5: EIO Input/output error]"),
    ],
)
def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch, cause):
    shapes, state = on(1, tree())
    with Checkpoints(tmp_path / "c") as c:
        c.save(1, state)
        c.wait()
        monkeypatch.setattr(type(c._manager), "load", chained(cause))
        with pytest.raises(UserError, match=r"^Cannot read .*c/1: [A-Z][a-z /]+\.$"):
            c.restore(1, shapes)


@pytest.mark.parametrize(
    "cause", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: 9 GiB"), RuntimeError("a bug")]
)
def test_no_memory_and_bugs_are_no_damage(tmp_path, monkeypatch, cause):
    shapes, state = on(1, tree())
    with Checkpoints(tmp_path / "c") as c:
        c.save(1, state)
        c.wait()
        load = chained(cause)
        if isinstance(cause, RuntimeError):

            def load(*_):
                raise cause

        monkeypatch.setattr(type(c._manager), "load", load)
        with pytest.raises((KeyError, RuntimeError)):
            c.restore(1, shapes)


def test_disk_errors_are_recognised_in_a_chain():
    def full():
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("tensorstore") from error

    with pytest.raises(ValueError, match="tensorstore") as caught:
        full()
    assert disk_error(caught.value) == "No space left on device"
    assert disk_error(ValueError("other")) is None
    assert disk_error(None) is None

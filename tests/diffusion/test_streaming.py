"""Rows that stay on the host: the sums are those of rows on the device, draw by draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from diffusion import draws, streaming
from diffusion.rows import rows
from diffusion.streaming import exact_from_host, on_host
from tests.diffusion.digits import brute, noise

KEY = jax.random.key(5)
LEVELS = np.array([0.5, 1.0, 4.0])
N, SHAPE = 150, (2, 3, 2)
BYTES = dict(scale=1 / 127.5, offset=-1.0)


def normal(dtype=np.float32, shift=0.0):
    y = np.random.default_rng(0).normal(size=(N, *SHAPE)) + shift
    return y.astype(dtype)


def pixels():
    return np.random.default_rng(1).integers(0, 256, (N, *SHAPE)).astype(np.uint8)


def parts(many=1, size=16, **given):
    return [draws.block(i, size, N, seed=0, **given) for i in range(many)]


def same(got, want, rtol=1e-5):
    for a, b in zip(jax.device_get(got), jax.device_get(want), strict=True):
        # "paired" is a difference of numbers of the largest one's size.
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [1, 37, 64, N, 1000])
def test_chunks_change_nothing(chunk):
    y, [part] = normal(), parts()
    want = draws.exact(rows(y, tile=16), part, KEY, jnp.asarray(LEVELS))
    [got] = exact_from_host(on_host(y), [part], KEY, LEVELS, chunk=chunk, tile=16)
    same(got, want)


def test_sums_equal_brute_force_in_float64():
    with jax.enable_x64(True):
        y, [part] = normal(np.float64), parts(antithetic=True)
        eps = part.sign[:, None] * noise(KEY, part.number, 12)
        for levels in (LEVELS, LEVELS[:1]):
            [found] = exact_from_host(on_host(y), [part], KEY, levels, chunk=40, tile=16)
            for i, s in enumerate(levels):
                want = brute(y.reshape(N, -1), part.index, eps, s)
                np.testing.assert_allclose(found.trcov[i], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "bfloat16", "float16", "float64"])
def test_stored_types_are_those_of_rows(dtype):
    """float64 is what float32 makes of it, as x64 is off."""
    given = BYTES if dtype == "uint8" else dict(scale=0.25) if dtype == "int16" else {}
    y = pixels() if dtype == "uint8" else (3 * normal()).astype(dtype)
    [part] = parts()
    there, here = rows(y, tile=16, **given), on_host(y, **given)
    assert (here.kept, here.mean.dtype) == (there.tiles.dtype, there.square.dtype)
    want = draws.exact(there, part, KEY, jnp.asarray(LEVELS))
    [got] = exact_from_host(here, [part], KEY, LEVELS, chunk=60, tile=16)
    same(got, want)


def test_numbers_far_from_zero_lose_nothing():
    y = normal(np.float64)
    [part] = parts()
    found = [
        exact_from_host(on_host(np.float32(v)), [part], KEY, LEVELS, chunk=60)[0].trcov
        for v in (y, y + 100)
    ]
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.parametrize("data", [normal(), pixels()], ids=["float32", "uint8"])
@pytest.mark.parametrize("chunk", [50, N])
def test_devices_share_each_chunk(data, chunk):
    """Neither chunks nor tiles nor devices divide the rows."""
    y = data
    given = BYTES if y.dtype == np.uint8 else {}
    many, mesh = parts(2), meshes.make(data=8)
    want = exact_from_host(on_host(y, **given), many, KEY, LEVELS, chunk=N, tile=16)
    got = exact_from_host(
        on_host(y, **given), many, KEY, LEVELS, chunk=chunk, tile=4, mesh=mesh
    )
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_a_memory_map_serves_many_blocks_in_few_passes(tmp_path, monkeypatch):
    np.save(tmp_path / "y.npy", pixels())
    data = on_host(np.load(tmp_path / "y.npy", mmap_mode="r"), **BYTES)
    many = parts(5)
    levels = jnp.asarray(LEVELS)
    want = [draws.exact(rows(pixels(), tile=16, **BYTES), p, KEY, levels) for p in many]
    starts, chunk = [], streaming._chunk

    def watched(data, tiles, tile, start):
        starts.append(start)
        return chunk(data, tiles, tile, start)

    monkeypatch.setattr(streaming, "_chunk", watched)
    got = exact_from_host(data, many, KEY, LEVELS, chunk=64, tile=16, together=3)
    assert starts == [0, 64, 128] * 2
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_no_program_is_made_twice_and_sums_are_reused(monkeypatch):
    data, add, old = on_host(normal()), streaming._add, []

    def kept(sums, *rest):
        old.append(sums)
        return add(sums, *rest)

    monkeypatch.setattr(streaming, "_add", kept)
    programs = [add, streaming._begin, streaming._end, streaming._squares]
    before = [p._cache_size() for p in programs]
    for seed, s in ((0, 0.3), (1, 0.9)):
        some = [draws.block(i, 6, N, seed) for i in range(2)]
        exact_from_host(data, some, jax.random.key(seed), [s], chunk=44, tile=11)
    assert [p._cache_size() - b for p, b in zip(programs, before, strict=True)] == [1] * 4
    assert len(old) == 2 * 2 * 4
    assert all(a.is_deleted() for sums in old for a in sums)


def test_the_look_at_the_data_is_that_of_rows(monkeypatch):
    monkeypatch.setattr(streaming, "READ", 32)
    for y, given in ((normal(shift=100.0), {}), (pixels(), BYTES)):
        there, here = rows(y, **given), on_host(y, **given)
        np.testing.assert_allclose(here.mean, there.mean, rtol=1e-6, atol=1e-6)
        variance = np.asarray(there.square, np.float64).sum() / N
        assert here.variance == pytest.approx(variance, rel=1e-6)
    assert on_host(np.ones((4, 3))).variance == 0


@pytest.mark.parametrize(
    ("data", "given", "named"),
    [
        (np.zeros((0, 3)), {}, "without zeros"),
        (np.zeros(4), {}, r"\(4,\).* without zeros"),
        (np.zeros((4, 3), np.uint8), {}, "data.scale"),
        (np.array([[0.0], [np.nan], [np.inf]]), {}, "2 rows .* row 1 first"),
        (np.zeros((4, 3), complex), {}, "real numbers"),
    ],
)
def test_data_that_cannot_be_are_named(data, given, named):
    with pytest.raises(UserError, match=named):
        on_host(data, **given)


@pytest.mark.parametrize("name", ["chunk", "tile", "together"])
def test_sizes_that_cannot_be_are_named(name):
    with pytest.raises(UserError, match=f"estimator.{name}"):
        exact_from_host(on_host(normal()), parts(), KEY, LEVELS, **{name: 0})
    with pytest.raises(UserError, match="sigma"):
        exact_from_host(on_host(normal()), parts(), KEY, [0.0])

"""Image data: published facts, every kind of file, and each way a file can be wrong."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from diffusion import images
from diffusion.images import flipped, load, restored, scaled, to_uint8

PIXELS = "x/127.5-1"


def pixels(n=6, size=8, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, size, size, channels)).astype(np.uint8)


def moments(rows):
    """(mean squared norm, total variance) in float64."""
    x = np.asarray(scaled(rows), np.float64).reshape(len(rows), -1)
    return np.mean(np.sum(x * x, axis=1)), np.sum(x.var(axis=0))


def shared(name):
    """A file of the data folder that TENFOLD_DATA names."""
    path = Path(os.environ.get("TENFOLD_DATA", "")) / "images" / name
    if not os.environ.get("TENFOLD_DATA") or not path.exists():
        pytest.skip(f"TENFOLD_DATA has no images/{name}")
    return str(path)


def test_digits_are_those_of_the_spec():
    got = load("", scaling=PIXELS)
    assert got.rows.shape == (1797, 8, 8, 1)
    assert got.rows.dtype == np.float32
    np.testing.assert_allclose(moments(got.rows), (45.910163, 18.773105), rtol=1e-7)
    assert got.labels.dtype == np.int32
    assert got.classes == tuple("0123456789")
    assert (got.scaling, got.duplicates, got.name) == ("x/8-1", 0, "digits")
    assert np.array_equal(restored(got, got.rows[:5]), 8 * got.rows[:5] + 8)


def test_lossless_cifar_is_that_of_the_spec():
    got = load(shared("cifar10_train_first4000.npz"), scaling=PIXELS)
    np.testing.assert_allclose(moments(got.rows), (790.3653, 763.0278), rtol=1e-6)
    assert got.source == "bac45b45504ed1289a3f437be4bfbefece248abbc094a428a0b4dfab00e776ae"
    assert int(got.rows.sum(dtype=np.int64)) == 1481085868
    head = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 4, 7, 7, 2, 9, 9, 9, 3, 2, 6]
    assert got.labels[:20].tolist() == head
    assert got.duplicates == 0


@pytest.mark.slow
def test_packed_jpegs_are_those_of_their_file():
    got = load(shared("cifar10_train_jpeg50k.npz"), scaling=PIXELS)
    assert got.rows.shape == (50000, 32, 32, 3)
    assert got.source == "bf3aabd52be912dae02a0435296c4dab5289524b57f55cd162dc4796935a611b"
    assert int(got.rows.sum(dtype=np.int64)) == 18537712937


def test_a_prefix_of_shuffled_packed_jpegs_mixes_the_classes():
    path = shared("cifar10_train_jpeg50k.npz")
    got = load(path, scaling=PIXELS, num_rows=60, shuffle=True, seed=1)
    assert got.rows.shape == (60, 32, 32, 3)
    assert len(set(got.labels.tolist())) > 5


def test_uint8_stays_and_is_scaled_when_used(tmp_path):
    x = pixels()
    np.savez(tmp_path / "a.npz", images=x, labels=np.arange(6)[:, None])
    got = load(str(tmp_path / "a.npz"), scaling=PIXELS, class_cond=True)
    assert got.rows.dtype == np.uint8
    assert np.array_equal(got.rows, x)
    assert got.labels.tolist() == list(range(6))
    np.testing.assert_allclose(scaled(got.rows), x / 127.5 - 1, atol=1e-7)
    assert np.array_equal(to_uint8(scaled(got.rows)), x)
    np.testing.assert_allclose(restored(got, scaled(got.rows)), x, atol=1e-4)
    assert to_uint8(np.array([-2.0, 2.0])).tolist() == [0, 255]


def test_integer_images_need_a_scaling(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels())
    with pytest.raises(UserError, match=r"config\.data\.scaling"):
        load(str(tmp_path / "a.npz"), scaling="")
    np.savez(tmp_path / "b.npz", images=pixels().astype(np.int64) * 300)
    with pytest.raises(UserError, match="from 0 to 255"):
        load(str(tmp_path / "b.npz"), scaling=PIXELS)
    np.savez(tmp_path / "c.npz", images=pixels().astype(np.int64))
    assert load(str(tmp_path / "c.npz"), scaling=PIXELS).rows.dtype == np.uint8


def test_floats_are_taken_as_they_are_with_a_word_where_that_is_odd(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    got = load(str(tmp_path / "a.npy"), scaling=PIXELS)
    assert np.array_equal(got.rows, x)
    assert got.scaling == ""
    np.save(tmp_path / "b.npy", x.astype(np.float16))
    with pytest.warns(UserWarning, match="float16"):
        assert load(str(tmp_path / "b.npy"), scaling="").rows.dtype == np.float32
    np.save(tmp_path / "c.npy", 100 * x)
    with pytest.warns(UserWarning, match="taken as they are"):
        load(str(tmp_path / "c.npy"), scaling="")
    np.save(tmp_path / "d.npy", pixels().astype(np.float32))
    with pytest.warns(UserWarning, match=r"from 0 to 255 are taken as they are"):
        load(str(tmp_path / "d.npy"), scaling="")


def test_floats_in_the_unit_interval_are_told_of_once_and_taken(tmp_path):
    unit = (pixels() / 255).astype(np.float32)
    np.save(tmp_path / "unit.npy", unit)
    with pytest.warns(UserWarning, match=r"2 x - 1 makes of \[0, 1\]") as seen:
        got = load(str(tmp_path / "unit.npy"), scaling="")
    assert len(seen) == 1
    assert np.array_equal(got.rows, unit)
    assert got.scaling == ""
    # Not of those in [-1, 1], of latents, whole numbers or rows somewhat beyond 1.
    np.savez(tmp_path / "latents.npz", latents=unit)
    np.save(tmp_path / "bytes.npy", pixels() // 255)
    np.save(tmp_path / "signed.npy", 2 * unit - 1)
    np.save(tmp_path / "beyond.npy", 1.01 * unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("latents.npz", "bytes.npy", "signed.npy", "beyond.npy"):
            load(str(tmp_path / name), scaling=PIXELS)


def test_points_and_grey_stacks_are_images_too(tmp_path):
    np.save(tmp_path / "points.npy", np.array([[0.7], [-0.7]], np.float32))
    assert load(str(tmp_path / "points.npy"), scaling="").rows.shape == (2, 1, 1, 1)
    np.save(tmp_path / "grey.npy", pixels()[..., 0])
    assert load(str(tmp_path / "grey.npy"), scaling=PIXELS).rows.shape == (6, 8, 8, 1)


def test_latents_are_standardised_and_can_be_restored(tmp_path):
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(50, 4, 4, 3)) * [1, 5, 0.1] + [0, 20, -3]).astype(np.float32)
    np.savez(tmp_path / "z.npz", latents=z)
    got = load(str(tmp_path / "z.npz"), scaling=PIXELS)
    np.testing.assert_allclose(got.rows.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.rows.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(restored(got, got.rows), z, atol=1e-5)
    np.savez(tmp_path / "twice.npz", latents=2 * z)
    twice = load(str(tmp_path / "twice.npz"), scaling=PIXELS)
    assert np.array_equal(twice.rows, got.rows)
    assert twice.sha256 != got.sha256
    np.savez(tmp_path / "flat.npz", latents=np.ones((4, 2, 2, 1), np.float32))
    with pytest.raises(UserError, match="constant"):
        load(str(tmp_path / "flat.npz"), scaling="")


def test_not_finite_values_are_counted_and_the_first_is_named(tmp_path):
    x = np.zeros((5, 4, 4, 1), np.float32)
    x[3, 1, 2, 0], x[4, 0, 0, 0] = np.nan, np.inf
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(UserError, match=r"2 are NaN or infinite.*\(3, 1, 2, 0\)"):
        load(str(tmp_path / "a.npy"), scaling="")


def test_duplicates_are_counted(tmp_path):
    x = pixels()
    np.save(tmp_path / "a.npy", x[[0, 1, 0, 2, 1, 0]])
    assert load(str(tmp_path / "a.npy"), scaling=PIXELS).duplicates == 3


def test_flips_double_the_rows(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(), labels=np.arange(6))
    plain = load(str(tmp_path / "a.npz"), scaling=PIXELS)
    double = load(str(tmp_path / "a.npz"), scaling=PIXELS, flip=True)
    assert np.array_equal(double.rows[6:], plain.rows[:, :, ::-1])
    assert double.labels.tolist() == [*range(6), *range(6)]
    assert double.sha256 == flipped(plain).sha256 != plain.sha256
    assert double.source == plain.source


def test_the_hash_tells_rows_labels_and_scaling_apart(tmp_path):
    x, y = pixels(), np.arange(6)

    def hashed(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load(str(tmp_path / "a.npz"), scaling=PIXELS).sha256

    as_floats = (x / 127.5 - 1).astype(np.float32)
    values = [hashed(images=x, labels=y), hashed(images=x), hashed(images=x, labels=y[::-1])]
    values += [hashed(images=x[::-1], labels=y), hashed(images=as_floats, labels=y)]
    assert len(set(values)) == 5
    assert hashed(images=x, labels=y) == values[0]


def write_folder(root, sizes, mode="RGB"):
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        x = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(x).save(path)


def test_a_folder_of_classes(tmp_path):
    write_folder(tmp_path, {"cat/a.png": (6, 5), "dog/b.bmp": (6, 5), "cat/deep/c.png": (6, 5)})
    (tmp_path / "notes.txt").write_text("no image")
    got = load(str(tmp_path), scaling=PIXELS, class_cond=True)
    assert got.rows.shape == (3, 5, 6, 3)
    assert got.classes == ("cat", "dog")
    assert got.labels.tolist() == [0, 0, 1]
    want = np.asarray(Image.open(tmp_path / "dog/b.bmp"))
    assert np.array_equal(got.rows[2], want)


def test_mixed_sizes_need_a_resolution(tmp_path):
    write_folder(tmp_path, {"a.png": (12, 8), "b.png": (8, 8)})
    with pytest.raises(UserError, match=r"data\.resolution.*12 x 8.*b\.png is 8 x 8"):
        load(str(tmp_path), scaling=PIXELS)
    got = load(str(tmp_path), scaling=PIXELS, resolution=8)
    wide = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(got.rows[0], wide[:, 2:10])
    assert got.labels is None
    assert load(str(tmp_path), scaling=PIXELS, resolution=4, channels=1).rows.shape[1:] == (
        (4, 4, 1)
    )


def test_arrays_of_bytes_are_resized_and_floats_are_not(tmp_path):
    x = np.full((3, 8, 8, 3), 77, np.uint8)
    np.save(tmp_path / "a.npy", x)
    got = load(str(tmp_path / "a.npy"), scaling=PIXELS, resolution=4)
    assert got.rows.shape == (3, 4, 4, 3)
    assert np.all(got.rows == 77)
    np.save(tmp_path / "b.npy", x.astype(np.float32) / 255)
    with pytest.raises(UserError, match=r"data\.resolution"):
        load(str(tmp_path / "b.npy"), scaling=PIXELS, resolution=4)


def test_grey_files_give_one_channel_unless_told(tmp_path):
    write_folder(tmp_path, {"a.png": (4, 4), "b.png": (4, 4)}, mode="L")
    assert load(str(tmp_path), scaling=PIXELS).rows.shape == (2, 4, 4, 1)
    assert load(str(tmp_path), scaling=PIXELS, channels=3).rows.shape == (2, 4, 4, 3)
    write_folder(tmp_path, {"c.png": (4, 4)})
    assert load(str(tmp_path), scaling=PIXELS).rows.shape == (3, 4, 4, 3)


def test_transparency_is_white_and_wide_images_are_refused(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.all(load(str(tmp_path), scaling=PIXELS).rows == 255)
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png has more than eight bits"):
        load(str(tmp_path), scaling=PIXELS)


def test_packed_jpegs_are_decoded_one_by_one(tmp_path):
    x = np.repeat(np.array([30, 90, 200], np.uint8), 192).reshape(3, 8, 8, 3)
    streams = []
    for row in x:
        Image.fromarray(row).save(tmp_path / "one.jpg", quality=95)
        streams.append((tmp_path / "one.jpg").read_bytes())
    size = next(i for i, each in enumerate(zip(*streams, strict=False)) if len(set(each)) > 1)
    bodies = [np.frombuffer(s[size:], np.uint8) for s in streams]
    parts = dict(
        header=np.frombuffer(streams[0][:size], np.uint8),
        bodies=np.concatenate(bodies),
        offsets=np.cumsum([0, *map(len, bodies)]),
    )
    np.savez(tmp_path / "a.npz", labels=np.arange(3, dtype=np.uint8), **parts)
    got = load(str(tmp_path / "a.npz"), scaling=PIXELS)
    assert np.abs(got.rows.astype(int) - x).max() <= 2
    assert got.labels.tolist() == [0, 1, 2]
    np.savez(tmp_path / "b.npz", **parts | {"offsets": parts["offsets"][:-1]})
    with pytest.raises(UserError, match="offsets"):
        load(str(tmp_path / "b.npz"), scaling=PIXELS)


def test_rows_are_chosen_by_the_seed(tmp_path):
    x = pixels(20)
    np.save(tmp_path / "a.npy", x)
    take = lambda **kwargs: load(str(tmp_path / "a.npy"), scaling=PIXELS, **kwargs).rows
    assert np.array_equal(take(num_rows=7), x[:7])
    mixed = take(num_rows=7, shuffle=True, seed=3)
    assert np.array_equal(mixed, x[np.random.default_rng(3).permutation(20)[:7]])
    assert not np.array_equal(mixed, take(num_rows=7, shuffle=True, seed=4))
    with pytest.raises(UserError, match=r"data\.num_rows"):
        take(num_rows=21)


def test_a_cache_is_used_until_what_it_was_made_from_changes(tmp_path, monkeypatch):
    folder, cache = tmp_path / "in", str(tmp_path / "kept" / "a.npy")
    write_folder(folder, {"a.png": (8, 8), "b.png": (8, 8)})
    plain = load(str(folder), scaling=PIXELS)
    first = load(str(folder), scaling=PIXELS, cache=cache)
    assert isinstance(first.rows, np.memmap)
    assert first.sha256 == plain.sha256

    decoded = []
    real = images.image_files.fitted
    monkeypatch.setattr(
        images.image_files, "fitted", lambda *args: decoded.append(1) or real(*args)
    )
    assert load(str(folder), scaling=PIXELS, cache=cache).sha256 == plain.sha256
    assert not decoded
    half = load(str(folder), scaling=PIXELS, cache=cache, resolution=4)
    assert decoded
    assert half.rows.shape == (2, 4, 4, 3)
    write_folder(folder, {"c.png": (8, 8)})
    assert len(load(str(folder), scaling=PIXELS, cache=cache).rows) == 3
    mixed = dict(num_rows=2, shuffle=True, seed=3)
    want = load(str(folder), scaling=PIXELS, **mixed).sha256
    assert load(str(folder), scaling=PIXELS, cache=cache, num_rows=2).sha256 != want
    assert load(str(folder), scaling=PIXELS, cache=cache, **mixed).sha256 == want
    load(str(folder), scaling=PIXELS, cache=cache)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert load(str(folder), scaling=PIXELS, cache=cache).rows[0].max() == 0
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a.json", "a.npy"]
    with pytest.raises(UserError, match=r"data\.cache"):
        load(str(folder), scaling=PIXELS, cache=str(tmp_path / "x.bin"))


def test_an_interrupted_cache_leaves_nothing_that_counts(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", {"a.png": (8, 8)})
    cache = tmp_path / "a.npy"

    def full(file, rows):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="cannot be written"):
        load(str(tmp_path / "in"), scaling=PIXELS, cache=str(cache))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_cache_without_its_note_does_not_count(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", {"a.png": (8, 8)})
    cache = str(tmp_path / "a.npy")
    want = load(str(tmp_path / "in"), scaling=PIXELS, cache=cache).sha256
    replace = os.replace

    def broken(source, target):
        if str(target).endswith(".json"):
            raise OSError("no space left")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(UserError, match="cannot be written"):
            load(str(tmp_path / "in"), scaling=PIXELS, cache=cache, resolution=4)
    assert load(str(tmp_path / "in"), scaling=PIXELS, cache=cache).sha256 == want


def bad(tmp_path, name, **arrays):
    np.savez(tmp_path / name, **arrays)
    return str(tmp_path / name)


def test_wrong_files_are_one_sentence(tmp_path):
    x = pixels()

    def refused(match, path, **kwargs):
        with pytest.raises(UserError, match=match):
            load(path, **{"scaling": PIXELS} | kwargs)

    refused(r"config\.data\.path is .*nowhere", str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").write_text("x")
    refused(r"\.npz or \.npy", str(tmp_path / "a.txt"))
    (tmp_path / "none").mkdir()
    refused("a folder with", str(tmp_path / "none"))
    (tmp_path / "torn.npz").write_bytes(b"PK no zip")
    refused("damaged", str(tmp_path / "torn.npz"))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([[{}]], object), allow_pickle=True)
    refused(r"objects\.npy is damaged or no NumPy file.*[^.]\.$", str(objects))
    (tmp_path / "torn.npy").write_bytes(b"")
    refused("damaged", str(tmp_path / "torn.npy"))
    refused(r"holds \['x'\]", bad(tmp_path, "b.npz", x=x))
    refused(r"shape \(0, 8, 8, 3\)", bad(tmp_path, "c.npz", images=x[:0]))
    refused(r"shape \(6,\)", bad(tmp_path, "d.npz", images=np.zeros(6)))
    refused(r"rows \[N, H, W, C\]", bad(tmp_path, "e.npz", images=np.zeros((2, 2, 2, 2, 2))))
    refused(r"data\.class_cond", bad(tmp_path, "f.npz", images=x), class_cond=True)
    refused("one label a row", bad(tmp_path, "g.npz", images=x, labels=np.arange(5)))
    refused("not integers", bad(tmp_path, "h.npz", images=x, labels=np.ones(6)))
    minus = np.array([0, 1, -1, 0, -1, 0])
    refused("2 rows have none.*row 2", bad(tmp_path, "i.npz", images=x, labels=minus))
    first = bad(tmp_path, "j.npz", images=x.transpose(0, 3, 1, 2))
    refused(r"\[N, C, H, W\]", first, channels=3)
    refused(r"\[N, C, H, W\]", first)
    much = np.array([[[[0.0, -1e60]]]])
    refused("up to 1e\\+15, but they go from -1e\\+60", bad(tmp_path, "l.npz", images=much))
    wide = (1e25 * x).astype(np.float32)
    refused(r"up to 1e\+15", bad(tmp_path, "m.npz", images=wide))
    refused("type bool", bad(tmp_path, "k.npz", images=x > 3))
    refused(r"data\.scaling", "", scaling="x/255")
    refused(r"data\.resolution", "", resolution=16)
    refused(r"data\.num_rows", "", num_rows=-1)
    write_folder(tmp_path / "mixed", {"a.png": (4, 4), "cat/b.png": (4, 4)})
    refused(r"a\.png is outside", str(tmp_path / "mixed"))
    write_folder(tmp_path / "broken", {"a.png": (4, 4)})
    (tmp_path / "broken" / "b.png").write_bytes(b"\x89PNG nothing")
    refused(r"b\.png cannot be read", str(tmp_path / "broken"))
    refused(r"data\.channels", str(tmp_path / "mixed" / "cat"), channels=2)

"""Pickled graph objects without their package, in a small made LMDB."""

import pickle
import sys
import types

import numpy as np
import pytest

from common.errors import UserError
from geometry.data import oc22, packed


class Old:
    """As before version 2: attributes of the object."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Storage:
    """As from version 2 on: a mapping in a storage that knows its owner."""

    def __init__(self, owner, attributes):
        self._mapping, self._parent = attributes, owner


class New:
    def __init__(self, **attributes):
        self._store = Storage(self, attributes)


def system(sid):
    rng = np.random.default_rng(sid)
    x = rng.random((5, 3)) * 6
    return dict(
        pos=x.astype(np.float32),
        pos_relaxed=(x + 0.1).astype(np.float32),
        atomic_numbers=np.array([8.0, 8, 22, 22, 1]),
        cell=np.eye(3, dtype=np.float32)[None] * 9,
        fixed=np.array([0, 1, 1, 0, 0]),
        tags=np.array([1, 0, 0, 1, 2]),
        sid=sid,
    )


def pickled(kind, values, monkeypatch, protocol=4):
    """As the package itself would have written it."""
    names = {Old: "torch_geometric.data.data", New: "torch_geometric.data.data",
             Storage: "torch_geometric.data.storage"}  # fmt: skip
    with monkeypatch.context() as patch:
        for module in ("torch_geometric", "torch_geometric.data"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        for cls, module in names.items():
            made = sys.modules.get(module) or types.ModuleType(module)
            setattr(made, cls.__name__, cls)
            patch.setitem(sys.modules, module, made)
            patch.setattr(cls, "__module__", module)
        return pickle.dumps(kind(**values), protocol)


def write(path, entries, length=True):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(path), subdir=False, map_size=2**24) as store,
        store.begin(write=True) as w,
    ):
        for k, data in enumerate(entries):
            w.put(str(k).encode(), data)
        if length:
            w.put(b"length", pickle.dumps(len(entries)))


@pytest.mark.parametrize("kind", [Old, New])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_all_versions(kind, protocol, monkeypatch):
    wanted = system(3)
    found = oc22.attributes(pickled(kind, wanted, monkeypatch, protocol))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    r = oc22.record(found)
    assert (r.id, r.group) == ("3", "HO2Ti2")
    np.testing.assert_array_equal(r.free, [True, False, False, True, True])
    np.testing.assert_allclose(r.end - r.start, 0.1, atol=1e-6)
    assert r.pbc.all()
    np.testing.assert_array_equal(r.cell, np.eye(3) * 9)


def test_a_database_becomes_a_packed_set(tmp_path, monkeypatch):
    many = [pickled((Old, New)[k % 2], system(k), monkeypatch) for k in range(12)]
    write(tmp_path / "a.lmdb", many[:7])
    write(tmp_path / "b.lmdb", many[7:], length=False)
    assert oc22.convert(tmp_path, tmp_path / "set.npz", 2) == 12
    records, split = packed.read(tmp_path / "set.npz")
    assert [r.id for r in records] == [str(k) for k in range(12)]
    assert set(split) == {2}
    for k, r in enumerate(records):
        np.testing.assert_allclose(r.end, system(k)["pos_relaxed"])
        np.testing.assert_array_equal(r.free, system(k)["fixed"] == 0)
    assert len(list(oc22.entries(tmp_path / "a.lmdb"))) == 7


def test_test_sets_have_no_targets(monkeypatch):
    hidden = {k: v for k, v in system(1).items() if k != "pos_relaxed"}
    assert oc22.record(oc22.attributes(pickled(Old, hidden, monkeypatch))).end is None
    with pytest.raises(UserError, match="no 'pos'"):
        oc22.record({**hidden, "pos": None})


class Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))


@pytest.mark.parametrize(("data", "words"), [
    (pickle.dumps(Evil()), r"builtins\.eval, which is not unpickled"),
    (pickle.dumps(np.load), r"numpy\S*\.load, which is not unpickled"),
    (b"no pickle", "cannot be unpickled"),
])  # fmt: skip
def test_what_is_not_unpickled(data, words):
    with pytest.raises(UserError, match=words):
        oc22.attributes(data)


def test_tensors_ask_for_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    data = b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93."
    with pytest.raises(UserError, match="pip install torch"):
        oc22.attributes(data)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no .lmdb"):
        list(oc22.entries(tmp_path))
    (tmp_path / "a.lmdb").write_text("text")
    with pytest.raises(UserError, match="is no LMDB"):
        list(oc22.entries(tmp_path))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="uv sync --extra oc22"):
        list(oc22.entries(tmp_path))

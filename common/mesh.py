"""One mesh with the axes `data` and `model`; placements by the state's paths."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError, reject


def make(data: int = -1, model: int = 1, devices: list | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      data: devices that share the batch; -1 for all that `model` leaves.
      model: devices that share one copy of the parameters.
      devices: others than those that are here, to compile for.

    Raises:
      UserError: the devices do not divide so.
    """
    devices = devices or jax.devices()
    if model < 1 or len(devices) % model:
        raise reject("mesh.model", model, f"a divisor of the {len(devices)} devices")
    data = len(devices) // model if data == -1 else data
    if data < 1 or data * model > len(devices):
        raise reject("mesh.data", data, f"-1, or from 1 to {len(devices) // model} devices")
    if data * model < len(devices) and jax.process_count() > 1:
        raise reject("mesh.data", data, "-1 when there are several processes")
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        (AxisType.Auto, AxisType.Auto),
        devices=devices[: data * model],
    )


def paths(tree: Any) -> list[str]:
    """The path of each leaf, for instance `params/blocks/qkv/kernel`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def place(shapes: Any, rules: tuple, mesh: Mesh) -> Any:
    """`ShapeDtypeStruct`s with the placement of the first rule that matches.

    Args:
      shapes: tree of anything with shape and dtype.
      rules: (regular expression, PartitionSpec) pairs.
      mesh: where to.

    Raises:
      UserError: the devices do not divide an axis that is to be split over them.
    """

    def placed(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            parts = ", ".join(f"{axis} = {n}" for axis, n in mesh.shape.items())
            raise UserError(
                f"{name} has the shape {leaf.shape}, which a mesh of {parts} devices cannot "
                f"split by {spec}."
            ) from error
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Host arrays -> global arrays split along axis 0; each process copies its rows.

    Arrays that are on devices stay as they are: a data set that every step reads.
    """
    sharding = NamedSharding(mesh, P("data"))

    def put(array):
        if isinstance(array, jax.Array):
            return array
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, batch)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Host arrays -> global arrays, whole on every device."""
    sharding = NamedSharding(mesh, P())

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def current(axis: str = "data") -> int:
    """Devices along an axis of the mesh in use; 1 outside of any mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def shared(tree: Any) -> Any:
    """Arrays with their first axis over the devices of "data", within jit; where those do not
    divide it, or without a mesh, as they are."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def put(array):
        fits = len(array) % current() == 0
        return jax.lax.with_sharding_constraint(array, P("data")) if fits else array

    return jax.tree.map(put, tree)


def over_data(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`shard_map` over the axis `data` of the mesh in use; as it is without a mesh.

    Replicated arguments are marked as varying inside, so that `jax.grad` within the
    function is each device's own: unmarked, it would be summed over the devices.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def local(*arguments):
        marked = [
            jax.lax.pcast(a, "data", to="varying") if spec == P() else a
            for a, spec in zip(arguments, in_specs, strict=True)
        ]
        return function(*marked)

    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names={"data"})


def replicate(tree: Any) -> Any:
    """The same values on every device, within jit; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: P(), tree))
